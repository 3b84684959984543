"""Part 2a: students from scratch, taught by two frozen encoders without a common space."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies.plan import ByFactor, ByGrid, Find, MissingError, Scores, by_factor, by_grid
from studies.report import conditions_texts, forest, marked, mean_text, test_row
from studies.runner import Study
from studies.statistics import Arms, Difference, Pair

from . import data as data_sets
from . import taught
from .features import Encoders, FrozenEncoders, cached
from .folder import needed
from .folder import read as read_folder
from .measure import CORRELATION, DRAWN, PRIMARY, SECONDARY, SHOWN
from .train import Setting

CLIP, RANKS = "clip", "ranks"
MEASURES = (PRIMARY, *SECONDARY)
_HERE = Path(__file__).parent


def data(
    sizes: SimpleNamespace, options: argparse.Namespace, kind: type[Encoders] = FrozenEncoders
) -> dict[str, data_sets.DataSet]:
    """Return the photographs, whose missing pixels and encoders' features are computed."""
    photographs = read_folder(needed(options.data))
    pictures = Setting(CLIP, 0, "dev", **sizes.start).train_pictures
    caches = [cached(photographs, pictures, of) for of in (data_sets.Thumbnails, kind)]
    return {"photographs": data_sets.of_photographs(*caches, pictures)}


def choices(sizes: SimpleNamespace, clip: Setting, scores: Scores) -> dict[str, ByGrid]:
    """Return the search of every arm's own fields, in plain CLIP's setting."""
    return {
        arm: by_grid(arm, replace(clip, arm=arm), grid, sizes, scores) for arm, grid in sizes.grids.items()
    }


def comparisons(sizes: SimpleNamespace) -> list[Pair]:
    """Return the tested differences: every arm minus CLIP, and those that have a teacher minus ranks."""
    rivals = [arm for arm in sizes.grids if arm not in ("rankclip", RANKS)]
    return [*((arm, CLIP) for arm in sizes.grids), *((arm, RANKS) for arm in rivals)]


def trained(sizes: SimpleNamespace, find: Find) -> tuple[Arms, ByFactor, dict[str, ByGrid]]:
    """Return the arms on the test side, CLIP's search, and theirs."""
    start, scores = Setting(CLIP, 0, "dev", **sizes.start), find.scores(PRIMARY)
    search = by_factor(start, sizes.factors, sizes.tuning_seeds, scores)
    grids = choices(sizes, search.chosen, scores)
    settings = {CLIP: search.chosen, **{arm: one.chosen for arm, one in grids.items()}}
    return Arms(find.arms(settings, sizes.seeds)), search, grids


def planned(other: Any) -> list[tuple[str, Difference]]:
    """Return the planned differences with their measures' titles."""
    sizes, finds = other("photographs-2a")
    arms, _, _ = trained(sizes, finds["photographs"])
    return [(m.title, arms.difference(pair, m)) for pair in comparisons(sizes) for m in MEASURES]


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], other: Any) -> dict[str, Any]:
    """Return the report's values; the tests are corrected together with part 2b's."""
    arms, search, grids = trained(sizes, finds["photographs"])
    pairs = comparisons(sizes)
    tests = corrected(arms, pairs, of_part_2b(sizes, other))
    return {
        **tables(arms, pairs, tests, "part2a.png"),
        **sentences(arms, pairs, tests),
        "clip": [one.text for one in search.tries],
        "setting": search.chosen,
        "score": search.score,
        "tries": [one.row() for one in grids.values()],
        "seeds": sizes.seeds,
    }


def of_part_2b(sizes: SimpleNamespace, other: Any) -> list[tuple[str, Difference]]:
    """Return part 2b's differences with their measures' titles; p = 1 where they are not there yet."""
    try:
        plan, finds = other("photographs-2b")
        arms, _ = taught.trained(plan, finds["photographs"], other)
        pairs = taught.comparisons(plan)
        return [(m.title, arms.difference(pair, m)) for pair in pairs for m in MEASURES]
    except MissingError:
        unknown = Difference(0.0, None, len(sizes.seeds), p=1.0)
        return [(m.title, unknown) for _ in range(sizes.tests_of_part_2b) for m in MEASURES]


def corrected(
    arms: Arms, pairs: Sequence[Pair], beside: Iterable[tuple[str, Difference]] = ()
) -> dict[tuple[Pair, str], Difference]:
    """Return the differences, the primary measure corrected on its own, the others together."""
    others = list(beside)
    found = {}
    for measures in ([PRIMARY], SECONDARY):
        titles = {m.title for m in measures}
        found |= arms.tests(pairs, measures, [d for title, d in others if title in titles])
    return found


def tables(
    arms: Arms, pairs: Sequence[Pair], tests: Mapping[tuple[Pair, str], Difference], picture: str
) -> dict[str, Any]:
    """Return the values that the reports of all taught models have."""
    to_clip = [arm for arm, of in pairs if of == CLIP]
    panels = {title: {arm: tests[(arm, CLIP), m.title] for arm in to_clip} for m, title in DRAWN.items()}
    seconds = {
        arm: fmean(one["processor_seconds"]["training"] for one in of.values())
        for arm, of in arms.records.items()
    }
    return {
        "pictures": {picture: forest(panels)},
        "arms": [
            [
                f"`{arm}`",
                *(mean_text(arms.estimate(arm, m), m.digits) for m in SHOWN),
                f"{seconds[arm]:.0f} s",
            ]
            for arm in arms.records
        ],
        "arms_head": ["arm", *(measure.title for measure in SHOWN), "training"],
        "tests": [test_row(pair, tests[pair, PRIMARY.title]) for pair in pairs],
        "secondary": [
            [f"`{arm}` − `{of}`", *(marked(tests[(arm, of), m.title], m.digits) for m in SECONDARY)]
            for arm, of in pairs
        ],
        "secondary_head": ["", *(measure.title for measure in SECONDARY)],
        "made": conditions_texts(arms.all),
    }


def sentences(
    arms: Arms, pairs: Sequence[Pair], tests: Mapping[tuple[Pair, str], Difference]
) -> dict[str, Any]:
    """Return what the reports' sentences are made of."""
    to_clip = {arm: tests[(arm, of), PRIMARY.title] for arm, of in pairs if of == CLIP}
    to_ranks = {arm: tests[(arm, of), PRIMARY.title] for arm, of in pairs if of == RANKS}
    taught_arms = [arm for arm in to_clip if arm != "rankclip"]

    def leading(measure: Any) -> str:
        return max(taught_arms, key=lambda arm: arms.estimate(arm, measure).mean)

    return {
        "helped": {arm: d for arm, d in to_clip.items() if d.established and d.mean > 0},
        "not_helped": [arm for arm, d in to_clip.items() if not (d.established and d.mean > 0)],
        "to_ranks": to_ranks,
        "leading": [leading(PRIMARY), leading(CORRELATION)],
    }


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        _HERE, Setting, {"photographs": "part2a"}, data, results, plan="part2a.yaml", report="part2a"
    )
