"""The miniature's commands: their arguments, and one end to end: interrupted, resumed, reported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniature_icons import write_icons
from miniature_paper import command
from miniature_paper.records import Store
from miniature_paper.search import command as studies

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "miniature"
# Four models: CLIP and RankCLIP on both backbones.
ARGUMENTS = ("--only", "table4", "--seeds", "1", "--jobs", "2", "--device", "cpu")


@pytest.mark.parametrize(("main", "arguments"), [(command.main, []), (studies.main, ["search"])])
def test_nothing_to_report_is_an_error(tmp_path, capsys, main, arguments):
    assert main([*arguments, "--report-only", "--output", str(tmp_path)]) == 1
    assert "holds no record" in capsys.readouterr().out


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


def _children(pid):
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(child) for child, parent in rows if int(parent) == pid]


@pytest.mark.slow
def test_it_is_interrupted_resumed_and_reported(tmp_path):
    write_icons(tmp_path / "icons", train=4200, validation=40, test=120)
    store = Store(tmp_path / "out" / "quick" / "results")
    first = _start(tmp_path)
    deadline = time.monotonic() + 600
    while not (store.read() and _children(first.pid)):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = _children(first.pid)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "Interrupted" in said
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    there = store.path.read_bytes()

    for more in ((), ("--report-only",)):
        process = _start(tmp_path, *more)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        html = tmp_path / "out" / "quick" / "report" / "report.html"
        assert html.stat().st_size > 1000
        html.unlink()
    assert store.path.read_bytes().startswith(there)
    first_steps = {}
    for record in store.read().values():
        setting, figures = record["setting"], record.get("figures", {})
        first_steps[setting["loss"], setting["backbone"]] = record["training"]["first"]["contrastive_loss"]
        assert (len(figures.get("heat_maps", ())) == 6) == (setting["backbone"] == "resnet")
    for backbone in ("resnet", "vit"):
        # One seed has the same weights and the same first batch, whatever the loss: so seeds can be paired.
        assert first_steps["clip", backbone] == first_steps["rankclip", backbone]
    assert len(first_steps) == 4
    assert not list((tmp_path / "out" / "runs").iterdir())  # no weights are kept
