"""The errors of the page of loops, and a table beside it: every row does what it says."""

from __future__ import annotations

import builtins
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import rankloss
from rankloss import InputWarning

PAGE = Path(__file__).parents[2] / "docs/loops.md"
TABLE = Path(__file__).parent / "bad_input_table.md"
TEXT = PAGE.read_text().partition("## Errors")[2] + TABLE.read_text()
LINES = [line for line in TEXT.splitlines() if line.startswith("| `")]
ROWS = [re.split(r" *(?<!\\)\| *", line)[1:4] for line in LINES]
NUMBERS = [row[:2] for row in ROWS if row[1] == "`nan`"]
WARNINGS = [row for row in ROWS if row[1] == "`InputWarning`"]
ERRORS = [row for row in ROWS if row[1].endswith("Error`")]


def evaluate(expression: str) -> object:
    v, t = normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    names = {**vars(rankloss), "torch": torch, "v": v, "t": t}
    return eval(
        expression.strip("`"), {**names, "loss": rankloss.RankConsistency(), "clip": rankloss.RankClipLoss()}
    )


def pattern_of(message: str) -> str:
    """The message as a regular expression: a last … stands for anything."""
    head, dots, tail = message.rpartition(" …")
    return f"^{re.escape(head)} .*" if dots and not tail else f"^{re.escape(message)}$"


def test_every_row_of_the_page_is_run() -> None:
    assert len(ERRORS) + len(WARNINGS) + len(NUMBERS) == len(LINES)


@pytest.mark.parametrize(("expression", "error", "message"), ERRORS)
def test_bad_input_is_refused_as_the_page_says(expression: str, error: str, message: str) -> None:
    kind = getattr(builtins, error.strip("`"))
    with pytest.raises(kind, match=pattern_of(message)):
        evaluate(expression)


@pytest.mark.parametrize(("expression", "_", "message"), WARNINGS)
def test_suspicious_input_is_computed_with_a_warning(expression: str, _: str, message: str) -> None:
    with pytest.warns(InputWarning, match=pattern_of(message)):
        value = evaluate(expression)
    assert isinstance(value, torch.Tensor)
    assert value.isfinite()


@pytest.mark.parametrize(("expression", "value"), NUMBERS)
def test_what_is_not_finite_gives_nan(expression: str, value: str) -> None:
    assert value == "`nan`"
    assert math.isnan(evaluate(expression))
