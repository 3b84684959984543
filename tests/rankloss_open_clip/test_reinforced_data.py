"""Data that hold a teacher's features, as MobileCLIP's do: its patched trainer hands them to the loss."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from teacher_features import stored, unit_rows
from torch import Tensor, nn

from rankloss import reference
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.training import build_loss, start

ROWS = 12


class DRClipLoss(nn.Module):
    """The patch's own loss: it needs the teacher's features, and takes those of synthetic captions."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        syn_text_features: Tensor | None = None,
        dist_syn_text_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor]:
        assert output_dict
        distances = (image_features - text_features).square().sum()
        return {
            "contrastive_loss": distances,
            "distill_loss": dist_image_features.sum() + dist_text_features.sum(),
        }


def unit(*sizes: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)), dim=-1)


STUDENT = {"image_features": unit(ROWS, 8, seed=0), "text_features": unit(ROWS, 8, seed=1)}
# Two teachers side by side.
TEACHER = {
    f"dist_{name}": torch.cat([unit(ROWS, 5, seed=seed), unit(ROWS, 4, seed=seed + 1)], 1)
    for name, seed in (("image_features", 2), ("text_features", 4))
}
SYNTHETIC = {
    "syn_text_features": unit(ROWS, 8, seed=6),
    "dist_syn_text_features": TEACHER["dist_text_features"],
}


def arguments(**options: Any) -> Namespace:
    given = {"loss": "rankclip", "rankclip_schedule": "constant", "rankclip_top_k": 4, **options}
    return Namespace(dataset_reinforcement=True, epochs=2, device="cpu", **given)


@pytest.mark.parametrize("options", [{"loss_teacher": "given"}, {}])
def test_a_loss_that_learns_from_the_teacher_takes_the_place_of_the_distillation(
    options: dict[str, str],
) -> None:
    loss = build_loss(DRClipLoss(), arguments(**options), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    if options:
        assert "distill_loss" not in found
    else:
        assert found["distill_loss"] == sum(x.sum() for x in TEACHER.values())
    given = {f"reference_{name.removeprefix('dist_')}": x.numpy() for name, x in TEACHER.items()}
    taught = given if options else {}
    students = {name: x.double().numpy() for name, x in STUDENT.items()}
    expected = reference.cross_modal(**students, logit_scale=10.0, **taught, top_k=4)
    assert found["cross_modal_raw"].item() == pytest.approx(expected, rel=1e-5)


def test_without_its_distillation_the_base_is_clips() -> None:
    loss = build_loss(DRClipLoss(), arguments(loss="rankclip-distill"), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    logits = 10 * STUDENT["image_features"] @ STUDENT["text_features"].T
    expected = (
        F.cross_entropy(logits, torch.arange(ROWS)) + F.cross_entropy(logits.T, torch.arange(ROWS))
    ) / 2
    torch.testing.assert_close(found["contrastive_loss"], expected)
    assert "distill_loss" not in found


def test_the_option_names_a_teacher(tmp_path: Path) -> None:
    args = arguments(loss="rankclip-distill")
    assert start(args, *chosen(args)).use_of_teacher == "required"
    args.loss_teacher = stored(tmp_path / "x", text_features=unit_rows(4, 2))
    with pytest.raises(ValueError, match=r"--loss-teacher: .*--dataset-reinforcement"):
        start(args, *chosen(args))
