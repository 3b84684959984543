"""Orders of a folder in open_clip's trainer: its steps are those of a loop of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from own_steps import SETTING, assert_equal_weights, encoded, resumed
from torch import Tensor
from trainer_runs import BOTH, SAMPLES, Run, Trainer

import rankloss_trainers
from rankloss_trainers.console import main
from rankloss_trainers.orders import Orders

OPTIONS = [
    *("--loss", "rankclip", "--rankclip-schedule", "constant"),
    *("--rankclip-lambda-cross", "8", "--rankclip-lambda-in", "8"),
]


def folder_of(trainer: Trainer, kind: str, data: list[str]) -> str:
    """Lists of two or three others for every other picture."""
    names = [Path(row[0]).name if kind == "csv" else f"{n:03}" for n, row in enumerate(trainer.rows)]
    lists = trainer.directory / f"{kind}.jsonl"
    lines = (
        {"id": names[n], "ids": [names[(n + k) % SAMPLES] for k in (5, 2, 9)[: 2 + n % 2]]}
        for n in range(0, SAMPLES, 2)
    )
    lists.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = str(trainer.directory / f"orders of {kind}")
    assert main(["orders", "--from", str(lists), "--output", output, *data]) == 0
    return output


def own_step(trainer: Trainer, run: Run, folder: str) -> dict[str, Tensor]:
    """The second step of a run, from its first checkpoint."""
    clip, optimizer = resumed(trainer, run)
    v, t = encoded(trainer, clip)
    loss = rankloss_trainers.create(
        "rankclip", orders=folder, schedule="constant", lambda_cross=8.0, lambda_in=8.0
    )
    lists = {k: torch.from_numpy(x) for k, x in Orders(folder).take(np.arange(SAMPLES)).items()}
    loss(v, t, clip.logit_scale.exp(), **lists).backward()
    optimizer.step()
    return dict(clip.state_dict())


def assert_own_step(trainer: Trainer, run: Run, folder: str) -> None:
    assert run.returncode == 0, run.output[-4000:]
    assert_equal_weights(run, own_step(trainer, run, folder))
    assert min(run.scalars["in_modal_loss"].values()) > 0
    assert set(run.scalars["listed_in_batch"].values()) == {1.0}  # a batch of all pairs


@pytest.fixture(scope="module")
def folders(trainer: Trainer) -> dict[str, str]:
    csv = ["--data", str(trainer.directory / "data.csv")]
    shards = ["--data", str(trainer.directory / "shard-{0..1}.tar")]
    return {"csv": folder_of(trainer, "csv", csv), "webdataset": folder_of(trainer, "webdataset", shards)}


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_run_is_a_loop_of_ones_own(trainer: Trainer, folders: dict[str, str], kind: str) -> None:
    data = trainer.webdataset if kind == "webdataset" else []
    options = [*SETTING, *OPTIONS, "--rankclip-orders", folders[kind], *data, "--batch-size", str(SAMPLES)]
    assert_own_step(trainer, trainer.call(f"orders, {kind}", *options), folders["csv"])


@pytest.mark.slow
def test_two_processes_train_as_one(trainer: Trainer, folders: dict[str, str]) -> None:
    halves = ["--batch-size", str(SAMPLES // 2), *BOTH]
    options = [*SETTING, *OPTIONS, "--rankclip-orders", folders["csv"], *halves]
    assert_own_step(trainer, trainer.call("orders, two processes", *options, processes=2), folders["csv"])


def test_a_folder_of_other_data_ends_the_run(trainer: Trainer, folders: dict[str, str]) -> None:
    run = trainer.call("orders of others", *SETTING, *OPTIONS, "--rankclip-orders", folders["webdataset"])
    assert run.returncode != 0
    assert re.search(r"row 0 of .*data\.csv, image .* is not row 0 of", run.output)
    run = trainer.call("no orders", *SETTING, *OPTIONS, "--rankclip-orders", str(trainer.directory))
    assert "argument --rankclip-orders: " in run.output
    assert "is no folder of `rankloss orders`" in run.output
