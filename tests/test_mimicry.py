"""``MimicryLoss``: its entries, its memory and its errors.

Values and gradients are in ``conditions`` and, on several processes, in ``test_distributed``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batches import gradients, random_batch, teacher_of
from memory import TensorSizes
from rankloss import ClipLoss, MimicryLoss

IMAGE, TEXT = TEACHER = ("reference_image_features", "reference_text_features")


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and the scale of six pairs."""
    return random_batch(seed=0, n=6, d=4, scale=10.0).leaves()


# --- entries ----------------------------------------------------------------------------------------------


def test_entries_are_the_bases_and_its_own_and_add_up() -> None:
    """The values themselves are in ``conditions``."""
    loss, teacher = MimicryLoss(weight=0.5), teacher_of(n=6, d=4)
    entries = loss(*batch(), output_dict=True, **teacher)
    assert list(entries) == ["contrastive_loss", "mimicry_loss"]
    assert torch.equal(entries["contrastive_loss"], ClipLoss()(*batch()))
    torch.testing.assert_close(loss(*batch(), **teacher), sum(entries.values()))


def test_one_modality_has_the_distances_of_that_modality() -> None:
    for name, student in zip(TEACHER, batch()[:2], strict=True):
        of_teacher = teacher_of(n=6, d=4)[name]
        entries = MimicryLoss(weight=2)(*batch(), output_dict=True, **{name: of_teacher})
        owed = 2 * (student - of_teacher).square().sum(1).mean()
        torch.testing.assert_close(entries["mimicry_loss"], owed)


def test_a_teacher_gets_no_gradient() -> None:
    teacher = {name: x.requires_grad_() for name, x in teacher_of(n=6, d=4).items()}
    v, t, s = batch()
    MimicryLoss()(v, t, s, **teacher).backward()
    assert v.grad is not None
    assert all(x.grad is None for x in teacher.values())


def test_a_student_that_equals_its_teacher_has_a_term_of_zero() -> None:
    v, t, s = batch()
    entries = MimicryLoss(weight=1)(v, t, s, output_dict=True, **{IMAGE: v, TEXT: t})
    assert entries["mimicry_loss"] == 0


def test_no_matrix_of_all_pairs_is_held() -> None:
    n = 4096
    v, t, s = random_batch(seed=0, n=n, d=4, scale=10.0).leaves(torch.float32)
    teacher = {name: x.float() for name, x in teacher_of(n=n, d=4).items()}
    loss = MimicryLoss(ClipLoss(memory_budget=0))
    with TensorSizes() as sizes:
        loss(v, t, s, **teacher).backward()
    assert n * 4 <= sizes.largest < n * n  # the features' own entries at least are counted


def test_a_narrower_teacher_is_compared_with_zeros_in_the_other_dimensions() -> None:
    v, t, s = batch()
    teacher = teacher_of(n=6, d=3)
    distance = MimicryLoss(weight=2)(v, t, s, output_dict=True, **teacher)["mimicry_loss"]
    images, texts = (torch.cat([teacher[name], torch.zeros(6, 1)], 1) for name in TEACHER)
    owed = 2 * ((v - images).square().sum(1).mean() + (t - texts).square().sum(1).mean())
    torch.testing.assert_close(distance, owed)
    torch.testing.assert_close(
        gradients(distance, (v, t), upstream=3.0), gradients(owed, (v, t), upstream=3.0)
    )


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "components", "named"),
    [
        pytest.param({}, None, f"MimicryLoss needs {IMAGE} or {TEXT}.* neither", id="no teacher"),
        pytest.param(
            teacher_of(n=6, d=5),
            None,
            rf"{IMAGE} must have at most .* width, 4,.* got 5.*components\(4\)",
            id="a teacher wider than the student",
        ),
        pytest.param(
            teacher_of(n=6, d=5),
            torch.eye(6)[:, :4],
            rf"components must be \(5, 4\) for {IMAGE}.* \(6, 4\)",
            id="components of another teacher",
        ),
        pytest.param(
            teacher_of(n=5, d=4),
            None,
            rf"{IMAGE} must have one row per pair, 6.* \(5, 4\)",
            id="a row too few",
        ),
        pytest.param(
            {TEXT: torch.full((6, 4), torch.nan)},
            None,
            f"{TEXT} must be finite.* row 0 has norm nan",
            id="NaN",
        ),
    ],
)
def test_a_teacher_or_components_that_do_not_fit_are_named(teacher: Any, components: Any, named: str) -> None:
    loss = MimicryLoss()
    loss.components = components
    with pytest.raises(ValueError, match=named):
        loss(*batch(), **teacher)
