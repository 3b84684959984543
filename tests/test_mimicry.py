"""``MimicryLoss``: its entries, its memory and its errors.

Values and gradients are in ``conditions`` and, on several processes, in ``test_distributed``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batches import random_batch, teacher_of
from memory import TensorSizes
from rankloss import ClipLoss, MimicryLoss

IMAGE, TEXT = TEACHER = ("reference_image_features", "reference_text_features")


def batch(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return random_batch(0, n, d, 10.0).leaves()


# --- entries ----------------------------------------------------------------------------------------------


def test_entries_are_the_bases_and_its_own_and_add_up() -> None:
    loss, teacher = MimicryLoss(weight=0.5), teacher_of(6, 4)
    entries = loss(*batch(), output_dict=True, **teacher)
    assert list(entries) == ["contrastive_loss", "mimicry_loss"]
    assert torch.equal(entries["contrastive_loss"], ClipLoss()(*batch()))
    torch.testing.assert_close(loss(*batch(), **teacher), sum(entries.values()))


def test_one_modality_has_the_distances_of_that_modality() -> None:
    loss, teacher = MimicryLoss(), teacher_of(6, 4)
    each = [loss(*batch(), output_dict=True, **{x: teacher[x]})["mimicry_loss"] for x in TEACHER]
    torch.testing.assert_close(sum(each), loss(*batch(), output_dict=True, **teacher)["mimicry_loss"])


def test_a_teacher_gets_no_gradient_and_a_copy_of_it_costs_nothing() -> None:
    v, t, s = batch()
    teacher = {name: x.requires_grad_() for name, x in teacher_of(6, 4).items()}
    MimicryLoss()(v, t, s, **teacher).backward()
    assert all(x.grad is None for x in teacher.values())
    loss = MimicryLoss(weight=1)
    same = loss(v, t, s, output_dict=True, **{IMAGE: v, TEXT: t})
    assert same["mimicry_loss"] == 0


def test_no_matrix_of_all_pairs_is_held() -> None:
    n = 4096  # beyond the size up to which whole matrices are kept
    v, t, s = (x.float().detach() for x in batch(n))
    with TensorSizes() as sizes:
        loss = MimicryLoss(ClipLoss(memory_budget=0))
        loss(v.requires_grad_(), t, s, **{name: x.float() for name, x in teacher_of(n, 4).items()}).backward()
    assert sizes.largest < n * n


def test_a_narrower_teacher_is_compared_with_zeros_in_the_other_dimensions() -> None:
    v, t, s = batch()
    teacher = teacher_of(6, 3)
    distance = MimicryLoss(weight=2)(v, t, s, output_dict=True, **teacher)["mimicry_loss"]
    (3 * distance).backward()
    padded = {name: torch.cat([x, torch.zeros(6, 1)], 1) for name, x in teacher.items()}
    expected = 2 * sum((x - y).square().sum(1).mean() for x, y in zip((v, t), padded.values(), strict=True))
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(v.grad, 3 * 2 * 2 * (v - padded[IMAGE]) / 6)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "components", "named"),
    [
        ({}, None, f"MimicryLoss needs {IMAGE} or {TEXT}.* neither"),
        (
            teacher_of(6, 5),
            None,
            rf"{IMAGE} must have at most .* width, 4,.* got 5.*components\(4\)",
        ),
        (teacher_of(6, 5), torch.eye(6)[:, :4], rf"components must be \(5, 4\) for {IMAGE}.* \(6, 4\)"),
        (teacher_of(5, 4), None, rf"{IMAGE} must have one row per pair, 6.* \(5, 4\)"),
        ({TEXT: torch.full((6, 4), torch.nan)}, None, f"{TEXT} must be finite.* row 0 has norm nan"),
    ],
)
def test_a_teacher_or_components_that_do_not_fit_are_named(teacher: Any, components: Any, named: str) -> None:
    loss = MimicryLoss()
    loss.components = components
    with pytest.raises(ValueError, match=named):
        loss(*batch(), **teacher)
