"""Every registered loss trains with its own defaults by open_clip's command, in one process after another."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher
import torch
from teacher_features import unit_rows
from trainer_runs import SAMPLES, Run, Trainer

from rankloss_features import caching, sources
from rankloss_features.caching import Spec
from rankloss_features.folder import NAMES as MODALITIES
from rankloss_features.teachers import Teacher
from rankloss_trainers import catalog
from rankloss_trainers.command_line import flag, prefix_of
from registered import NAMES
from stored_features import stored

STEPS = 2
WIDTH = 32  # of the tiny model, which mimicry compares
COLUMNS = {"caption_key": "synthetic"}
"""Values of options that a loss has no default for: columns of the data."""


def load(given: list[str], args: Any, device: torch.device) -> Teacher:
    """Tiny maps in place of encoders that only an extra installs."""
    whole = tiny_teacher.teacher(**{name: getattr(args, name) for name in given})
    names = [name for name in MODALITIES if f"{name.partition('_')[0]}_encoder" in given]
    return Teacher(whole.about, {name: whole.encoders[name] for name in names}, spaces="separate")


@dataclass(frozen=True)
class InTurn:
    """The trainer's ``main`` for the options of one run after another."""

    runs: tuple[tuple[str, ...], ...]

    def install(self, trainer: Any) -> None:
        main = trainer.main
        sources.load = load
        Spec.check = lambda spec: spec  # type: ignore[method-assign]
        caching._WORKERS = 0

        def of_each(argv: list[str]) -> None:
            for options in self.runs:
                main([*argv, *options])

        trainer.main = of_each


@pytest.fixture(scope="module")
def runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of every registered loss."""
    lines = ["filepath\ttitle\tsynthetic\tcandidates\tgrades"]
    for number, row in enumerate(trainer.rows):
        other = trainer.rows[number - 1][1]
        lines.append("\t".join([*row, json.dumps([row[2], other]), "[2, 1]"]))
    data = trainer.directory / "every.csv"
    data.write_text("\n".join(lines) + "\n")
    pairs = [(Path(row[0]).name, row[1]) for row in trainer.rows]
    teacher = {name: unit_rows(SAMPLES, WIDTH, seed) for seed, name in enumerate(MODALITIES)}
    folder = stored(tmp_path_factory.mktemp("every") / "teacher", pairs, **teacher)
    options = []
    for name in NAMES:
        named = catalog.load(name)
        words = ["--loss", name, "--name", f"every {name}"]
        if named.kind == "sigmoid":
            words.append("--siglip")
        if named.teacher == "required":
            words += ["--loss-teacher", folder]
        for key, option in named.options.items():
            if option.is_required:
                words += [flag(prefix_of(name, named), key), COLUMNS[key]]
        options.append(tuple(words))
    shared = ["--train-data", str(data), "--epochs", "1", "--batch-size", str(SAMPLES // STEPS)]
    trainer.call("every loss", *shared, "--save-frequency", "0", change=InTurn(tuple(options)))
    return {name: Run("", trainer.directory / "logs" / f"every {name}") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_trains_with_its_own_defaults(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert re.search(f"Loss: {re.escape('+'.join(catalog.names_of(name)))} ", run.log)
    values = list(run.scalars["loss"].values())
    assert len(values) == STEPS
    assert torch.tensor(values).isfinite().all()
