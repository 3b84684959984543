"""The examples of docs/transformers.md, run as they are printed."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_transformers import Pairs, arguments, clip, lines

from rankloss_trainers.command_line import LossArguments
from rankloss_trainers.transformers import ContrastiveTrainer

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"
CLASS, ARGUMENTS, TEACHER, LARGE_BATCHES, FINE_TUNING = re.findall(
    r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (CLASS, {"schedule": "rankclip"}),
        (ARGUMENTS, {"top_k": 3}),
        (TEACHER, {"reference": "teacher", "top_k": 8}),
        (LARGE_BATCHES, {"schedule": "rankclip"}),
        (FINE_TUNING, {"schedule": "linear", "schedule_unit": "auto"}),
    ],
    ids=["class", "arguments", "teacher", "large batches", "fine-tuning"],
)
def test_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    here = {"use_cpu": True, "report_to": "none", "dataloader_pin_memory": False}
    typed = {"output_dir": tmp_path, "max_steps": 2, "rankclip-top-k": 3, **here}
    argv = [f"--{name}={value}" for name, value in typed.items()] if example is ARGUMENTS else []
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    cls = transformers.TrainingArguments
    names = {
        "ContrastiveTrainer": ContrastiveTrainer,
        "LossArguments": LossArguments,
        "HfArgumentParser": transformers.HfArgumentParser,
        "TrainingArguments": cls if example is ARGUMENTS else functools.partial(cls, **here, logging_steps=1),
        "model": clip(),
        "args": arguments(tmp_path, max_steps=2),
        "pairs": Pairs(256),
        "held_out": Pairs(8),
        "taught_pairs": Pairs(32, "image", "text"),
    }
    exec(example, names)
    trainer: Any = names["trainer"]
    assert options.items() <= trainer.loss_runtime.chosen.values.items()
    if example is not CLASS:
        trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps >= 2
    assert trainer.loss_runtime.criterion.schedule_value > 0
    for line in lines(trainer)[-1:]:
        assert line["in_modal_loss"] > 0
