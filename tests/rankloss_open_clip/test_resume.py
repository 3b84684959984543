"""``--resume``: λ, log lines and weights are those of the run that was never interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from trainer_runs import (
    BOTH,
    OFFICIAL,
    STEPS,
    WHOLE_SET,
    EpochSeeds,
    Run,
    Runs,
    Trainer,
    assert_equal_training,
)

from rankloss import schedules

EPOCHS = 3
PER_STEP = ["--loss", "rankclip", "--rankclip-schedule", "linear", "--rankclip-schedule-unit", "step"]


@dataclass(frozen=True)
class Resumed:
    """One training, in one piece and in two."""

    whole: Run
    by_path: Run
    forgotten: Run
    killed: Run
    killed_log: str
    latest: Run
    lambdas: dict[int, float]


def interrupted(start: Callable[..., Run], loss: list[str], lambdas: dict[int, float]) -> Resumed:
    whole = start("whole", *loss)
    path = ("--resume", str(whole.directory / "checkpoints" / "epoch_1.pt"))
    by_path, forgotten = start("by path", *loss, *path), start("without the loss", *path)
    killed = start("killed", *loss, kill_in_epoch=1)
    killed_log, latest = killed.log, start("killed", *loss, "--resume", "latest")
    for run in (whole, by_path, forgotten, latest):
        assert run.returncode == 0, run.output[-4000:]
    return Resumed(whole, by_path, forgotten, killed, killed_log, latest, lambdas)


def by_epoch(trainer: Trainer) -> Resumed:
    lambdas = {step: schedules.official(step // STEPS + 1, EPOCHS) for step in range(EPOCHS * STEPS)}
    return interrupted(starting(trainer, "per epoch"), OFFICIAL, lambdas)


def by_step(trainer: Trainer) -> Resumed:
    return interrupted(starting(trainer, "per step", "--accum-freq", "2"), PER_STEP, linear(STEPS // 2))


def by_two_processes(trainer: Trainer) -> Resumed:
    """Of the unmodified trainer, whose sampler is seeded by the epoch when there are several processes."""
    options = [*BOTH, "--precision", "amp_bf16", "--accum-freq", "2", "--batch-size", "8"]
    options += ["--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"]
    start = starting(trainer, "two processes", *options, processes=2)
    return interrupted(start, PER_STEP, linear(STEPS // 2))


def starting(trainer: Trainer, name: str, *options: str, processes: int = 1) -> Callable[..., Run]:
    def start(how: str, *more: str, kill_in_epoch: int | None = None) -> Run:
        given = ("--epochs", str(EPOCHS), *options, *more)
        epochs = EpochSeeds(kill_in_epoch, seeds=processes == 1)
        return trainer.call(f"{name}, {how}", *given, processes=processes, epochs=epochs)

    return start


def linear(steps: int) -> dict[int, float]:
    return {step: schedules.linear(step + 1, EPOCHS * steps) for step in range(EPOCHS * steps)}


@pytest.fixture(
    scope="module",
    params=[by_step, *(pytest.param(how, marks=pytest.mark.slow) for how in (by_epoch, by_two_processes))],
    ids=lambda function: function.__name__,
)
def resumed(request: pytest.FixtureRequest, trainer: Trainer) -> Resumed:
    training: Resumed = request.param(trainer)
    return training


def steps_of_an_epoch(resumed: Resumed) -> int:
    return len(resumed.lambdas) // EPOCHS


def test_resumed_by_path_ends_with_the_same_bits(resumed: Resumed) -> None:
    assert "(epoch 1)" in resumed.by_path.log
    assert_equal_training(resumed.whole, resumed.by_path, epochs=(2, 3))


def test_resumed_by_path_logs_the_same_lines(resumed: Resumed) -> None:
    lines = resumed.whole.timeless_log
    assert len(lines) == len(resumed.lambdas)
    assert resumed.by_path.timeless_log == lines[steps_of_an_epoch(resumed) :]


def test_killed_job_was_in_the_middle_of_an_epoch(resumed: Resumed) -> None:
    assert resumed.killed.returncode == -signal.SIGKILL
    first = steps_of_an_epoch(resumed)
    logged = resumed.killed_log.count("Train Epoch:")
    assert first < logged < 2 * first
    assert "resuming" not in resumed.killed_log
    assert f"{resumed.latest.directory / 'checkpoints' / 'epoch_1.pt'}" in resumed.latest.log


def test_killed_and_resumed_job_ends_with_the_same_bits(resumed: Resumed) -> None:
    assert_equal_training(resumed.whole, resumed.latest, epochs=(1, 2, 3))


def test_killed_and_resumed_job_logs_the_same_lines(resumed: Resumed) -> None:
    lines, first = resumed.whole.timeless_log, steps_of_an_epoch(resumed)
    before = resumed.killed_log.count("Train Epoch:")
    logged = resumed.latest.timeless_log
    assert logged[:before] == lines[:before]
    assert logged[before:] == lines[first:], "the interrupted epoch is repeated from its start"


def test_schedule_stands_where_it_would_have(resumed: Resumed) -> None:
    first = steps_of_an_epoch(resumed)
    whole = resumed.whole.scalars["rank_lambda"]
    assert whole == pytest.approx(resumed.lambdas)
    later = {step: value for step, value in whole.items() if step >= first}
    assert len(set(later.values())) > 1
    assert resumed.by_path.scalars["rank_lambda"] == later
    after = resumed.latest.scalars["rank_lambda"]
    assert {step: value for step, value in after.items() if step >= first} == later


def test_resumed_without_the_loss_is_another_training(resumed: Resumed) -> None:
    # The comparisons above can fail: only `--loss` is missing here.
    whole, forgotten = resumed.whole.epoch(2), resumed.forgotten.epoch(2)
    assert not torch.equal(whole["visual.proj"], forgotten["visual.proj"])
    assert "Loss: rankclip" not in resumed.forgotten.log


def test_unmodified_trainer_resumes_where_the_order_of_the_data_does_not_matter(
    runs: Runs, trainer: Trainer
) -> None:
    # It shuffles the first epoch after --resume like the first of a fresh run; with one batch of the whole
    # set, uncropped, that only changes the order of sums.
    name, first = "csv, whole set", runs["csv, whole set"]
    checkpoint = str(first.directory / "checkpoints" / "epoch_1.pt")
    run = trainer.call(f"{name}, resumed", *WHOLE_SET, "--resume", checkpoint)
    assert run.returncode == 0, run.output[-4000:]
    (line,) = run.train_lines()
    assert line == pytest.approx(first.train_lines()[1], rel=1e-4)
