"""The study: arms without training and on frozen encoders, beside the records of students from scratch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rankloss
from studies import icons
from studies.data import drawings
from studies.data.features import Encoders, FrozenEncoders, cached, standardised
from studies.data.flickr8k import read
from studies.data.pairs import DataSet, Thumbnails, of_photographs
from studies.data.words import WordVectors
from studies.manifest import HERE
from studies.plan import Best, Find, MissingError, best_of
from studies.records import Record, read_lines
from studies.report import conditions_texts, ends_text, mean_text, test_cells, tries_row
from studies.runner import Study
from studies.statistics import Arms, Difference, correct, estimate
from studies.students import heads, losses
from studies.students.measure import PRIMARY, hits_of_pictures, recorded

from .search import Search, without_encoders

SEARCHES = ("search", "pixels")
CAPTIONS = "rankclip-captions"  # the name that its records have
LOSSES = {
    "smoothing": "clip",
    "rankclip": "rankclip",
    "encoders": "rankclip-encoders",
    "ids": "clip",
    "captions": CAPTIONS,
}
"""The loss of each arm that is compared with ``heads``."""
SCRATCH = HERE / "photographs/results/part2d"


@dataclasses.dataclass(frozen=True)
class Setting(heads.Setting):
    """All that determines a measurement, beside its data."""

    neighbours: int = 0  # of a search


class Baselines:
    """A data set as frozen encoders see it, and the arms on it.

    Args:
        data: The data set.
        captions: Of the pictures to train on.
    """

    def __init__(self, data: DataSet, captions: Sequence[Sequence[str]]) -> None:
        self.data, self.fingerprint, self.captions = data, data.fingerprint, captions
        self.frozen = standardised({side: of.teacher for side, of in data.sides.items()})
        numbers = {text: n for n, text in enumerate(dict.fromkeys(itertools.chain(*captions)))}
        self.ids = torch.tensor([[numbers[text] for text in of] for of in captions])

    @functools.cached_property
    def words(self) -> Tensor:
        """TF-IDF of the captions to train on, ``[N, S, tokens]``."""
        texts = [*itertools.chain(*self.captions)]
        rows = WordVectors(texts, dimensions=None).transform(texts)
        return torch.from_numpy(rows).unflatten(0, (len(self.captions), -1))

    def train(self, setting: Setting) -> Record:
        """Train heads, or only search, and measure."""
        sides = without_encoders(self.data.sides) if setting.arm == "pixels" else self.frozen

        def model() -> Any:
            if setting.arm in SEARCHES:
                return Search(sides["train"], setting.neighbours)
            loss = by_words(setting.weight) if setting.arm == CAPTIONS else None
            seen = functools.partial(self._seen, setting)
            return heads.train(setting, sides["train"], loss=loss, seen=seen)

        return recorded(model, lambda of: self.data.measure(of, setting.side, sides[setting.side]))

    def _seen(self, setting: Setting, rows: Tensor, drawn: Tensor) -> dict[str, Tensor]:
        """Return what an arm's loss is given beside the features."""
        if setting.same_id:
            return {"pair_ids": self.ids[rows, drawn]}
        if setting.arm == CAPTIONS:
            return {losses.TEACHER[1]: self.words[rows, drawn]}
        teacher = self.data.sides["train"].teacher
        return losses.references(setting.arm, (teacher.pictures[rows], teacher.sentences[rows, drawn]))


def by_words(weight: float) -> nn.Module:
    """Return CLIP's loss with the words' similarities as soft targets within both modalities."""
    return rankloss.RankClipLoss(
        lambda_cross=0.0, lambda_in=weight, schedule="constant", model="top_one", reference_scale=40.0,
        diagonal=False,
    )  # fmt: skip


def data(
    sizes: SimpleNamespace, options: argparse.Namespace, kind: type[Encoders] = FrozenEncoders
) -> dict[str, Baselines]:
    """Return the data sets that are there: icons if they are built, photographs if their folder is given."""
    sides = {"emojis": drawings.emojis(sizes.emojis)}
    if "icons" in sizes.sizes and (options.icons / "manifest.json").is_file():
        sides["icons"] = drawings.icons(icons.built(options.icons), *sizes.icons)
    kept = options.output / "drawings"
    found = {
        name: Baselines(drawings.data_set(of, kept, kind), of["train"].captions) for name, of in sides.items()
    }
    if "photographs" in sizes.sizes and options.data is not None:
        count, pictures = sizes.sizes["photographs"]["train_pictures"], read(options.data)
        caches = [cached(pictures, count, of) for of in (Thumbnails, kind)]
        captions = [pictures.sentences[name] for name in pictures.used(count)["train"]]
        found["photographs"] = Baselines(of_photographs(*caches, count), captions)
    return found


def chosen(sizes: SimpleNamespace, name: str, find: Find) -> dict[str, Best]:
    """Return the tries of every arm on a data set; those of heads have the learning rate of plain ones."""
    start = Setting("clip", sizes.try_seed, "dev", **sizes.sizes[name])
    found: dict[str, Best] = {}
    for arm, grid in sizes.tries.items():
        base = dataclasses.replace(start, arm=arm)
        if arm not in SEARCHES:
            of = found["heads"].chosen if arm in LOSSES else start
            base = dataclasses.replace(of, arm=LOSSES.get(arm, "clip"))
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        tries = [dataclasses.replace(base, **point) for point in points]
        found[arm] = best_of(arm, tries, find.scores(PRIMARY))
    return found


def scratch(name: str) -> list[float]:
    """Return R@10 of part 2d's students by CLIP's loss."""
    lines = read_lines(SCRATCH / name / "records.jsonl")
    return [PRIMARY(line) for line in lines if line.get("setting", {}).get("arm") == "clip"]


def measured(sizes: SimpleNamespace, name: str, finds: Mapping[str, Find]) -> tuple[dict[str, Best], Arms]:
    """Return the tries and the arms on a data set.

    Raises:
        MissingError: If a record is missing.
    """
    find = finds.get(name, Find(name, {}))
    tries = chosen(sizes, name, find)
    settings = {arm: best.chosen for arm, best in tries.items()}
    searched = find.arms({arm: settings.pop(arm) for arm in SEARCHES}, [0])
    return tries, Arms(searched | find.arms(settings, sizes.seeds))


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all measurements of the plan, one data set after the other; absent ones are passed over."""
    for name in sizes.sizes:
        if name in finds:
            measured(sizes, name, finds)


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the data sets whose measurements are all there."""
    found = {}
    for name in sizes.sizes:
        with contextlib.suppress(MissingError):
            found[name] = measured(sizes, name, finds)
    tries, arms = ({name: of[part] for name, of in found.items()} for part in (0, 1))
    compared = [(name, arm) for arm in LOSSES for name in arms if arm in arms[name].records]
    tests = correct({(name, arm): arms[name].difference((arm, "heads"), PRIMARY) for name, arm in compared})

    def ends(name: str, arm: str) -> str:
        return ends_text(arms[name].over_pictures((arm, "heads"), hits_of_pictures))

    def mean(arms: Arms, arm: str) -> str:
        return mean_text(arms.estimate(arm, PRIMARY)) if arm in arms.records else "–"

    means = [[f"`{arm}`", *(mean(of, arm) for of in arms.values())] for arm in sizes.tries]
    return {
        "seeds": sizes.seeds,
        "sets": list(arms),
        "absent": [name for name in sizes.sizes if name not in arms],
        "means": [*means, ["`scratch`", *(mean_text(estimate(scratch(name))) for name in arms)]],
        "adds": {
            arm: [name for name, of in compared if of == arm and _above(tests[name, arm])] for arm in LOSSES
        },
        "same": [f"`{arm}` on {name}" for name, arm in compared if tests[name, arm].half_width == 0],
        "tests": [
            [
                f"`{arm}`",
                name,
                *test_cells(tests[name, arm]),
                ends_text(arms[name].over_pictures((arm, "heads"), hits_of_pictures)),
            ]
            for name, arm in compared
        ],
        "tries": [[name, *tries_row(best, _text)] for name, of in tries.items() for best in of.values()],
        "made": conditions_texts(record for of in arms.values() for record in of.all),
    }


def _above(d: Difference) -> bool:
    return d.established and d.mean > 0


def _text(one: Setting) -> str:
    if one.arm in SEARCHES:
        return f"k {one.neighbours}"
    own = {"label smoothing": one.label_smoothing, "weight": one.weight if one.arm != "clip" else 0}
    texts = [f"lr {one.lr:g}", f"dropout {one.dropout:g}", *(f"{k} {v:g}" for k, v in own.items() if v)]
    return ", ".join([*texts, one.same_id] if one.same_id else texts)


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="settings.yaml",
        records={name: name for name in ("emojis", "icons", "photographs")},
        data=data,
        results=results,
        report="baselines",
        template="template.md",
        ask=ask,
    )
