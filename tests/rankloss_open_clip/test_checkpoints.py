"""``--resume``: λ, log lines and weights of the run that was never interrupted; a loss's state, or none."""

from __future__ import annotations

import pickle
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import epoch_begins
from torch import nn
from trainer_runs import BOTH, STEPS, EpochSeeds, Run, Trainer, assert_equal_training

from rankloss import schedules
from rankloss_open_clip import checkpoints
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.trainer_loss import TrainerLoss
from untrusted import Pickled

EPOCHS = 2
PER_STEP = ["--loss", "rankclip", "--rankclip-schedule", "linear", "--loss-schedule-unit", "step"]
PER_EPOCH = STEPS // 2  # optimizer steps: every second batch makes one
LAMBDAS = {step: schedules.linear(step + 1, EPOCHS * PER_EPOCH) for step in range(EPOCHS * PER_EPOCH)}


class Training:
    """One training, in one piece and in two."""

    def __init__(self, trainer: Trainer) -> None:
        options = ["--epochs", str(EPOCHS), "--accum-freq", "2"]

        def start(how: str, *more: str, kill_in_epoch: int | None = None) -> Run:
            code = -signal.SIGKILL if kill_in_epoch else 0
            return trainer.call(how, *options, *more, change=EpochSeeds(kill_in_epoch), code=code)

        self.whole = start("resume, whole", *PER_STEP)
        self.killed_log = start("resume, killed", *PER_STEP, kill_in_epoch=1).log
        self.latest = start("resume, killed", *PER_STEP, "--resume", "latest")


@pytest.fixture(scope="module")
def training(trainer: Trainer) -> Training:
    return Training(trainer)


def test_job_that_was_killed_in_an_epoch_ends_with_the_same_bits_and_lines(training: Training) -> None:
    before, lines = training.killed_log.count("Train Epoch:"), training.whole.timeless_log
    assert len(lines) == len(LAMBDAS)
    assert training.whole.scalars["rank_lambda"] == pytest.approx(LAMBDAS)
    assert PER_EPOCH < before < 2 * PER_EPOCH
    assert f"{training.latest.directory / 'checkpoints' / 'epoch_1.pt'}" in training.latest.log
    assert_equal_training(training.whole, training.latest, epochs=(1, 2))
    # The interrupted epoch is repeated from its start.
    assert training.latest.timeless_log == [*lines[:before], *lines[PER_EPOCH:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epoch", "call"), [(0, 1), (0, 4), (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 4)]
)
def test_job_that_was_killed_at_any_call_ends_with_the_same_bits(
    trainer: Trainer, four_epochs: Run, epoch: int, call: int
) -> None:
    name = f"killed at {epoch}, {call}"
    trainer.call(name, *FOUR_EPOCHS, change=EpochSeeds(epoch, call), code=-signal.SIGKILL)
    resumed = trainer.call(name, *FOUR_EPOCHS, "--resume", "latest", change=EpochSeeds(None))
    assert_equal_training(four_epochs, resumed, epochs=(4,))


FOUR_EPOCHS = [*PER_STEP, "--epochs", "4", "--accum-freq", "2"]


@pytest.fixture(scope="module")
def four_epochs(trainer: Trainer) -> Run:
    return trainer.call("never killed", *FOUR_EPOCHS, change=EpochSeeds(None))


@pytest.mark.slow
def test_two_processes_resume_with_the_same_bits_and_lines(trainer: Trainer) -> None:
    options = [*PER_STEP, *BOTH, "--epochs", "2", "--accum-freq", "2"]
    whole = trainer.call("resume, two processes", *options, processes=2, change=EpochSeeds(None))
    path = str(whole.directory / "checkpoints" / "epoch_1.pt")
    again = (*options, "--resume", path)
    resumed = trainer.call("resume, two processes again", *again, processes=2, change=EpochSeeds(None))
    assert "world_size: 2" in whole.log
    assert "world_size: 2" in resumed.log
    assert_equal_training(whole, resumed, epochs=(2,))
    lines = whole.timeless_log
    assert resumed.timeless_log == lines[len(lines) // 2 :]


# --- the state of a loss ------------------------------------------------------------------------------------


def arguments(name: str = "tiny-caption", **changes: Any) -> Any:
    given = {
        "loss": name,
        "second_caption_key": "syn",
        "epochs": 3,
        "rank": 0,
        "world_size": 2,
        "resume": None,
    }
    return SimpleNamespace(**{**given, **changes})


def loss(args: Any) -> TrainerLoss:
    return TrainerLoss(args, *chosen(args))


def optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    built = torch.optim.AdamW([weight])
    built.step()
    return built


def resumed(epoch: int, **changes: Any) -> float:
    """The state of a run that begins."""
    args = arguments(**changes)
    run = loss(args)
    epoch_begins(run, epoch, args, optimizer())
    average: float = run.criterion.average.item()
    return average


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            {"state": {}, "param_groups": []},
            "holds no state of a loss: the state of tiny-caption starts anew",
        ),
        (
            {checkpoints.KEY: {"loss": "other", "state_dict": {}}},
            "holds the state of the loss other: the state of tiny-caption starts anew",
        ),
    ],
)
def test_resuming_without_the_state_warns_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, found: dict[str, Any], said: str
) -> None:
    path = str(tmp_path / "epoch_1.pt")
    torch.save({"epoch": 1, "optimizer": found}, path)
    for rank in (0, 1):
        assert resumed(1, resume=path, rank=rank) == 1
    (message,) = caplog.messages
    assert re.search(said, message)


def test_resuming_on_another_course_warns_once_and_shows_both(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path, first = str(tmp_path / "epoch_1.pt"), optimizer()
    epoch_begins(loss(arguments("rankclip")), 0, arguments("rankclip"), first)
    torch.save({"epoch": 1, "optimizer": first.state_dict()}, path)
    for epochs, rank, count in ((3, 0, 0), (4, 1, 0), (4, 0, 1)):
        args = arguments("rankclip", resume=path, rank=rank, epochs=epochs)
        epoch_begins(loss(args), 1, args, optimizer())
        assert caplog.text.count("over 12 step(s); this run trains with rankclip: rankclip") == count
    assert "rankclip per step over 16 step(s)" in caplog.text


def test_resuming_with_another_loss_or_option_warns_once_and_shows_both(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path, first = str(tmp_path / "epoch_1.pt"), optimizer()
    before = arguments("spread")
    epoch_begins(loss(before), 0, before, first)
    torch.save({"epoch": 1, "optimizer": first.state_dict()}, path)
    for changes, shown in (({}, None), ({"spread_weight": 0.5}, "spread (weight 0.5)")):
        args = arguments("spread", resume=path, **changes)
        epoch_begins(loss(args), 1, args, optimizer())
        assert caplog.messages == (
            [f"The checkpoint was trained with spread; this run trains with {shown}"] if shown else []
        )
    torch.save({"epoch": 1, "optimizer": optimizer().state_dict()}, path)
    args = arguments("spread", resume=path)
    epoch_begins(loss(args), 1, args, optimizer())
    assert "trained with no loss of rankloss; this run trains with spread" in caplog.messages[-1]


def test_where_there_is_no_state_nothing_is_added_nor_said(caplog: pytest.LogCaptureFixture) -> None:
    sharded, args = optimizer(), arguments("tiny", fsdp=True, resume="x.pt")
    epoch_begins(loss(args), 1, args, sharded)
    assert not sharded._optimizer_state_dict_post_hooks
    assert resumed(0, resume="weights.pt") == 1, "a file of weights alone"
    assert not caplog.records


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for loads that do not say what they are
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "optimizer": Pickled(tmp_path / "made")}, path)
    with pytest.raises(pickle.UnpicklingError):
        resumed(1, resume=str(path))
    assert not (tmp_path / "made").exists()
