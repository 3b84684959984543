"""The clock: who is told what, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankloss
from rankloss_baselines import CyClipLoss
from rankloss_trainers.clock import Clock, Position, tell


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
        loss = Listener()
        clock, calls = Clock(loss, "step"), []
        for epoch in range(first_epoch, epochs):
            clock.start_epoch(Position(epoch, epochs, steps, accum_freq))
            calls += [clock.advance() for _ in range(steps * accum_freq)]
        return loss.told, calls

    whole, calls = told(0)
    assert whole == [(step + 1, epochs * steps) for step in range(epochs * steps)]
    assert calls == [s for _ in range(epochs) for s in range(steps) for _ in range(accum_freq)]
    resumed = min(resumed, epochs)
    assert told(resumed)[0] == whole[resumed * steps :]


def test_clock_that_was_not_started_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="start_epoch"):
        Clock(Listener(), "epoch").advance()


def test_every_part_that_has_the_method_is_told() -> None:
    listener = Listener()
    loss = CyClipLoss(rankloss.RankClipLoss(nn.Sequential(listener), schedule="linear"))
    tell(loss, "set_progress", 2, 3)
    assert loss.base.schedule_value == 0.5
    assert listener.told == [(2, 3)]
