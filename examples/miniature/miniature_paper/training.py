"""One training: the unmodified command of open_clip in a process of its own.

The guard that the loss was honoured is that of ``examples/openmoji``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from openmoji_demo.train import TrainerLog, TrainingError

from .grid import PRESETS, Setting

MODELS = Path(__file__).resolve().parents[1] / "models"
# The trainer reads a meaning into a model's path that holds "vit" or "coca".
_FOLDERS = {"resnet": "resnet", "vit": "transformer"}
# λ by the step, so that its course does not hang on how many epochs a data size makes of the steps.
BY_STEP = ("--rankclip-schedule-unit", "step")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        checkpoint: The weights after the last epoch.
        seconds: From the start of the trainer to its end.
        first: The loss terms of the first step, the same contrastive one for every loss of a seed.
        last: Those of the last logged step.
    """

    checkpoint: Path
    seconds: float
    first: dict[str, float]
    last: dict[str, float]


def model_folder(backbone: str) -> Path:
    """Return the folder that holds the architecture."""
    return MODELS / _FOLDERS[backbone]


def model_name(backbone: str) -> str:
    """Return what open_clip calls the architecture, in the output folder."""
    return f"local-dir:models/{_FOLDERS[backbone]}"


def model_config(backbone: str) -> dict[str, Any]:
    """Return the architecture."""
    config: dict[str, Any] = json.loads(
        (model_folder(backbone) / "open_clip_config.json").read_text(encoding="utf-8")
    )
    return config


@dataclasses.dataclass(frozen=True)
class Job:
    """What the trainer is started with, beside the data.

    Attributes:
        loss: What is passed to ``--loss``.
        backbone: The model folder.
        epochs: How often every pair is seen.
        arguments: The arguments that the result depends on, these two among them but for the model.
    """

    loss: str
    backbone: str
    epochs: int
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, setting: Setting) -> Job:
        """Return the job that trains a setting."""
        epochs = PRESETS[setting.preset].epochs(setting.pairs)
        return cls(setting.loss, setting.backbone, epochs, tuple(arguments(setting)))

    def command(self, table: str, name: str, *, device: str, workers: int) -> list[str]:
        """Return the whole command line; it is run in the output folder.

        Args:
            table: The pairs' table, relative to the output folder.
            name: The run's folder below ``runs``.
            device: ``cpu`` or ``cuda``.
            workers: Processes that read pictures; 0 reads them in the trainer.
        """
        # fmt: off
        return [
            sys.executable, "-m", "open_clip_train.main",
            "--model", model_name(self.backbone),
            "--train-data", table,
            "--dataset-type", "csv",
            "--csv-separator", "\t",
            *self.arguments,
            "--device", device,
            "--workers", str(workers),
            "--logs", "runs",
            "--name", name,
            "--log-every-n-steps", "20",
            "--save-frequency", "0",
        ]
        # fmt: on


def recipe(loss: str, *, epochs: int, batch_size: int, warmup: int, seed: int) -> list[str]:
    """Return the arguments that every training has, whatever its loss."""
    # fmt: off
    return [
        "--loss", loss,
        "--epochs", str(epochs),
        "--batch-size", str(batch_size),
        "--lr", "1e-3",
        "--wd", "0.1",
        "--beta1", "0.9",
        "--beta2", "0.98",
        "--eps", "1e-6",
        "--warmup", str(warmup),
        "--grad-clip-norm", "1",
        "--precision", "fp32",
        "--aug-cfg", "scale=(0.6,1.0)",
        "--seed", str(seed),
    ]
    # fmt: on


def arguments(setting: Setting) -> list[str]:
    """Return the trainer's arguments that the result depends on, beside the data and the model."""
    preset = PRESETS[setting.preset]
    found = recipe(
        setting.loss,
        epochs=preset.epochs(setting.pairs),
        batch_size=preset.batch_size,
        warmup=preset.warmup,
        seed=setting.seed,
    )
    if setting.loss == "alip":
        found += ["--alip-caption-key", "synthetic"]
    if setting.loss.startswith("rankclip"):
        found += BY_STEP
    if setting.loss == "rankclip":
        found += ["--rankclip-lambda-cross", f"{setting.lambda_cross:g}"]
        found += ["--rankclip-lambda-in", f"{setting.lambda_in:g}"]
    elif setting.loss == "rankclip-cross":
        found += ["--rankclip-lambda-cross", f"{setting.lambda_cross:g}"]
    elif setting.loss == "rankclip-in":
        found += ["--rankclip-lambda-in", f"{setting.lambda_in:g}"]
    return found


def environment(threads: int | None) -> dict[str, str]:
    """Return a child's environment; ``threads`` None leaves the number of threads to it."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads is not None:
        env.update(
            dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        )
    return env


def place_models(output: Path) -> None:
    """Copy the architectures below ``output``, where the trainer's relative paths find them."""
    for folder in _FOLDERS.values():
        target = output / "models" / folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(MODELS / folder / "open_clip_config.json", target / "open_clip_config.json")


async def train(
    job: Job,
    *,
    output: Path,
    table: str,
    name: str,
    device: str,
    workers: int = 0,
    threads: int | None = 1,
    progress: Callable[[float], None] = lambda _: None,
) -> Trained:
    """Train one model; cancelling ends the trainer.

    Args:
        job: What is trained.
        output: The folder the trainer is started in.
        table: The pairs' table, relative to it.
        name: The run's folder below ``runs``; an older one is replaced.
        device: ``cpu`` or ``cuda``.
        workers: Processes that read pictures.
        threads: Threads of the trainer.
        progress: Is told the share that is done.

    Raises:
        LossNotAttachedError: If plain CLIP was trained in place of another loss.
        TrainingError: If the trainer fails or leaves no checkpoint.
    """
    folder = output / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoints" / f"epoch_{job.epochs}.pt"
    log = TrainerLog(job.loss, job.epochs)
    first: dict[str, float] = {}
    started = time.monotonic()
    async with child(
        job.command(table, name, device=device, workers=workers),
        cwd=output,
        env=environment(threads),
    ) as process:
        assert process.stdout is not None
        async for raw in process.stdout:
            if log.read(raw.decode(errors="replace").rstrip()):
                first = first or log.terms
                progress(log.done)
        code = await process.wait()
    if code != 0 or not checkpoint.is_file() or not first:
        raise TrainingError(
            f"open_clip's trainer ended with status {code}, {'a' if checkpoint.is_file() else 'no'} final "
            f"checkpoint and {'some' if first else 'no'} logged steps. Its last lines:\n"
            + "\n".join(log.tail)
        )
    return Trained(checkpoint, time.monotonic() - started, first, log.terms)


@contextlib.asynccontextmanager
async def child(
    command: list[str], *, cwd: Path, env: dict[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a process that never outlives the block, whose output and errors come as one stream."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,
        start_new_session=True,  # Ctrl-C is for the parent only, which ends its children in order
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), timeout=10)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
