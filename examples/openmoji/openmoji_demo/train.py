"""Starts open_clip's own training command and makes sure that it trained the loss that was asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

STOCK_LOSS = "clip"
# A few pictures in grey, since the line art of the evaluation has no colour.
AUGMENTATION = ("scale=(0.5,1.0)", "gray_scale_prob=0.1")
_PROGRESS = re.compile(r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<seen>\d+)/(?P<total>\d+) ")
_TERM = re.compile(r"\b(\w+_loss): (\S+)", re.IGNORECASE)
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| (?P<level>\w+) \| (?P<text>.*)$")
_SHOWN = ("Train Epoch:", "Loss:")
_DONE = "complete.json"


class TrainingError(RuntimeError):
    """The trainer failed, or did something else than it was asked to."""


class LossNotAttachedError(TrainingError):
    """The trainer ran without the plug-in and would have trained plain CLIP under another name."""

    def __init__(self, loss: str, terms: Collection[str]) -> None:
        super().__init__(
            f"--loss {loss} was not honoured: the only loss terms logged are {', '.join(terms) or 'none'}.\n"
            "Without its plug-in open_clip takes --loss for an abbreviation of --loss-dist-impl and trains "
            "plain CLIP, so this run is not reported as anything else.\n"
            "Reinstall the plug-in (pip install -e '.[examples]'), make sure that "
            "TORCH_DEVICE_BACKEND_AUTOLOAD is not 0, and run\n"
            "python -m rankloss_open_clip.doctor"
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run inside the output folder.

    Attributes:
        root: The output folder: the trainer is started in it, and all paths are relative to it.
        data: The built data, relative to ``root``.
        loss: What is passed to ``--loss``.
        seed: The trainer's seed.
        epochs: How often every training caption is seen.
        device: ``cpu`` or ``cuda``.
        extra: Further arguments of the trainer; they come last, so they win.
    """

    root: Path
    data: str
    loss: str
    seed: int
    epochs: int
    device: str
    extra: tuple[str, ...] = ()

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
        return self.folder / "checkpoints" / f"epoch_{self.epochs}.pt"

    def command(self) -> list[str]:
        """Return the trainer's command line."""
        # Pictures this small are read faster than two cores can train on them; a GPU needs helpers.
        workers = min(8, max(1, (os.cpu_count() or 2) - 1)) if self.device.startswith("cuda") else 0
        # fmt: off
        return [
            sys.executable, "-m", "open_clip_train.main",
            # A relative path: open_clip reads meaning into a model path that contains "vit" or "coca".
            "--model", "local-dir:model",
            "--loss", self.loss,
            "--train-data", f"{self.data}/train.csv",
            "--dataset-type", "csv",
            "--csv-separator", "\t",
            "--aug-cfg", *AUGMENTATION,
            "--epochs", str(self.epochs),
            "--batch-size", "128",
            "--lr", "1e-3",
            "--wd", "0.1",
            "--beta1", "0.9",
            "--beta2", "0.98",
            "--eps", "1e-6",
            "--warmup", "30",
            "--grad-clip-norm", "1",
            "--precision", "fp32",
            "--device", self.device,
            "--workers", str(workers),
            "--seed", str(self.seed),
            "--logs", "runs",
            "--name", self.name,
            "--report-to", "tensorboard",
            "--log-every-n-steps", "10",
            "--save-frequency", "0",
            *self.extra,
        ]
        # fmt: on

    def settings(self) -> dict[str, Any]:
        """Return what makes two runs the same run."""
        architecture = (self.root / "model" / "open_clip_config.json").read_text(encoding="utf-8")
        table = (self.root / self.data / "train.csv").read_text(encoding="utf-8")
        return {
            "command": self.command()[1:],
            "model": json.loads(architecture),
            "train_data": _digest(table),
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_scalars(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's curves from its TensorBoard event files: step and value by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_loss(loss: str, terms: Collection[str]) -> None:
    """Raise unless the terms that a run logged show that it trained with ``loss``.

    The trainer's own log of its arguments proves nothing: without the plug-in it reads ``--loss X`` as
    ``--loss-dist-impl X``, trains plain CLIP and exits with status 0.

    Args:
        loss: What was passed to ``--loss``.
        terms: The loss terms that were logged, whatever their case: plain CLIP has ``contrastive_loss`` only.

    Raises:
        LossNotAttachedError: If there is no term besides plain CLIP's.
    """
    if loss != STOCK_LOSS and not {term.lower() for term in terms} - {"contrastive_loss"}:
        raise LossNotAttachedError(loss, terms)


class TrainerLog:
    """Reads the trainer's lines one by one, and stops a run that trains another loss than it was asked for.

    Attributes:
        done: The share of the training that is over.
        tail: The last lines.
        terms: The loss terms of the last logged step.
    """

    def __init__(self, loss: str, epochs: int) -> None:
        self._loss = loss
        self._epochs = epochs
        self.done = 0.0
        self.tail: deque[str] = deque(maxlen=30)
        self.terms: dict[str, float] = {}

    def read(self, line: str) -> bool:
        """Take in a line and say whether it reported a step.

        Raises:
            LossNotAttachedError: As soon as the first logged step shows plain CLIP instead of the loss.
        """
        self.tail.append(line)
        step = _PROGRESS.search(line)
        if step is None:
            return False
        terms = {name.lower(): float(value) for name, value in _TERM.findall(line)}
        if not self.terms:
            check_loss(self._loss, terms)
        self.terms = terms
        self.done = (int(step["epoch"]) + int(step["seen"]) / int(step["total"])) / self._epochs
        return True


def train(run: Run, console: Console) -> float:
    """Train, showing the trainer's own lines and a bar, and return the seconds it took.

    Raises:
        LossNotAttachedError: As soon as the first logged step shows plain CLIP instead of the loss asked for.
        TrainingError: If the trainer fails or leaves no checkpoint.
    """
    if run.folder.exists():
        shutil.rmtree(run.folder)  # an interrupted run: complete ones were skipped before
    command = run.command()
    console.print(f"[dim]$ cd {run.root}[/dim]", highlight=False, soft_wrap=True)
    console.print(
        "$ " + shlex.join(["python", *command[1:]]).replace("\t", "\\t"),
        style="dim",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=run.root,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            tail = _follow(run, process.stdout or (), console)
        except BaseException:
            process.terminate()
            raise
    code = process.returncode
    if code != 0 or not run.checkpoint.is_file():
        raise TrainingError(
            f"open_clip's trainer ended with status {code} and "
            f"{'a' if run.checkpoint.is_file() else 'no'} final checkpoint. Its last lines:\n"
            + "\n".join(tail)
        )
    seconds = time.monotonic() - started
    tags = [tag.removeprefix("train/") for tag in read_scalars(run.folder)]
    check_loss(run.loss, [tag for tag in tags if tag.endswith("_loss")])
    marker = {"settings": run.settings(), "seconds": round(seconds, 1)}
    (run.folder / _DONE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return seconds


def _follow(run: Run, output: Iterable[str], console: Console) -> deque[str]:
    """Show the trainer's progress until it ends, and return its last lines."""
    log = TrainerLog(run.loss, run.epochs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"Training {run.loss}", total=None)
        for raw in output:
            line = raw.rstrip()
            if log.read(line):
                bar.update(task, completed=log.done, total=1.0)
            # The parameters and the printed model are two hundred lines; out.log has them.
            entry = _LOG_LINE.match(line)
            if entry and (entry["level"] != "INFO" or entry["text"].startswith(_SHOWN)):
                console.print(entry["text"], markup=False, highlight=False)
        bar.update(task, completed=1.0, total=1.0)
    return log.tail


def training_seconds(run: Run) -> float:
    """Return how long a complete run took."""
    return float(json.loads((run.folder / _DONE).read_text(encoding="utf-8"))["seconds"])
