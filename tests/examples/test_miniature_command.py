"""The paper in miniature, end to end on made-up icons: interrupted, resumed, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for module in (
    "sklearn",
    "torchmetrics",
    "rich",
    "webdataset",
    "timm",
    "umap",
    "captum",
    "jinja2",
    "resvg_py",
):
    pytest.importorskip(module, reason="the example's packages are not installed")
pytest.importorskip("open_clip_train", reason="the example's packages are not installed")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "miniature"

from miniature_icons import write_icons  # noqa: E402

# Four models: CLIP and RankCLIP on both backbones.
ARGUMENTS = ("--only", "table4", "--seeds", "1", "--jobs", "2", "--device", "cpu")


def _start(folder, *more):
    command = [sys.executable, str(EXAMPLE / "run.py"), "--icons", str(folder / "icons")]
    return subprocess.Popen(
        [*command, "--output", str(folder / "out"), *ARGUMENTS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What a shell starts in the background ignores SIGINT, and so does everything below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _records(folder):
    return sorted((folder / "out" / "quick" / "results").glob("*.json"))


def _children(pid):
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(child) for child, parent in rows if int(parent) == pid]


@pytest.mark.slow
def test_it_is_interrupted_resumed_and_reported(tmp_path):
    write_icons(tmp_path / "icons", train=4200, validation=40, test=120)
    first = _start(tmp_path)
    deadline = time.monotonic() + 600
    while not (_records(tmp_path) and _children(first.pid)):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = _children(first.pid)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "Interrupted. The same command goes on" in said
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    there = {path: path.read_bytes() for path in _records(tmp_path)}
    assert 1 <= len(there) < 4

    second = _start(tmp_path)
    said, _ = second.communicate(timeout=900)
    assert second.returncode == 0, said
    assert f"4 models, {len(there)} of them there already" in said
    assert {path: path.read_bytes() for path in there} == there

    records = [json.loads(path.read_text(encoding="utf-8")) for path in _records(tmp_path)]
    assert {(r["setting"]["loss"], r["setting"]["backbone"]) for r in records} == {
        (loss, backbone) for loss in ("clip", "rankclip") for backbone in ("resnet", "vit")
    }
    for backbone in ("resnet", "vit"):
        # One seed has the same weights and the same first batch, whatever the loss: so seeds can be paired.
        first_steps = {
            r["training"]["first"]["contrastive_loss"]
            for r in records
            if r["setting"]["backbone"] == backbone
        }
        assert len(first_steps) == 1
    for record, path in zip(records, _records(tmp_path), strict=True):
        assert path.stat().st_size < 60_000
        assert ("figures" in record) == (record["setting"]["backbone"] == "resnet")
        assert set(record["seconds"]) == {"training", "measuring"}
    assert not list((tmp_path / "out" / "runs").iterdir())  # no weights are kept

    html = tmp_path / "out" / "quick" / "report" / "report.html"
    html.unlink()
    third = _start(tmp_path, "--report-only")
    said, _ = third.communicate(timeout=300)
    assert third.returncode == 0, said
    assert html.stat().st_size > 1000
