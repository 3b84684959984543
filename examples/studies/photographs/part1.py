"""Part 1: RankCLIP and plain CLIP on frozen features, each in its best setting, with controls."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies.plan import ByFactor, Find, by_factor
from studies.report import conditions_texts, forest, marked, mean_text, test_row
from studies.runner import Study
from studies.statistics import Arms

from .folder import needed
from .frozen import Frozen
from .heads import Setting
from .measure import CORRELATION, DIRECTIONS, DRAWN, PRIMARY, SCALE, SECONDARY, SHOWN

_HERE = Path(__file__).parent


def search(sizes: SimpleNamespace, loss: str, find: Find) -> ByFactor:
    """Follow a loss's search on the dev side."""
    start = Setting(loss, 0, "dev", **sizes.start)
    return by_factor(start, sizes.factors, sizes.tuning_seeds, find.scores(PRIMARY))


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Frozen]:
    """Return the photographs, whose missing features are computed."""
    start = Setting("clip", 0, "dev", **sizes.start)
    return {"photographs": Frozen(needed(options.data), start.train_pictures)}


def controls(sizes: SimpleNamespace, clip: Setting, find: Find) -> dict[str, Setting]:
    """Return both losses in other settings: with more and fewer epochs, and with one scale for both."""
    if not sizes.control_seeds:
        return {}
    ends = find([replace(clip, seed=seed) for seed in sizes.tuning_seeds]).values()
    scale = round(fmean(map(SCALE, ends)), 1)
    changed = {
        "the pilot's setting": Setting("clip", 0, "test", **sizes.start),
        "twice the epochs": replace(clip, epochs=2 * clip.epochs),
        "equal scale": replace(clip, scale_start=scale, scale_ceiling=max(scale, 100.0), scale_fixed=True),
        "half the epochs": replace(clip, epochs=max(1, clip.epochs // 2)),
    }
    return {
        f"{loss}, {name}": replace(one, loss=loss) for name, one in changed.items() for loss in sizes.tuned
    }


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values."""
    find = finds["photographs"]
    searches = {loss: search(sizes, loss, find) for loss in sizes.tuned}
    clip, tuned = (one.chosen for one in searches.values())
    settings = {loss: replace(clip, loss=loss) for loss in sizes.tuned}
    if tuned != settings["rankclip"]:
        settings["rankclip-tuned"] = tuned
    settings |= {loss: replace(clip, loss=loss) for loss in sizes.components}
    arms = Arms(
        find.arms(settings, sizes.seeds) | find.arms(controls(sizes, clip, find), sizes.control_seeds)
    )
    pairs = [(arm, _reference(arm)) for arm in arms.records if arm != _reference(arm)]
    tests = arms.tests(pairs, [PRIMARY]) | arms.tests(pairs, SECONDARY)
    primary = {arm: tests[(arm, other), PRIMARY.title] for arm, other in pairs}
    panels = {title: {arm: tests[(arm, of), m.title] for arm, of in pairs} for m, title in DRAWN.items()}
    return {
        "pictures": {"part1.png": forest(panels)},
        "searches": searches,
        "tuning_seeds": sizes.tuning_seeds,
        "chosen": {loss: _chosen(sizes, one) for loss, one in searches.items()},
        "factors": _factors(searches),
        "seeds": sizes.seeds,
        "components": sizes.components,
        "primary": primary,
        "people": tests[("rankclip", "clip"), CORRELATION.title],
        "arms": [
            [f"`{arm}`", *(mean_text(arms.estimate(arm, m), m.digits) for m in SHOWN)] for arm in arms.records
        ],
        "arm_head": ["arm", *(measure.title for measure in SHOWN)],
        "tests": [_row(pair, primary[pair[0]]) for pair in pairs],
        "secondary": [
            [m.title, *(marked(tests[pair, m.title], m.digits) for pair in pairs)] for m in SECONDARY
        ],
        "secondary_head": ["", *(f"`{arm}`" for arm, _ in pairs)],
        "published": [*sizes.published, *(_beside(arms, arm) for arm in sizes.tuned)],
        "conditions": _conditions(arms),
    }


def _reference(arm: str) -> str:
    """Return plain CLIP in the arm's setting."""
    return "".join(["clip", *arm.partition(", ")[1:]])


def _chosen(sizes: SimpleNamespace, one: ByFactor) -> str:
    """Return a search's setting in words."""
    return ", ".join(f"{name.replace('_', ' ')} {getattr(one.chosen, name):g}" for name in sizes.factors)


def _factors(searches: Mapping[str, ByFactor]) -> list[list[str]]:
    """Return the searches' tries: a level in each row, a loss in each column."""
    texts = [[one.text for one in search.tries] for search in searches.values()]
    return [[*of[0][:2], *(scores for _, _, scores in of)] for of in zip(*texts, strict=True)]


def _row(pair: tuple[str, str], d: Any) -> list[str]:
    arm, other, difference, *rest = test_row(pair, d)
    return [arm, other, difference, str(d.n), *rest]


def _beside(arms: Arms, arm: str) -> list[str]:
    """Return the row of our own means, in the published table's columns."""
    named = {measure.title: measure for measure in (*DIRECTIONS, *SECONDARY)}
    ways = ("picture → sentence", "sentence → picture")
    columns = [f"{score}, {way}" for way in ways for score in ("R@1", "R@5", "R@10", "median rank")]
    means = (arms.estimate(arm, named[title]).mean for title in (*columns, CORRELATION.title))
    return [f"here: `{arm}`", *(f"{mean:.1f}" for mean in means)]


def _conditions(arms: Arms) -> list[list[str]]:
    seconds = fmean(sum(record["processor_seconds"].values()) for record in arms.all)
    trained = f"{len(arms.all)}, {seconds:.0f} s of one core each"
    made = [["made with", kind] for kind in conditions_texts(arms.all)]
    return [["trainings on the test side", trained], *made]


def study(_: str) -> Study:
    """Return the study."""
    return Study(_HERE, Setting, {"photographs": "part1"}, data, results, plan="part1.yaml", report="part1")
