"""The miniature's commands: their arguments, and one end to end: interrupted, resumed, reported."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniature_icons import write_icons
from miniature_paper import command
from miniature_paper.records import read_lines
from miniature_paper.search import command as studies

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "miniature"
# Four models: CLIP and RankCLIP on both backbones.
ARGUMENTS = ("--only", "table4", "--seeds", "1", "--jobs", "2", "--device", "cpu")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (command.main, ["--seeds", "0"]),
        (command.main, ["--jobs", "-1"]),
        (command.main, ["--only", "table9"]),
        (command.main, ["--device", "tpu"]),
        (command.main, ["--presets", "full"]),
        (studies.main, ["answer"]),
        (studies.main, ["--jobs", "0", "search"]),
        (studies.main, ["--trial=recipe", "search"]),  # nothing of a plan can be set
        (studies.main, ["--seeds=3", "question"]),
        (studies.main, ["--confirm", "teacher"]),
    ],
)
def test_bad_arguments_are_named(capsys, main, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("main", "arguments"), [(command.main, []), (studies.main, ["search"])])
def test_nothing_to_report_is_an_error(tmp_path, capsys, main, arguments):
    assert main([*arguments, "--report-only", "--output", str(tmp_path)]) == 1
    assert "holds no record" in capsys.readouterr().out


def test_the_full_records_are_those_of_the_repository(tmp_path):
    args = command.parse(["--preset", "full", "--output", str(tmp_path)])
    assert args.results == EXAMPLE / "results" / "full"
    args = command.parse(["--output", str(tmp_path)])
    assert args.preset == "quick"
    assert {tmp_path} <= {*args.results.parents} & {*args.report.parents}


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


def _finish(folder, *more):
    process = _start(folder, *more)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said


def _file(folder):
    return folder / "out" / "quick" / "results" / "records.jsonl"


def _records(folder):
    return [line for line in read_lines(_file(folder))[0] if "key" in line]


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
    assert "Interrupted" in said
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    there = _file(tmp_path).read_bytes()
    assert 1 <= len(_records(tmp_path)) < 4

    _finish(tmp_path)
    assert _file(tmp_path).read_bytes().startswith(there)

    records = _records(tmp_path)
    first_steps = {
        (r["setting"]["loss"], r["setting"]["backbone"]): r["training"]["first"]["contrastive_loss"]
        for r in records
    }
    assert first_steps.keys() == set(itertools.product(("clip", "rankclip"), ("resnet", "vit")))
    for backbone in ("resnet", "vit"):
        # One seed has the same weights and the same first batch, whatever the loss: so seeds can be paired.
        assert first_steps["clip", backbone] == first_steps["rankclip", backbone]
    assert _file(tmp_path).stat().st_size < 4 * 60_000
    for record in records:
        assert ("figures" in record) == (record["setting"]["backbone"] == "resnet")
        assert set(record["seconds"]) == {"training", "measuring"}
    assert not list((tmp_path / "out" / "runs").iterdir())  # no weights are kept

    html = tmp_path / "out" / "quick" / "report" / "report.html"
    html.unlink()
    _finish(tmp_path, "--report-only")
    assert html.stat().st_size > 1000
