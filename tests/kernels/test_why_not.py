from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankloss.kernels import rows, why_not
from rankloss.options import RankOptions


def ask(
    n: int = 64, N: int = 64, device: str = "cuda", dtype: torch.dtype = torch.float32, **options: Any
) -> str | None:
    return why_not(RankOptions(**options), torch.device(device), dtype, n, N)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rows, "triton_version", lambda: "3.7.0")


@pytest.mark.usefixtures("compiled")
def test_what_is_served_has_no_reason_against_it() -> None:
    assert ask() is None
    assert ask(method="bin") is None
    assert ask(1, 131_072) is None


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"worth": "identity"}, "worth='identity'"),
        ({"ties": "random"}, "ties='random'"),
        ({"lists": "batch"}, "lists='batch'"),
        ({"dtype": torch.float64}, "not in float64"),
        ({"device": "cpu"}, "on CUDA, not on cpu"),
        ({"N": 131_073}, "131,073"),
        ({"method": "bin", "bins": 2**20}, "1,048,576"),
    ],
    ids=str,
)
def test_what_is_not_served_is_named(case: dict[str, Any], reason: str) -> None:
    found = ask(**case)
    assert found is not None
    assert reason in found


@given(n=st.integers(1, 5000), N=st.integers(2, 131_072), bins=st.sampled_from([0, 2, 600, 2048, 131_072]))
def test_a_launch_has_a_program_and_no_more_than_rows(n: int, N: int, bins: int) -> None:
    for processors, cache in ((0, rows.CACHE), (1, 1), (20, 2**20), (132, rows.CACHE)):
        launch = rows.choose_launch(n, N, bins, processors, cache)
        assert 1 <= launch.programs <= n
        assert launch.programs >= min(n, processors // 2)
        assert launch.block & (launch.block - 1) == 0
        assert 32 * launch.warps <= max(32, launch.block)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "triton_version", lambda: None)
    assert ask() == "Triton is not installed"
    monkeypatch.setattr(rows, "triton_version", lambda: "3.2.0+git1")
    assert ask() == "the kernels need Triton 3.4 or later; 3.2.0+git1 is installed"
    for version in ("3.4.0", "3.10.0"):
        monkeypatch.setattr(rows, "triton_version", lambda version=version: version)
        assert ask(device="cpu") is None


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "triton_version", lambda: "3.7.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ask(device="cpu") is None
    assert ask(device="cuda") == "TRITON_INTERPRET=1 takes CPU tensors, not cuda"
