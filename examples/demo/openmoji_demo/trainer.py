"""Starts open_clip's unmodified training command, follows its log, and checks which loss it trained."""

import asyncio
import dataclasses
import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

_NOT_ATTACHED = """\
Without the plug-in open_clip reads --loss as an abbreviation of --loss-dist-impl and trains plain CLIP.
Reinstall the plug-in (pip install -e '.[examples]'), make sure that TORCH_DEVICE_BACKEND_AUTOLOAD
is unset or 1, and run rankloss doctor. A command of your own that cannot be wrong is
python -m rankloss_open_clip, which fails where the plug-in is missing"""
_STEP = re.compile(r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<seen>\d+)/(?P<total>\d+) ")
_TERM = re.compile(r"\b(\w+_loss): (\S+)", re.IGNORECASE)


class TrainingError(RuntimeError):
    """The trainer failed, or trained something else."""


def recipe(
    loss: str, *, epochs: int, batch_size: int, warmup: int, seed: int, augmentation: Sequence[str]
) -> list[str]:
    """Return the trainer's arguments that every example shares; the result depends on each of them."""
    return shlex.split(
        f"--loss {loss} --epochs {epochs} --batch-size {batch_size} --lr 1e-3 --wd 0.1 --beta1 0.9 "
        f"--beta2 0.98 --eps 1e-6 --warmup {warmup} --grad-clip-norm 1 --precision fp32 "
        f"--aug-cfg {shlex.join(augmentation)} --seed {seed}"
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """A training, whatever the machine that does it."""

    loss: str
    epochs: int
    model: str  # folder of the architecture, relative to where the trainer is started
    arguments: tuple[str, ...]  # those that the result depends on, beside model and data

    def command(
        self, table: str, name: str, *, device: str, workers: int, more: Sequence[str] = ()
    ) -> list[str]:
        """Return the trainer's command line.

        The table's path is relative to where the trainer is started, and ``name`` is the run's folder below
        ``runs``. More arguments come last and take precedence. Without workers the trainer reads the images.
        """
        # A relative path, since open_clip gives "vit" and "coca" anywhere in a model's path a meaning.
        model, table, name = map(shlex.quote, (f"local-dir:{self.model}", table, name))
        words = (
            f"-m open_clip_train.main --model {model} --train-data {table} "
            f"--dataset-type csv --csv-separator '\t' {shlex.join(self.arguments)} --device {device} "
            f"--workers {workers} --logs runs --name {name} --save-frequency 0"
        )
        return [sys.executable, *shlex.split(words), *more]


def place_model(source: Path, folder: Path) -> None:
    """Copy an architecture to where the trainer's relative path finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "open_clip_config.json", folder / "open_clip_config.json")


class Log:
    """Reads the trainer's output line by line and stops a run that trains plain CLIP instead of its loss."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self.checkpoint = checkpoint_of(folder, job.epochs)
        self.share = 0.0  # of the training that is done
        self.seconds = 0.0  # that it took
        self.tail: deque[str] = deque(maxlen=30)
        self.last: dict[str, float] = {}  # terms of the latest step
        self.first = self.last  # and of the first; its contrastive term is the same for every loss of a seed

    def read(self, line: str) -> None:
        """Take in a line.

        Raises:
            TrainingError: The first step has no term but CLIP's, although the job has another loss.
        """
        self.tail.append(line)
        step = _STEP.search(line)
        if step is None:
            return
        self.last = {name.lower(): float(value) for name, value in _TERM.findall(line)}
        if not self.first:
            # The logged arguments prove nothing: without the plug-in, --loss abbreviates another option.
            if self._job.loss != "clip" and not self.last.keys() - {"contrastive_loss"}:
                logged = ", ".join(self.last) or "none"
                raise TrainingError(
                    f"--loss {self._job.loss} was not honoured: the only loss terms logged are {logged}.\n"
                    f"{_NOT_ATTACHED}"
                )
            self.first = self.last
        share_of_epoch = int(step["seen"]) / int(step["total"])
        self.share = (int(step["epoch"]) + share_of_epoch) / self._job.epochs


def checkpoint_of(folder: Path, epochs: int) -> Path:
    """Return where the trainer leaves the weights of the last epoch."""
    return folder / "checkpoints" / f"epoch_{epochs}.pt"


async def train(
    job: Job,
    command: Sequence[str],
    folder: Path,
    *,
    root: Path,
    threads: int | None = None,
    on_line: Callable[[str, Log], None] | None = None,
) -> Log:
    """Train one model with a command that is started in ``root``; cancelling ends the trainer.

    Files of an earlier, unfinished run in ``folder``, where the trainer writes, are deleted. ``on_line`` is
    called with every line of output and the log read so far; without ``threads`` their number is torch's.

    Raises:
        TrainingError: The trainer failed, logged no step, left no last checkpoint, or trained plain CLIP in
            place of another loss.
    """
    shutil.rmtree(folder, ignore_errors=True)
    log, started = Log(job, folder), time.monotonic()

    def read(line: str) -> None:
        log.read(line)
        if on_line is not None:
            on_line(line, log)

    code = await follow(command, read, cwd=root, threads=threads)
    log.seconds = time.monotonic() - started
    if code != 0 or not log.checkpoint.is_file() or not log.first:
        checkpoint = "a final checkpoint" if log.checkpoint.is_file() else "no final checkpoint"
        steps = "some logged steps" if log.first else "no logged steps"
        reason = f"open_clip's trainer ended with status {code}, {checkpoint} and {steps}. Its last lines:"
        raise TrainingError("\n".join([reason, *log.tail]))
    return log


async def follow(
    command: Sequence[str], read: Callable[[str], None], *, cwd: Path, threads: int | None
) -> int | None:
    """Run a command, pass on its output and errors line by line, and return its exit status."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads is not None:
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,
        start_new_session=True,  # Ctrl-C reaches only the parent, which then terminates its children
    )
    assert process.stdout is not None
    try:
        async for raw in process.stdout:
            read(raw.decode(errors="replace").rstrip())
        return await process.wait()
    finally:
        if process.returncode is None:  # cancelled: the process must not outlive this call
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), timeout=10)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
