"""Data that hold a teacher's features, as MobileCLIP's do: its patched trainer hands them to the loss."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import reference
from rankloss_open_clip.arguments import check_run, chosen
from rankloss_open_clip.training import build_loss

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


@pytest.mark.parametrize("options", [{"rankclip_reference": "teacher"}, {"rankclip_reference": "own"}])
def test_the_loss_ranks_by_what_it_is_handed_and_keeps_its_base(options: dict[str, str]) -> None:
    loss = build_loss(DRClipLoss(), arguments(**options), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    assert found["distill_loss"] == sum(x.sum() for x in TEACHER.values())
    given = {f"reference_{name.removeprefix('dist_')}": x.numpy() for name, x in TEACHER.items()}
    taught = given if options["rankclip_reference"] == "teacher" else {}
    students = {name: x.double().numpy() for name, x in STUDENT.items()}
    expected = reference.cross_modal(**students, logit_scale=10.0, **taught, top_k=4)
    assert found["cross_modal_raw"].item() == pytest.approx(expected, rel=1e-5)


def test_without_its_distillation_the_base_is_clips() -> None:
    options = {
        "loss": "rankclip-distill",
        "rankclip_reference": "teacher",
        "rankclip_distill_loss": "exclude",
    }
    loss = build_loss(DRClipLoss(), arguments(**options), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    logits = 10 * STUDENT["image_features"] @ STUDENT["text_features"].T
    expected = (
        F.cross_entropy(logits, torch.arange(ROWS)) + F.cross_entropy(logits.T, torch.arange(ROWS))
    ) / 2
    torch.testing.assert_close(found["contrastive_loss"], expected)
    assert "distill_loss" not in found


def test_the_option_names_a_teacher() -> None:
    args = arguments(loss="rankclip-distill")
    check_run(chosen(args), args)
    args.rankclip_reference_features = "folder"
    with pytest.raises(ValueError, match=r"--loss-teacher: .*--dataset-reinforcement"):
        check_run(chosen(args), args)
