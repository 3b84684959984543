"""``benchmarks/gpu.py`` without a GPU: every section runs, a run resumes, a failure stays alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from interpreter import HAS_TRITON

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")
if not HAS_TRITON:
    pytest.skip("no Triton that interprets the kernels", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(output: Path, *arguments: Any, code: int = 0) -> str:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry-run", "--output", output, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_section_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    assert "precision: done in" in run(tmp_path, "--only", "precision")
    measured = (tmp_path / "precision.json").read_text()
    assert "precision: done before" in run(tmp_path, "--only", "precision")
    assert (tmp_path / "precision.json").read_text() == measured
    errors = json.loads(measured)
    assert all(error < 1e-4 for name, error in errors.items() if "sort" in name)
    report = (tmp_path / "report.md").read_text()
    assert "dry_run True" in report
    assert "| torch-sort, s = 100.0, TF32 off |" in report
    assert "Not measured: The kernels against float64" in report


def test_a_section_that_fails_is_reported_and_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "precision.json.partial").mkdir()  # where it is to be written
    said = run(tmp_path, "--only", "precision", "graph_capture", code=1)
    assert "precision: FAILED" in said
    assert "graph_capture: done" in said
    assert "IsADirectoryError" in (tmp_path / "precision.error.txt").read_text()
    assert (tmp_path / "graph_capture.json").exists()


def test_no_time_left_is_said(tmp_path: Path) -> None:
    assert "precision: no time left" in run(tmp_path, "--only", "precision", "--limit", "6", code=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so() -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 2
    assert "there is no CUDA device; --dry-run runs every section on the CPU" in done.stderr


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert "FAILED" not in said
    assert "no time left" not in said
    agreement = json.loads((tmp_path / "kernel_agreement.json").read_text())
    assert len(agreement) == 5
    for found in agreement.values():
        assert found["nll"] < 1e-5
        assert found["gradient"] < 1e-4
        assert found["same_bits_twice"]
    assert json.loads((tmp_path / "two_processes.json").read_text())["gradient"] < 1e-5
    assert "Not measured" not in (tmp_path / "report.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"gpu_milliseconds.png", "gpu_peak_mib.png"}
