"""Part 2d, as preregistration-part2d.md has it: softmax against ranks, over three data sets together.

One file: the settings, the trainings in the plan's order, the tests, and the report. Nothing is tested before
every training is there.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from examples_common.records import Record, Store
from examples_common.statistics import Difference, correct, estimate, paired_difference
from examples_common.trainings import finder, shared
from examples_common.wording import conditions_texts, mean_text, test_cells, write_report
from icons_data.load import load

from . import drawings, students
from .features import Cache, FrozenEncoders
from .findings import PRIMARY
from .folder import read
from .plan import Changes
from .students.losses import TOP_ONE
from .students.train import Setting

CLIP, RANKS = "clip", "ranks"
ARMS = (CLIP, RANKS, TOP_ONE)
SEEDS = tuple(range(7000, 7016))
# Chosen in part 2a on photographs, in part 2c on emojis and icons: the training, and an arm's own fields.
TRAINING: dict[str, Changes] = {
    "photographs": {"train_pictures": 6000, "epochs": 20, "lr": 1e-3},
    "emojis": {"train_pictures": 1097, "epochs": 30, "lr": 2e-3},
    "icons": {"train_pictures": 8000, "epochs": 6, "lr": 1e-3},
}
_DRAWINGS: dict[str, Changes] = {
    RANKS: {"weight": 16.0, "top_k": 16},
    TOP_ONE: {"weight": 16.0, "scale": 40.0},
}
CHOSEN: dict[str, dict[str, Changes]] = {
    "photographs": {RANKS: {"weight": 2.0, "top_k": 4}, TOP_ONE: {"weight": 16.0, "scale": 20.0}},
    "emojis": _DRAWINGS,
    "icons": _DRAWINGS,
}
SETS = tuple(TRAINING)
COMPARISONS = ((TOP_ONE, CLIP), (RANKS, CLIP), (TOP_ONE, RANKS))
ICONS = (8000, 1000)  # to train on, and of each other side

Values = Mapping[str, Mapping[str, Mapping[int, float]]]  # R@10 by data set, arm and seed


def setting(name: str, arm: str, seed: int) -> Setting:
    """Return the setting of a training on a data set."""
    return Setting(arm, seed, "test", **TRAINING[name], **CHOSEN[name].get(arm, {}))


def planned() -> list[tuple[str, Setting]]:
    """Return all trainings, seed by seed: a stop leaves complete blocks."""
    return [(name, setting(name, arm, seed)) for seed, name, arm in itertools.product(SEEDS, SETS, ARMS)]


def data_sets(photographs: Path, icons: Path, kept: Path) -> dict[str, students.data.DataSet]:
    """Return the three data sets; features that are missing are computed. The icons are built already."""
    folder = read(photographs)
    pixels, features = (Cache(folder, kind.name) for kind in (students.data.Thumbnails, FrozenEncoders))
    for cache, kind in ((pixels, students.data.Thumbnails), (features, FrozenEncoders)):
        if missing := cache.missing(folder.used(TRAINING["photographs"]["train_pictures"]).values()):
            encoders = kind()
            for path, names in missing:
                cache.fill(path, names, encoders)
    sides = {"emojis": drawings.data.emojis(), "icons": drawings.data.icons(load(icons), *ICONS)}
    return {
        "photographs": students.data.of_photographs(
            pixels, features, TRAINING["photographs"]["train_pictures"]
        ),
        **{name: drawings.data.data_set(name, of, kept, FrozenEncoders) for name, of in sides.items()},
    }


def follow(studies: Mapping[str, students.study.Study], locks: Path) -> None:
    """Do the trainings without a record, in the plan's order; says no result."""
    torch.set_num_threads(1)  # several processes share the cores, and sums keep one order
    everything = planned()
    waiting = [(name, one) for name, one in everything if not studies[name].find([one])]

    def key(of: tuple[str, Setting]) -> str:
        return f"{of[0]}-{studies[of[0]].key(of[1])}"

    for name, one in shared(waiting, key, locks):
        study = studies[name]
        if not study.find([one]):  # another process may have finished it
            study.store.save(study.key(one), study.record(one))
        print(
            f"{sum(bool(studies[n].find([s])) for n, s in everything)} of {len(everything)} trainings",
            flush=True,
        )


def pooled(values: Values) -> Difference:
    """Return the primary test: softmax minus ranks, a block of three data sets for each seed.

    ``d̄_s = ⅓·Σ_d (softmax_ds − ranks_ds)``, a two-sided t-test of the sixteen d̄_s.
    """
    of = {arm: {s: fmean(values[name][arm][s] for name in SETS) for s in SEEDS} for arm in (TOP_ONE, RANKS)}
    found = paired_difference(of[TOP_ONE], of[RANKS])
    assert found is not None
    return correct({TOP_ONE: found})[TOP_ONE]


def secondary(values: Values) -> dict[tuple[str, tuple[str, str]], Difference]:
    """Return nine differences, three on each data set, corrected over all of them."""
    return correct(
        {
            (name, pair): paired_difference(*(values[name][arm] for arm in pair))
            for name in SETS
            for pair in COMPARISONS
        }
    )


def write(records: Mapping[str, Mapping[Setting, Record]], path: Path) -> Path:
    """Write the report of all records.

    Raises:
        RuntimeError: If a training is missing.
    """
    if missing := sum(one not in records[name] for name, one in planned()):
        raise RuntimeError(f"{missing} of {len(planned())} trainings are missing: nothing is reported yet")
    values = {
        name: {arm: {s: PRIMARY(records[name][setting(name, arm, s)]) for s in SEEDS} for arm in ARMS}
        for name in SETS
    }
    tests = secondary(values)
    return write_report(
        path,
        Path(__file__).with_name("pooled.md"),
        seeds=len(SEEDS),
        primary=pooled(values),
        arms=[
            [f"`{arm}`", *(mean_text(estimate([*values[name][arm].values()]), len(SEEDS)) for name in SETS)]
            for arm in ARMS
        ],
        arms_head=["arm", *SETS],
        tests=[
            [f"`{arm}`", f"`{other}`", *_cells(tests, (arm, other))] for arm, other in COMPARISONS
        ],
        tests_head=["arm", "minus", *(cell for name in SETS for cell in (name, "p", ""))],
        made=conditions_texts(one for of in records.values() for one in of.values()),
    )  # fmt: skip


def _cells(tests: Mapping[Any, Difference], pair: tuple[str, str]) -> list[str]:
    return [cell for name in SETS for cell in test_cells(tests[name, pair])]


def main(argv: Sequence[str] | None = None) -> None:
    """Do the missing trainings, and write the report once all are there."""
    example = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="the folder of Flickr8k")
    parser.add_argument("--icons", type=Path, default=Path("outputs/icons"), help="folder of the icons")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/photographs"), help="of features and locks"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    stores = {name: Store(example / "results" / "part2d" / name) for name in SETS}
    if not args.report_only:
        if args.data is None:
            parser.error("argument --data: needed")
        sets = data_sets(args.data, args.icons, args.output / "drawings")
        studies = {name: students.study.Study(sets[name], stores[name]) for name in SETS}
        follow(studies, args.output / "locks")
    records = {
        name: finder(stores[name], Setting)([one for n, one in planned() if n == name]) for name in SETS
    }
    print(write(records, example / "report" / "part2d.md"))


if __name__ == "__main__":
    main()
