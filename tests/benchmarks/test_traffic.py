"""``benchmarks/traffic.py``: what it counts, and that it does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# Bytes per element and list, launches, peak MiB: what was counted last. They may fall, and are lowered then.
LIMITS = {
    "1024 × 1024": {
        "torch-sort": (303, 127, 165),
        "torch-bin": (337, 141, 171),
        "triton-sort": (48, 70, 45),
        "triton-bin": (48, 70, 45),
    },
    "1024 × 8192": {
        "torch-sort": (291, 246, 389),
        "torch-bin": (252, 302, 332),
        "triton-sort": (30, 70, 318),
        "triton-bin": (30, 70, 301),
    },
    "4096 × 4096": {
        "torch-sort": (275, 242, 721),
        "torch-bin": (247, 298, 623),
        "triton-sort": (27, 70, 561),
        "triton-bin": (27, 70, 561),
    },
}
F4 = 6 * 4 * 4  # a matrix of float32, 6 × 4
# Launches, bytes and copies from or to the host, by hand; x and out are of float32, i of int64.
OPERATIONS = {
    "x + x": [1, 2 * F4, 0],
    "x + x[:1]": [1, 2 * F4, 0],
    "x.mul_(2)": [1, 2 * F4, 0],
    "x * x[:, :1].expand(6, 4)": [1, 2 * F4, 0],
    "torch.mul(x, x, out=out)": [1, 2 * F4, 0],
    "out.copy_(x)": [1, 2 * F4, 0],
    "torch.zeros_like(x)": [1, F4, 0],
    "x[1:].T": [0, 0, 0],
    "x.gather(1, i)": [1, 2 * F4 + 2 * F4, 0],
    "out.scatter_add_(1, i, x)": [1, 2 * F4 + F4 + 2 * F4, 0],
    "x @ x.T": [1, F4 + 6 * 6 * 4, 0],
    "out.addmm_(x.new_empty(6, 3), x.new_empty(3, 4))": [1, 2 * F4 + 6 * 3 * 4 + 3 * 4 * 4, 0],
    "out.addmm_(x.new_empty(6, 3), x.new_empty(3, 4), beta=0)": [1, F4 + 6 * 3 * 4 + 3 * 4 * 4, 0],
    "x.double()": [1, F4 + 2 * F4, 0],
    "torch.ones(6, 4).to(x.device)": [1, F4, 1],
}

# One process for everything that is counted: modes of torch's dispatcher, and Triton not interpreted.
PROGRAM = """
import json, sys, rankloss, torch, traffic
from traffic import AsCuda, Count
found = {size: traffic.measure(*map(int, size.split(" × ")), 512, 640) for size in json.loads(sys.argv[1])}

v, t = (torch.empty(4096, 512, device="meta") for _ in "vt")
teacher = {"reference_image_features": v, "reference_text_features": t}
loss = rankloss.RankClipLoss(schedule="constant", top_k=8, kernel="torch")
call = lambda v, t, _v, _t, s: loss(v, t, s, **teacher)
found["teacher's best 8"] = traffic.count(call, traffic.features(4096, 4096, 512), 4096, 4096)

x, out = (torch.empty(6, 4, device="meta") for _ in "xo")
i = torch.empty(6, 4, device="meta", dtype=torch.int64)
found["operations"] = {}
for operation in json.loads(sys.argv[2]):
    with Count([x, i, out]) as count, AsCuda():
        eval(operation)
    counters = count.launches, count.bytes, count.host_copies
    found["operations"][operation] = [sum(counter.values()) for counter in counters]
with Count([x]) as count, AsCuda():
    y = x + 1
    del y
    y = x.double()
found["peak"] = count.added_peak
with AsCuda():
    found["device"] = [str(x.device), x.is_cuda, torch.empty(2, device="cuda").device.type]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    arguments = [json.dumps(list(LIMITS)), json.dumps(list(OPERATIONS))]
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", LIMITS)
def test_counts_do_not_grow(size: str, counted: dict[str, Any]) -> None:
    for name, limits in LIMITS[size].items():
        found = counted[size][name]
        for quantity, limit in zip(("bytes_per_element", "launches", "peak_mib"), limits, strict=True):
            assert 0 < found[quantity] <= limit, (name, quantity)
        assert sum(found["launches_by_operation"].values()) == found["launches"]
        # Once over the rows, and twice over the features of each modality.
        assert found["launches_by_operation"].get("kernel", 0) == (5 if name.startswith("triton") else 0)


def test_a_teachers_best_move_no_more_than_bins(counted: dict[str, Any]) -> None:
    bins = counted["4096 × 4096"]["torch-bin"]["bytes_per_element"]
    assert 12 < counted["teacher's best 8"]["bytes_per_element"] <= bins


def test_operations_move_what_they_read_and_write(counted: dict[str, Any]) -> None:
    assert counted["operations"] == OPERATIONS
    assert counted["peak"] == 2 * F4
    assert counted["device"] == ["cuda:0", True, "cuda"]


def test_it_says_why_the_kernels_cannot_be_counted() -> None:
    command = [sys.executable, BENCHMARKS / "traffic.py", "--rows", "8", "--items", "8"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be counted here: TRITON_INTERPRET=1 takes CPU tensors" in done.stderr
