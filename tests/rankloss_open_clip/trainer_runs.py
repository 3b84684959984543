"""Real runs of open_clip's trainer, on a tiny model and 64 generated pairs."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import process_pool
from counting import LOSSES_AND_FOLDERS, count_calls
from samples import add_sample

SAMPLES = 64
PRECISIONS = ("fp32", "amp", "amp_bf16", "bf16", "pure_bf16")
STEPS = 4  # optimizer steps of an epoch, without accumulation
TIMEOUT = 600  # seconds; a busy machine takes minutes for what takes seconds
RANKCLIP_OFFICIAL = [
    *("--loss", "rankclip", "--rankclip-schedule", "official"),
    *("--loss-schedule-unit", "epoch"),
]
RANKCLIP_IN_WHOLE_BATCHES = [  # two epochs of one step each, on the same uncropped pairs in any order
    *("--loss", "rankclip", "--epochs", "2", "--batch-size", str(SAMPLES)),
    *("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"),
]
LOCAL_LOSS_WITH_GRAD = ["--local-loss", "--gather-with-grad"]
PLUGIN_OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
# A run without the plug-in, and then the modules of ours, the reasons for it, and these after all.
WITHOUT_PLUGIN = """
import sys
from open_clip_train.main import main
main(sys.argv[1:])
print(sorted(name for name in sys.modules if name.startswith("rankloss")))
from rankloss_open_clip import bootstrap
print(*bootstrap.problems())
bootstrap.attach()
print(bootstrap.problems())
"""

# Importing the trainer takes ten times as long as training the tiny model, so most runs are forked from a
# process that has imported it, the one that the pools of processes are forked from.
_forks = multiprocessing.get_context("forkserver")
_OF_A_RUN = [
    "open_clip_train.main",
    "rankloss_open_clip.training",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "pandas",
]
_forks.set_forkserver_preload([*process_pool._PRELOADED, *_OF_A_RUN])


@dataclass(frozen=True)
class Run:
    """A finished process, as a rule a run of the trainer."""

    output: str  # stdout and stderr
    directory: Path

    @cached_property
    def log(self) -> str:
        return (self.directory / "out.log").read_text()

    @cached_property
    def params(self) -> dict[str, str]:
        """The trainer's arguments as it wrote them down, all as text."""
        lines = (self.directory / "params.txt").read_text().splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    @cached_property
    def _events(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own
            module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
            return module.EventAccumulator(str(self.directory / "tensorboard"), {"scalars": 0}).Reload()

    @cached_property
    def scalars(self) -> dict[str, dict[int, float]]:
        """The scalars in TensorBoard's file: tag → step → value."""
        return {
            tag.removeprefix("train/"): {event.step: event.value for event in self._events.Scalars(tag)}
            for tag in self._events.Tags()["scalars"]
        }

    @cached_property
    def timeless_log(self) -> list[str]:
        """The lines of the training steps as they were written, without date, times and throughput."""
        lines = [line for line in self.log.splitlines() if "Train Epoch:" in line]
        return [re.sub(r"^.*(?=Train Epoch:)|Data \(t\):.*?/gpu ", "", line) for line in lines]

    def tensors_after_epoch(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint, those of the optimizer included."""
        path = self.directory / "checkpoints" / f"epoch_{number}.pt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name.removeprefix("module."): x for name, x in checkpoint["state_dict"].items()}
        for index, state in checkpoint["optimizer"]["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items()})
        return tensors

    def train_lines(self) -> list[dict[str, float]]:
        """The values of each line that the trainer logged while training."""
        lines = [line for line in self.log.splitlines() if "Train Epoch:" in line]
        name_and_value = re.compile(r"(\w+): (-?[\d.]+) \(")  # before the bracket with the running mean
        return [{name: float(value) for name, value in name_and_value.findall(line)} for line in lines]


def assert_equal_training(one: Run, other: Run, epochs: tuple[int, ...] = (1, 2, 3)) -> None:
    """Two runs have the same weights and optimizer state, bit for bit, after each of these epochs."""
    for epoch in epochs:
        left, right = one.tensors_after_epoch(epoch), other.tensors_after_epoch(epoch)
        assert left.keys() == right.keys()
        assert len(left) > 20, "weights and optimizer state must be there to be compared"
        assert all(torch.equal(left[name], right[name]) for name in left)


class Trainer:
    """Starts runs of the trainer in their own processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tower = {"width": 32, "layers": 1}
        images = {"image_size": 32, "patch_size": 16, "head_width": 16, **tower}
        texts = {"context_length": 16, "vocab_size": 49408, "heads": 2, **tower}
        pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        multimodal = {"custom_text": True, "multimodal_cfg": texts}
        # open_clip finds CoCa's loss by the model's name.
        self.write_model("tiny", {"vision_cfg": images, "text_cfg": texts})
        vision_of_coca = {**images, **pooled}
        text_of_coca = {**texts, "embed_cls": True, "output_tokens": True}
        self.write_model("tiny-coca", {"vision_cfg": vision_of_coca, "text_cfg": text_of_coca, **multimodal})
        noise = np.random.default_rng(0)
        rows = ["filepath\ttitle\tsynthetic"]
        for i in range(SAMPLES):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(directory / f"{i}.png")
            title = f"picture {i:02d} of {i % 7} apples and {i % 5} pears"
            synthetic = f"there are {i % 7} apples, {i % 5} pears and {i % 3} plums"
            rows.append(f"{directory / f'{i}.png'}\t{title}\t{synthetic}")
        (directory / "data.csv").write_text("\n".join(rows) + "\n")
        self.rows = [row.split("\t") for row in rows[1:]]
        for number in range(2):  # the same pairs as a webdataset of two shards
            with tarfile.open(directory / f"shard-{number}.tar", "w") as shard:
                for i in range(number, SAMPLES, 2):
                    picture, title, _ = self.rows[i]
                    add_sample(shard, f"{i:03}", png=Path(picture).read_bytes(), txt=title.encode())

    def write_model(self, name: str, config: dict[str, Any]) -> None:
        """Write the folder that ``--model local-dir:…`` reads."""
        (self.directory / name).mkdir()
        written = json.dumps({"model_cfg": {"embed_dim": 32, **config}, "preprocess_cfg": {}})
        (self.directory / name / "open_clip_config.json").write_text(written)

    @property
    def webdataset(self) -> list[str]:
        """The options that name the pairs as a webdataset of two shards."""
        shards = str(self.directory / "shard-{0..1}.tar")
        return ["--dataset-type", "webdataset", "--train-data", shards, "--train-num-samples", str(SAMPLES)]

    def arguments(self, name: str, *options: str) -> list[str]:
        """The trainer's arguments of a run with this name: the tiny model, the CSV file, and the options."""
        return [
            *("--model", f"local-dir:{self.directory / 'tiny'}", "--device", "cpu", "--precision", "fp32"),
            *("--train-data", str(self.directory / "data.csv"), "--dataset-type", "csv", "--workers", "0"),
            *("--csv-img-key", "filepath", "--csv-caption-key", "title"),
            *("--batch-size", str(SAMPLES // STEPS), "--warmup", "1", "--log-every-n-steps", "1"),
            *("--logs", str(self.directory / "logs"), "--name", name, "--report-to", "tensorboard"),
            *options,
        ]

    def call(
        self,
        name: str,
        *options: str,
        processes: int = 1,
        change: Any = None,
        alone: bool = False,
        code: int = 0,
        **environment: str,
    ) -> Run:
        """Call the trainer's ``main`` in processes forked from one that has imported it.

        Several find each other by the variables that torchrun sets; when one fails, the others are killed.
        ``change`` has a method ``install``, which changes the trainer in these processes. ``alone`` makes the
        options the whole command line. ``code`` is the exit code that it must end with.
        """
        output = self.directory / f"{name}.txt"
        environment = {"OMP_NUM_THREADS": "1", **environment}
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        started = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            argv = list(options) if alone else self.arguments(name, *options)
            process = _forks.Process(target=_train, args=(argv, str(output), change, environment | ranks))
            process.start()
            started.append(process)
        first_failure = next(filter(None, _exit_codes(started)), 0)
        return self._finished(first_failure, output.read_text(), name, code)

    def run(self, name: str, *options: str, command: tuple[str, ...] = (), **keywords: Any) -> Run:
        """Run the command, or another way to start the trainer, in an interpreter; see :meth:`python`."""
        command = command or ("-m", "open_clip_train.main")
        return self.python(*command, *self.arguments(name, *options), name=name, **keywords)

    def python(
        self,
        *arguments: str,
        executable: str = sys.executable,
        name: str = "",
        code: int = 0,
        **environment: str,
    ) -> Run:
        """Run Python with these arguments; ``code`` is the exit code that it must end with."""
        done = subprocess.run(
            [executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            cwd=self.directory,
            timeout=20 * TIMEOUT,
            check=False,
        )
        return self._finished(done.returncode, done.stdout, name, code)

    def _finished(self, code: int, output: str, name: str, expected: int) -> Run:
        """The run that has ended with an exit code, which must be the expected one."""
        assert code == expected, output[-4000:]
        return Run(output, self.directory / "logs" / name)


def _exit_codes(processes: list[Any]) -> list[int]:
    """Wait for processes, and kill all others when one fails or TIMEOUT is over.

    The exit codes are in the order in which the processes ended, so that of the first to fail comes before
    those of the ones that were killed for it.
    """
    deadline = time.monotonic() + TIMEOUT
    codes: list[int] = []
    running = list(processes)
    while running:
        sentinels = [process.sentinel for process in running]
        ended = multiprocessing.connection.wait(sentinels, deadline - time.monotonic())
        codes += [process.exitcode for process in running if process.sentinel in ended]
        running = [process for process in running if process.sentinel not in ended]
        is_timeout = not ended
        if is_timeout or any(codes):
            for process in running:
                process.kill()
    return codes


@dataclass(frozen=True)
class EpochSeeds:
    """Seeds each epoch by its number, and may kill the process in the middle of one.

    The trainer seeds once, when it starts, so the first epoch after ``--resume`` is shuffled and cropped like
    the first of a fresh run, with any loss. With a seed for each epoch a resumed run sees the batches of the
    uninterrupted one, and everything else can be compared to the last bit.
    """

    kill_in_epoch: int | None = None
    kill_at_call: int = 3

    def install(self, trainer: Any) -> None:
        original = trainer.train_one_epoch

        @functools.wraps(original)
        def train_one_epoch(
            model: torch.nn.Module, data: Any, loss: torch.nn.Module, epoch: int, *rest: Any, **named: Any
        ) -> Any:
            trainer.random_seed(epoch)
            if epoch == self.kill_in_epoch:
                calls = itertools.count(1)
                loss.register_forward_pre_hook(lambda *_: _kill_if(next(calls) == self.kill_at_call))
            return original(model, data, loss, epoch, *rest, **named)

        trainer.train_one_epoch = train_one_epoch


def _kill_if(now: bool) -> None:
    """Kill this process, as by ``kill -9``."""
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


class NoRecompilation:
    """Makes it an error to compile a function again, and prints the counts of what was compiled."""

    def install(self, trainer: Any) -> None:
        dynamo, main = importlib.import_module("torch._dynamo"), trainer.main
        dynamo.config.error_on_recompile = True

        def counted(argv: list[str]) -> None:
            main(argv)
            counts = dynamo.utils.counters
            breaks = sum(counts["graph_break"].values())
            print("compiled frames:", counts["frames"]["ok"], "graph breaks:", breaks)

        trainer.main = counted


CALLED_ONCE = {
    "choose": LOSSES_AND_FOLDERS["choose"],
    **{name: f"rankloss.{name}.__init__" for name in ("RankClipLoss", "MimicryLoss", "ClipLoss")},
}


class PrintsCounts:
    """Prints how often losses are chosen and built, and a folder is opened, before the first step."""

    def install(self, trainer: Any) -> None:
        counts = count_calls(pytest.MonkeyPatch(), **CALLED_ONCE, open=LOSSES_AND_FOLDERS["open"])
        train = trainer.train_one_epoch

        @functools.wraps(train)
        def train_one_epoch(*args: Any, **keywords: Any) -> Any:
            print("before a step:", json.dumps(counts))
            return train(*args, **keywords)

        trainer.train_one_epoch = train_one_epoch


class WithoutDeviceIds(torch.nn.parallel.DistributedDataParallel):
    """open_clip 3.x passes ``device_ids=[device]``, which DistributedDataParallel refuses for a CPU."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **keywords: Any) -> None:
        super().__init__(module, **keywords)


def _train(argv: list[str], output: str, change: Any, environment: dict[str, str]) -> None:
    """Call the trainer's ``main`` in this forked process, which ends with it; ``output`` gets its words."""
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(Path(output).parent)
    torch.set_num_threads(1)
    if "RANK" in environment:
        torch.nn.parallel.DistributedDataParallel = WithoutDeviceIds  # type: ignore[misc]
    trainer = importlib.import_module("open_clip_train.main")
    if change is not None:
        change.install(trainer)
    sys.exit(trainer.main(argv))


class Runs:
    """Runs by name. Each happens once, when it is first asked for."""

    def __init__(self) -> None:
        self._starts: dict[str, Callable[[], Run]] = {}
        self._done: dict[str, Run] = {}

    def add(self, name: str, start: Callable[..., Run], *arguments: Any, **keywords: Any) -> None:
        """Add a run by the call that starts it, which is made when the run is first asked for."""
        self._starts[name] = functools.partial(start, *arguments, **keywords)

    def __getitem__(self, name: str) -> Run:
        if name not in self._done:
            self._done[name] = self._starts[name]()
        return self._done[name]
