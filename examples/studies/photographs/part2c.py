"""Part 2c: the weights of two encoders without a common space, searched on emojis and icons."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies import icons
from studies.plan import Find, MissingError, by_factor
from studies.report import conditions_texts, forest, mean_text, test_cells
from studies.runner import Study
from studies.statistics import Arms, Difference, Pair, correct

from . import drawings, part2a
from .data import DataSet
from .features import Encoders, FrozenEncoders
from .measure import PRIMARY
from .part2a import CLIP, RANKS
from .train import Setting

SETS = ("emojis", "icons")
_HERE = Path(__file__).parent


def data(
    sizes: SimpleNamespace, options: argparse.Namespace, kind: type[Encoders] = FrozenEncoders
) -> dict[str, DataSet]:
    """Return both data sets; icons and features are made if they are missing."""
    sides = {
        "emojis": drawings.emojis(sizes.emojis),
        "icons": drawings.icons(icons.built(options.icons), *sizes.icons),
    }
    kept = options.output / "drawings"
    return {name: drawings.data_set(sides[name], kept, kind) for name in SETS}


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], other: Any) -> dict[str, Any]:
    """Return the report's values; the tests of both data sets are corrected together."""
    searches = {
        name: by_factor(
            Setting(CLIP, 0, "dev", **sizes.start[name]),
            sizes.factors,
            sizes.tuning_seeds,
            finds[name].scores(PRIMARY),
        )
        for name in SETS
    }
    # The fields that are plain CLIP's own on a data set.
    clip = {
        name: {field: getattr(one.chosen, field) for field in (*sizes.start[name], *sizes.factors)}
        for name, one in searches.items()
    }

    def on(name: str, settings: list[Setting]) -> list[float]:
        return finds[name].scores(PRIMARY)([replace(one, **clip[name]) for one in settings])

    def joint(settings: list[Setting]) -> list[float]:
        return [fmean(both) for both in zip(*(on(name, settings) for name in SETS), strict=True)]

    choices = part2a.choices(sizes, Setting(CLIP, 0, "dev"), joint)
    variants = {
        arm: {
            name: fmean(
                on(name, [replace(choices[RANKS].chosen, arm=arm, seed=seed) for seed in sizes.best_seeds])
            )
            for name in SETS
        }
        for arm in (RANKS, *sizes.variants)
    }
    chosen = {CLIP: Setting(CLIP, 0, "test"), **{arm: one.chosen for arm, one in choices.items()}}
    arms = {
        name: Arms(
            finds[name].arms({arm: replace(one, **clip[name]) for arm, one in chosen.items()}, sizes.seeds)
        )
        for name in SETS
    }
    rivals = [arm for arm in sizes.grids if arm != RANKS]
    pairs = [*((arm, CLIP) for arm in sizes.grids), *((arm, RANKS) for arm in rivals)]
    tests = correct({(name, pair): arms[name].difference(pair, PRIMARY) for name in SETS for pair in pairs})

    def where(pair: tuple[str, str], sign: int) -> list[str]:
        ds = {name: tests[name, pair] for name in SETS}
        return [name for name, d in ds.items() if d.established and d.mean * sign > 0]

    panels = {name: {arm: tests[name, (arm, CLIP)] for arm in sizes.grids} for name in SETS}
    if photographs := _on_photographs(list(sizes.grids), other):
        panels = {"photographs": photographs, **panels}
    return {
        "pictures": {"part2c.png": forest(panels)},
        "photographs": bool(photographs),
        "seeds": sizes.seeds,
        "weights": choices[RANKS].row()[1],
        "better_variants": [
            arm for arm in sizes.variants if all(variants[arm][name] > variants[RANKS][name] for name in SETS)
        ],
        "helps": where((RANKS, CLIP), 1),
        "rivals": {
            arm: {"above": where((arm, RANKS), 1), "below": where((arm, RANKS), -1)} for arm in rivals
        },
        **tables(arms, tests, pairs),
        "clip": [[name, *one.text] for name in SETS for one in searches[name].tries],
        "tries": [one.row() for one in choices.values()],
        "variants": [[f"`{arm}`", *(f"{of[name]:.2f}" for name in SETS)] for arm, of in variants.items()],
        "made": conditions_texts(record for name in SETS for record in arms[name].all),
    }


def tables(
    arms: Mapping[str, Arms], tests: Mapping[tuple[str, Pair], Difference], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Return the tables of means and of tests whose columns are data sets."""
    trained = next(iter(arms.values())).records
    cells = {pair: [cell for name in arms for cell in test_cells(tests[name, pair])] for pair in pairs}
    return {
        "arms": [
            [f"`{arm}`", *(mean_text(of.estimate(arm, PRIMARY)) for of in arms.values())] for arm in trained
        ],
        "tests": [[f"`{arm}`", f"`{of}`", *cells[arm, of]] for arm, of in pairs],
        "tests_head": ["arm", "minus", *(cell for name in arms for cell in (name, "p", ""))],
    }


def _on_photographs(arms: list[str], other: Any) -> dict[str, Difference]:
    """Return part 2a's differences to plain CLIP, for the figure; nothing where it is not finished."""
    try:
        sizes, finds = other("photographs-2a")
        found, _, _ = part2a.trained(sizes, finds["photographs"])
    except MissingError:
        return {}
    tests = part2a.corrected(found, part2a.comparisons(sizes), part2a.of_part_2b(sizes, other))
    return {arm: tests[(arm, CLIP), PRIMARY.title] for arm in arms}


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        _HERE, Setting, {name: name for name in SETS}, data, results, plan="part2c.yaml", report="part2c"
    )
