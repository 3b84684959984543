"""What the unmodified training command does with, and without, ``--loss``."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
import torch
from trainer_runs import PRECISIONS, STEPS, Run, Runs, assert_equal_training

from rankloss import schedules

SUMMANDS = {
    "--loss rankclip": 3,
    "one epoch": 3,
    "steps with accumulation": 3,
    **dict.fromkeys(PRECISIONS, 3),
    "siglip": 3,
    "coca": 4,
    "distill": 4,
}
TERMS = ("contrastive_loss", "cross_modal_loss", "in_modal_loss")
METRICS = ("rank_lambda", "cross_modal_raw", "in_modal_raw")
PATHS = {"name", "log_path", "checkpoint_path", "tensorboard_path"}


def test_unmodified_command_trains_with_the_ranking_terms(runs: Runs) -> None:
    run = runs["--loss rankclip"]
    assert len(run.train_lines()) == 3 * STEPS
    for line in run.train_lines():
        expected = [name.capitalize() for name in (*TERMS, *METRICS, "loss")]
        assert list(line)[-len(expected) :] == expected


def test_log_says_at_the_start_what_is_trained(runs: Runs) -> None:
    lines = [line for line in runs["--loss rankclip"].log.splitlines() if "Loss: rankclip" in line]
    assert len(lines) == 1
    assert "on ClipLoss" in lines[0]
    assert "schedule official per epoch over 3 epoch(s)" in lines[0]
    assert "lambda scale 1 cross-modal and 1 in-modal" in lines[0]
    assert f"open_clip {importlib.metadata.version('open_clip_torch')}" in lines[0]
    log = runs["--loss rankclip"].log
    assert log.index("Loss: rankclip") < log.index("Train Epoch")


def test_params_file_names_the_options_of_the_run(runs: Runs) -> None:
    params = runs["--loss rankclip"].params
    assert params["loss"] == "rankclip"
    assert params["rankclip_schedule"] == "official"
    assert params["rankclip_lambda_cross"] == "1.0"
    assert params["rankclip_top_k"] == "None"


@pytest.mark.parametrize("name", ["no --loss", "--loss clip"])
def test_training_without_the_ranking_loss_is_bit_equal_to_stock(runs: Runs, name: str) -> None:
    assert_equal_training(runs["stock"], runs[name])
    assert runs["stock"].scalars.keys() == runs[name].scalars.keys()
    assert "rankclip" not in runs[name].log.replace(str(runs[name].directory), "")


def test_params_file_without_loss_is_that_of_stock(runs: Runs) -> None:
    stock, hooked = runs["stock"].params, runs["no --loss"].params
    assert stock.keys() == hooked.keys()
    assert {key for key in stock if stock[key] != hooked[key]} <= PATHS
    clip = runs["--loss clip"].params
    assert clip.keys() - stock.keys() == {"loss"}


def test_epoch_at_lambda_zero_is_bit_equal_to_stock(runs: Runs) -> None:
    stock, run = runs["stock"], runs["--loss rankclip"]
    assert_equal_training(stock, run, epochs=(1,))
    weights = "visual.proj"
    assert not torch.equal(stock.epoch(2)[weights], run.epoch(2)[weights]), "later epochs must differ"
    first = [run.scalars[term][step] for term in TERMS[1:] for step in range(STEPS)]
    assert first == [0.0] * len(first)


def test_logged_loss_is_the_sum_of_the_logged_terms(runs: Runs) -> None:
    for name, count in SUMMANDS.items():
        scalars = runs[name].scalars
        for step, loss in scalars["loss"].items():
            terms = [values[step] for key, values in scalars.items() if key.endswith("_loss")]
            assert len(terms) == count
            assert loss == pytest.approx(sum(terms), rel=1e-6)
        for line in runs[name].train_lines():
            terms = [value for key, value in line.items() if key.endswith("_loss")]
            assert line["Loss"] == pytest.approx(sum(terms), rel=1e-4)


def test_tensorboard_shows_the_lambda_of_each_epoch(runs: Runs) -> None:
    logged = runs["--loss rankclip"].scalars["rank_lambda"]
    assert logged == {step: schedules.official(step // STEPS + 1, 3) for step in range(3 * STEPS)}
    assert len(set(logged.values())) == 3


def test_tensorboard_and_log_show_the_same(runs: Runs) -> None:
    run = runs["--loss rankclip"]
    lines = run.train_lines()
    for name in (*TERMS, "rank_lambda", "loss"):
        assert list(run.scalars[name]) == list(range(3 * STEPS))
        written = [line[name.capitalize()] for line in lines]
        assert written == pytest.approx(list(run.scalars[name].values()), rel=1e-4), "five digits in the log"


def test_terms_follow_lambda_in_the_log(runs: Runs) -> None:
    scalars = runs["--loss rankclip"].scalars
    for term in TERMS[1:]:
        assert all(scalars[term][step] != 0 for step in range(STEPS, 3 * STEPS))


def test_single_epoch_goes_by_steps_and_says_so(runs: Runs) -> None:
    run = runs["one epoch"]
    expected = {step: schedules.rankclip(step + 1, STEPS) for step in range(STEPS)}
    assert run.scalars["rank_lambda"] == pytest.approx(expected)
    assert "schedule rankclip per step" in run.log
    assert "one epoch has no ramp" in run.log
    assert "no ramp" not in runs["--loss rankclip"].log


@pytest.mark.parametrize(("name", "times"), [("fp32", 1), ("one epoch", 0), ("steps with accumulation", 0)])
def test_short_ramp_over_epochs_is_said_once(runs: Runs, name: str, times: int) -> None:
    assert runs[name].log.count("is a short ramp") == times


def test_steps_are_optimizer_steps_under_accumulation(runs: Runs) -> None:
    # Two micro-batches a step: the loss is called twice, λ moves once.
    total = 2 * STEPS // 2
    expected = {step: schedules.linear(step + 1, total) for step in range(total)}
    assert runs["steps with accumulation"].scalars["rank_lambda"] == pytest.approx(expected)


def test_runner_trains_the_same_where_torch_loads_no_plugins(runs: Runs) -> None:
    assert_trained_the_same(runs, "runner")


@pytest.mark.parametrize("name", ["file path", "in process"])
def test_every_way_to_start_trains_the_same(runs: Runs, name: str) -> None:
    assert_trained_the_same(runs, name)


def assert_trained_the_same(runs: Runs, name: str) -> None:
    assert_equal_training(runs["--loss rankclip"], runs[name])
    assert runs["--loss rankclip"].timeless_log == runs[name].timeless_log
    assert len(re.findall("Loss: rankclip", runs[name].log)) == 1


def test_spawned_workers_bring_the_data_of_forked_ones(runs: Runs) -> None:
    spawned, forked = runs["spawned worker"], runs["forked worker"]
    assert_equal_training(spawned, forked, epochs=(1,))
    assert spawned.timeless_log == forked.timeless_log
    assert len(re.findall("Loss: rankclip", spawned.output)) == 1, "only the trainer itself builds the loss"


def test_run_prints_no_warning_of_ours(runs: Runs) -> None:
    def warned(run: Run) -> set[str]:
        return {line for line in run.output.splitlines() if "Warning" in line or "WARNING" in line}

    def stripped(run: Run) -> set[str]:
        return {re.sub(r"^[\d,:-]+ \| ", "", line) for line in warned(run)}

    assert stripped(runs["--loss rankclip"]) <= stripped(runs["stock"])
    assert stripped(runs["no --loss"]) <= stripped(runs["stock"])


def test_broken_plugin_does_not_stop_a_run_without_loss(runs: Runs) -> None:
    run = runs["broken plug-in"]
    assert len(run.train_lines()) == STEPS
    assert "--loss is not available in this run" in run.output
    assert "sabotaged" in run.output
