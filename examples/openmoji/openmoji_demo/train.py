"""One training of the demo: its recipe, and whether it was finished earlier."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from examples_common import trainer
from examples_common.terminal import bars, say
from examples_common.trainer import Job, Log, TrainingError
from rich.console import Console

# Some pictures in grey, since the line art of the evaluation has no colour.
AUGMENTATION = ("scale=(0.5,1.0)", "gray_scale_prob=0.1")
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| (?P<level>\w+) \| (?P<text>.*)$")
_SHOWN = ("Train Epoch:", "Loss:")
_DONE = "complete.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run inside the output folder."""

    root: Path  # the output folder: the trainer is started in it, and all paths are relative to it
    data: str  # the built data
    loss: str
    seed: int
    epochs: int
    device: str
    extra: tuple[str, ...] = ()  # further arguments of the trainer; they come last and take precedence

    @property
    def name(self) -> str:
        """The trainer's ``--name``."""
        return f"{Path(self.data).name}-{self.loss}-epochs{self.epochs}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the trainer writes its log, checkpoints and TensorBoard events."""
        return self.root / "runs" / self.name

    @property
    def checkpoint(self) -> Path:
        """The weights after the last epoch."""
        return trainer.checkpoint_of(self.folder, self.epochs)

    @property
    def seconds(self) -> float:
        """How long the complete run took."""
        return float(json.loads((self.folder / _DONE).read_text(encoding="utf-8"))["seconds"])

    def job(self) -> Job:
        """Return what the trainer is started with."""
        recipe = trainer.recipe(
            self.loss,
            epochs=self.epochs,
            batch_size=128,
            warmup=30,
            seed=self.seed,
            augmentation=AUGMENTATION,
        )
        return Job(self.loss, self.epochs, "model", tuple(recipe))

    def command(self) -> list[str]:
        """Return the trainer's command line."""
        # Pictures this small are read faster than two cores can train on them; a GPU needs helpers.
        workers = min(8, max(1, (os.cpu_count() or 2) - 1)) if self.device.startswith("cuda") else 0
        more = ("--report-to", "tensorboard", "--log-every-n-steps", "10", *self.extra)
        table = f"{self.data}/train.csv"
        return self.job().command(table, self.name, device=self.device, workers=workers, more=more)

    def settings(self) -> dict[str, Any]:
        """Return what makes two runs the same run."""
        architecture = (self.root / "model" / "open_clip_config.json").read_text(encoding="utf-8")
        table = (self.root / self.data / "train.csv").read_bytes()
        return {
            "command": self.command()[1:],
            "model": json.loads(architecture),
            "train_data": hashlib.sha256(table).hexdigest()[:16],
        }

    def is_complete(self) -> bool:
        """Say whether this run was finished earlier with the same settings.

        Raises:
            TrainingError: If it was finished with other ones. Nothing trained is ever overwritten.
        """
        marker = self.folder / _DONE
        if not marker.is_file() or not self.checkpoint.is_file():
            return False
        if json.loads(marker.read_text(encoding="utf-8"))["settings"] != self.settings():
            raise TrainingError(
                f"{self.folder} was trained with other settings (data, model or arguments after --): "
                "delete that folder or choose another --output"
            )
        return True

    def train(self, console: Console) -> None:
        """Train, showing the trainer's own lines and a bar.

        Raises:
            LossNotAttachedError: If the first logged step shows plain CLIP instead of the requested loss.
            TrainingError: If the trainer fails or leaves no checkpoint.
        """
        command = self.command()
        say(console, f"$ cd {self.root}", "dim")
        say(console, "$ " + shlex.join(["python", *command[1:]]).replace("\t", "\\t"), "dim")
        with bars(console) as progress:
            bar = progress.add_task(f"Training {self.loss}", total=1.0)

            def show(line: str, log: Log) -> None:
                progress.update(bar, completed=log.share)
                # The parameters and the printed model are two hundred lines; out.log has them.
                entry = _LOG_LINE.match(line)
                if entry and (entry["level"] != "INFO" or entry["text"].startswith(_SHOWN)):
                    say(console, entry["text"])

            trained = asyncio.run(
                trainer.train(self.job(), command, self.folder, root=self.root, on_line=show)
            )
        marker = {"settings": self.settings(), "seconds": round(trained.seconds, 1)}
        (self.folder / _DONE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def read_scalars(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's curves from its TensorBoard event files: step and value by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
