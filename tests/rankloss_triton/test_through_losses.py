"""``kernel="triton"`` of the losses: the core's one door to the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rankloss
from devices import DEVICE

N, D = 5, 16
generator = torch.Generator().manual_seed(0)
IMAGE, TEXT, *TEACHER = (F.normalize(torch.randn(N, D, generator=generator), dim=-1) for _ in range(4))
TEXT[4] = TEXT[2]
REFERENCE = dict(zip(("reference_image_features", "reference_text_features"), TEACHER, strict=True))


def loss_and_gradients(teacher: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (IMAGE, TEXT, torch.tensor(14.3))]
    references = {name: x.to(DEVICE) for name, x in teacher.items()}
    loss = rankloss.RankClipLoss(schedule="constant", chunk_size=3, **options)(*inputs, **references)
    return [x.detach() for x in (loss, *torch.autograd.grad(loss, inputs))]


@pytest.mark.parametrize(
    ("options", "teacher"),
    [
        ({}, {}),
        ({"method": "bin", "bins": 3}, REFERENCE),
        ({"top_k": 2, "diagonal": False}, {}),
        ({"lambda_cross": 0, "lambda_in": 0}, {}),
    ],
    ids=["sort", "bin by a teacher", "top_k without the own pair", "no rank term"],
)
def test_value_and_gradients_are_those_of_torchs_operations(options: dict, teacher: dict) -> None:
    found = loss_and_gradients(teacher, torch.float32, kernel="triton", **options)
    for x, y in zip(found, loss_and_gradients(teacher, torch.float32, **options), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_case_without_a_kernel_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"kernel='triton' .*float64"):
        loss_and_gradients({}, torch.float64, kernel="triton")
