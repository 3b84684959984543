"""Time and memory of forward and backward, measured in this process or in a fresh one; memory on Linux."""

from __future__ import annotations

import multiprocessing as mp
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

import rankloss

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # where a script finds what they share

from contenders import DISTILLED, LOSSES, batch, teacher
from memory import saved_bytes
from resident import added_bytes, status

T = TypeVar("T")

_WARM_UP = 64  # pairs: enough that threads and libraries are up, too few for their memory to show
_LARGEST_COUNTED = 4096  # pairs up to which what is saved for backward is counted: it takes another forward


class Times(NamedTuple):
    """Seconds of the rounds of one contender."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Times) -> float:
        """The median of the rounds' ratios: what slows a whole round down cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def in_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, Times]:
    """Run all contenders once a round, so that they share whatever else the machine is doing.

    Every other round runs them in reverse order: none always follows the same one.
    """
    times = {name: Times([]) for name in contenders}
    for k in range(-warm_up, rounds):
        for name in contenders if k % 2 == 0 else reversed(contenders):
            started = time.perf_counter()
            contenders[name]()
            if k >= 0:
                times[name].seconds.append(time.perf_counter() - started)
    return times


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` in a process of its own: a memory peak leaves no trace in the next one.

    It is forked from one that has imported what takes long and has computed nothing.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "open_clip_train.params", "rankloss"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure_time(names: list[str], n: int, d: int, threads: int, rounds: int) -> dict[str, Times]:
    """Forward and backward of the losses, in turns."""
    torch.set_num_threads(threads)
    inputs = batch(n, d)
    losses = {name: LOSSES[name]() for name in names}
    return in_turns(
        {name: (lambda loss=loss: loss(*inputs).backward()) for name, loss in losses.items()}, rounds
    )


def measure_memory(name: str, n: int, d: int, threads: int) -> dict[str, float | None]:
    """Forward and backward of one loss, once; to be called in a fresh process.

    Returns:
        ``added_bytes``: peak resident memory above that before the call, with the inputs there and a small
        batch computed. ``peak_bytes``: peak resident memory of the process, torch and inputs included.
        ``saved_bytes``: what forward keeps for backward. ``seconds_alone``: the time of that one call.
    """
    torch.set_num_threads(threads)
    loss = LOSSES[name]()
    loss(*batch(_WARM_UP, d)).backward()
    inputs = batch(n, d)
    if name == DISTILLED:
        teacher(n, d)
    started = time.perf_counter()
    added = added_bytes(lambda: loss(*inputs).backward())
    seconds = time.perf_counter() - started
    peak = status("VmHWM")
    saved = saved_bytes(lambda: loss(*inputs)) if n <= _LARGEST_COUNTED else None
    return {"added_bytes": added, "peak_bytes": peak, "saved_bytes": saved, "seconds_alone": seconds}


def conditions(**settings: Any) -> dict[str, Any]:
    """Conditions of a measurement: the machine, the versions, the date."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rankloss": rankloss.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 1),
        **settings,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
