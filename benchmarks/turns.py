"""Contenders measured in turns: the seconds of every round, and the bytes of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from devices import DEVICE
from memory import LiveBytes, saved_bytes

Step = Callable[[], object]


def in_turns(
    steps: Mapping[str, Step], rounds: int, seconds: Callable[[Step], float]
) -> dict[str, list[float]]:
    """Seconds of every round, in each of which every contender runs once.

    What slows the machine down for a while slows all of them down, and their ratios stay. Every other round
    runs in reverse order: none always follows the same one.
    """
    seconds_of: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        names = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in names:
            seconds_of[name].append(seconds(steps[name]))
    return seconds_of


def stopwatch(step: Step) -> float:
    """Seconds of a step, on a card until the card has done its work."""
    _synchronize()
    started = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    """Wait until a card has done its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def count_memory(step: Step) -> dict[str, int]:
    """Run a step for the first time, and count.

    Returns:
        ``peak_bytes``: the most that its tensors held at once, on a card all that was allocated, beyond what
        was there before. ``saved_bytes``: what the forward pass kept for the backward pass.
    """
    if DEVICE.type != "cuda":
        with LiveBytes() as live:
            saved = saved_bytes(step)
        return {"peak_bytes": live.peak, "saved_bytes": saved}
    _synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    saved = saved_bytes(step)
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "saved_bytes": saved}
