"""A run from beginning to end: train, measure, keep the record, delete the weights."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from examples_common import trainer
from examples_common.machine import conditions
from examples_common.records import Record, Store
from examples_common.terminal import Report, run_all, say
from filelock import FileLock, Timeout
from joblib import cpu_count
from rich.console import Console

from .data import Tables
from .grid import Setting, model_config
from .search.trials import Attempt

_PACKAGES = {"open_clip": "open_clip_torch", "torch": "torch", "numpy": "numpy", "rankloss": "rankloss"}

Run = Setting | Attempt  # what one model is trained with and how it is measured
AnyRun = TypeVar("AnyRun", Setting, Attempt)


def key_of(run: Run, data: str) -> str:
    """Return a record's key: the run's name and a fingerprint of everything that determines its numbers.

    Args:
        run: The run.
        data: Fingerprint of the pairs that are trained on and of what is measured on.
    """
    content = {
        "setting": dataclasses.asdict(run),
        "model": model_config(run.backbone),
        "arguments": run.job().arguments,
        "data": data,
        "measured": run.measured(),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    return f"{run.name}-{digest}"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Hardware of the runs."""

    device: str  # cpu or cuda
    jobs: int  # runs at a time

    @property
    def threads(self) -> int | None:
        """Threads of each run; None leaves it to torch."""
        return 1 if self.device == "cpu" else None

    @property
    def workers(self) -> int:
        """Processes that read pictures for each training; with 0 the trainer reads them itself."""
        return 0 if self.device == "cpu" else max(1, cpu_count() // self.jobs - 1)

    def conditions(self) -> dict[str, Any]:
        """Return versions and hardware, for the record."""
        import torch

        return conditions(
            _PACKAGES,
            device=torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu",
            threads=self.threads,
            jobs=self.jobs,
        )


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Place of the trainings and measurements."""

    output: Path  # the trainer is started here
    icons: Path
    tables: Tables  # tables of pairs below output
    store: Store
    machine: Machine
    keep_checkpoints: bool = False  # keep weights and log of runs that succeeded
    teacher: str | None = None  # folder of a model that others' rankings are compared with

    def key(self, run: Run) -> str:
        """Return the key of a run's record."""
        return key_of(run, self.tables.digests[run.pairs])

    def find(self, runs: Iterable[AnyRun]) -> dict[AnyRun, Record]:
        """Return the records there are of these runs, made from the same data by the same arguments."""
        records = self.store.read()
        return {run: records[key] for run in runs if (key := self.key(run)) in records}

    def do(self, title: str, runs: Sequence[AnyRun], console: Console) -> bool:
        """Train and measure the runs without a record, and return whether all have one now."""
        there = self.find(runs)
        todo = [run for run in runs if run not in there]
        console.rule(f"{title}, {self.machine.jobs} at a time on {self.machine.device}")
        say(console, f"{len(runs)} models, {len(there)} of them finished already")
        expected = (trainer.TrainingError, OSError)
        queue = run_all(todo, self.make, jobs=self.machine.jobs, console=console, expected=expected)
        failed, there = asyncio.run(queue), self.find(runs)
        for said, missing in (
            ("Failed", list(failed)),
            ("Left to another process", [run for run in todo if run not in failed and run not in there]),
        ):
            if missing:
                say(console, f"{said}: {', '.join(run.name for run in missing)}", "bold red")
        return len(there) == len(runs)

    async def make(self, run: Run, report: Report) -> None:
        """Train and measure a model, and store its record, unless another process is doing so or has done it.

        Raises:
            TrainingError: If the trainer failed or trained another loss, or measuring failed.
        """
        key = self.key(run)
        (self.output / "locks").mkdir(exist_ok=True)
        try:
            with FileLock(self.output / "locks" / key, timeout=0):
                if key not in self.store.read():
                    self.store.save(key, await self._record(run, key, report))
        except Timeout:
            return

    async def _record(self, run: Run, key: str, report: Report) -> Record:
        job, machine, folder = run.job(), self.machine, self.output / "runs" / key
        table = self.tables.tables[run.pairs]
        report("training", 0.0)
        trained = await trainer.train(
            job,
            job.command(
                table, key, device=machine.device, workers=machine.workers, more=("--log-every-n-steps", "20")
            ),
            folder,
            root=self.output,
            threads=machine.threads,
            on_line=lambda _, log: report("training", 0.95 * log.share),
        )
        report("measuring", 0.95)
        started = time.monotonic()
        todo = {
            "setting": dataclasses.asdict(run),
            "model": f"local-dir:{job.model}",
            "checkpoint": str(trained.checkpoint),
            "icons": str(self.icons),
            "device": machine.device,
            "teacher": self.teacher,
        }
        measured = await self._measured(todo, folder)
        seconds = {"training": trained.seconds, "measuring": time.monotonic() - started}
        if not self.keep_checkpoints:
            shutil.rmtree(folder)
        return {
            "setting": todo["setting"],
            **measured,
            "data": self.tables.digests[run.pairs],
            "training": {"first": trained.first, "last": trained.last},
            "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
            "conditions": machine.conditions(),
        }

    async def _measured(self, todo: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Measure in a process of its own, with threads of its own."""
        job, result, tail = folder / "job.json", folder / "measured.json", deque[str](maxlen=30)
        job.write_text(json.dumps({**todo, "result": str(result)}), encoding="utf-8")
        command = [sys.executable, "-m", "miniature_paper.measure", str(job)]
        code = await trainer.follow(command, tail.append, cwd=self.output, threads=self.machine.threads)
        if code != 0 or not result.is_file():
            raise trainer.TrainingError(
                f"measuring ended with status {code}. Its last lines:\n" + "\n".join(tail)
            )
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
