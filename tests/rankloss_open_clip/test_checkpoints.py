"""A checkpoint without the state of a loss, and a loss without a state; test_runs.py resumes one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import epoch_begins
from torch import nn

from rankloss_open_clip import checkpoints
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.training import TrainerLoss


def arguments(name: str = "alip", **changes: Any) -> Any:
    given = {"loss": name, "alip_caption_key": "syn", "epochs": 3, "rank": 0, "world_size": 2, "resume": None}
    return SimpleNamespace(**{**given, **changes})


def loss(args: Any) -> TrainerLoss:
    return TrainerLoss(args, *chosen(args))


def optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    built = torch.optim.AdamW([weight])
    built.step()
    return built


def resumed(epoch: int, **changes: Any) -> list[float]:
    """The histories of a run that begins."""
    args = arguments(**changes)
    run = loss(args)
    epoch_begins(run, epoch, args, optimizer())
    histories: list[float] = run.criterion.histories.tolist()
    return histories


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"state": {}, "param_groups": []}, "holds no state of a loss"),
        ({checkpoints.KEY: {"loss": "other", "state_dict": {}}}, "holds the state of the loss other"),
    ],
)
def test_resuming_without_the_state_warns_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, found: dict[str, Any], said: str
) -> None:
    path = str(tmp_path / "epoch_1.pt")
    torch.save({"epoch": 1, "optimizer": found}, path)
    for rank in (0, 1):
        assert resumed(1, resume=path, rank=rank) == [1, 1, 1]
    (message,) = caplog.messages
    assert f"{said}: the state of alip starts anew" in message


def test_where_there_is_no_state_nothing_is_added_nor_said(caplog: pytest.LogCaptureFixture) -> None:
    built, sharded = optimizer(), optimizer()
    for args, each in ((arguments("cyclip", resume="x.pt"), built), (arguments(fsdp=True), sharded)):
        epoch_begins(loss(args), 1, args, each)
    assert not {**built._optimizer_state_dict_post_hooks, **sharded._optimizer_state_dict_post_hooks}
    assert resumed(0, resume="weights.pt") == [1, 1, 1], "a file of weights alone"
    assert not caplog.records


class Pickled:
    """An object that makes a folder where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.made,)


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for loads that do not say what they are
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "optimizer": Pickled(tmp_path / "made")}, path)
    with pytest.raises(pickle.UnpicklingError):
        resumed(1, resume=str(path))
    assert not (tmp_path / "made").exists()
