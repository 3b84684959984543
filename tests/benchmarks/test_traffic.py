"""``tests/traffic.py``: what it counts, and that it does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import traffic

# At 1,024 rows of 8,192 items: bytes per element and list, launches, peak MiB. What falls is lowered here.
KERNEL_BYTES = 35
LIMITS = {
    "torch-sort": (255, 222, 357),
    "torch-bin": (272, 314, 269),
    "triton-sort": (KERNEL_BYTES, 76, 190),
    "triton-bin": (KERNEL_BYTES, 76, 167),
}
F4 = 6 * 4 * 4  # a matrix of float32, 6 × 4
# Launches, bytes and copies from or to the host, by hand; x and out are of float32, i of int64.
OPERATIONS = {
    "x + x": (1, 2 * F4, 0),
    "x * x[:, :1].expand(6, 4)": (1, 2 * F4, 0),
    "torch.mul(x, x, out=out)": (1, 2 * F4, 0),
    "x[1:].T": (0, 0, 0),
    "x.gather(1, i)": (1, 2 * F4 + 2 * F4, 0),
    "out.scatter_add_(1, i, x)": (1, 2 * F4 + F4 + 2 * F4, 0),
    "out.scatter_reduce_(1, i, x, 'amax')": (1, 2 * F4 + F4 + 2 * F4, 0),
    "out.addmm_(x.new_empty(6, 3), x.new_empty(3, 4), beta=0)": (1, F4 + 6 * 3 * 4 + 3 * 4 * 4, 0),
    "x.double()": (1, F4 + 2 * F4, 0),
    "torch.ones(6, 4).to(x.device)": (1, F4, 1),
}


@pytest.mark.slow
def test_counts_do_not_grow() -> None:
    """In a process of its own, where Triton is not interpreted."""
    command = [sys.executable, "-W", "error", traffic.__file__, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    for name, limits in LIMITS.items():
        found = counted[name]
        for quantity, limit in zip(("bytes_per_element", "launches", "peak_mib"), limits, strict=True):
            assert 0 < found[quantity] <= limit, (name, quantity)
        assert sum(found["launches_by_operation"].values()) == found["launches"]
        assert ("kernel" in found["launches_by_operation"]) == name.startswith("triton")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_moves_what_it_reads_and_writes(operation: str) -> None:
    x, out = (torch.empty(6, 4, device="meta") for _ in range(2))
    i = torch.empty(6, 4, device="meta", dtype=torch.int64)
    with traffic.Count([x, i, out]) as count, traffic.AsCuda():
        eval(operation)
    counters = count.launches, count.bytes, count.host_copies
    assert tuple(sum(counter.values()) for counter in counters) == OPERATIONS[operation]


def test_peak_is_of_what_lives_at_once_on_what_says_that_it_is_cuda() -> None:
    x = torch.empty(6, 4, device="meta")
    with traffic.Count([x]) as count, traffic.AsCuda():
        y = x + 1
        assert (str(y.device), y.is_cuda) == ("cuda:0", True)
        del y
        x.double()
    assert count.added_peak == 2 * F4
