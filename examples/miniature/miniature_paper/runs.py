"""A run from beginning to end: train, measure, keep the record, throw the weights away."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .data import Tables
from .grid import Setting
from .schedule import Progress
from .store import Record, Store, key_of
from .training import Job, child, environment, model_name, train

_PACKAGES = {"open_clip": "open_clip_torch", "torch": "torch", "numpy": "numpy", "rankloss": "rankloss"}


class _Trainable(Protocol):
    """A dataclass that says what a model is trained with."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def pairs(self) -> int:
        """Number of training pairs."""


class MeasuringError(RuntimeError):
    """The measuring process failed."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the runs are done on.

    Attributes:
        device: ``cpu`` or ``cuda``.
        jobs: Runs at a time.
        workers: Processes that read pictures for each training; 0 reads them in the trainer.
        threads: Threads of each run; None leaves it to torch.
    """

    device: str
    jobs: int
    workers: int
    threads: int | None

    @classmethod
    def of(cls, device: str, jobs: int | None = None) -> Machine:
        """Use every core: a run of one thread on each; or a GPU, with processes that feed it.

        On a GPU these small models leave most of it idle, so some of them share it, as many as there are
        four cores to read and prepare the pictures of each.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if device == "cpu":
            return cls(device, jobs or cores, 0, 1)
        jobs = jobs or max(1, min(4, cores // 4))
        return cls(device, jobs, max(1, cores // jobs - 1), None)

    def conditions(self) -> dict[str, Any]:
        """Return versions and hardware, for the record."""
        import torch

        name = torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"
        return {
            **{key: importlib.metadata.version(package) for key, package in _PACKAGES.items()},
            "python": platform.python_version(),
            "device": name,
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "jobs": self.jobs,
        }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Where models are trained and measured, one after the other or some at a time.

    Attributes:
        output: The folder that the trainer is started in.
        icons: The icons' folder.
        tables: The tables of pairs below ``output``.
        store: Where records go.
        machine: What to run on.
        keep_checkpoints: Whether to keep the weights and the trainer's log of runs that succeeded.
    """

    output: Path
    icons: Path
    tables: Tables
    store: Store
    machine: Machine
    keep_checkpoints: bool = False

    async def make(
        self, setting: _Trainable, job: Job, key: str, *, measured_by: str, progress: Progress
    ) -> None:
        """Train and measure a model, and store its record.

        Args:
            setting: What the record is of.
            job: What the trainer is started with for it.
            key: The record's name.
            measured_by: The module that measures, in a process of its own.
            progress: Is told the stage and its share that is done.

        Raises:
            TrainingError: If the trainer failed, or trained another loss.
            MeasuringError: If measuring failed.
        """
        machine, folder = self.machine, self.output / "runs" / key
        progress("training", 0.0)
        trained = await train(
            job,
            output=self.output,
            table=self.tables.tables[setting.pairs],
            name=key,
            device=machine.device,
            workers=machine.workers,
            threads=machine.threads,
            progress=lambda share: progress("training", share),
        )
        progress("measuring", 1.0)
        started = time.monotonic()
        todo = {
            "setting": dataclasses.asdict(setting),
            "output": str(self.output),
            "model": model_name(job.backbone),
            "checkpoint": str(trained.checkpoint),
            "icons": str(self.icons),
            "device": machine.device,
        }
        measured = await _measured(measured_by, todo, folder, threads=machine.threads)
        record = {
            "setting": dataclasses.asdict(setting),
            **measured,
            "data": self.tables.digests[setting.pairs],
            "training": {"first": trained.first, "last": trained.last},
            "seconds": {
                "training": round(trained.seconds, 1),
                "measuring": round(time.monotonic() - started, 1),
            },
            "conditions": machine.conditions(),
        }
        self.store.save(key, record)
        if not self.keep_checkpoints:
            shutil.rmtree(folder)


class Runs:
    """Makes the records of the grid's settings.

    Args:
        workshop: Where they are made.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def stored(self, setting: Setting) -> Record | None:
        """Return the record of a setting, if there is one of the same data and arguments."""
        return self._workshop.store.load(self._key(setting))

    async def make(self, setting: Setting, progress: Progress) -> None:
        """Train and measure a setting, and store its record; see :meth:`Workshop.make`."""
        await self._workshop.make(
            setting,
            Job.of(setting),
            self._key(setting),
            measured_by="miniature_paper.measure",
            progress=progress,
        )

    def _key(self, setting: Setting) -> str:
        return key_of(setting, self._workshop.tables.digests[setting.pairs])


async def _measured(
    module: str, todo: dict[str, Any], folder: Path, *, threads: int | None
) -> dict[str, Any]:
    """Measure in a process of its own and return what it found; cancelling ends the process.

    Args:
        module: The module that is run with a job file; it writes to the job's ``result``.
        todo: The job; the process is started in its ``output``.
        folder: Where job and result are written.
        threads: Threads of the process.

    Raises:
        MeasuringError: If it fails.
    """
    job, result = folder / "job.json", folder / "measured.json"
    job.write_text(json.dumps({**todo, "result": str(result)}), encoding="utf-8")
    env = environment(threads)
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    tail: deque[str] = deque(maxlen=30)
    async with child([sys.executable, "-m", module, str(job)], cwd=Path(todo["output"]), env=env) as process:
        assert process.stdout is not None
        async for raw in process.stdout:
            tail.append(raw.decode(errors="replace").rstrip())
        code = await process.wait()
    if code != 0 or not result.is_file():
        raise MeasuringError(f"measuring ended with status {code}. Its last lines:\n" + "\n".join(tail))
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
