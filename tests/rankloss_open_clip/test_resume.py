"""``--resume``: λ, log lines and weights are those of the run that was never interrupted."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from trainer_runs import OFFICIAL, STEPS, WHOLE_SET, EpochSeeds, Run, Runs, Trainer, assert_equal_training

from rankloss import schedules

EPOCHS = 3


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


def by_epoch(trainer: Trainer) -> Resumed:
    lambdas = {step: schedules.official(step // STEPS + 1, EPOCHS) for step in range(EPOCHS * STEPS)}
    return interrupted(trainer, "per epoch", OFFICIAL, [], lambdas)


def by_step(trainer: Trainer) -> Resumed:
    loss = ["--loss", "rankclip", "--rankclip-schedule", "linear", "--rankclip-schedule-unit", "step"]
    total = EPOCHS * STEPS // 2
    lambdas = {step: schedules.linear(step + 1, total) for step in range(total)}
    return interrupted(trainer, "per step", loss, ["--accum-freq", "2"], lambdas)


def interrupted(
    trainer: Trainer, name: str, loss: list[str], options: list[str], lambdas: dict[int, float]
) -> Resumed:
    def call(how: str, *more: str, kill_in_epoch: int | None = None) -> Run:
        given = ("--epochs", str(EPOCHS), *options, *more)
        return trainer.call(f"{name}, {how}", *given, seeds=EpochSeeds(kill_in_epoch))

    def in_pieces() -> tuple[Run, str, Run]:
        killed = call("killed", *loss, kill_in_epoch=1)
        return killed, killed.log, call("killed", *loss, "--resume", "latest")

    with ThreadPoolExecutor(1) as pool:
        pieces = pool.submit(in_pieces)
        whole = call("whole", *loss)
        path = ("--resume", str(whole.directory / "checkpoints" / "epoch_1.pt"))
        by_path, forgotten = call("by path", *loss, *path), call("without the loss", *path)
        killed, killed_log, latest = pieces.result()
    for run in (whole, by_path, forgotten, latest):
        assert run.returncode == 0, run.output[-4000:]
    return Resumed(whole, by_path, forgotten, killed, killed_log, latest, lambdas)


@pytest.fixture(scope="module", params=[by_epoch, by_step], ids=lambda function: function.__name__)
def resumed(request: pytest.FixtureRequest, trainer: Trainer) -> Resumed:
    training: Resumed = request.param(trainer)
    return training


def steps_of_an_epoch(resumed: Resumed) -> int:
    return len(resumed.lambdas) // EPOCHS


def test_a6_resumed_by_path_ends_with_the_same_bits(resumed: Resumed) -> None:
    assert "(epoch 1)" in resumed.by_path.log
    assert_equal_training(resumed.whole, resumed.by_path, epochs=(2, 3))


def test_a6_resumed_by_path_logs_the_same_lines(resumed: Resumed) -> None:
    lines = resumed.whole.timeless_log
    assert len(lines) == len(resumed.lambdas)
    assert resumed.by_path.timeless_log == lines[steps_of_an_epoch(resumed) :]


def test_a6_killed_job_was_in_the_middle_of_an_epoch(resumed: Resumed) -> None:
    assert resumed.killed.returncode == -signal.SIGKILL
    first = steps_of_an_epoch(resumed)
    logged = resumed.killed_log.count("Train Epoch:")
    assert first < logged < 2 * first
    assert "resuming" not in resumed.killed_log
    assert f"{resumed.latest.directory / 'checkpoints' / 'epoch_1.pt'}" in resumed.latest.log


def test_a6_killed_and_resumed_job_ends_with_the_same_bits(resumed: Resumed) -> None:
    assert_equal_training(resumed.whole, resumed.latest, epochs=(1, 2, 3))


def test_a6_killed_and_resumed_job_logs_the_same_lines(resumed: Resumed) -> None:
    lines, first = resumed.whole.timeless_log, steps_of_an_epoch(resumed)
    before = resumed.killed_log.count("Train Epoch:")
    logged = resumed.latest.timeless_log
    assert logged[:before] == lines[:before]
    assert logged[before:] == lines[first:], "the interrupted epoch is repeated from its start"


def test_a6_schedule_stands_where_it_would_have(resumed: Resumed) -> None:
    first = steps_of_an_epoch(resumed)
    whole = resumed.whole.scalars["rank_lambda"]
    assert whole == pytest.approx(resumed.lambdas)
    later = {step: value for step, value in whole.items() if step >= first}
    assert len(set(later.values())) > 1
    assert resumed.by_path.scalars["rank_lambda"] == later
    after = resumed.latest.scalars["rank_lambda"]
    assert {step: value for step, value in after.items() if step >= first} == later


def test_a6_resumed_without_the_loss_is_another_training(resumed: Resumed) -> None:
    # The comparisons above can fail: only `--loss` is missing here.
    whole, forgotten = resumed.whole.epoch(2), resumed.forgotten.epoch(2)
    assert not torch.equal(whole["visual.proj"], forgotten["visual.proj"])
    assert "Loss: rankclip" not in resumed.forgotten.log


def test_a6_unmodified_trainer_resumes_where_the_order_of_the_data_does_not_matter(
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
