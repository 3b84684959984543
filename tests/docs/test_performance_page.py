"""The estimate of docs/performance.md is computed from what the page assumes."""

from __future__ import annotations

import re

import pytest
import torch
from tools_folder import ROOT
from torch.utils.flop_counter import FlopCounterMode

PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
PEAKS = {"RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}  # dense bf16: a multiply-add counts twice
((GFLOP, USED),) = re.findall(r"(\d+) GFLOP a pair at (\d+) % of the dense bf16 peak", PAGE)


def test_shares_of_a_step_are_those_of_the_pages_times() -> None:
    section = PAGE.partition("**An estimate, not a measurement**")[2].partition("**The kernels**")[0]
    cards, *rows = re.findall(r"^\| (\S+ × \S+) \| (.*) \| (.*) \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 4, "the table has a heading and four rows"
    for size, *cells in rows:
        pairs = int(size.partition(" × ")[0].replace(",", ""))
        for card, cell in zip(cards[1:], cells, strict=True):
            step = 1e3 * pairs * float(GFLOP) * 1e9 / (float(USED) / 100 * PEAKS[card])
            times = cell.partition(": ")[0]
            shares = [f"{100 * float(x.replace(',', '')) / step:.0f}" for x in times.split(", ")]
            assert cell == f"{times}: {', '.join(dict.fromkeys(shares))} %", (size, card)


def test_operations_of_a_pair_are_those_that_torch_counts() -> None:
    """Forward and backward of open_clip's ViT-B/32."""
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
        features = model(torch.empty(1, 3, 224, 224), torch.empty(1, 77, dtype=torch.long))[:2]
        torch.cat(features).sum().backward()
    assert counter.get_total_flops() / 1e9 == pytest.approx(float(GFLOP), rel=0.01)
