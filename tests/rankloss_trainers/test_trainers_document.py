"""The examples of docs/trainers.md, run as they are printed."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

import transformers
from tiny_transformers import Pairs, arguments, clip, lines

from rankloss import schedules
from rankloss_trainers.transformers import ContrastiveTrainer, LossOptions

DOCUMENT = Path(__file__).parents[2] / "docs" / "trainers.md"
CLASS, ARGUMENTS, TEACHER, FINE_TUNING = re.findall(
    r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE
)


def run(tmp_path: Path, example: str) -> Any:
    names = {
        "ContrastiveTrainer": ContrastiveTrainer,
        "LossOptions": LossOptions,
        "HfArgumentParser": transformers.HfArgumentParser,
        "TrainingArguments": functools.partial(transformers.TrainingArguments, use_cpu=True),
        "model": clip(),
        "args": arguments(tmp_path, max_steps=2),
        "pairs": Pairs(16),
        "held_out": Pairs(8),
        "taught_pairs": Pairs(32, "image", "text"),
    }
    exec(example, names)
    return names["trainer"]


def test_class(tmp_path: Path) -> None:
    assert lines(run(tmp_path, CLASS))[-1]["in_modal_loss"] > 0


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["script", "--rankclip-top-k", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    example = ARGUMENTS.replace("TrainingArguments", "transformers_arguments")
    example = f"from transformers import TrainingArguments as transformers_arguments\n{example}"
    trainer = run(tmp_path, example)
    assert trainer.driven_loss.criterion.consistency.options.top_k == 3


def test_teacher(tmp_path: Path) -> None:
    trainer = run(tmp_path, TEACHER)
    trainer.train()
    assert trainer.driven_loss.criterion.consistency.options.top_k == 8


def test_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = run(tmp_path, FINE_TUNING)
    assert trainer.args.num_train_epochs == 3
    assert trainer.driven_loss.criterion.schedule is schedules.linear
    assert trainer.driven_loss.clock.unit == "step"
