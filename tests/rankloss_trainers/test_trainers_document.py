"""The examples of docs/trainers.md, run as they are printed."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_transformers import Pairs, arguments, clip, lines

from rankloss_trainers.transformers import ContrastiveTrainer, LossOptions

DOCUMENT = Path(__file__).parents[2] / "docs" / "trainers.md"
CLASS, ARGUMENTS, TEACHER, FINE_TUNING = re.findall(
    r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (CLASS, {"schedule": "rankclip"}),
        (ARGUMENTS, {"top_k": 3}),
        (TEACHER, {"reference": "teacher", "top_k": 8}),
        (FINE_TUNING, {"schedule": "linear", "schedule_unit": "step"}),
    ],
    ids=["class", "arguments", "teacher", "fine-tuning"],
)
def test_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--rankclip-top-k", "3"] if example is ARGUMENTS else []
    monkeypatch.setattr(sys, "argv", ["script", *argv, "--output_dir", str(tmp_path)])
    cls = transformers.TrainingArguments
    names = {
        "ContrastiveTrainer": ContrastiveTrainer,
        "LossOptions": LossOptions,
        "HfArgumentParser": transformers.HfArgumentParser,
        "TrainingArguments": cls if example is ARGUMENTS else functools.partial(cls, use_cpu=True),
        "model": clip(),
        "args": arguments(tmp_path, max_steps=2),
        "pairs": Pairs(16),
        "held_out": Pairs(8),
        "taught_pairs": Pairs(32, "image", "text"),
    }
    exec(example, names)
    trainer: Any = names["trainer"]
    assert options.items() <= trainer.chosen_loss.options.items()
    if example is CLASS:
        assert lines(trainer)[-1]["in_modal_loss"] > 0
    if example is TEACHER:
        trainer.train()
