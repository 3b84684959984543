"""The benchmarks' own arithmetic, on made-up measurements, and their scripts, on sizes that say nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import bin_error  # noqa: E402
import costs  # noqa: E402
import gpu  # noqa: E402
import scaling  # noqa: E402
from measure import conditions  # noqa: E402
from report import fill  # noqa: E402
from scaling import Point  # noqa: E402

MIB = 2**20
POINTS = [
    Point("ClipLoss", 4096, 1.0, 1.0, 100 * MIB),
    Point("naive terms", 4096, 12.0, 12.0, 700 * MIB),
    Point("RankConsistency sort", 4096, 4.0, 4.5, 50 * MIB, saved_bytes=MIB),
    Point("RankConsistency bin", 4096, 2.5, 2.0, 60 * MIB),
    Point("RankConsistency bin", 8192, None, 4.0, 120 * MIB),
    Point("RankConsistency bin", 16384, None, 8.0, 240 * MIB),
]
SHOWN = {  # what the report makes of them
    "naive / sort, time, N = 4,096": "at least 3.00× | 3.00× | yes",
    "naive / sort, added memory, N = 4,096": "at least 12.00× | 14.00× | yes",
    "naive / bin, time, N = 4,096": "at least 5.00× | 4.80× | **no**",
    "RankConsistency bin, added memory, N = 16,384 / 8,192": "at most 2.20× | 2.00× | yes",
    "RankConsistency sort, whole process, N = 32,768": "at most 2.00 GiB | not measured | –",
    "demo's step, rankclip / clip, N = 128": "at most 1.03× | 1.05× | **no**",
}


def test_report_judges_the_targets_and_shows_what_was_not_measured() -> None:
    results = {
        "conditions": conditions(threads=2, d=512),
        "points": [point._asdict() for point in POINTS],
        "step": {"ratio": {"--loss clip": 1.0, "--loss rankclip": 1.05}},
        "notes": ["left out"],
    }
    lines = scaling.report(results).splitlines()
    for what, cells in SHOWN.items():
        assert f"| {what} | {cells} |" in lines
    assert "- left out" in lines
    assert "| RankConsistency bin | 2.5 (2.5×) | 4* | 8* | 0.84 |" in lines  # those alone have no ratio
    assert "| naive terms | 700.0 | – | – | – |" in lines


def test_a_jump_between_neighbours_is_marked() -> None:
    assert costs.jumps([1.0, 5.0, 26.0, 26.0, math.inf], least=0.1) == [False, False, True, False, True]
    assert costs.jumps([0.01, 0.4, 30.0, 20.0], least=1.0) == [False, False, True, False]


def test_fill_replaces_what_is_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb\n")
    for text in (r"new \1", "newer"):
        fill(path, "x", text)
        assert path.read_text() == f"a\n<!-- bench:x -->\n{text}\n<!-- /bench:x -->\nb\n"
    with pytest.raises(ValueError, match="bench:y"):
        fill(path, "y", "text")


def test_more_bins_are_closer_to_the_exact_order() -> None:
    few, many = bin_error.errors("agreeing", 64, 8, 10.0, (4, 256))
    assert 0 < many < few / 4


def test_a_section_on_the_gpu_that_fails_leaves_the_others_and_one_that_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"sort": {"milliseconds": 0.5}}
    sections = {"bad": lambda bench: {}[bench], "good": lambda _: found}
    sections["good"].__doc__ = "Good times"
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    for said in ("good: done in", "good: done before"):
        assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert "bad: FAILED" in out
        assert said in out
    assert json.loads((tmp_path / "good.json").read_text()) == found
    report = (tmp_path / "report.md").read_text()
    assert "### Good times\n\n|  | milliseconds |\n" in report
    assert "Not measured: bad." in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said", "files"),
    [
        ("scaling.py", "| naive terms |", {"results.json", "table.md"}),
        ("bin_error.py", "| agreeing, N = 32, s = 100 |", {"bin_error.json", "bin_error.md"}),
        ("distributed.py", "| 4 | False | 32 |", {"distributed.json", "distributed.md"}),
        ("ranked_lists.py", "8 lists of 4 candidates.", {"ranked_lists.json", "ranked_lists.md"}),
        ("costs.py", "| chunk_size = | 1 | 2 | 4 |", {"costs.json", "costs.md"}),
    ],
)
def test_script_measures_and_reports_the_same_again(
    script: str, said: str, files: set[str], tmp_path: Path
) -> None:
    def run(*arguments: object) -> str:
        command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode in (0, 1 if script == "costs.py" else 0), done.stderr
        return done.stdout

    assert said in run("--quick", "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files
    results, report = sorted(files)
    again = run("--results", tmp_path / results, "--output", tmp_path / "again")
    assert (tmp_path / report).read_text() in again


@pytest.mark.slow
def test_every_section_of_the_gpu_script_runs(tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert "Not measured" not in (tmp_path / "report.md").read_text()
