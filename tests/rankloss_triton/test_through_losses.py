"""``kernel="triton"`` of the losses: the core's one door to the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankloss
from batches import gradients, random_batch, teacher_of
from counting import count_calls


def loss_and_gradients(
    *, has_teacher: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """RankCLIP's loss of five pairs, in chunks, and its gradients by images, texts and scale."""
    pairs = 5
    inputs = random_batch(seed=0, n=pairs, d=16, scale=14.3, duplicates=1).leaves(dtype)
    teacher = teacher_of(pairs) if has_teacher else {}
    loss = rankloss.RankClipLoss(schedule="constant", chunk_size=3, **options)
    value = loss(*inputs, **teacher)
    return [value, *gradients(value, inputs, upstream=-1.7)]


@pytest.mark.parametrize(
    ("options", "has_teacher"),
    [
        ({}, False),
        ({"method": "bin", "bins": 3}, True),
        ({"top_k": 2, "diagonal": False}, False),
    ],
    ids=["sort", "bin by a teacher", "top_k without the own pair"],
)
def test_value_and_gradients_are_those_of_torchs_operations(
    options: dict, has_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = count_calls(monkeypatch, kernel="rankloss_triton.launching.launch")
    of_kernel = loss_and_gradients(has_teacher=has_teacher, kernel="triton", **options)
    assert launches["kernel"] > 0
    of_torch = loss_and_gradients(has_teacher=has_teacher, kernel="torch", **options)
    torch.testing.assert_close(of_kernel, of_torch, rtol=1e-4, atol=1e-5)


def test_without_a_rank_term_no_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = count_calls(monkeypatch, kernel="rankloss_triton.launching.launch")
    options: dict[str, Any] = {"lambda_cross": 0, "lambda_in": 0}
    value_and_gradients = loss_and_gradients(kernel="triton", **options)
    assert launches["kernel"] == 0
    torch.testing.assert_close(value_and_gradients, loss_and_gradients(kernel="torch", **options))


def test_a_case_without_a_kernel_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"kernel='triton' does not serve here: .*not in float64"):
        loss_and_gradients(dtype=torch.float64, kernel="triton")
