"""Fixtures of the benchmarks, and the conditions that their JSON states.

With ``--benchmark-disable`` nothing is timed: every benchmark runs once, on small sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rankloss
from devices import DEVICE
from process_pool import Pools
from turns import Step, count_memory, in_turns, stopwatch

_LOAD_AT_THE_START = os.getloadavg()[0]

Measured = dict[str, tuple[list[float], dict[str, Any]]]
"""Seconds and counts of the contenders of a group."""


def pytest_configure() -> None:
    """Refuse to measure another rankloss than PYTHONPATH has, and a card that is not there."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"RANKLOSS_TEST_DEVICE={DEVICE} needs a CUDA card and a CUDA build of torch")
    paths = [Path(path).resolve() for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    wanted = next((path for path in paths if (path / "rankloss").is_dir()), None)
    imported = Path(rankloss.__file__).resolve().parents[1]
    if wanted not in (None, imported):
        raise pytest.UsageError(f"PYTHONPATH has rankloss in {wanted}; imported is that in {imported}")


def pytest_report_header() -> str:
    return f"benchmarks: rankloss {rankloss.__version__} from {Path(rankloss.__file__).parent}, on {DEVICE}"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add what the numbers depend on."""
    import open_clip

    machine_info["versions"] = {
        "torch": torch.__version__,
        "NumPy": np.__version__,
        "open_clip": open_clip.__version__,
        "rankloss": rankloss.__version__,
    }
    machine_info["threads"] = torch.get_num_threads()
    machine_info["load_average"] = _LOAD_AT_THE_START
    machine_info["card"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None


@pytest.fixture
def size(benchmark: Any) -> Callable[[int], int]:
    """The size to measure; a 64th of it where nothing is timed."""
    return lambda n: n if benchmark.enabled else max(4, n // 64)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Real gloo processes by world size."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def measured() -> dict[str, Measured]:
    """All that was measured in this session, by group."""
    return {}


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, measured: dict[str, Measured]
) -> Callable[..., None]:
    """Measure a contender in turns with the others of its group, and give pytest-benchmark its rounds.

    The first test of a group measures all of them that ``-k`` selects; they are the tests that differ in
    nothing but their parameter ``contender``.
    """

    def run(
        group: str,
        contender: str,
        make: Callable[[str], Step],
        rounds: int,
        *,
        seconds: Callable[[Any], float] = stopwatch,
        count: Callable[[Any], dict[str, Any]] = count_memory,
    ) -> None:
        """Compare steps.

        Args:
            group: The title of the group.
            contender: The contender.
            make: The step of any contender, by its name.
            rounds: The rounds to time.
            seconds: Carries out a step, and gives its seconds.
            count: Carries out a step that is not timed, before the others, and gives what is counted in it.
        """
        benchmark.group = group
        if not benchmark.enabled:
            step = make(contender)
            count(step)
            benchmark.pedantic(seconds, (step,))
            return
        if group not in measured:
            tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
            selected = [test for test in tests if _place(test) == _place(request.node)]
            names = [test.callspec.params["contender"] for test in selected]
            measured[group] = _measure({name: make(name) for name in names}, rounds, seconds, count)
        if contender not in measured[group]:
            pytest.skip("out of memory")
        found, counts = measured[group][contender]
        benchmark.extra_info.update(counts)
        left = iter(found)
        benchmark.pedantic(lambda: _let_pass(next(left)), rounds=len(found))

    return run


def _place(test: pytest.Function) -> tuple[Any, ...]:
    """All by which tests differ, except for the contender."""
    params = test.callspec.params if hasattr(test, "callspec") else {}
    return test.path, test.originalname, {name: x for name, x in params.items() if name != "contender"}


def _measure(
    steps: dict[str, Step],
    rounds: int,
    seconds: Callable[[Step], float],
    count: Callable[[Step], dict[str, Any]],
) -> Measured:
    counts = {}
    for name in list(steps):
        try:
            counts[name] = count(steps[name])
        except torch.OutOfMemoryError:  # of a card; the others go on
            del steps[name]
            torch.cuda.empty_cache()
    found = in_turns(steps, rounds, seconds)
    return {name: (found[name], counts[name]) for name in steps}


# --- pytest-benchmark's clock ---------------------------------------------------------------------------

_passed = 0.0


def clock() -> float:
    """The time that pytest-benchmark sees: the seconds that were measured, replayed."""
    return _passed


def _let_pass(seconds: float) -> None:
    global _passed
    _passed += seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))
