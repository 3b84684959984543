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
    imported = Path(rankloss.__file__).resolve().parents[1]
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        folder = Path(path).resolve()
        if path and (folder / "rankloss").is_dir():  # the first one is the one that is meant
            if folder != imported:
                raise pytest.UsageError(
                    f"PYTHONPATH has rankloss in {folder}; imported is that in {imported}"
                )
            break


def pytest_report_header() -> str:
    """The line above the tests: the rankloss that is measured, and the device."""
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
    """The size to measure; a 64th of it, but 4 at least, where nothing is timed."""
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
            steps = {name: make(name) for name in _contenders(request)}
            measured[group] = _measure(steps, rounds, seconds, count)
        if contender not in measured[group]:
            pytest.skip("out of memory")
        seconds_of_rounds, counts = measured[group][contender]
        benchmark.extra_info.update(counts)
        # pytest-benchmark times rounds in which its clock moves on by the seconds that were measured before.
        remaining = iter(seconds_of_rounds)
        benchmark.pedantic(lambda: _let_pass(next(remaining)), rounds=len(seconds_of_rounds))

    return run


def _contenders(request: pytest.FixtureRequest) -> list[str]:
    """The contenders of the tests that are selected, and differ from this one in nothing else."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    group = [test for test in tests if _without_contender(test) == _without_contender(request.node)]
    return [test.callspec.params["contender"] for test in group]


def _without_contender(test: pytest.Function) -> tuple[Any, ...]:
    """All by which tests differ, except for the contender: the file, the function, other parameters."""
    parameters = test.callspec.params if hasattr(test, "callspec") else {}
    others = {name: value for name, value in parameters.items() if name != "contender"}
    return test.path, test.originalname, others


def _measure(
    steps: dict[str, Step],
    rounds: int,
    seconds: Callable[[Step], float],
    count: Callable[[Step], dict[str, Any]],
) -> Measured:
    """Count a step of every contender, then time all in turns; those that are out of memory are left out."""
    counts = {}
    for name, step in steps.items():
        try:
            counts[name] = count(step)
        except torch.OutOfMemoryError:  # of a card; the others go on
            torch.cuda.empty_cache()
    seconds_of = in_turns({name: steps[name] for name in counts}, rounds, seconds)
    return {name: (seconds_of[name], counts[name]) for name in counts}


# --- pytest-benchmark's clock ---------------------------------------------------------------------------

_passed = 0.0


def clock() -> float:
    """The time that pytest-benchmark sees: the seconds that were measured, replayed."""
    return _passed


def _let_pass(seconds: float) -> None:
    """Set the clock forward."""
    global _passed
    _passed += seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-benchmark use the clock in every test."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))
