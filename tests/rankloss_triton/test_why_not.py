"""The cases that are served, and the reasons against the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch

from rankloss.options import RankOptions
from rankloss_triton import launching, why_not


def reason_against(
    n: int = 64, N: int = 64, device: str = "cuda", dtype: torch.dtype = torch.float32, **options: Any
) -> str | None:
    """The reason against n lists of N items, by default a case that is served; None where there is none."""
    return why_not(RankOptions(**options), torch.device(device), dtype, n, N)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch, _interpreted: None) -> None:
    """Kernels are compiled by a Triton that is new enough, and not interpreted as in the other files.

    The other fixture is asked for so that it comes first, and its variable can be deleted.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launching, "triton_version", lambda: "3.7.0")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        pytest.param({}, None, id="sorted float32 on CUDA"),
        pytest.param({"method": "bin"}, None, id="binned"),
        pytest.param({"n": 1, "N": 131_072}, None, id="the longest list"),
        pytest.param(
            {"reduction": "none"}, "reduction='none' is computed from whole matrices", id="no reduction"
        ),
        pytest.param({"model": "top_one"}, "model='top_one' has no kernel", id="top one"),
        pytest.param({"dtype": torch.float64}, "not in float64", id="float64"),
        pytest.param({"device": "cpu"}, "on CUDA, not on cpu", id="CPU"),
        pytest.param({"device": "xpu"}, "never run on XPU", id="XPU"),
        pytest.param({"N": 131_073}, "of 2 to 131,072 items; got 64 of 131,073", id="too long a list"),
        pytest.param({"N": 1}, "of 2 to 131,072 items; got 64 of 1", id="too short a list"),
        pytest.param({"n": 0}, "take one list or more, of 2 to 131,072 items; got 0 of 64", id="no list"),
        pytest.param(
            {"method": "bin", "bins": 2**20}, "up to 131,072 bins, not 1,048,576", id="too many bins"
        ),
    ],
)
def test_the_reason_names_what_is_not_served(case: dict[str, Any], reason: str | None) -> None:
    assert_reason(reason_against(**case), reason)


def assert_reason(reason: str | None, expected_part: str | None) -> None:
    """The reason has this part; there is none where a case is served."""
    if expected_part is None:
        assert reason is None
    else:
        assert expected_part in str(reason)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton is not installed"),
        ("3.2.0+git1", "the kernels need Triton 3.4 or later; 3.2.0+git1 is installed"),
        ("3.4.0", None),
        ("3.10.0", None),
    ],
)
def test_triton_must_be_there_and_not_too_old(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(launching, "triton_version", lambda: version)
    assert_reason(reason_against(), reason)


@pytest.mark.parametrize(
    "name", ["triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm"]
)
def test_every_build_of_triton_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return "3.5.1"

    monkeypatch.undo()  # the fixture's version, which would be found in place of this one
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    uncached = launching.triton_version.__wrapped__  # by now the function has cached the installed version
    assert uncached() == "3.5.1"


def test_the_interpreter_takes_cpu_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_reason(reason_against(device="cpu"), None)
    assert_reason(reason_against(device="cuda"), "TRITON_INTERPRET")
