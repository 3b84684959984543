"""The benchmarks' own arithmetic, on made-up measurements, and their scripts, on sizes that say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bin_error  # noqa: E402
import distributed as cost_of_processes  # noqa: E402
from measure import Times, in_turns  # noqa: E402
from process_pool import Pools  # noqa: E402
from scaling_report import Point, exponent, fill, plot, report, targets  # noqa: E402

CONDITIONS = {
    "cpu": "A CPU", "cores": 2, "threads": 2, "system": "Linux", "python": "3", "torch": "2", "numpy": "2",
    "rankloss": "0", "date": "2000-01-01", "d": 512, "load_average": 0.1,
}  # fmt: skip
MIB = 2**20


def points() -> list[Point]:
    """Twice as large, the naive terms take 4 times as much of everything, ours twice the memory."""
    made = []
    for n in (512, 1024, 2048, 4096, 8192, 16384):
        time, memory = (n / 4096) ** 2, n / 4096
        made += [
            Point("ClipLoss", n, 1.0 * time, 1.0 * time, 100 * memory**2 * MIB),
            Point("ClipLoss streamed", n, 1.2 * time, 1.2 * time, 20 * memory * MIB),
            Point("RankConsistency sort", n, 4.0 * time, 4.5 * time, 50 * memory * MIB, saved_bytes=MIB),
            Point("RankConsistency bin", n, None if n > 4096 else 2.5 * time, 2.0, 60 * memory * MIB),
            Point("RankClipLoss bin", n, 3.0 * time, 3.0 * time, 60 * memory * MIB),
            Point("rankclip-distill", n, 2.6 * time, 2.6 * time, 60 * memory * MIB),
        ]
        if n <= 4096:
            made.append(Point("naive terms", n, 12.0 * time, 12.0 * time, 700 * memory**2 * MIB))
    return made


def results(of: list[Point]) -> dict[str, Any]:
    step = {"ratio": {"--loss clip": 1.0, "--loss rankclip": 1.05, "naive": 1.2}}
    return {
        "conditions": CONDITIONS, "points": [p._asdict() for p in of], "step": step, "notes": ["left out"]
    }  # fmt: skip


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_exponent_is_that_of_a_power_law(p: float) -> None:
    ns = [1024, 2048, 4096, 16384]
    assert exponent(ns, [3 * n**p for n in ns]) == pytest.approx(p)


def test_exponent_passes_over_small_and_missing_points() -> None:
    assert exponent([64, 512, 1024, 2048, 4096], [9.0, 9.0, 1.0, None, 16.0]) == pytest.approx(2.0)
    assert exponent([64, 1024, 2048], [1.0, 2.0, None]) is None


def test_targets_are_judged_by_their_own_side() -> None:
    judged = {t.what: (t.value, t.met) for t in targets(points(), {"--loss rankclip": 1.05})}
    assert judged["naive / sort, time, N = 4,096"] == (pytest.approx(3.0), True)
    assert judged["naive / sort, added memory, N = 4,096"] == (pytest.approx(14.0), True)
    assert judged["naive / bin, time, N = 4,096"] == (pytest.approx(4.8), False)
    assert judged["RankClipLoss bin / ClipLoss, time, N = 4,096"] == (pytest.approx(3.0), True)
    assert judged["RankConsistency bin, added memory, N = 16,384 / 8,192"] == (pytest.approx(2.0), True)
    assert judged["RankConsistency sort, whole process, N = 32,768"] == (None, None)
    assert judged["ClipLoss streamed / ClipLoss, time, N = 4,096"] == (pytest.approx(1.2), True)
    assert judged["ClipLoss streamed / ClipLoss, time, N = 16,384"] == (pytest.approx(1.2), True)
    assert judged["rankclip-distill / ClipLoss, time, N = 4,096"] == (pytest.approx(2.6), False)
    assert judged["SigLipLoss streamed / SigLipLoss, time, N = 4,096"] == (None, None)
    assert judged["ClipLoss streamed, added memory, N = 32,768"] == (None, None)
    assert judged["demo's step, --loss rankclip / --loss clip"] == (1.05, False)


def test_times_of_different_runs_are_no_ratio() -> None:
    alone = [p._replace(seconds=None) for p in points()]
    judged = {t.what: t.met for t in targets(alone, None)}
    assert judged["naive / sort, time, N = 4,096"] is None
    assert judged["naive / sort, added memory, N = 4,096"] is True


def test_report_shows_what_was_measured_and_what_was_not() -> None:
    text = report(results(points()))
    lines = text.splitlines()
    cells = {line.split(" | ")[0]: line for line in lines}
    assert cells["| naive / bin, time, N = 4,096"].endswith("| at least 5.00× | 4.80× | **no** |")
    assert cells["| RankConsistency sort, whole process, N = 32,768"].endswith("| not measured | – |")
    assert "- left out" in lines
    times, memory = (line for line in lines if line.startswith("| naive terms"))
    assert times.endswith("| 12 (12.0×) | – | – | 2.00 |")  # N = 8,192 and 16,384 have no point
    assert memory.endswith("| 700.0 | – | – | 2.00 |")
    binned = next(line for line in lines if line.startswith("| RankConsistency bin"))
    assert "| 2* |" in binned  # alone: no ratio


def test_plots_are_written(tmp_path: Path) -> None:
    for path in plot(results(points()), tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_fill_replaces_what_is_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb\n")
    for text in (r"new \1", "newer"):
        fill(path, "x", text)
        assert path.read_text() == f"a\n<!-- bench:x -->\n{text}\n<!-- /bench:x -->\nb\n"
    with pytest.raises(ValueError, match="bench:y"):
        fill(path, "y", "text")


def test_the_docs_have_a_place_for_every_table(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    fill(path, "scaling", "table")
    fill(path, "distributed", "table")
    fill(path, "bins", "table")


def test_more_bins_are_closer_to_the_exact_order() -> None:
    few, many = bin_error.errors(bin_error.agreeing, 64, 8, 10.0, (4, 256))
    assert 0 < many < few / 4


def test_bin_error_script_fills_its_table(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("<!-- bench:bins -->\n<!-- /bench:bins -->\n")
    printed = run("bin_error.py", "--quick", "--output", str(tmp_path), "--write", str(path))
    assert (tmp_path / "bin_error.md").read_text() in printed
    assert "| agreeing, N = 32, s = 100 |" in path.read_text()


def test_contenders_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    times = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert "".join(calls) == "baabba"
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 2, "b": 2}


def test_ratio_is_of_the_rounds() -> None:
    assert Times([1.0, 20.0, 3.0]).ratio_to(Times([0.5, 10.0, 2.0])) == 2.0  # the second was slow for both


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_and_bytes_of_real_processes_are_those_of_the_formula(pools: Pools) -> None:
    n, d = 32, 16
    for world_size, local_loss in ((1, True), (2, True), (2, False)):
        ranks = pools[world_size].run(cost_of_processes.measure, n, d, local_loss, "sort", 1)
        found = cost_of_processes.slowest(world_size, local_loss, ranks)
        formula = cost_of_processes.cost(n, d, world_size, local_loss)
        assert found["rows"] == formula["rows"]
        filled = 2 * n * d * 4 if world_size > 1 else 0
        assert (found["gathered_bytes"], found["reduced_bytes"]) == (filled, filled)
        if found["sent_bytes"] is not None:  # where the system counts; a message has a head besides
            sent = formula["forward_bytes"] + formula["backward_bytes"]
            assert sent <= found["sent_bytes"] < sent + 4096


@pytest.mark.slow
def test_distributed_script_measures_every_world_size(tmp_path: Path) -> None:
    run("distributed.py", "--quick", "--output", str(tmp_path))
    found = json.loads((tmp_path / "distributed.json").read_text(encoding="utf-8"))
    assert [(r["world_size"], r["local_loss"], r["rows"]) for r in found["runs"]] == [
        (1, True, 32), (2, True, 16), (2, False, 32), (4, True, 8), (4, False, 32),
    ]  # fmt: skip
    assert "W = 256, N = 65,536" in (tmp_path / "distributed.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_scaling_script_measures_every_loss(tmp_path: Path) -> None:
    run("scaling.py", "--quick", "--output", str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len({(p["loss"], p["n"]) for p in found["points"]}) == len(found["points"]) == 18
    for p in found["points"]:
        assert p["seconds"] > 0
        assert p["peak_bytes"] > p["added_bytes"] >= 0
        assert p["saved_bytes"] > 0
    assert {x.name for x in tmp_path.iterdir()} == {
        "results.json", "table.md", "scaling_time.png", "scaling_memory.png",
    }  # fmt: skip
    again = run(
        "scaling.py", "--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "again")
    )
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in again
