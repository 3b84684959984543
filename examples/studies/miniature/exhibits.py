"""The paper's tables and figures in miniature: the models of each, and the values of the report.

One setting is one trained model. Exhibits share settings: plain CLIP with seed 0 is in almost all of them
and is trained once.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openmoji_demo import page

from studies.plan import Find
from studies.report import fill
from studies.runner import Study
from studies.statistics import Arms

from . import figures, tables
from .settings import PACKAGES, PRESETS, WEIGHTS, Setting
from .tables import Exhibit, Tally
from .trainings import Miniature

LOSSES = ("clip", "cyclip", "alip", "rankclip", "rankclip-cross", "rankclip-in")
EXHIBITS = ("table1", "table2", "table3", "table4", "figure3", "figure4", "figure6", "figure7")
SUMMARY = ("models × seeds", "tests", "better", "worse", "p < 0.05 uncorrected", "expected by chance")
_HERE = Path(__file__).parent
_TEMPLATES = _HERE / "templates"


def settings_of(preset: SimpleNamespace, exhibit: str, seeds: Iterable[int]) -> list[Setting]:
    """Return the settings that one exhibit shows, seed by seed."""

    def model(loss: str, **changes: Any) -> Setting:
        setting = Setting(loss, "resnet", preset.pairs, *WEIGHTS.get(loss, (0.0, 0.0)), 0, preset.name)
        return replace(setting, **changes)

    if exhibit == "table4":
        models = [
            model(loss, backbone=backbone) for backbone in ("resnet", "vit") for loss in ("clip", "rankclip")
        ]
    elif exhibit == "figure3":
        weights = [(x, 1.0) for x in preset.lambdas] + [(1.0, x) for x in preset.lambdas]
        swept = (model(_name(c, i), lambda_cross=c, lambda_in=i) for c, i in weights)
        models = [model("clip"), *swept]
    elif exhibit == "figure4":
        models = [model(loss, pairs=pairs) for pairs in preset.sizes for loss in ("clip", "rankclip")]
    else:
        models = [model(loss) for loss in LOSSES]
    limit = {"figure3": preset.sweep_seeds, "figure6": 1, "figure7": 1}.get(exhibit)
    shown = [seed for seed in seeds if limit is None or seed < limit]
    return list(dict.fromkeys(replace(one, seed=seed) for seed in shown for one in models))


def _name(lambda_cross: float, lambda_in: float) -> str:
    """Return the ``--loss`` with these weights: the sweep over λ ends in the ablations."""
    return "rankclip" if lambda_cross and lambda_in else "rankclip-cross" if lambda_cross else "rankclip-in"


def plan(preset: SimpleNamespace) -> list[Setting]:
    """Return every setting, those of Table 1 first, seed by seed."""
    seeds = range(preset.seeds)
    every = [one for seed in seeds for exhibit in EXHIBITS for one in settings_of(preset, exhibit, [seed])]
    return list(dict.fromkeys([*settings_of(preset, "table1", seeds), *every]))


class Collection:
    """The records of all models."""

    def __init__(self, preset: SimpleNamespace, find: Find) -> None:
        self.preset = preset
        self.records = find(plan(preset))

    @property
    def tasks(self) -> set[str]:
        """Every task that some record has, such as ``zero-shot/mdi``."""
        return {task for record in self.records.values() for task in record["metrics"]}

    def arms(self, exhibit: str) -> Arms:
        """Return the models of one table or figure; a model is named by its setting with seed 0."""
        found: dict[Setting, dict[int, Any]] = {}
        for one in settings_of(self.preset, exhibit, range(self.preset.seeds)):
            found.setdefault(replace(one, seed=0), {})[one.seed] = self.records[one]
        return Arms(found)


def results(preset: SimpleNamespace, finds: Mapping[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values."""
    collection = Collection(preset, finds["icons"])
    paper = json.loads((_HERE / "paper.json").read_text(encoding="utf-8"))
    unsaid = {"rows": [], "series": [], "note": "", "read_off": None}
    quoted = {key: {**unsaid, **of} for key, of in paper["exhibits"].items()}
    pictures = figures.draw(collection, quoted)
    exhibits, records = tables.build(collection, quoted), list(collection.records.values())
    budget = f"{preset.steps:,} steps of {preset.batch_size:,} pairs for every model"
    command = f"`python -m studies miniature --preset {preset.name}`"
    facts = [["command", command], ["budget", budget], ["time", _time(records)]]
    anchors = [page.anchor(f"{e.number}: {e.title}") for e in exhibits]
    links = [f"[{e.number}](#{name}) {e.title}" for e, name in zip(exhibits, anchors, strict=True)]
    return {
        "size": preset,
        "paper": paper["paper"],
        "reading": paper["reading"],
        "planned": len(records),
        "facts": [*facts, *conditions(records)],
        "short": [[link, *_summary(e)] for link, e in zip(links, exhibits, strict=True)],
        "short_head": ["exhibit", *SUMMARY],
        "exhibits": [(e, _text(e), _numbers(e)) for e in exhibits],
        "pictures": {f"figures/{key}.png": one for key, one in pictures.items()},
    }


def _time(records: Sequence[Mapping[str, Any]]) -> str:
    hours = [sum(record["seconds"].values()) / 3600 for record in records]
    spent = f"{sum(hours):.1f} hours of training and measuring, summed over the models"
    jobs = [record["conditions"].get("jobs", 1) for record in records]  # runs at a time
    return f"{spent}, in about {sum(h / n for h, n in zip(hours, jobs, strict=True)):.1f} hours"


def conditions(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return every condition with its values, and how many records each holds for where there are several."""
    records = list(records)
    rows = []
    for name in dict.fromkeys(name for record in records for name in record["conditions"]):
        found = Counter(page.plain(record["conditions"].get(name, "not recorded")) for record in records)
        counted = (v if len(found) == 1 else f"{v} ({n} models)" for v, n in found.most_common())
        rows.append([name, ", ".join(counted)])
    return rows


def _text(exhibit: Exhibit) -> str:
    """Summarise an exhibit in Markdown: what was measured, what follows, and the paper's numbers."""
    above: dict[str, list[float]] = {}  # the paper's own differences, by model
    for row in (row for row in exhibit.rows if row.quoted and exhibit.key != "figure6"):
        for (group, label), cell in zip(exhibit.columns, row.cells, strict=True):
            if isinstance(cell, tables.QuotedCell) and cell.difference is not None:
                name = f"{label} ({group})" if exhibit.key == "table4" else label
                above.setdefault(name, []).append(cell.difference)
    return fill(_TEMPLATES / "findings.md", exhibit=exhibit, tally=Tally(exhibit.comparisons), above=above)


def _summary(exhibit: Exhibit) -> list[str]:
    """Return an exhibit's row below :data:`SUMMARY`; dashes where nothing is tested."""
    found = Tally(exhibit.comparisons)
    counts = [f"{len(part)}" for part in (found.tested, found.above, found.below, found.nominal)]
    shown = [*counts, f"{found.expected:.1f}"] if found.tested else ["–"] * 5
    return [f"{len(exhibit.shown.all)}", *shown]


def _numbers(exhibit: Exhibit) -> list[Any]:
    """Return the head, the rows and the number of columns that are aligned to the right."""
    labels = [f"{group}: {label}" if group else label for group, label in exhibit.columns]
    shown = {"chance": "{:.2f}", "items": "{:,}"}
    extra = [name for name in shown if any(getattr(row, name) is not None for row in exhibit.rows)]
    rows, width = [], len(labels) + len(extra)
    for title, of in itertools.groupby(exhibit.rows, lambda row: (row.quoted, row.section)):
        rows.append([("*The paper's: {}*" if title[0] else "**{}**").format(title[1]), *[""] * width])
        for row in of:
            cells = ["" if cell is None else str(cell) for cell in row.cells]
            known = ((shown[name], getattr(row, name)) for name in extra)
            cells += ["" if value is None else form.format(value) for form, value in known]
            rows.append([f"*{row.label}*" if row.quoted else row.label, *cells])
    return [[exhibit.corner, *labels, *extra], rows, width]


def study(_: str) -> Study:
    """Return the study."""

    def data(preset: SimpleNamespace, options: argparse.Namespace) -> dict[str, Miniature]:
        return {"icons": Miniature(options, preset.sizes)}

    return Study(
        _HERE,
        Setting,
        {"icons": "full"},
        data,
        results,
        plan=PRESETS.__getitem__,
        report="report",
        template="templates/report.md",
        packages=PACKAGES,
    )
