"""The benchmarks' own arithmetic, on made-up measurements, and their scripts, on sizes that say nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import checkouts  # noqa: E402
import gpu  # noqa: E402
from measure import conditions  # noqa: E402
from report import fill  # noqa: E402

MIB = 2**20


def test_two_checkouts_are_compared_by_ratios_of_their_medians() -> None:
    cell = {"loss": "bin", "n": 1024, "processes": 4, "threads": 2}
    cell |= {"time": {"this": 0.5, "other": 0.4}, "memory": {"this": 30 * MIB, "other": 60 * MIB}}
    results = {
        "conditions": conditions(threads="1 and 2", d=512),
        "checkouts": {"this": "abc", "other": "def"},
        "cells": [cell],
    }
    row = "| bin | 1,024 | 1/4 | 2 | 0.5 | 0.4 | **1.25** | 30.0 | 60.0 | **0.50** |"
    assert row in checkouts.report_against(results).splitlines()


def test_fill_replaces_what_is_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb\n")
    for text in (r"new \1", "newer"):
        fill(path, "x", text)
        assert path.read_text() == f"a\n<!-- bench:x -->\n{text}\n<!-- /bench:x -->\nb\n"
    with pytest.raises(ValueError, match="bench:y"):
        fill(path, "y", "text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said", "files"),
    [
        (["scaling.py"], "| naive terms |", {"results.json", "table.md"}),
        (["scaling.py", "--against", ROOT], "| bin | 32 | 1/4 | 2 |", {"against.json", "against.md"}),
        (["bin_error.py"], "| agreeing, N = 32, s = 100 |", {"bin_error.json", "bin_error.md"}),
        (["distributed.py"], "| 4 | False | 32 |", {"distributed.json", "distributed.md"}),
        (["ranked_lists.py"], "8 lists of 4 candidates.", {"ranked_lists.json", "ranked_lists.md"}),
    ],
    ids=lambda x: " ".join(map(str, x[:2])) if isinstance(x, list) else "",
)
def test_script_measures_and_reports_the_same_again(
    command: list[str | Path], said: str, files: set[str], tmp_path: Path
) -> None:
    script, *options = command

    def run(*arguments: object) -> str:
        line = [sys.executable, ROOT / "benchmarks" / script, *options, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=600, check=True).stdout

    assert said in run("--quick", "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files
    results, report = sorted(files)
    again = run("--results", tmp_path / results, "--output", tmp_path / "again")
    assert (tmp_path / report).read_text() in again


@pytest.mark.slow
def test_every_section_of_the_gpu_script_runs(tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert "Not measured" not in (tmp_path / "report.md").read_text()
