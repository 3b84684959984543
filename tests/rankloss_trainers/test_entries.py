"""The entries of a loss: its terms and its metrics."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from rankloss_trainers.entries import Entries, LoggedTerms


def leaf(value: float = 2.0) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def entries_with_a_constant(x: torch.Tensor, y: torch.Tensor) -> Entries:
    """Three terms, of which the first is a constant, and a metric."""
    constant = torch.tensor(5.0)
    return Entries.of("a loss", {"a_loss": constant, "b_loss": x * x, "c_loss": y, "d": x.detach()})


def test_a_term_that_is_a_constant_requires_a_gradient_where_another_does() -> None:
    """A compiled trainer would be compiled again at the step from which λ is above 0."""
    entries = entries_with_a_constant(leaf(2.0), leaf(3.0))
    assert all(term.requires_grad for term in entries.terms.values())
    assert not entries.metrics["d"].requires_grad


def test_a_term_that_is_a_constant_changes_no_value_and_no_gradient() -> None:
    x, y = leaf(2.0), leaf(3.0)
    entries = entries_with_a_constant(x, y)
    assert entries.terms == {"a_loss": 5, "b_loss": 4, "c_loss": 3}
    (7 * entries.total).backward()
    assert (x.grad, y.grad) == (7 * 2 * 2, 7)  # 7·d(x² + y) at x = 2


def test_constant_terms_stay_constants_where_nothing_is_trained() -> None:
    term = torch.tensor(5.0)
    assert Entries.of("a loss", {"a_loss": term}).terms["a_loss"] is term


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"depth": 1.0}, "str must give each entry as a tensor of one value; depth is 1.0"),
        ({"a_loss": torch.zeros(2)}, "str must give each entry as a tensor of one value; a_loss is (2,)"),
        ({"depth": torch.tensor(1.0)}, "str gives no entry ending in _loss to train; got ['depth']"),
        ({}, "str gives no entry ending in _loss to train; got []"),
        (
            {"a_loss": leaf(), "itc": leaf()},
            "str gives 'itc' with a gradient: call it itc_loss to train it, or detach it to log it",
        ),
    ],
)
def test_entries_that_nobody_could_train_or_log_are_refused(entries: Any, message: str) -> None:
    """The errors name the loss's class, str, as the loss of these tests is a text."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Entries.of("a loss", entries)


def test_a_trainer_adds_up_the_terms_and_logs_the_metrics_too() -> None:
    logged = LoggedTerms(
        {"a_loss": torch.tensor(1.0), "b_loss": torch.tensor(2.0)}, {"depth": torch.tensor(8.0)}
    )
    assert sum(logged.values()) == 3
    assert dict(logged.items()) == {"a_loss": 1, "b_loss": 2, "depth": 8}
