"""The state of a loss in the trainer's checkpoints: saved with the optimizer's, and found again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip_train.file_utils
import pytest
import torch
from stand_ins import epoch_begins
from torch import nn

from rankloss_baselines import AlipLoss, CyClipLoss
from rankloss_open_clip import checkpoints
from rankloss_open_clip.training import TrainerLoss


def loss(history: float = 1.0) -> TrainerLoss:
    return TrainerLoss(AlipLoss(initial_history=history), unit="step")


def arguments(name: str = "alip", **changes: Any) -> Any:
    return SimpleNamespace(**{"loss": name, "epochs": 3, "rank": 0, "resume": None, **changes})


def optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    built = torch.optim.AdamW([weight])
    built.step()
    return built


def resumed(epoch: int, **changes: Any) -> list[float]:
    """The histories of a run that begins."""
    run = loss()
    epoch_begins(run, epoch, arguments(**changes), optimizer())
    histories: list[float] = run.criterion.histories.tolist()
    return histories


def test_state_travels_with_the_optimizer(tmp_path: Path) -> None:
    first, built, path = loss(0.25), optimizer(), str(tmp_path / "epoch_1.pt")
    for epoch in range(2):  # one hook, however many epochs
        epoch_begins(first, epoch, arguments(), built)
    first.criterion.histories[1] = 0.75
    assert len(built._optimizer_state_dict_post_hooks) == 1
    torch.save({"epoch": 1, "optimizer": built.state_dict()}, path)
    state = built.state_dict()[checkpoints.KEY]["state_dict"]["histories"]
    first.criterion.histories.fill_(0)
    assert state.tolist() == [0.25, 0.75, 0.25], "a copy of the moment"

    # open_clip's own reader, as patched; it loads tensors and containers only.
    read = open_clip_train.file_utils.pt_load
    checkpoint = read(path, map_location="cpu")
    assert resumed(1, resume=path) == [0.25, 0.75, 0.25]
    assert resumed(1, resume=path) == [1, 1, 1], "what was kept is forgotten when a run begins"
    read(path)
    assert resumed(0) == [1, 1, 1], "a fresh run starts anew whatever was read before"
    # The optimizer ignores the addition.
    other = optimizer()
    other.load_state_dict(checkpoint["optimizer"])
    assert other.state_dict().keys() == {"state", "param_groups"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"state": {}, "param_groups": []}, "holds no state of a loss"),
        ({checkpoints.KEY: {"loss": "other", "state_dict": {}}}, "holds the state of the loss other"),
    ],
)
def test_resuming_without_the_state_warns_once(
    caplog: pytest.LogCaptureFixture, found: dict[str, Any], said: str
) -> None:
    for rank in (0, 1):
        checkpoints.pick_up({"epoch": 1, "optimizer": found})
        assert resumed(1, resume="x.pt", rank=rank) == [1, 1, 1]
    (message,) = caplog.messages
    assert "The loss alip has a state" in message
    assert f"{said}: it starts anew" in message


def test_where_there_is_no_state_nothing_is_added_nor_said(caplog: pytest.LogCaptureFixture) -> None:
    built, sharded = optimizer(), optimizer()
    epoch_begins(TrainerLoss(CyClipLoss(), unit="epoch"), 1, arguments("cyclip", resume="x.pt"), built)
    epoch_begins(loss(), 0, arguments(fsdp=True), sharded)  # which takes only what it knows
    assert not {**built._optimizer_state_dict_post_hooks, **sharded._optimizer_state_dict_post_hooks}
    checkpoints.pick_up({"visual.proj": torch.zeros(1)})
    assert resumed(0, resume="weights.pt") == [1, 1, 1]
    assert not caplog.records
