"""The clock: who is told what, and when; and which methods are another protocol's."""

from __future__ import annotations

from typing import Any

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


def test_trainer_that_announces_each_step() -> None:
    loss = Listener()
    clock = Clock(loss, "step")
    assert not clock.started
    for step in (3, 4):
        clock.start_step(step, 4)
        assert clock.started
        assert [clock.advance() for _ in range(2)] == [step - 1] * 2
    assert loss.told == [(3, 4), (4, 4)]


def test_clock_that_was_not_started_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="start_epoch"):
        Clock(Listener(), "epoch").advance()


class Foreign(nn.Module):
    """A part with a ``set_epoch`` of its own."""

    def __init__(self, set_epoch: Any) -> None:
        super().__init__()
        self.set_epoch = set_epoch


heard: list[tuple[int, int]] = []


@pytest.mark.parametrize(
    ("set_epoch", "is_ours"),
    [
        (lambda i, n: heard.append((i, n)), True),
        (lambda i, n, /, verbose=False: heard.append((i, n)), True),
        # Protocols that would fail, or be misled, by two numbers.
        (lambda epoch: heard.append(epoch), False),
        (lambda epoch, seed=0: heard.append(epoch), False),
        (lambda *epochs: heard.append(epochs), False),
        (lambda epoch, *, epochs: heard.append(epoch), False),
        (lambda epoch, epochs, seed: heard.append(epoch), False),
        (lambda: heard.append(0), False),
        (7, False),
    ],
)
def test_every_part_that_takes_two_numbers_is_told(set_epoch: Any, is_ours: bool) -> None:
    heard.clear()
    loss = CyClipLoss(rankloss.RankClipLoss(nn.Sequential(Foreign(set_epoch)), schedule="linear"))
    tell(loss, "set_epoch", 2, 3)
    assert loss.base.schedule_value == 0.5
    assert (heard == [(2, 3)]) == is_ours
    assert len(heard) == is_ours
