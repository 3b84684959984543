"""Parts 2b and 3: heads that are taught by one teacher with a common space, or see a part of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from studies.plan import ByGrid, Find, by_grid, read
from studies.records import Record
from studies.report import difference_text, mark
from studies.runner import Run, Study
from studies.statistics import Arms, Pair

from . import heads, part1, part2a, view_losses, views
from .frozen import Frozen
from .heads import Heads
from .measure import CORRELATION, PRIMARY, recorded
from .teacher import Ensemble
from .views import Setting

CLIP, RANKS, TEACHER = "clip", "ranks", "teacher"
BOTH = "mimicry-and-ranks"
_HERE = Path(__file__).parent


class Itself:
    """A model of features that are in the common space already."""

    log_scale = torch.zeros(())

    def pictures(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features

    def sentences(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


class Taught:
    """Frozen features, the teacher, and the trainings of heads that see a part of it."""

    def __init__(self, of: Frozen, ensemble: Ensemble) -> None:
        self.of, self.teacher = of, ensemble.of(of)
        self.fingerprint = ensemble.name(of.fingerprint)

    def train(self, setting: Setting) -> Record:
        """Train and measure heads; or measure the teacher."""
        if setting.loss == TEACHER:
            own = self.teacher.sides[setting.side]
            return recorded(Itself, lambda model: self.of.measured(model, setting.side, own))
        return recorded(lambda: self.heads(setting), lambda model: self.of.measured(model, setting.side))

    def heads(self, setting: Setting) -> Heads:
        """Train heads.

        A loss's own parameters are drawn apart from the heads': a seed's heads start as the same ones.
        """
        side = self.of.sides["train"]
        torch.manual_seed(setting.seed)
        loss = view_losses.build(setting, (self.teacher.sides["train"].pictures.shape[-1],) * 2)
        return heads.train(setting, side, loss=loss, seen=views.of(setting.view, self.teacher, side))


def of_heads(other: Callable[[str], Any]) -> dict[str, Any]:
    """Return plain CLIP's best setting of part 1, which the teacher and every student have."""
    sizes, finds = other("photographs-1")
    chosen = part1.search(sizes, CLIP, finds["photographs"]).chosen
    return {**sizes.start, **{name: getattr(chosen, name) for name in sizes.factors}}


def choices(sizes: SimpleNamespace, base: Mapping[str, Any], find: Find) -> dict[str, ByGrid]:
    """Return every arm's search; that of mimicry and ranks lies around the winners of both."""
    found: dict[str, ByGrid] = {}
    for name, arm in sizes.arms.items():
        start, grid = Setting(arm["loss"], 0, "dev", **base, view=arm["view"]), arm["grid"]
        if name == BOTH:
            w, ranks = found["mimicry"].chosen.weight, found[RANKS].chosen
            start = replace(start, top_k=ranks.top_k)
            most = ranks.weight
            grid = {"mimicry": (w / 2, w), "weight": (most / 4, most / 2, most)}
        found[name] = by_grid(name, start, grid, sizes, find.scores(PRIMARY))
    return found


def comparisons(sizes: SimpleNamespace) -> list[Pair]:
    """Return the tested differences: each arm minus CLIP, then minus the ranks of its view."""
    rivals = [name for name, arm in sizes.arms.items() if arm["loss"] != RANKS]
    return [*((name, CLIP) for name in sizes.arms), *((name, ranks_of(sizes, name)) for name in rivals)]


def ranks_of(sizes: SimpleNamespace, name: str) -> str:
    """Return the arm of ranks of an arm's view."""
    view = sizes.arms[name]["view"]
    return RANKS if view == "features" else f"{sizes.same.get(view, view)}: {RANKS}"


def trained(
    sizes: SimpleNamespace, find: Find, other: Callable[[str], Any]
) -> tuple[Arms, dict[str, ByGrid]]:
    """Return the arms on the test side, and their searches."""
    base = of_heads(other)
    grids = choices(sizes, base, find)
    settings = {CLIP: Setting(CLIP, 0, "test", **base), **{name: one.chosen for name, one in grids.items()}}
    return Arms(find.arms(settings, sizes.seeds)), grids


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], other: Callable[[str], Any]) -> dict[str, Any]:
    """Return the report's values; part 2b's tests are corrected together with part 2a's."""
    find, pairs = finds["photographs"], comparisons(sizes)
    of_teacher = Setting(TEACHER, sizes.teacher[0], "test", **of_heads(other))
    (teacher,) = find([of_teacher]).values()
    arms, grids = trained(sizes, find, other)
    tests = part2a.corrected(arms, pairs, part2a.planned(other) if sizes.part == "2b" else ())
    above = {pair: d for pair in pairs if (d := tests[pair, PRIMARY.title]).established and d.mean > 0}
    return {
        **part2a.tables(arms, pairs, tests, f"part{sizes.part}.png"),
        "part": sizes.part,
        "seeds": sizes.seeds,
        "teachers": sizes.teacher,
        "teacher": [f"{measure(teacher):.1f}" for measure in (PRIMARY, CORRELATION)],
        "names": list(sizes.arms),
        "above": above,
        "leading": [
            max(sizes.arms, key=lambda arm: arms.estimate(arm, m).mean) for m in (PRIMARY, CORRELATION)
        ],
        "views": _views(sizes, tests) if sizes.part == "3" else {},
        "tries": [one.row() for one in grids.values()],
    }


def _views(sizes: SimpleNamespace, tests: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return what is said of each view, and its row: ranks and the other losses, minus CLIP."""

    def cell(name: str) -> str:
        d = tests[(name, CLIP), PRIMARY.title]
        return f"{difference_text(d)} {mark(d)}"

    found = {}
    for view in dict.fromkeys(arm["view"] for arm in sizes.arms.values()):
        rivals = [name for name, arm in sizes.arms.items() if arm["view"] == view and arm["loss"] != RANKS]
        ranks = ranks_of(sizes, rivals[0])
        ds = {rival: tests[(rival, ranks), PRIMARY.title] for rival in rivals}
        helps = tests[(ranks, CLIP), PRIMARY.title]
        found[view] = {
            "better": [rival for rival, d in ds.items() if d.established and d.mean > 0],
            "worse": [rival for rival, d in ds.items() if d.established and d.mean < 0],
            "rivals": rivals,
            "helps": helps.established and helps.mean > 0,
            "row": [view, cell(ranks), "; ".join(f"`{sizes.arms[x]['loss']}` {cell(x)}" for x in rivals)],
        }
    return found


def study(name: str) -> Study:
    """Return a part's study."""
    part = name.rpartition("-")[2]

    def sizes(preset: str) -> SimpleNamespace:
        found = read(_HERE / f"part{part}.yaml", preset)
        found.part = part
        return found

    def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Taught]:
        run = Run(study(name), options.preset, options.output)
        of_part_1 = part1.data(run.other("photographs-1")[0], options)["photographs"]
        return {"photographs": Taught(of_part_1, Ensemble(of_heads(run.other), sizes.teacher, sizes.weak))}

    of = f"part{part}"
    return Study(
        _HERE, Setting, {"photographs": of}, data, results, plan=sizes, report=of, template="taught.md"
    )
