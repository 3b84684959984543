"""A driven loss: features in; terms and metrics, told apart, out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
from rankloss_baselines import AlipLoss
from rankloss_baselines.entries import alip_log
from rankloss_trainers.clock import Position
from rankloss_trainers.driven_loss import DrivenLoss
from rankloss_trainers.logging import RankClipLog

SCALE = torch.tensor(8.0)


def features(count: int = 2, seed: int = 0) -> list[Tensor]:
    rows = normalize(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return [x.clone().requires_grad_() for x in rows]


def ranked(step: int, total_steps: int, log: RankClipLog | None = None, **options: Any) -> DrivenLoss:
    loss = DrivenLoss(
        rankloss.RankClipLoss(**{"schedule": "linear", **options}), evaluate=log or RankClipLog()
    )
    loss.clock.start_step(step, total_steps)
    return loss


class Named(nn.Module):
    """A loss of given entries."""

    def __init__(self, **entries: Tensor) -> None:
        super().__init__()
        self.entries = entries
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        self.seen = inputs
        return self.entries


def test_terms_are_told_from_metrics_by_their_names() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    criterion = Named(a_loss=3 * x, depth=5 * x.detach(), b_loss=x * x)
    loss = DrivenLoss(criterion)
    loss.clock.start_step(1, 9)
    image_features, text_features = features()
    terms, metrics = entries = loss(image_features, text_features, SCALE, logit_bias=None)
    assert terms == {"a_loss": 6, "b_loss": 4}
    assert metrics == {"depth": 10}
    entries.total.backward()
    assert x.grad == 7
    assert criterion.seen.pop("image_features") is image_features
    assert criterion.seen.pop("text_features") is text_features
    assert criterion.seen == {"logit_scale": SCALE, "logit_bias": None, "output_dict": True}


@pytest.mark.parametrize(
    ("names", "message"),
    [(["depth"], "no name ends in _loss, got depth"), (["a_loss", "itc"], "call it itc_loss, or detach it")],
)
def test_entries_that_nobody_could_tell_apart_are_refused(names: list[str], message: str) -> None:
    """A base that calls its loss ``itc`` would be shown and not trained, beside terms that are."""
    loss = DrivenLoss(Named(**{name: torch.tensor(1.0, requires_grad=True) for name in names}))
    loss.clock.start_step(1, 9)
    with pytest.raises(ValueError, match=f"Named.* {message}"):
        loss(*features(), SCALE)


@pytest.mark.parametrize("step", [1, 2, 3])  # λ = 0, ½, 1
def test_rankclip_is_what_it_is_alone(step: int) -> None:
    loss = ranked(step, 3, RankClipLog(agreement_every=1))
    driven, alone = features(), features()
    entries = loss(*driven, SCALE)
    raw = ("cross_modal_raw", "in_modal_raw") if step > 1 else ()
    assert list(entries.metrics) == ["rank_lambda", *raw, "cross_modal_tau", "in_modal_tau"]
    assert entries.metrics["rank_lambda"] == (step - 1) / 2
    expected = loss.criterion(*alone, SCALE)
    assert torch.equal(entries.total, expected)
    (0.3 * entries.total).backward()
    (0.3 * expected).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(driven, alone, strict=True))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(range(first, 9), {first, *range(1, 9, 3)} & {*range(first, 9)}) for first in range(1, 5)]
    + [(range(2, 14, 2), {2, 4, 8, 10})],  # of several losses, which take turns
)
def test_agreement_is_measured_at_the_first_step_and_then_at_every_so_many(
    steps: range, expected: set[int]
) -> None:
    log = RankClipLog(agreement_every=3)
    loss, measured, last = ranked(1, 14, log), set(), None
    for step in steps:
        loss.clock.start_step(step, 14)
        tau = loss(*features(seed=2 * step), SCALE).metrics["cross_modal_tau"].item()
        if tau != last:
            measured.add(step)
        last = tau
    assert measured == expected


@pytest.mark.parametrize("names", [("image", "text"), ("text",)])
def test_raw_terms_are_ranked_by_the_teacher_that_is_given(names: tuple[str, ...]) -> None:
    cross = float(len(names) == 2)
    loss = ranked(2, 3, lambda_cross=cross)  # λ = ½
    pair, teacher = features(), features(4)[2:]
    given = {f"reference_{name}_features": x for name, x in zip(names, teacher, strict=False)}
    entries = loss(*pair, SCALE, **given)
    expected = rankloss.RankConsistency(cross_modal=cross)(*pair, SCALE, output_dict=True, **given)
    for term in ("cross_modal", "in_modal") if cross else ("in_modal",):
        torch.testing.assert_close(entries.metrics[f"{term}_raw"], expected[f"{term}_loss"].detach())
        torch.testing.assert_close(entries.terms[f"{term}_loss"], expected[f"{term}_loss"] / 32)


def test_histories_move_in_the_first_call_of_a_step_only() -> None:
    loss = DrivenLoss(AlipLoss(momentum=0.5), evaluate=alip_log)
    v, t, c = features(3)
    seen = []
    loss.start_epoch(Position(epoch=0, epochs=1, steps=2, accum_freq=2))
    for _ in range(4):
        metrics = loss(v, t, SCALE, caption_features=c).metrics
        seen.append(metrics["alip_text_caption"].item())
    mean = (t * c).sum(-1).mean().item()
    assert seen == pytest.approx([(1 + mean) / 2] * 2 + [(1 + 3 * mean) / 4] * 2, rel=1e-6)
