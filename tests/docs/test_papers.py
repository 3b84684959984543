"""The table of papers: each is there, and what it names can be built."""

from __future__ import annotations

import re

import pytest
import torch
from tools_folder import ROOT

import rankloss
import rankloss_baselines

PAGE = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
ROWS = [re.split(r" \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| [")]
PAPERS = "RankCLIP CyCLIP ALIP CLIP-KD UniCL NegCLIP LambdaLoss ListNet ListMLE DPO SigLIP LiT"


def test_every_paper_has_a_row_with_a_link_and_what_was_measured() -> None:
    assert [re.findall(r"\[([\w-]+)\]\(https:", row[0]) for row in ROWS] == [[x] for x in PAPERS.split()]
    for _, _, _, measured in ROWS:
        assert re.search(r"\d\.\d\d ± \d|not measured|\]\(\w+\.md#", measured)


@pytest.mark.parametrize("call", re.findall(r"`([\w.]+\([^`]*\))`", PAGE))
def test_what_a_row_names_can_be_built(call: str) -> None:
    names = {**vars(rankloss), **vars(rankloss_baselines), "rankloss": rankloss}
    assert isinstance(eval(call, names), torch.nn.Module)


def test_feature_distillation_is_that_of_the_paper() -> None:
    """There 2000 times the mean over pairs and dimensions."""
    v, t, teacher_v, teacher_t = torch.nn.functional.normalize(torch.randn(4, 6, 512), dim=-1)
    (call,) = re.findall(r"`(MimicryLoss\([^`]*\))`", PAGE)
    loss = eval(call, vars(rankloss))
    teacher = {"reference_image_features": teacher_v, "reference_text_features": teacher_t}
    found = loss(v, t, 10.0, output_dict=True, **teacher)["mimicry_loss"]
    expected = 2000 * ((v - teacher_v).square().mean() + (t - teacher_t).square().mean())
    torch.testing.assert_close(found, expected)
