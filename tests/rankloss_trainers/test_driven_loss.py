"""A driven loss: features in; terms and metrics, told apart, out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
import rankloss_baselines
from rankloss_baselines.entries import alip_log
from rankloss_trainers.clock import Position
from rankloss_trainers.driven_loss import DrivenLoss
from rankloss_trainers.logging import RankClipLog


def features(count: int = 2) -> list[Tensor]:
    rows = normalize(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    return [x.clone().requires_grad_() for x in rows]


class Named(nn.Module):
    """A loss of given entries."""

    def __init__(self, **entries: Tensor) -> None:
        super().__init__()
        self.entries = entries
        self.seen: list[dict[str, Any]] = []

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        self.seen.append(inputs)
        return self.entries


def test_terms_are_told_from_metrics_by_their_names() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    criterion = Named(a_loss=3 * x, depth=5 * x.detach(), b_loss=x * x)
    loss = DrivenLoss(criterion)
    loss.clock.start_step(1, 9)
    image_features, text_features = features()
    terms, metrics = entries = loss(image_features, text_features, torch.tensor(4.0), logit_bias=None)
    assert terms == {"a_loss": 6, "b_loss": 4}
    assert metrics == {"depth": 10}
    entries.total.backward()
    assert x.grad == 7
    (seen,) = criterion.seen
    assert seen.pop("image_features") is image_features
    assert seen.pop("text_features") is text_features
    assert seen == {"logit_scale": 4, "logit_bias": None, "output_dict": True}


def test_loss_without_a_term_is_an_error() -> None:
    loss = DrivenLoss(Named(depth=torch.tensor(1.0)))
    loss.clock.start_step(1, 9)
    with pytest.raises(ValueError, match="Named gives no term to train: no name ends in _loss, got depth"):
        loss(*features(), torch.tensor(4.0))


def test_entry_with_a_gradient_and_another_name_is_an_error() -> None:
    """A base that calls its loss ``itc`` would be shown and not trained, beside rank terms that are."""

    def base(image_features: Tensor, text_features: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"itc": (image_features - text_features).square().mean()}

    loss = DrivenLoss(rankloss.RankClipLoss(base, schedule="constant"), evaluate=RankClipLog())
    loss.clock.start_step(1, 9)
    with pytest.raises(ValueError, match=r"RankClipLoss gives 'itc' with a gradient.* call it itc_loss, or"):
        loss(*features(), torch.tensor(4.0))


@pytest.mark.parametrize("step", [1, 2, 3])  # λ = 0, ½, 1
def test_rankclip_is_what_it_is_alone(step: int) -> None:
    criterion = rankloss.RankClipLoss(schedule="linear")
    loss = DrivenLoss(criterion, evaluate=RankClipLog(agreement_every=1))
    loss.clock.start_step(step, 3)
    driven, alone = features(), features()
    scale = torch.tensor(8.0)
    entries = loss(*driven, scale)
    assert list(entries.metrics) == [
        *("rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau")
    ]
    assert entries.metrics["rank_lambda"] == (step - 1) / 2
    expected = criterion(*alone, scale)
    assert torch.equal(entries.total, expected)
    (0.3 * entries.total).backward()
    (0.3 * expected).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(driven, alone, strict=True))


@pytest.mark.parametrize("resumed_at", range(1, 5))
def test_agreement_is_measured_at_the_first_step_and_then_at_every_so_many(resumed_at: int) -> None:
    loss = DrivenLoss(rankloss.RankClipLoss(schedule="constant"), evaluate=RankClipLog(agreement_every=3))
    measured, last = [], None
    for step in range(resumed_at, 9):
        loss.clock.start_step(step, 9)
        for _ in range(2):  # accumulated
            pair = normalize(torch.randn(2, 6, 4), dim=-1)
            tau = loss(*pair, torch.tensor(8.0)).metrics["cross_modal_tau"].item()
            if tau != last:
                measured.append(step)
            last = tau
    assert measured == [step for step in range(resumed_at, 9) if step == resumed_at or step % 3 == 1]


def test_agreement_is_measured_where_a_loss_is_called_for_some_steps_only() -> None:
    """One of several losses, which take turns."""
    log = RankClipLog(agreement_every=4)
    loss = DrivenLoss(rankloss.RankClipLoss(schedule="constant"), evaluate=log)
    measured: list[int] = []
    for step in range(2, 14, 2):
        loss.clock.start_step(step, 13)
        expected = log.next_measured(step - 1)
        before = log._measured
        loss(*normalize(torch.randn(2, 6, 4), dim=-1), torch.tensor(8.0))
        if log._measured != before:
            measured.append(step)
        assert (expected == step - 1) == (log._measured != before)
    assert measured == [2, 6, 10]


@pytest.mark.parametrize("step", [1, 2])  # λ = 0, ½
@pytest.mark.parametrize("names", [("image", "text"), ("text",)])
def test_raw_terms_are_ranked_by_the_teacher_that_is_given(step: int, names: tuple[str, ...]) -> None:
    in_run = {"lambda_cross": float(len(names) == 2)}
    criterion = rankloss.RankClipLoss(schedule="linear", **in_run)
    loss = DrivenLoss(criterion, evaluate=RankClipLog())
    loss.clock.start_step(step, 3)
    pair, teacher = features(), features(4)[2:]
    given = {f"reference_{name}_features": x for name, x in zip(names, teacher, strict=False)}
    entries = loss(*pair, torch.tensor(8.0), **given)
    raw = rankloss.RankConsistency(cross_modal=in_run["lambda_cross"])
    expected = raw(*pair, torch.tensor(8.0), output_dict=True, **given)
    for term in ("cross_modal", "in_modal") if len(names) == 2 else ("in_modal",):
        torch.testing.assert_close(entries.metrics[f"{term}_raw"], expected[f"{term}_loss"].detach())
        weight = (step - 1) / 2 / 16
        torch.testing.assert_close(entries.terms[f"{term}_loss"], weight * expected[f"{term}_loss"])


def test_histories_move_in_the_first_call_of_a_step_only() -> None:
    loss = DrivenLoss(rankloss_baselines.AlipLoss(momentum=0.5), evaluate=alip_log)
    image_features, text_features, caption_features = features(3)
    scale = torch.tensor(8.0)
    seen = []
    loss.start_epoch(Position(epoch=0, epochs=1, steps=2, accum_freq=2))
    for _ in range(4):
        metrics = loss(image_features, text_features, scale, caption_features=caption_features).metrics
        seen.append(metrics["alip_text_caption"].item())
    mean = (text_features * caption_features).sum(-1).mean().item()
    assert seen == pytest.approx([(1 + mean) / 2] * 2 + [(1 + 3 * mean) / 4] * 2, rel=1e-6)
