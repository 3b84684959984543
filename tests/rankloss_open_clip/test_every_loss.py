"""Every registered loss trains with its own defaults by open_clip's command, in one process after another."""

from __future__ import annotations

import json
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
from stored_features import features_folder

STEPS = 2
WIDTH = 32  # of the tiny model, which mimicry compares
REQUIRED_OPTIONS = {"caption_key": "synthetic"}
"""Values of options that a loss has no default for: columns of the data."""


def load_tiny_encoders(flags: list[str], args: Any, device: torch.device) -> Teacher:
    """Tiny maps in place of encoders that only an extra installs; flags: ``image_encoder`` and so on."""
    both = tiny_teacher.teacher(**{name: getattr(args, name) for name in flags})
    encoders = {}
    for modality in MODALITIES:  # image_features, text_features
        if modality.replace("features", "encoder") in flags:
            encoders[modality] = both.encoders[modality]
    return Teacher(both.about, encoders, spaces="separate")


@dataclass(frozen=True)
class InTurn:
    """Makes the trainer's ``main`` train with the options of one run after another, which saves imports.

    A preset's own teacher, two encoders, becomes tiny ones, computed in the process itself.
    """

    runs: tuple[tuple[str, ...], ...]

    def install(self, trainer: Any) -> None:
        main = trainer.main
        sources.load = load_tiny_encoders
        Spec.check = lambda spec: spec  # type: ignore[method-assign]  # that an encoder of this name exists
        caching._WORKERS = 0

        def train_in_turn(argv: list[str]) -> None:
            for options in self.runs:
                main([*argv, *options])

        trainer.main = train_in_turn


@pytest.fixture(scope="module")
def runs(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of every registered loss, by its name: of STEPS steps, on pairs with every column."""
    pairs = [(Path(picture).name, title) for picture, title, _ in trainer.rows]
    teacher = {name: unit_rows(SAMPLES, WIDTH, seed) for seed, name in enumerate(MODALITIES)}
    folder = features_folder(tmp_path_factory.mktemp("every") / "teacher", pairs, **teacher)
    runs = InTurn(tuple(tuple(command_line_of(name, folder)) for name in NAMES))
    data = str(write_table(trainer))
    shared = ["--train-data", data, "--epochs", "1", "--batch-size", str(SAMPLES // STEPS)]
    trainer.call("every loss", *shared, "--save-frequency", "0", change=runs)
    return {name: Run("", trainer.directory / "logs" / f"every {name}") for name in NAMES}


def write_table(trainer: Trainer) -> Path:
    """Write the pairs with a second caption and a list of two candidates: that one, and another's title."""
    lines = ["filepath\ttitle\tsynthetic\tcandidates\tgrades"]
    for number, (picture, title, synthetic) in enumerate(trainer.rows):
        _, title_before, _ = trainer.rows[number - 1]
        lines.append(f"{picture}\t{title}\t{synthetic}\t{json.dumps([synthetic, title_before])}\t[2, 1]")
    file = trainer.directory / "every.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def command_line_of(name: str, teacher: str) -> list[str]:
    """The options of a loss: its name, and no others but those that it cannot do without."""
    named = catalog.load(name)
    words = ["--loss", name, "--name", f"every {name}"]
    if named.kind == "sigmoid":
        words.append("--siglip")
    if named.teacher == "required":
        words += ["--loss-teacher", teacher]
    for key, option in named.options.items():
        if option.is_required:
            words += [flag(prefix_of(name, named), key), REQUIRED_OPTIONS[key]]
    return words


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_trains_with_its_own_defaults(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    names_in_log = "+".join(catalog.names_of(name))  # a preset is logged as the losses that it joins
    assert f"Loss: {names_in_log} " in run.log
    losses = list(run.scalars["loss"].values())
    assert len(losses) == STEPS
    assert torch.tensor(losses).isfinite().all()
