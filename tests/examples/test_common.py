"""The examples' common parts: how the trainer's log is read, imports, and the examples in docstrings."""

import ast
import asyncio
import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import studies.report
from openmoji_demo import metrics, trainer
from openmoji_demo.trainer import Job, TrainingError
from studies.data import pairs
from studies.icons import labels
from studies.students import measure


def log_line(epoch, seen, total, terms):
    """Return a line of the trainer's log, after ``seen`` of an epoch's ``total`` pairs."""
    return f"2026-01-01,00:00:00 | INFO | Train Epoch: {epoch} [{seen:>5}/{total} (1%)] Data: 0.1 {terms}"


PLAIN = log_line(0, 1, 10, "Contrastive_loss: 3.5 (3.5) Loss: 3.5 (3.5)")
RANKED = log_line(1, 50, 100, "Contrastive_loss: 3.5 (3.6) Cross_modal_loss: 0.25 (0.2) Loss: 3.7")


def log_of_a_run(tmp_path, loss, line):
    """Train one epoch with a script in place of the trainer, which logs a line and saves a checkpoint.

    Return what the examples read of its log.
    """
    checkpoint = trainer.checkpoint_of(tmp_path / "run", 1)
    script = f"""
import pathlib
print({line!r})
checkpoint = pathlib.Path({str(checkpoint)!r})
checkpoint.parent.mkdir(parents=True)
checkpoint.touch()
"""
    command = [sys.executable, "-c", script]
    job = Job(loss, epochs=1, model="model", arguments=())
    return asyncio.run(trainer.train(job, command, tmp_path / "run", root=tmp_path))


def test_plain_clip_under_another_name_is_refused_at_the_first_step(tmp_path):
    with pytest.raises(TrainingError, match="--loss tiny"):
        log_of_a_run(tmp_path, "tiny", PLAIN)


def test_plain_clip_is_trained_under_its_own_name(tmp_path):
    assert log_of_a_run(tmp_path, "clip", PLAIN).last == {"contrastive_loss": 3.5}


def test_the_log_has_the_values_of_the_terms_and_the_share_of_epochs(tmp_path):
    """The line is of the second epoch, at its half; the values in parentheses are averages."""
    log = log_of_a_run(tmp_path, "tiny", RANKED)
    assert log.share == pytest.approx(1.5)
    assert log.first == log.last == {"contrastive_loss": 3.5, "cross_modal_loss": 0.25}


def test_the_examples_use_public_names_only():
    """Of rankloss and its packages: what a module lists, or defines if it has no list, and its modules."""
    examples = Path(__file__).resolve().parents[2] / "examples"
    used = {name for path in examples.rglob("*.py") for name in imported_names(path)}
    ours = {name for name in used if name.startswith("rankloss") and "." in name}
    assert ours
    for path in ours:
        owner_name, _, name = path.rpartition(".")
        owner = importlib.import_module(owner_name)
        submodules = {module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", ()))}
        assert name in {*getattr(owner, "__all__", vars(owner)), *submodules}, path
        assert not any(part.startswith("_") for part in path.split(".")), path


def imported_names(path):
    """Return the modules that a file imports, and the names with their modules; none of its own package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", [labels, measure, metrics, pairs, studies.report])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
