"""The errors of the page of loops, and a table beside it: every row does what it says."""

from __future__ import annotations

import builtins
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction  # noqa: F401 (calls of the tables use it)
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


def rows(text: str) -> list[list[str]]:
    """The cells of each row of tables that begins with a call; ``\\|`` stands for a bar within a cell."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines]


@dataclass(frozen=True)
class Error:
    """A call of the tables, and what its error says."""

    call: str
    kind: str
    argument: str
    reason: str
    value: str


def error_of_the_page(call: str, kind: str, message: str, remedy: str) -> Error:
    """A row of the page, whose message may end with an ellipsis: it begins with the argument."""
    reason = message.removesuffix(" …").removesuffix(".")
    argument, *_ = re.split(r"\W", reason)
    value = reason.split()[-1]  # a message ends with it
    return Error(call, kind, argument, reason, value)


ON_THE_PAGE = rows(PAGE.read_text().partition("## Errors")[2])
IN_THE_TABLE = rows(TABLE.read_text())
NO_ERRORS = ("`nan`", "`finite`")  # in the column of the error, where a call returns such a number
NUMBERS = [row[:2] for row in (*ON_THE_PAGE, *IN_THE_TABLE) if row[1] in NO_ERRORS]
ERRORS = [error_of_the_page(*row) for row in ON_THE_PAGE if row[1] not in NO_ERRORS]
ERRORS += [Error(*row) for row in IN_THE_TABLE if row[1] not in NO_ERRORS]

# From here to `changed`: the names that the calls of the tables use, beside rankloss's own.
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
    """Use each loss, and raise the error that all of them raise; RankConsistency takes no bias."""
    errors = []
    losses = [loss for loss in LOSSES if loss is not RankConsistency or "logit_bias" not in named]
    for make in losses:
        with pytest.raises((ValueError, TypeError)) as caught:
            use(make, inputs, named)
        errors.append(caught.value)
    assert len({(type(error), str(error)) for error in errors}) == 1
    raise errors[0]


def lists(**changed: Any) -> Any:
    """Call RankedLists with six lists of two candidates; options and inputs may be changed."""
    options = {name: x for name, x in changed.items() if name in vars(RankedLists())}
    inputs = {
        "query_features": v,
        "candidate_features": torch.stack([t, v], 1),
        "grades": torch.tensor([[1.0, 0.0]] * 6),
        "logit_scale": 10.0,
    }
    inputs |= {name: x for name, x in changed.items() if name not in options}
    return RankedLists(**options)(**inputs)


def frozen(**changed: Any) -> Any:
    """Call RankedLists with a frozen model's features beside."""
    features = {"reference_query_features": v, "reference_candidate_features": torch.stack([t, v], 1)}
    return lists(**features | {"reference_scale": 1.0} | changed)


def changed(loss: Any, **options: Any) -> Any:
    """Call a loss whose options were set after it was built."""
    vars(loss).update(options)
    return loss(v, v[:, None], torch.zeros(6, 1))


def evaluate(expression: str) -> Any:
    """Evaluate a call of the tables, with the names of this file, ``loss`` and ``clip``."""
    names = {**vars(rankloss), **globals(), "loss": RankConsistency(), "clip": RankClipLoss()}
    return eval(expression.strip("`"), names)


def assert_says(text: str, error: Error) -> None:
    assert re.search(rf"(?<!\w){error.argument}(?!\w)", text), text  # as a word of its own
    assert error.reason in text
    assert error.value in text


@pytest.mark.parametrize(
    "error",
    [pytest.param(error, id=error.call) for error in ERRORS if error.kind != "`InputWarning`"],
)
def test_an_error_has_the_argument_the_reason_and_the_value(error: Error) -> None:
    with pytest.raises(getattr(builtins, error.kind.strip("`"))) as caught:
        evaluate(error.call)
    assert_says(str(caught.value), error)


@pytest.mark.parametrize(
    "warning",
    [pytest.param(error, id=error.call) for error in ERRORS if error.kind == "`InputWarning`"],
)
def test_a_warning_has_the_argument_the_reason_and_the_value_of_a_finite_loss(warning: Error) -> None:
    with pytest.warns(InputWarning) as warned:
        assert evaluate(warning.call).isfinite()
    assert_says(str(warned[0].message), warning)


@pytest.mark.parametrize(("call", "value"), NUMBERS)
def test_other_input_gives_a_number_or_nan_without_a_warning(call: str, value: str) -> None:
    loss = evaluate(call).detach()  # the configuration of pytest makes a warning an error
    assert loss.isfinite() if value == "`finite`" else loss.isnan()
