"""Part 2d: softmax against ranks, by one test over photographs, emojis and icons together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies.plan import Find
from studies.report import conditions_texts
from studies.runner import Study
from studies.statistics import Arms, Difference, Pair, correct, paired_difference

from . import part2a, part2c
from .data import DataSet
from .features import Encoders, FrozenEncoders
from .measure import PRIMARY
from .part2a import CLIP, RANKS
from .student_losses import TOP_ONE
from .train import Setting

SETS = ("photographs", "emojis", "icons")
ARMS = (CLIP, RANKS, TOP_ONE)
COMPARISONS: list[Pair] = [(TOP_ONE, CLIP), (RANKS, CLIP), (TOP_ONE, RANKS)]
_HERE = Path(__file__).parent


def data(
    sizes: SimpleNamespace, options: argparse.Namespace, kind: type[Encoders] = FrozenEncoders
) -> dict[str, DataSet]:
    """Return the three data sets; what is missing of them is made."""
    photographs = SimpleNamespace(start=sizes.start["photographs"])
    return {**part2a.data(photographs, options, kind), **part2c.data(sizes, options, kind)}


def planned(sizes: SimpleNamespace, name: str, seed: int, arms: Sequence[str] = ARMS) -> dict[str, Setting]:
    """Return the trainings of a data set with a seed, by arm."""
    own = sizes.chosen[name]
    return {arm: Setting(arm, seed, "test", **sizes.start[name], **own.get(arm, {})) for arm in arms}


def found(sizes: SimpleNamespace, finds: Mapping[str, Find], arms: Sequence[str] = ARMS) -> dict[str, Arms]:
    """Return the records of each data set, which are asked for seed by seed: a stop leaves whole blocks."""
    records: dict[str, dict[str, dict[int, Any]]] = {name: {arm: {} for arm in arms} for name in SETS}
    for seed in sizes.seeds:
        for name in SETS:
            settings = planned(sizes, name, seed, arms)
            there = finds.get(name, Find(name, {}))(settings.values())
            for arm, one in settings.items():
                records[name][arm][seed] = there[one]
    return {name: Arms(of) for name, of in records.items()}


def pooled(arms: Mapping[str, Arms]) -> Difference:
    """Return the primary test: the mean over the data sets of softmax minus ranks, a block for each seed."""
    of = {
        arm: {
            seed: fmean(of.values(arm, PRIMARY)[seed] for of in arms.values())
            for seed in arms[SETS[0]].records[arm]
        }
        for arm in (TOP_ONE, RANKS)
    }
    return correct({TOP_ONE: paired_difference(of[TOP_ONE], of[RANKS])})[TOP_ONE]


def secondary(arms: Mapping[str, Arms]) -> dict[tuple[str, Pair], Difference]:
    """Return three differences on each data set, corrected over all nine."""
    return correct(
        {(name, pair): arms[name].difference(pair, PRIMARY) for name in SETS for pair in COMPARISONS}
    )


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values."""
    arms = found(sizes, finds)
    tests = secondary(arms)
    return {
        "seeds": sizes.seeds,
        "primary": pooled(arms),
        "below": [name for name in SETS if (d := tests[name, COMPARISONS[2]]).established and d.mean < 0],
        **part2c.tables(arms, tests, COMPARISONS),
        "arms_head": ["arm", *SETS],
        "made": conditions_texts(record for of in arms.values() for record in of.all),
    }


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=_HERE,
        setting=Setting,
        plan="part2d.yaml",
        records={name: f"part2d/{name}" for name in SETS},
        data=data,
        results=results,
        report="part2d",
    )
