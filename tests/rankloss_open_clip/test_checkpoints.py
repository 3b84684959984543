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
from stand_ins import begin_epoch
from torch import nn
from trainer_runs import LOCAL_LOSS_WITH_GRAD, STEPS, EpochSeeds, Run, Trainer, assert_equal_training

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
    """One training, in one piece, and killed in its second epoch and resumed.

    Attributes:
        whole: The run in one piece.
        killed_log: The log of the killed run.
        latest: The run that resumes it.
    """

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


def test_lambda_follows_the_optimizer_steps(training: Training) -> None:
    assert training.whole.scalars["rank_lambda"] == pytest.approx(LAMBDAS)
    assert len(training.whole.timeless_log) == len(LAMBDAS), "a line is logged at each of them"


def test_job_that_was_killed_in_an_epoch_ends_with_the_same_bits(training: Training) -> None:
    assert f"{training.latest.directory / 'checkpoints' / 'epoch_1.pt'}" in training.latest.log
    assert_equal_training(training.whole, training.latest, epochs=(1, 2))


def test_job_that_was_killed_in_an_epoch_repeats_the_lines_of_that_epoch(training: Training) -> None:
    """The log has the lines up to the kill, then all of the second epoch, which starts again."""
    lines = training.whole.timeless_log
    before_the_kill = training.killed_log.count("Train Epoch:")
    assert PER_EPOCH < before_the_kill < 2 * PER_EPOCH, "it was killed within the second epoch"
    assert training.latest.timeless_log == [*lines[:before_the_kill], *lines[PER_EPOCH:]]


FOUR_EPOCHS = [*PER_STEP, "--epochs", "4", "--accum-freq", "2"]


@pytest.fixture(scope="module")
def four_epochs(trainer: Trainer) -> Run:
    return trainer.call("never killed", *FOUR_EPOCHS, change=EpochSeeds(None))


# An epoch calls the loss once for each of its four batches, and steps at the second and the fourth.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("epoch", "call"), [(0, 1), (0, 4), (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 4)]
)
def test_job_that_was_killed_at_any_call_ends_with_the_same_bits(
    trainer: Trainer, four_epochs: Run, epoch: int, call: int
) -> None:
    name = f"killed at {epoch}, {call}"
    trainer.call(
        name, *FOUR_EPOCHS, change=EpochSeeds(kill_in_epoch=epoch, kill_at_call=call), code=-signal.SIGKILL
    )
    resumed = trainer.call(name, *FOUR_EPOCHS, "--resume", "latest", change=EpochSeeds(None))
    if epoch > 0:  # the first has no checkpoint before it
        assert f"{resumed.directory / 'checkpoints' / f'epoch_{epoch}.pt'}" in resumed.log
    assert_equal_training(four_epochs, resumed, epochs=(4,))


@pytest.mark.slow
def test_two_processes_resume_with_the_same_bits_and_lines(trainer: Trainer) -> None:
    options = [*PER_STEP, *LOCAL_LOSS_WITH_GRAD, "--epochs", "2", "--accum-freq", "2"]
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


def arguments(loss: str, **changes: Any) -> Any:
    """The trainer's arguments of a run with a loss, in the first of two processes."""
    of_run = {"loss": loss, "epochs": 3, "rank": 0, "world_size": 2, "resume": None}
    return SimpleNamespace(**{**of_run, "second_caption_key": "syn", **changes})


def loss_of(args: Any) -> TrainerLoss:
    """The losses that the arguments ask for, without the checks and the data of a run."""
    return TrainerLoss(args, *chosen(args))


def stepped_optimizer() -> torch.optim.Optimizer:
    """An optimizer of one weight, which has a state to save: it has made a step."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    return optimizer


STATE_OF_A_NEW_LOSS = 1.0


def state_at_the_begin_of(epoch: int, **changes: Any) -> float:
    """The state of the loss ``tiny-caption``, one running average, when a run begins at an epoch."""
    args = arguments("tiny-caption", **changes)
    loss = loss_of(args)
    begin_epoch(loss, epoch, args, stepped_optimizer())
    average: float = loss.criterion.average.item()
    return average


@pytest.mark.parametrize(
    ("of_optimizer", "message"),
    [
        pytest.param(
            {"state": {}, "param_groups": []},
            "holds no state of a loss: the state of tiny-caption starts anew",
            id="no state of a loss",
        ),
        pytest.param(
            {checkpoints.KEY: {"loss": "other", "state_dict": {}}},
            "holds the state of the loss other: the state of tiny-caption starts anew",
            id="state of another loss",
        ),
    ],
)
def test_resuming_without_the_state_warns_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, of_optimizer: dict[str, Any], message: str
) -> None:
    path = str(tmp_path / "epoch_1.pt")
    torch.save({"epoch": 1, "optimizer": of_optimizer}, path)
    for rank in (0, 1):  # the first process alone warns
        assert state_at_the_begin_of(1, resume=path, rank=rank) == STATE_OF_A_NEW_LOSS
    (logged,) = caplog.messages
    assert re.search(message, logged)


def test_resuming_on_another_course_warns_once_and_shows_both(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The schedule of the checkpoint's run went over three epochs of four steps."""
    path = checkpoint_of(tmp_path, "rankclip")

    def resume(*, epochs: int, rank: int) -> None:
        args = arguments("rankclip", resume=path, rank=rank, epochs=epochs)
        begin_epoch(loss_of(args), 1, args, stepped_optimizer())

    resume(epochs=3, rank=0)  # the same course
    resume(epochs=4, rank=1)  # another, but the first process alone warns
    assert caplog.text == ""
    resume(epochs=4, rank=0)
    assert caplog.text.count("over 12 step(s); this run trains with rankclip: rankclip") == 1
    assert "rankclip per step over 16 step(s)" in caplog.text


def checkpoint_of(folder: Path, name: str | None) -> str:
    """A checkpoint after the first epoch of a run with a loss, or with none of rankloss."""
    optimizer = stepped_optimizer()
    if name is not None:
        args = arguments(name)
        begin_epoch(loss_of(args), 0, args, optimizer)  # lets the optimizer save the loss's state
    torch.save({"epoch": 1, "optimizer": optimizer.state_dict()}, folder / "epoch_1.pt")
    return str(folder / "epoch_1.pt")


@pytest.mark.parametrize(
    ("before", "changes", "messages"),
    [
        pytest.param("spread", {}, [], id="the same"),
        pytest.param(
            "spread",
            {"spread_weight": 0.5},
            ["The checkpoint was trained with spread; this run trains with spread (weight 0.5)"],
            id="another weight",
        ),
        pytest.param(
            None,
            {},
            ["The checkpoint was trained with no loss of rankloss; this run trains with spread"],
            id="another loss",
        ),
    ],
)
def test_resuming_with_another_loss_or_option_warns_once_and_shows_both(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    before: str | None,
    changes: dict[str, Any],
    messages: list[str],
) -> None:
    args = arguments("spread", resume=checkpoint_of(tmp_path, before), **changes)
    begin_epoch(loss_of(args), 1, args, stepped_optimizer())
    assert caplog.messages == messages


def test_under_fsdp_a_state_starts_anew_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint is not opened: there is none. A run that begins warns of nothing."""
    assert state_at_the_begin_of(0, fsdp=True) == STATE_OF_A_NEW_LOSS
    assert not caplog.records
    assert state_at_the_begin_of(1, fsdp=True, resume="x.pt") == STATE_OF_A_NEW_LOSS
    (logged,) = caplog.messages
    assert logged.endswith("holds no state of a loss: the state of tiny-caption starts anew")


def test_a_state_that_no_optimizer_can_save_is_an_error() -> None:
    args = arguments("tiny-caption")
    with pytest.raises(
        RuntimeError, match="tiny-caption has a state, and this trainer's epochs no optimizer"
    ):
        begin_epoch(loss_of(args), 0, args, optimizer=None)


def test_under_fsdp_a_loss_without_a_state_adds_nothing_to_an_optimizer_and_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """FSDP saves the optimizer's own entries alone. The checkpoint is not opened: there is none."""
    optimizer, args = stepped_optimizer(), arguments("tiny", fsdp=True, resume="x.pt")
    begin_epoch(loss_of(args), 1, args, optimizer)
    assert not optimizer._optimizer_state_dict_post_hooks  # by which a loss's state is saved
    assert not caplog.records


def test_a_run_that_begins_with_a_file_of_weights_alone_has_a_new_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its epoch is the first, and nothing is read of the file: there is none."""
    assert state_at_the_begin_of(0, resume="weights.pt") == STATE_OF_A_NEW_LOSS
    assert not caplog.records


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for loads that do not say what they are
    path, made = tmp_path / "epoch_1.pt", tmp_path / "made"
    torch.save({"epoch": 1, "optimizer": Pickled(made)}, path)  # which makes the folder if its code runs
    with pytest.raises(pickle.UnpicklingError):
        state_at_the_begin_of(1, resume=str(path))
    assert not made.exists()
