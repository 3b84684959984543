"""The trainings on both data sets, in the plan's order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from examples_common.trainings import by_seed
from rich.console import Console

from photostudy.plan import Changes
from photostudy.students.plan import RANKS, Choice
from photostudy.students.study import Study

from . import plan
from .plan import SETS, Plan


def follow(sizes: Plan, studies: Mapping[str, Study], console: Console) -> None:
    """Do CLIP's searches, every arm's tries, the variants of ranks, and then the trainings of the test."""
    torch.set_num_threads(1)  # several processes share the cores, and sums keep one order
    finds = {name: studies[name].find for name in SETS}
    clip: dict[str, Changes] = {}
    for name in SETS:
        while (search := plan.of_clip(sizes, name, finds[name])).due:
            studies[name].do(f"{name}: search of clip", search.due, console)
        clip[name] = search.chosen

    def do(title: str, settings: object) -> None:
        for name in SETS:
            studies[name].do(f"{name}: {title}", [plan.on(one, clip[name]) for one in settings], console)

    find, choices = plan.joint(finds, clip), dict[str, Choice]()
    for arm in plan.GRIDS:
        while (choice := plan.choice(sizes, arm, find)).due:
            do(f"tries of {arm}", choice.due)
        choices[arm] = choice
    do("variants of ranks", [one for of in plan.variants(sizes, choices[RANKS]).values() for one in of])
    for name in SETS:
        tests = plan.tests(sizes, choices, clip[name])
        studies[name].do(f"{name}: test", by_seed(tests.values()), console)
