"""Errors and warnings of `RankedLists`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batches import unit_rows
from rankloss import InputWarning, RankedLists


def call(loss: RankedLists | None = None, **changed: Any) -> Tensor:
    rng = np.random.default_rng(0)
    given = {
        "query_features": torch.from_numpy(unit_rows(rng, 3, 4)),
        "candidate_features": torch.from_numpy(unit_rows(rng, 6, 4)).view(3, 2, 4),
        "grades": torch.tensor([[1.0, 0.0]] * 3),
        "logit_scale": 10.0,
    }
    given.update({k: v(given[k]) if callable(v) else v for k, v in changed.items()})
    return (loss or RankedLists())(**given)


def with_(place: tuple[int, int], value: Any) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[place] = value
        return x

    return changed


INDEX = torch.tensor([[0, 1], [2, 3], [4, 5]])
POOL = {"candidate_features": lambda x: x.flatten(0, 1), "candidate_index": INDEX}
MASK = torch.ones(3, 2, dtype=torch.bool)
FROZEN: dict[str, Any] = {
    "reference_query_features": torch.ones(3, 7),
    "reference_candidate_features": torch.ones(3, 2, 7),
    "reference_scale": 1.0,
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "infinity": ({"grades": with_((1, 0), math.inf)}, r"grades must be numbers.*; row 1 has \[inf\]"),
    "large integers": ({"grades": torch.full((3, 2), 2**53 + 1)}, "grades must be at most 2⁵³.*; row 0 has"),
    "the least integer": (
        {"grades": torch.full((3, 2), -(2**63))},
        "grades must be at most 2⁵³.*; row 0 has",
    ),
    "words": ({"grades": [["a", "b"]]}, r"grades must be a torch\.Tensor; got list"),
    "booleans": ({"grades": MASK}, r"grades must be of .*; got torch\.bool"),
    "one list": ({"grades": torch.zeros(2)}, r"grades must have shape \[N, K\].*; got \(2,\)"),
    "lists": ({"grades": torch.zeros(2, 2)}, r"grades must have shape .*N = 3.*; got \(2, 2\)"),
    "no candidates": ({"grades": torch.zeros(3, 0)}, r"K at least 1.*; got \(3, 0\)"),
    "pool alone": ({"candidate_features": torch.zeros(6, 4)}, r"\[M, D\] with candidate_index; got \(6, 4\)"),
    "width": ({"candidate_features": torch.zeros(3, 2, 5)}, r"\(3, 2, 4\).*; got \(3, 2, 5\)"),
    "integers": (
        {"candidate_features": lambda x: x.long()},
        "candidate_features must be floating point; got torch.int64",
    ),
    "mask": ({"mask": MASK.long()}, r"mask must be of torch\.bool; got torch\.int64"),
    "mask's shape": ({"mask": MASK[:2]}, r"mask must have shape .*; got \(2, 2\)"),
    "negative": (
        {**POOL, "candidate_index": INDEX - 1},
        r"candidate_index must be at least 0 and less than 6; row 0 has \[-1\]",
    ),
    "index's type": (
        {**POOL, "candidate_index": INDEX.float()},
        r"candidate_index must be of .*; got torch\.float32",
    ),
    "ids": (
        {**POOL, "candidate_ids": INDEX},
        r"candidate_ids must be integers of shape \(6,\); got .*\(3, 2\)",
    ),
    "reference's shape": (
        {"reference_scores": torch.zeros(3, 3)},
        r"reference_scores must have shape \[N, K\].*; got \(3, 3\)",
    ),
    "reference's type": ({"reference_scores": MASK}, r"reference_scores must be of .*; got torch\.bool"),
    "reference's value": (
        {"reference_scores": torch.tensor([[0.0, 0.0], [math.nan, 0.0], [0.0, math.inf]])},
        r"reference_scores must be finite; row 1 has \[nan\]",
    ),
    "two references": (
        {"reference_scores": torch.zeros(3, 2), "reference_scale": 1.0},
        "reference_scores and reference_scale are two references; give one",
    ),
    "half a reference": (
        {"reference_query_features": torch.zeros(3, 7)},
        "reference_scale go together; got reference_query_features alone",
    ),
    "reference queries": (
        {**FROZEN, "reference_query_features": torch.ones(2, 7)},
        r"reference_query_features must have one row per query, 3; got shape \(2, 7\)",
    ),
    "reference candidates": (
        {**FROZEN, "reference_candidate_features": torch.ones(3, 2, 4)},
        r"reference_candidate_features must have shape \[N, K, D\] = \(3, 2, 7\).*; got \(3, 2, 4\)",
    ),
    "infinite reference queries": (
        {**FROZEN, "reference_query_features": with_((2, 0), math.inf)(torch.ones(3, 7))},
        "reference_query_features must be finite; row 2 is not",
    ),
    "infinite reference candidates": (
        {**FROZEN, "reference_candidate_features": torch.full((3, 2, 7), math.nan)},
        "reference_candidate_features must be finite; row 0 is not",
    ),
    "reference's scale": ({**FROZEN, "reference_scale": -1.0}, "reference_scale must be positive.*; got -1"),
    "reference's device": (
        {"reference_scores": torch.zeros(3, 2, device="meta")},
        "reference_scores must be on the device of query_features, cpu; got meta",
    ),
    "device": (
        {"grades": lambda x: x.to("meta")},
        "grades must be on the device of query_features, cpu; got meta",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_with_the_argument_and_the_row(kind: str) -> None:
    changed, message = BAD[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changed)


def test_negatives_need_a_frozen_models_features() -> None:
    with pytest.raises(ValueError, match=r"reference_scores are of a query's own.*give reference_query_feat"):
        call(RankedLists(in_batch_negatives=True), reference_scores=torch.zeros(3, 2))


def test_a_query_may_not_be_its_own_negative() -> None:
    twice = lambda x: x[[0, 1, 0]]  # noqa: E731
    with pytest.raises(ValueError, match="row 2 equals row 0"):
        call(RankedLists(in_batch_negatives=True), query_features=twice)
    assert call(query_features=twice).isfinite()


@pytest.mark.parametrize("grade", [-1.0, -math.inf, math.inf, math.nan, 2.0**54])
def test_lambda_needs_grades_that_have_a_gain(grade: float) -> None:
    with pytest.raises(
        ValueError, match=r"grades must be numbers from 0 to 2⁵³ for model='lambda'; row 1 has \["
    ):
        call(RankedLists(model="lambda"), grades=with_((1, 1), grade))


def test_weights_by_difference_need_finite_grades() -> None:
    weighted = RankedLists(model="pairwise", pair_weight="difference")
    with pytest.raises(ValueError, match=r"grades must be finite.*; row 1 has \[-inf\]"):
        call(weighted, grades=with_((1, 1), -math.inf))


@pytest.mark.parametrize(
    "options",
    [
        {"model": "listnet"},
        {"top_k": 0},
        {"pair_weight": "difference"},
        {"pair_weight": "difference", "model": "pairwise", "in_batch_negatives": True},
        {"gain": "exponential"},
        {"gain": "log", "model": "lambda"},
        {"top_k": 2, "model": "lambda"},
        {"pair_weight": "difference", "model": "lambda"},
        {"model": "lambda", "in_batch_negatives": True},
        {"in_batch_negatives": 1},
        {"reduction": "batchmean"},
        {"chunk_size": 0},
        {"gather": True},
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RankedLists(**options)
    if "gather" not in options:
        loss = RankedLists()
        for name, value in options.items():
            setattr(loss, name, value)
        with pytest.raises(ValueError, match=next(iter(options))):
            call(loss)


def test_suspicious_features_are_warned_of_once_and_padding_is_not() -> None:
    loss = RankedLists()
    mask = with_((0, 0), False)(MASK)
    call(loss, candidate_features=lambda x: x * mask[..., None], mask=mask)
    with pytest.warns(InputWarning, match="candidate_features should be unit-norm"):
        call(candidate_features=lambda x: 2 * x)


def test_a_loss_may_be_asked_for_as_a_dict() -> None:
    assert call(output_dict=True).keys() == {"ranked_lists_loss"}
