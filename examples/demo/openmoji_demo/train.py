"""The trainings of the demo: their recipe, whether one was finished earlier, and several side by side."""

import asyncio
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joblib import cpu_count
from rich.console import Console

from rankloss_trainers.catalog import TRAINERS_OWN, known, load, names_of, prefix_of

from . import trainer
from .arms import Arm
from .terminal import Report, run_all, say
from .trainer import Job, Log, TrainingError

# Some pictures in grey, since the line art of the evaluation has no colour.
AUGMENTATION = ("scale=(0.5,1.0)", "gray_scale_prob=0.1")
# The trainer's warnings, except that the model starts from random weights, which is intended here.
_WARNING = re.compile(
    r"^\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| (?:WARNING|ERROR|CRITICAL) \| "
    r"(?!.*(?:no CLIP weights found|No pretrained weights loaded))(?P<text>.*)$"
)
_ATTACHED = re.compile(r" \| INFO \| (Loss: (?!\d).*)")  # what the plug-in trains with, before the first step
_DONE = "complete.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run inside the output folder."""

    root: Path  # the output folder: the trainer is started in it, and all paths are relative to it
    data: str  # the built data
    arm: Arm
    seed: int
    epochs: int
    device: str
    extra: tuple[str, ...] = ()  # further arguments of the trainer; they come last and take precedence

    @property
    def name(self) -> str:
        """The trainer's ``--name``."""
        return f"{Path(self.data).name}-{self.arm.name}-epochs{self.epochs}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the trainer's log, checkpoints and TensorBoard events."""
        return self.root / "runs" / self.name

    @property
    def checkpoint(self) -> Path:
        """The weights after the last epoch."""
        return trainer.checkpoint_of(self.folder, self.epochs)

    def record(self) -> dict[str, Any]:
        """Return what the complete run was trained with: its settings, the seconds it took, the threads."""
        stored: dict[str, Any] = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
        return stored

    def job(self) -> Job:
        """Return the training job."""
        numbers = {"epochs": self.epochs, "batch_size": 64, "warmup": 30, "seed": self.seed}
        recipe = trainer.recipe(self.arm.loss, **numbers, augmentation=AUGMENTATION)
        return Job(self.arm.loss, self.epochs, "model", (*recipe, *self.arm.arguments))

    def command(self) -> list[str]:
        """Return the trainer's command line."""
        # On a CPU, reading such small pictures is no bottleneck; a GPU needs worker processes.
        workers = min(8, max(1, cpu_count() - 1)) if self.device.startswith("cuda") else 0
        more = ("--report-to", "tensorboard", "--log-every-n-steps", "10", *self.extra)
        table = f"{self.data}/train.csv"
        return self.job().command(table, self.name, device=self.device, workers=workers, more=more)

    def settings(self) -> dict[str, Any]:
        """Return what identifies a run."""
        model = json.loads((self.root / "model" / "open_clip_config.json").read_text(encoding="utf-8"))
        table = hashlib.sha256((self.root / self.data / "train.csv").read_bytes()).hexdigest()
        return {"command": self.command()[1:], "model": model, "train_data": table[:16]}

    def is_complete(self) -> bool:
        """Say whether this run was finished earlier with the same settings.

        Raises:
            TrainingError: If it was finished with other ones. Nothing trained is ever overwritten.
        """
        if not (self.folder / _DONE).is_file() or not self.checkpoint.is_file():
            return False
        if self.record()["settings"] != self.settings():
            raise TrainingError(
                f"{self.folder} was trained with other settings (data, model or arguments after --): "
                "delete that folder or choose another --output"
            )
        return True

    async def train(self, threads: int | None, report: Report, console: Console) -> None:
        """Train, report the share that is done, pass on the trainer's warnings, and mark the run as complete.

        Raises:
            TrainingError: As :func:`openmoji_demo.trainer.train`.
        """

        def read(line: str, log: Log) -> None:
            """Show a line of the trainer's log, if it says something, and the share that is done."""
            if log.first:
                report("training", log.share)
            if warning := _WARNING.match(line):
                say(console, f"{self.arm.name}: {warning['text']}", "yellow")
            if attached := _ATTACHED.search(line):
                say(console, attached[1])

        report("preparing", 0.0)  # the model, and a teacher's features
        trained = await trainer.train(
            self.job(), self.command(), self.folder, root=self.root, threads=threads, on_line=read
        )
        marker = {"settings": self.settings(), "threads": threads, "seconds": round(trained.seconds, 1)}
        (self.folder / _DONE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def arguments_for(loss: str, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the trainer's arguments without the options of other losses than this, or these joined ones."""
    names = [] if loss == TRAINERS_OWN else names_of(loss)
    prefixes = {name: prefix_of(name, load(name)) for name in known()}
    kept = []
    applies = True  # of the latest option, and so of its values
    for word in arguments:
        if word.startswith("--"):
            owners = {name for name, prefix in prefixes.items() if word.startswith(f"--{prefix}-")}
            is_of_the_trainer = not owners
            applies = is_of_the_trainer or not owners.isdisjoint(names)
        if applies:
            kept.append(word)
    return tuple(kept)


def side_by_side(count: int, device: str) -> tuple[int, int | None]:
    """Return how many of ``count`` trainings run at a time, and with how many threads each.

    On a CPU all of them share the cores: three on two cores end sooner than two and then one. On a GPU there
    is one at a time, with torch's number of threads (None).
    """
    if device != "cpu":
        return 1, None
    return count, max(1, cpu_count() // count)


def train_all(runs: Sequence[Run], device: str, console: Console) -> None:
    """Train several models; the first to fail ends the others, and its error is raised."""
    jobs, threads = side_by_side(len(runs), device)

    async def one(run: Run, report: Report) -> None:
        await run.train(threads, report, console)

    asyncio.run(run_all(runs, one, jobs=jobs, console=console))
