"""The value that the raw rank terms have by chance."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import rankloss
from rankloss_trainers.logging import RankClipLog, chance

N = 12


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_k": 40}, {"diagonal": False}, {"model": "top_one"}],
)
def test_chance_is_the_value_of_equal_scores(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    equal, scale = torch.eye(4)[:1].repeat(N, 1), 7.0
    teacher = torch.nn.functional.normalize(torch.randn(2, N, 5), dim=-1)
    taught = {"reference_image_features": teacher[0], "reference_text_features": teacher[1]}
    if options.get("model") == "top_one":
        options = {**options, "reference_scale": 30.0}
    loss = rankloss.RankClipLoss(schedule="constant", **options)
    log, inputs = RankClipLog(), {"image_features": equal, "text_features": equal, "logit_scale": scale}
    with caplog.at_level(logging.INFO, "rankloss_trainers"):
        for step in range(2):
            entries = log(loss, loss(**inputs, output_dict=True, **taught), step, {**inputs, **taught})
    value = chance(loss.consistency.options, N)
    assert value is not None
    assert entries["cross_modal_raw"].item() == pytest.approx(value, rel=1e-4)
    assert entries["in_modal_raw"].item() == pytest.approx(value, rel=1e-4)
    assert caplog.text.count(f"Raw rank terms of chance: {value:.3f} nats") == 1


def test_chance_is_unknown_where_ties_or_weights_decide_it() -> None:
    for options in ({"lists": "batch"}, {"method": "bin"}, {"discount": "log"}):
        assert chance(rankloss.RankOptions(**options), N) is None
