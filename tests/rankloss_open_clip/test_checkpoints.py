"""The state of a loss in the trainer's checkpoints: saved with the optimizer's, and found again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import open_clip_train.file_utils
import pytest
import torch
from stand_ins import loader
from torch import nn

from rankloss_baselines import AlipLoss, CyClipLoss
from rankloss_baselines.entries import alip_log
from rankloss_open_clip import checkpoints
from rankloss_open_clip.logged_terms import TrainerLoss
from rankloss_open_clip.training import start_epoch

DATA = loader(4)


def loss(history: float = 1.0, criterion: type[nn.Module] = AlipLoss) -> TrainerLoss:
    if criterion is CyClipLoss:
        return TrainerLoss(CyClipLoss(), unit="epoch")
    return TrainerLoss(AlipLoss(initial_history=history), unit="step", evaluate=alip_log)


def arguments(name: str = "alip", **changes: Any) -> Any:
    return SimpleNamespace(
        **{"loss": name, "epochs": 3, "accum_freq": 1, "rank": 0, "resume": None, **changes}
    )


def optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    built = torch.optim.AdamW([weight])
    built.step()
    return built


def saved(built: torch.optim.Optimizer, tmp_path: Any) -> str:
    path = str(tmp_path / "epoch_1.pt")
    torch.save({"epoch": 1, "optimizer": built.state_dict()}, path)
    return path


def test_state_travels_with_the_optimizer(tmp_path: Any) -> None:
    first, built = loss(0.25), optimizer()
    for epoch in range(2):  # one hook, however many epochs
        start_epoch(first, epoch, DATA, arguments(), built)
    first.criterion.histories[1] = 0.75
    assert len(built._optimizer_state_dict_post_hooks) == 1
    path = saved(built, tmp_path)
    state = built.state_dict()[checkpoints.KEY]["state_dict"]["histories"]
    first.criterion.histories.fill_(0)
    assert state.tolist() == [0.25, 0.75, 0.25], "a copy of the moment"

    # open_clip's own reader, as patched; it loads tensors and containers only.
    checkpoint = open_clip_train.file_utils.pt_load(path, map_location="cpu")
    second = loss()
    start_epoch(second, 1, DATA, arguments(resume=path), optimizer())
    assert second.criterion.histories.tolist() == [0.25, 0.75, 0.25]
    # The optimizer ignores the addition.
    resumed = optimizer()
    resumed.load_state_dict(checkpoint["optimizer"])
    assert resumed.state_dict().keys() == {"state", "param_groups"}


def test_loss_without_a_state_leaves_checkpoints_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    built = optimizer()
    start_epoch(loss(criterion=CyClipLoss), 1, DATA, arguments("cyclip", resume="x.pt"), built)
    assert built.state_dict().keys() == {"state", "param_groups"}
    assert not built._optimizer_state_dict_post_hooks
    assert not caplog.records


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        ({"epoch": 1, "optimizer": {"state": {}, "param_groups": []}}, "holds no state of a loss"),
        (
            {"epoch": 1, "optimizer": {checkpoints.KEY: {"loss": "other", "state_dict": {}}}},
            "holds the state of --loss other",
        ),
    ],
)
def test_resuming_without_the_state_warns_once(
    caplog: pytest.LogCaptureFixture, checkpoint: dict[str, Any], found: str
) -> None:
    for rank in (0, 1):
        checkpoints.pick_up("x.pt", checkpoint)
        resumed = loss()
        start_epoch(resumed, 1, DATA, arguments(resume="x.pt", rank=rank), optimizer())
        assert resumed.criterion.histories.tolist() == [1, 1, 1]
    (record,) = caplog.records
    assert "--loss alip has a state that belongs to the run" in record.message
    assert f"{found}: it starts anew" in record.message


def test_new_run_and_bare_weights_cause_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    start_epoch(loss(), 0, DATA, arguments(), optimizer())
    checkpoints.pick_up("weights.pt", {"visual.proj": torch.zeros(1)})
    start_epoch(loss(), 0, DATA, arguments(resume="weights.pt"), optimizer())
    assert not caplog.records


def test_runs_of_one_process_share_no_state(tmp_path: Any) -> None:
    """A fresh run starts anew whatever was read before, and a resumed run is given the state of its file."""
    paths = []
    for number, history in enumerate((0.25, 0.5)):
        built = optimizer()
        start_epoch(loss(history), 0, DATA, arguments(), built)
        paths.append(str(tmp_path / f"{number}.pt"))
        torch.save({"epoch": 1, "optimizer": built.state_dict()}, paths[-1])

    def histories(epoch: int, resume: str | None) -> list[float]:
        run = loss()
        start_epoch(run, epoch, DATA, arguments(resume=resume), optimizer())
        return run.criterion.histories.tolist()

    read = open_clip_train.file_utils.pt_load
    for path, expected in zip(paths, (0.25, 0.5), strict=True):
        read(path, map_location="cpu")
        assert histories(1, path) == [expected] * 3
        assert histories(0, None) == [1, 1, 1]
    # Read, but not by the run that begins: a file whose run was given up, or another one's.
    read(paths[0])
    assert histories(0, None) == [1, 1, 1]
    read(file_path=paths[0])
    assert histories(1, paths[1]) == [1, 1, 1]
    assert histories(1, paths[0]) == [1, 1, 1], "what was kept is forgotten when a run begins"


def test_what_cannot_save_it_warns(caplog: pytest.LogCaptureFixture) -> None:
    sharded = optimizer()
    start_epoch(loss(), 0, DATA, arguments(fsdp=True), sharded)
    assert not sharded._optimizer_state_dict_post_hooks
    start_epoch(loss(criterion=CyClipLoss), 0, DATA, arguments("cyclip", fsdp=True), optimizer())
    (record,) = caplog.records
    assert "has a state that --fsdp does not save" in record.message
