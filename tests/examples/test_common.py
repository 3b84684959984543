"""The examples' common parts: the trainer's guard, the queue of runs, tables and pages."""

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


def line(epoch, seen, total, terms):
    return f"2026-01-01,00:00:00 | INFO | Train Epoch: {epoch} [{seen:>5}/{total} (1%)] Data: 0.1 {terms}"


PLAIN = line(0, 1, 10, "Contrastive_loss: 3.5 (3.5) Loss: 3.5 (3.5)")
RANKED = line(1, 50, 100, "Contrastive_loss: 3.5 (3.6) Cross_modal_loss: 0.25 (0.2) Loss: 3.7")


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
    with pytest.raises(TrainingError, match="--loss tiny"):
        run(tmp_path, "tiny", PLAIN, checkpoint=True)
    assert run(tmp_path, "clip", PLAIN, checkpoint=True).last == {"contrastive_loss": 3.5}
    log = run(tmp_path, "tiny", RANKED, checkpoint=True)
    assert log.share == pytest.approx(1.5)  # a job of one epoch
    assert log.first == log.last == {"contrastive_loss": 3.5, "cross_modal_loss": 0.25}


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
    for module, _, name in (name.rpartition(".") for name in ours if "." in name):
        owner = importlib.import_module(module)
        modules = {found.name for found in pkgutil.iter_modules(getattr(owner, "__path__", ()))}
        assert name in {*getattr(owner, "__all__", vars(owner)), *modules}, (module, name)
        assert not any(part.startswith("_") for part in (*module.split("."), name)), (module, name)


@pytest.mark.parametrize("module", [labels, measure, metrics, pairs, studies.report])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
