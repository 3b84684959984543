"""A loss whose terms are separated from its metrics, and what is logged of RankCLIP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
from rankloss_baselines import CyClipLoss
from rankloss_trainers.clock import Position, tell
from rankloss_trainers.driven_loss import DrivenLoss, Entries
from rankloss_trainers.logging import RankClipLog

SCALE = torch.tensor(8.0)


def features(count: int = 2, seed: int = 0) -> list[Tensor]:
    rows = normalize(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return [x.clone().requires_grad_() for x in rows]


def inputs(pair: list[Tensor]) -> dict[str, Tensor]:
    return {"image_features": pair[0], "text_features": pair[1], "logit_scale": SCALE}


def ranked(step: int, total_steps: int, **options: Any) -> rankloss.RankClipLoss:
    loss = rankloss.RankClipLoss(**{"schedule": "linear", **options})
    loss.set_progress(step, total_steps)
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
    loss, pair = DrivenLoss(criterion), features()
    loss.start_epoch(Position(epoch=0, epochs=1, steps=2, accum_freq=1))
    terms, metrics = entries = loss(*pair, SCALE, logit_bias=None)
    assert terms == {"a_loss": 6, "b_loss": 4}
    assert metrics == {"depth": 10}
    entries.total.backward()
    assert x.grad == 7
    seen = {name: value for name, value in criterion.seen.items() if name not in inputs(pair)}
    assert seen == {"logit_bias": None, "output_dict": True}
    assert all(criterion.seen[name] is value for name, value in inputs(pair).items())


@pytest.mark.parametrize(
    ("names", "message"),
    [(["depth"], "no name ends in _loss, got depth"), (["a_loss", "itc"], "call it itc_loss, or detach it")],
)
def test_entries_that_nobody_could_tell_apart_are_refused(names: list[str], message: str) -> None:
    """A base that calls its loss ``itc`` would be shown and not trained, beside terms that are."""
    entries = {name: torch.tensor(1.0, requires_grad=True) for name in names}
    with pytest.raises(ValueError, match=f"Named.* {message}"):
        Entries.of(Named(), entries)


@pytest.mark.parametrize("step", [1, 2, 3])  # λ = 0, ½, 1
def test_rankclip_is_what_it_is_alone(step: int) -> None:
    loss, driven, alone = ranked(step, 3), features(), features()
    entries = Entries.of(loss, RankClipLog(agreement_every=1)(loss, step, **inputs(driven)))
    raw = ("cross_modal_raw", "in_modal_raw") if step > 1 else ()
    assert list(entries.metrics) == ["rank_lambda", *raw, "cross_modal_tau", "in_modal_tau"]
    assert entries.metrics["rank_lambda"] == (step - 1) / 2
    expected = loss(*alone, SCALE)
    assert torch.equal(entries.total, expected)
    (0.3 * entries.total).backward()
    (0.3 * expected).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(driven, alone, strict=True))


@pytest.mark.parametrize("names", [("image", "text"), ("text",)])
def test_raw_terms_are_ranked_by_the_teacher_that_is_given(names: tuple[str, ...]) -> None:
    cross = float(len(names) == 2)
    loss = ranked(2, 3, lambda_cross=cross)  # λ = ½
    pair, teacher = features(), features(4)[2:]
    given = {f"reference_{name}_features": x for name, x in zip(names, teacher, strict=False)}
    entries = RankClipLog()(loss, 1, **inputs(pair), **given)
    expected = rankloss.RankConsistency(cross_modal=cross)(*pair, SCALE, output_dict=True, **given)
    for term in ("cross_modal", "in_modal") if cross else ("in_modal",):
        torch.testing.assert_close(entries[f"{term}_raw"], expected[f"{term}_loss"].detach())
        torch.testing.assert_close(entries[f"{term}_loss"], expected[f"{term}_loss"] / 32)


# --- where training stands ---------------------------------------------------------------------------------


class Listener(nn.Module):
    """A loss that records what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []

    def set_progress(self, step: int, total_steps: int) -> None:
        self.told.append((step, total_steps))


@given(
    epochs=st.integers(1, 4), steps=st.integers(1, 4), accum_freq=st.integers(1, 3), resumed=st.integers(0, 3)
)
def test_every_step_is_told_once_and_a_resumed_run_is_told_the_same(
    epochs: int, steps: int, accum_freq: int, resumed: int
) -> None:
    def told(first_epoch: int) -> tuple[list[tuple[int, int]], list[int]]:
        listener, calls = Listener(), []
        loss = DrivenLoss(listener, evaluate=lambda _, step, **__: calls.append(step) or {"a_loss": SCALE})
        for epoch in range(first_epoch, epochs):
            loss.start_epoch(Position(epoch, epochs, steps, accum_freq))
            for _ in range(steps * accum_freq):
                loss(SCALE, SCALE, SCALE)
        return listener.told, calls

    whole, calls = told(0)
    assert whole == [(step + 1, epochs * steps) for step in range(epochs * steps)]
    assert calls == [s for _ in range(epochs) for s in range(steps) for _ in range(accum_freq)]
    resumed = min(resumed, epochs)
    assert told(resumed)[0] == whole[resumed * steps :]


def test_loss_that_is_told_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="start_epoch"):
        DrivenLoss(Listener())(SCALE, SCALE, SCALE)


def test_every_part_that_has_the_method_is_told() -> None:
    listener = Listener()
    loss = CyClipLoss(rankloss.RankClipLoss(nn.Sequential(listener), schedule="linear"))
    tell(loss, "set_progress", 2, 3)
    assert loss.base.schedule_value == 0.5
    assert listener.told == [(2, 3)]
