"""The errors of the page of loops, and a table beside it: every row does what it says."""

from __future__ import annotations

import builtins
import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import rankloss
from rankloss import (
    ClipLoss,
    InputWarning,
    RankClipLoss,
    RankConsistency,
    RankedLists,
    SigLipLoss,
)
from rankloss_trainers import catalog
from registered import NAMES, input_names

PAGE = Path(__file__).parents[2] / "docs/loops.md"
TABLE = Path(__file__).parent / "bad_input_table.md"
TEXT = PAGE.read_text().partition("## Errors")[2] + TABLE.read_text()
LINES = [line for line in TEXT.splitlines() if line.startswith("| `")]
ROWS = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in LINES]
NUMBERS = [row[:2] for row in ROWS if row[1] in ("`nan`", "`finite`")]
ERRORS = [row for row in ROWS if row[:2] not in NUMBERS]
ON_THE_PAGE = PAGE.read_text().count("\n| `")

v, t = normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
LOSSES: list[Callable[..., nn.Module]] = [
    ClipLoss,
    functools.partial(ClipLoss, memory_budget=0, label_smoothing=0.2),
    SigLipLoss,
    functools.partial(SigLipLoss, memory_budget=0),
    functools.partial(RankClipLoss, schedule="constant"),
    functools.partial(RankClipLoss, schedule=lambda i, n: 0.0),
    *(
        catalog.load(name).constructor
        for name in NAMES
        if input_names(name) == ("image_features", "text_features", "logit_scale")
    ),
    RankConsistency,
]


def use(make: Callable[..., nn.Module], inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Build a loss, and call it if there are inputs."""
    loss = make(**({} if inputs else named))
    if isinstance(loss, RankClipLoss):
        loss.set_epoch(1, 2)
    loss(*inputs, **named)


def every(*inputs: Any, **named: Any) -> None:
    """Use each loss, and raise the error that all of them raise."""
    errors = []
    for make in LOSSES[:-1] if "logit_bias" in named else LOSSES:
        with pytest.raises((ValueError, TypeError)) as caught:
            use(make, inputs, named)
        errors.append(caught.value)
    assert len({(type(error), str(error)) for error in errors}) == 1
    raise errors[0]


def lists(**changed: Any) -> Any:
    """Call RankedLists with lists of two candidates, and what is changed, of the options too."""
    options = {name: changed.pop(name) for name in vars(RankedLists()) & changed.keys()}
    given = {"candidate_features": torch.stack([t, v], 1), "grades": torch.tensor([[1.0, 0.0]] * 6)}
    return RankedLists(**options)(**{"query_features": v, "logit_scale": 10.0} | given | changed)


def frozen(**changed: Any) -> Any:
    """Call it with a frozen model's features."""
    features = {"reference_query_features": v, "reference_candidate_features": torch.stack([t, v], 1)}
    return lists(**features | {"reference_scale": 1.0} | changed)


def changed(loss: Any, **options: Any) -> Any:
    """Call a loss whose options were set after it was built."""
    vars(loss).update(options)
    return loss(v, v[:, None], torch.zeros(6, 1))


def evaluate(expression: str) -> Any:
    names = {**vars(rankloss), **globals(), "loss": RankConsistency(), "clip": RankClipLoss()}
    names["Fraction"] = Fraction
    return eval(expression.strip("`"), names)


@pytest.mark.parametrize("row", ERRORS, ids=[row[0] for row in ERRORS])
def test_an_error_has_the_argument_the_reason_and_the_value(row: list[str]) -> None:
    call, kind, *words = row
    if row in ERRORS[:ON_THE_PAGE]:
        begins = words[0].removesuffix(" …").removesuffix(".")
        argument, reason, value = re.split(r"\W", begins)[0], begins, begins.split()[-1]
    else:
        argument, reason, value = words
    if kind == "`InputWarning`":
        with pytest.warns(InputWarning) as warned:
            assert evaluate(call).isfinite()
        text = str(warned[0].message)
    else:
        with pytest.raises(getattr(builtins, kind.strip("`"))) as caught:
            evaluate(call)
        text = str(caught.value)
    assert re.search(rf"(?<!\w){argument}(?!\w)", text), text
    assert reason in text
    assert value in text


@pytest.mark.parametrize(("call", "value"), NUMBERS)
def test_other_input_gives_a_number_or_nan_without_a_warning(call: str, value: str) -> None:
    assert math.isfinite(evaluate(call).detach()) == (value == "`finite`")
