"""The report, from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples_common.records import Record, Store
from examples_common.trainings import finder
from examples_common.wording import (
    conditions_texts,
    difference_text,
    mark,
    marked,
    mean_text,
    p_text,
    signed,
    too_early,
    tries_row,
    write_report,
)

from .findings import Findings, best, findings, winner
from .plan import ARMS, BESIDE, CLIP, MODELS, Find, Plan
from .train import Setting

PRIMARY = {"photographs": "experts τ_c", "emojis": "nDCG@10"}
SECONDARY = {"photographs": ("experts τ_b", "crowd nDCG@10", "R@10"), "emojis": ("τ_b", "R@10")}
_TITLES = {"photographs": "People's grades of photographs' captions", "emojis": "Emojis graded by a rule"}


def write(sizes: Plan, stores: Mapping[str, Store], folder: Path) -> Path:
    """Write the report and return its path."""
    parts = [
        {"title": _TITLES[name], **_values(sizes, name, finder(store, Setting))}
        for name, store in stores.items()
        if store.path.is_file()
    ]
    if not parts:
        raise RuntimeError(f"{next(iter(stores.values())).path}: holds no record: nothing to report")
    template = Path(__file__).with_name("report.md")
    return write_report(folder / "lists.md", template, sizes=sizes, parts=parts)


def _values(sizes: Plan, name: str, find: Find) -> dict[str, Any]:
    found = findings(sizes, PRIMARY[name], SECONDARY[name], find)
    return {
        "primary": found.primary,
        "missing": found.missing,
        "conclusions": conclusions(found, len(sizes.seeds)),
        "searches": [tries_row(x.arm, x.scores, x.chosen, _text) for x in found.searches.values()],
        "arms": _arms(found, len(sizes.seeds)),
        "arms_head": ["arm", found.primary, *found.secondary],
        "tests": _tests(found),
        "others": _others(found),
        "others_head": ["minus `clip`", *found.secondary],
        "conditions": _conditions(found),
    }


# --- the plan's sentences ---


def conclusions(found: Findings, seeds: int) -> list[str]:
    """Return the plan's sentences for the findings; none for a comparison that lacks a training."""
    if (early := too_early(seeds, missing=found.missing > 0)) is not None:
        return early
    said = [_of_group(found, "Alone", MODELS), _of_group(found, "Beside CLIP's loss", BESIDE.values())]
    said.append(_of_clip(found))
    said += [_of_pair(found, model) for model in MODELS]
    return said


def _of_group(found: Findings, where: str, group: Iterable[str]) -> str:
    names = list(group)
    if won := winner(found, names):
        least = min(abs(d.mean) for pair, d in found.tests.items() if won in pair and set(pair) <= set(names))
        return f"**{where} `{won}` won: above each of the other four, by {least:.2f} at least.**"
    first, equals = best(found, names)
    return (
        f"**{where} no difference is shown between the best, `{first}`, and {_named(equals)}.** "
        f"It is above {_named([arm for arm in names if arm not in (first, *equals)])}."
    )


def _of_clip(found: Findings) -> str:
    by_sign = {sign: [arm for arm in ARMS[1:] if found.sign(arm, CLIP) == sign] for sign in (1, 0, -1)}
    return (
        f"Above as many further steps of CLIP's loss: {_named(by_sign[1])}. No significant difference: "
        f"{_named(by_sign[0])}. Below: {_named(by_sign[-1])}."
    )


def _of_pair(found: Findings, model: str) -> str:
    d = found.tests[BESIDE[model], model]
    text = {1: "better than alone", 0: "not significantly different from alone", -1: "worse than alone"}
    said = text[found.sign(BESIDE[model], model) or 0]
    return f"`{model}` beside CLIP's loss is {said}: {signed(d.mean)} ({signed(d.low)} to {signed(d.high)})."


def _named(arms: Sequence[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms) or "none"


# --- tables ---


def _text(setting: Setting) -> str:
    weight = f", weight {setting.weight:g}" if setting.arm in BESIDE.values() else ""
    option = f"smoothing {setting.option}" if setting.arm == CLIP else setting.option
    return f"{option}, {setting.lr:g}{weight}"


def _arms(found: Findings, seeds: int) -> list[list[str]]:
    measures = (found.primary, *found.secondary)
    return [[f"`{arm}`", *(mean_text(found.estimate(arm, m), seeds) for m in measures)] for arm in ARMS]


def _tests(found: Findings) -> list[list[str]]:
    return [
        [f"`{arm}`", f"`{other}`", difference_text(d), p_text(d.p), p_text(d.adjusted), mark(d)]
        for (arm, other), d in found.tests.items()
    ]


def _others(found: Findings) -> list[list[str]]:
    measures = found.secondary
    return [[f"`{arm}`", *(marked(found.others.get((arm, one))) for one in measures)] for arm in ARMS[1:]]


def _conditions(found: Findings) -> list[list[str]]:
    records: list[Record] = [record for of in found.records.values() for record in of.values()]
    if not records:
        return []
    seconds = fmean(record["processor_seconds"] for record in records)
    kinds = conditions_texts(records)
    items = sorted({", ".join(f"{k} {v:,}" for k, v in record["items"].items()) for record in records})
    return [
        ["records of the test", f"{len(records)}, {seconds:.1f} s of one core each"],
        *(["data", one] for one in items),
        *(["made with", kind] for kind in kinds),
    ]
