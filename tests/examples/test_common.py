"""What the examples share: the trainer's guard, the queue of runs, tables and pages."""

import ast
import asyncio
import doctest
import importlib
import io
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from clip_evaluation import metrics
from examples_common import page, tables, terminal, trainer
from examples_common.trainer import Job, Log, TrainingError
from hypothesis import given
from hypothesis import strategies as st
from icons_data import labels
from miniature_paper import captions, wording
from rich.console import Console

JOB = Job("rankclip", 4, "model", ("--loss", "rankclip"))


def line(epoch, seen, total, terms):
    return f"2026-01-01,00:00:00 | INFO | Train Epoch: {epoch} [{seen:>5}/{total} (1%)] Data: 0.1 {terms}"


PLAIN = line(0, 1, 10, "Contrastive_loss: 3.5 (3.5) Loss: 3.5 (3.5)")
RANKED = line(1, 50, 100, "Contrastive_loss: 3.5 (3.6) Cross_modal_loss: 0.25 (0.2) Loss: 3.7")


def test_the_log_tells_progress_and_terms():
    log = Log(JOB, Path())
    log.read("2026-01-01,00:00:00 | INFO | Start epoch 0")
    assert (log.share, log.last) == (0, {})
    log.read(RANKED)
    assert log.share == pytest.approx(1.5 / 4)
    assert log.first == log.last == {"contrastive_loss": 3.5, "cross_modal_loss": 0.25}
    assert len(log.tail) == 2


def run(tmp_path, loss, *lines, status=0, checkpoint=False):
    """Train with a script in place of the trainer, which logs these lines."""
    job = Job(loss, 1, "model", ())
    made = trainer.checkpoint_of(tmp_path / "run", 1)
    script = f"import sys, pathlib\nfor line in {lines!r}: print(line)\n"
    if checkpoint:
        script += f"p = pathlib.Path({str(made)!r}); p.parent.mkdir(parents=True); p.touch()\n"
    command = [sys.executable, "-c", f"{script}sys.exit({status})"]
    return asyncio.run(trainer.train(job, command, tmp_path / "run", root=tmp_path))


def test_plain_clip_under_another_name_is_refused_at_the_first_step(tmp_path):
    with pytest.raises(TrainingError, match="--loss cyclip was not honoured"):
        run(tmp_path, "cyclip", PLAIN, checkpoint=True)
    assert run(tmp_path, "clip", PLAIN, checkpoint=True).last == {"contrastive_loss": 3.5}
    assert run(tmp_path, "cyclip", RANKED, checkpoint=True).first["cross_modal_loss"] == 0.25


@pytest.mark.parametrize(
    ("lines", "status", "checkpoint"),
    [((RANKED,), 3, True), ((RANKED,), 0, False), ((), 0, True)],
    ids=["status", "no checkpoint", "no step"],
)
def test_a_trainer_that_fails_is_quoted(tmp_path, lines, status, checkpoint):
    said = rf"status {status}, {'a' if checkpoint else 'no'} final[\s\S]*{'Train Epoch' * bool(lines)}"
    with pytest.raises(TrainingError, match=said):
        run(tmp_path, "rankclip", *lines, status=status, checkpoint=checkpoint)


Run = namedtuple("Run", "name")
RUNS = [Run(f"run {i}") for i in range(12)]


def run_all(runs, work, jobs):
    console = Console(file=io.StringIO(), width=200)
    return terminal.run_all(runs, work, jobs=jobs, console=console, expected=(TrainingError,))


@given(jobs=st.integers(1, 5), runs=st.integers(0, 12), bad=st.sets(st.sampled_from(RUNS)))
def test_every_run_is_done_in_order_and_failures_stop_nothing(jobs, runs, bad):
    order, running, most = [], set(), 0

    async def work(one, report):
        nonlocal most
        order.append(one)
        running.add(one)
        most = max(most, len(running))
        report("training", 0.5)
        await asyncio.sleep(0)
        running.remove(one)
        if one in bad:
            raise TrainingError("no")

    failed = asyncio.run(run_all(RUNS[:runs], work, jobs))
    assert order == RUNS[:runs]
    assert most == min(jobs, runs)
    assert set(failed) == bad & set(RUNS[:runs])


def test_a_bug_ends_everything():
    ended = []

    async def work(one, report):
        if one == RUNS[0]:
            await asyncio.sleep(0)
            raise ZeroDivisionError
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(one)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_all(RUNS[:5], work, 2))
    assert ended == [RUNS[1]]


def test_cancelling_waits_until_every_run_has_cleaned_up():
    cleaned = []

    async def work(one, report):
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02 * RUNS.index(one))  # each takes its time
            cleaned.append(one)

    async def main():
        task = asyncio.create_task(run_all(RUNS[:6], work, 3))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cleaned == RUNS[:3]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_the_children(tmp_path, sent):
    """From the signal to the exit status, with a child that would sleep for a minute."""
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    # What a shell starts in the background ignores SIGINT, and so does everything below it.
    script = f"""
import asyncio, signal, sys
from pathlib import Path
from examples_common import terminal, trainer
signal.signal(signal.SIGINT, signal.default_int_handler)

async def work(run, report):
    await trainer.follow([sys.executable, "-c", {child!r}], print, cwd=Path("."), threads=1)

def command(console):
    asyncio.run(terminal.run_all([Path("one")], work, jobs=1, console=console, expected=()))
    return 0

sys.exit(terminal.status_of(command))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (mark.is_file() and mark.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in out
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_errors_are_printed_and_bugs_are_not_hidden(capsys):
    def fail(error):
        raise error

    assert terminal.status_of(lambda console: fail(OSError("disk full"))) == 1
    assert "disk full" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        terminal.status_of(lambda console: fail(ZeroDivisionError()))


def test_the_examples_use_public_names_only():
    examples = Path(__file__).resolve().parents[2] / "examples"
    used = set()
    for path in examples.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in used if name.split(".")[0].startswith("rankloss")}
    assert ours
    for module, _, name in (name.rpartition(".") for name in ours - {"rankloss"}):
        owner = importlib.import_module(module)
        modules = {found.name for found in pkgutil.iter_modules(getattr(owner, "__path__", ()))}
        assert name in {*getattr(owner, "__all__", vars(owner)), *modules}, (module, name)
        assert not any(part.startswith("_") for part in (*module.split("."), name)), (module, name)


@pytest.mark.parametrize("module", [captions, labels, metrics, wording])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@given(st.lists(st.lists(st.text("a0.|−±", max_size=6), min_size=3, max_size=3), max_size=4))
def test_a_table_keeps_every_cell_as_it_is(rows):
    text = tables.markdown(["x", "y", "z"], rows, right=2)
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()[2:]]
    assert [[cell.strip().replace("\\|", "|") for cell in row] for row in cells] == rows
    seen = page.html(text, title="t")
    assert seen.count("<tr>") == 1 + len(rows)
    assert seen.count('scope="row"') == len(rows)
