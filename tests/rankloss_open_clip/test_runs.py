"""Runs of the real trainer: what they train, what they log, and what they leave as it is."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import open_clip
import pytest
import torch
from trainer_runs import (
    PRECISIONS,
    RANKCLIP_OFFICIAL,
    STEPS,
    Run,
    Runs,
    Trainer,
    assert_equal_training,
)

from rankloss import schedules
from rankloss_features.trained_files import options_of_run

RANK_TERMS = ("cross_modal_loss", "in_modal_loss")
TERMS = ("contrastive_loss", *RANK_TERMS)
METRICS = ("rank_lambda", "cross_modal_raw", "in_modal_raw")
TAUS = ("cross_modal_tau", "in_modal_tau")
EPOCHS = 3  # of the run called "agreement"

# The terms that each run trains.
TRAINED = {
    **dict.fromkeys(("--loss rankclip", "agreement"), TERMS),
    **dict.fromkeys((*PRECISIONS, "siglip", "siglip, fp16"), TERMS),
    **dict.fromkeys(("ranked by the teacher", "rankclip-distill"), TERMS),
    "coca": (*TERMS, "caption_loss"),
    "distill": (*TERMS, "distill_loss"),
    "clip-streamed": TERMS[:1],
    "tiny": ("contrastive_loss", "tiny_loss"),
    "mimicry": ("contrastive_loss", "mimicry_loss"),
    "spread": ("contrastive_loss", "spread_loss"),
    "spread, siglip": (*TERMS, "spread_loss"),
    "tiny-caption": ("contrastive_loss", "caption_loss"),
}
FAST = {"--loss rankclip", "agreement", "fp32", "amp_bf16", "ranked by the teacher", "clip-streamed"}
FAST |= {"tiny-caption"}


def some_slow(*names: str) -> list[Any]:
    """Names of runs as parameters of a test, which is slow for all but the fast runs."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(*TRAINED))
def test_run_names_its_losses_and_versions_before_training(runs: Runs, name: str) -> None:
    run = runs[name]
    when_it_is_built, line = re.findall(r"Loss: [a-z].*", run.log)
    assert when_it_is_built == line, "the same words again as training begins"
    joined, _, package = line.removeprefix("Loss: ").partition(" (")
    assert sorted(joined.split("+")) == sorted(run.params["loss"].split("+"))  # the innermost is shown first
    assert package.startswith("tiny-losses 1.0" if name.startswith("tiny") else "rankloss")
    assert line.endswith(f"open_clip {open_clip.__version__}")
    lines_before_training = run.log[: run.log.index("Train Epoch")].splitlines()
    assert any(line in shown for shown in lines_before_training[-4:]), "among the last, where it is seen"


@pytest.mark.parametrize("name", some_slow(*TRAINED))
def test_run_trains_the_sum_of_its_terms(runs: Runs, name: str) -> None:
    scalars, terms = runs[name].scalars, TRAINED[name]
    of_training = [key for key in scalars if "/" not in key]  # "val/…" are the evaluation's
    assert {key for key in of_training if key.endswith("_loss")} == set(terms)
    for step, loss in scalars["loss"].items():
        assert loss == pytest.approx(sum(scalars[term][step] for term in terms), rel=1e-6)


@pytest.mark.parametrize("name", some_slow(*TRAINED))
def test_a_term_is_0_only_where_lambda_is(runs: Runs, name: str) -> None:
    scalars = runs[name].scalars
    lambdas = scalars.get("rank_lambda", {})
    for term, step in itertools.product(TRAINED[name], scalars["loss"]):
        is_off = term in RANK_TERMS and lambdas.get(step) == 0
        assert math.isfinite(scalars[term][step])
        assert (scalars[term][step] == 0) is is_off, (term, step)


@pytest.mark.parametrize("name", some_slow(*TRAINED))
def test_the_last_weights_of_a_run_are_finite(runs: Runs, name: str) -> None:
    run = runs[name]
    checkpoints = (run.directory / "checkpoints").glob("epoch_*")
    last = max(int(path.stem.removeprefix("epoch_")) for path in checkpoints)
    assert all(x.isfinite().all() for x in run.tensors_after_epoch(last).values())


# --- without --loss, and while λ is 0 ---------------------------------------------------------------------


def test_run_without_loss_is_bit_equal_to_one_without_the_plugin(runs: Runs) -> None:
    assert_equal_training(runs["stock"], runs["no --loss"])


def test_run_without_loss_logs_what_one_without_the_plugin_logs(runs: Runs) -> None:
    run = runs["no --loss"]
    assert runs["stock"].scalars.keys() == run.scalars.keys()
    assert runs["stock"].timeless_log == run.timeless_log
    assert "rankclip" not in run.log.replace(str(run.directory), "")


def test_run_without_loss_has_the_parameters_of_one_without_the_plugin(runs: Runs) -> None:
    stock, params = runs["stock"].params, runs["no --loss"].params
    assert stock.keys() == params.keys()
    paths = {"name", "log_path", "checkpoint_path", "tensorboard_path"}
    assert {key for key in stock if stock[key] != params[key]} <= paths


def test_a_plugin_that_is_switched_off_is_a_problem_until_it_is_attached(runs: Runs) -> None:
    # WITHOUT_PLUGIN prints the loaded modules of rankloss, the problems, and those left after attach().
    (problem,) = re.findall(r"^\[\]\n(.*)\n\[\]$", runs["stock"].output, re.MULTILINE)
    for word in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "''", "python -m rankloss_open_clip"):
        assert word in problem


def test_epoch_at_lambda_zero_is_bit_equal_to_stock(runs: Runs) -> None:
    stock, run = runs["stock"], runs["--loss rankclip"]
    assert_equal_training(stock, run, epochs=(1,))
    assert not torch.equal(
        stock.tensors_after_epoch(2)["visual.proj"], run.tensors_after_epoch(2)["visual.proj"]
    ), "λ is 1 there"


@pytest.mark.parametrize("name", some_slow("command", "runner", "agreement"))
def test_every_way_to_start_and_to_log_trains_the_same(runs: Runs, name: str) -> None:
    plugin, run = runs["--loss rankclip"], runs[name]
    assert_equal_training(plugin, run)
    if name != "agreement":
        assert run.timeless_log == plugin.timeless_log


def test_a_lines_last_values_are_the_terms_the_metrics_and_the_total(runs: Runs) -> None:
    lines = runs["--loss rankclip"].train_lines()
    assert len(lines) == 3 * STEPS
    for step, line in enumerate(lines):
        is_ranked = step >= STEPS  # λ is 0 in the first epoch, and nothing is ranked
        metrics = METRICS if is_ranked else ("rank_lambda",)
        expected = [name.capitalize() for name in (*TERMS, *metrics, "loss")]
        assert list(line)[-len(expected) :] == expected
        assert ("In_modal_raw" in line) is is_ranked


def test_run_writes_down_the_options_of_its_loss(runs: Runs) -> None:
    expected = {
        "loss": "rankclip",
        "rankclip_schedule": "official",
        "rankclip_lambda_cross": "1.0",
        "rankclip_top_k": "None",
    }
    assert runs["--loss rankclip"].params.items() >= expected.items()


def warnings_of(run: Run) -> set[str]:
    """The lines of a run's output that warn, without their times."""
    lines = [line for line in run.output.splitlines() if "Warning" in line or "WARNING" in line]
    return {re.sub(r"^[\d,:-]+ \| ", "", line) for line in lines}


def test_run_with_a_loss_warns_of_no_more_than_one_without_the_plugin(runs: Runs) -> None:
    assert warnings_of(runs["--loss rankclip"]) <= warnings_of(runs["stock"])


def test_options_of_a_run_are_read_beside_its_checkpoint(runs: Runs) -> None:
    """By the commands that open the checkpoint, which build the model and prepare pictures by them."""
    run = runs["--loss rankclip"]
    options = options_of_run(run.directory / "checkpoints/epoch_1.pt")
    assert options.keys() == run.params.keys()
    assert options["model"] == run.params["model"]
    # Each in its own type, although the trainer writes text.
    assert (options["image_mean"], options["force_quick_gelu"], options["epochs"]) == (None, False, 3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--loss rankclip --batch-size 1", "--loss: rankclip needs at least 2 pairs in a batch; got 1"),
        ("--loss tiny --batch-size 1", "--loss: tiny needs at least 2 pairs in a batch; got 1"),
        (
            "--loss rankclip --rankclip-kernel triton",
            "--rankclip-kernel: kernel='triton' does not serve here: the kernels run on CUDA, not on cpu",
        ),
    ],
)
def test_a_run_whose_first_batch_would_be_refused_takes_no_name(
    trainer: Trainer, options: str, reason: str
) -> None:
    run = trainer.call("first batch", *options.split(), code=2)
    assert f"error: argument {reason}" in run.output
    assert not run.directory.exists()


# --- λ --------------------------------------------------------------------------------------------------


def test_lambda_and_raw_terms_explain_the_weighted_ones(runs: Runs) -> None:
    """A term is its raw value times λ/N, N = 16 pairs in a batch, and λ by epochs as the paper has it."""
    scalars = runs["agreement"].scalars
    assert scalars["cross_modal_raw"], "some steps are ranked"
    for term in ("cross_modal", "in_modal"):
        for step, raw in scalars[f"{term}_raw"].items():
            lambda_ = schedules.official(step // STEPS + 1, EPOCHS)
            assert scalars["rank_lambda"][step] == lambda_
            assert scalars[f"{term}_loss"][step] == pytest.approx(raw * lambda_ / 16, rel=1e-6)
            assert 0.1 < raw < 10, "in nats per item: the scale of log 16, a term by chance"


def test_lambda_of_one_epoch_goes_by_steps(runs: Runs) -> None:
    expected = {step: schedules.rankclip(step + 1, STEPS) for step in range(STEPS)}
    assert runs["fp32"].scalars["rank_lambda"] == pytest.approx(expected)
    assert "schedule per step" in runs["fp32"].log
    assert len(set(runs["fp32"].scalars["lr"].values())) == 1, "without the learning rate's schedule"


# --- the trainer's features -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", some_slow(*PRECISIONS))
def test_every_precision_trains_in_its_own_numbers(runs: Runs, precision: str) -> None:
    if precision != "fp32":
        # The first step has the same weights and pairs; eight bits of mantissa give two digits.
        first, exact = runs[precision].train_lines()[0], runs["fp32"].train_lines()[0]
        assert first == pytest.approx(exact, rel=0.02)
        assert first != pytest.approx(exact, rel=1e-6)
    has_bfloat16_weights = precision in ("bf16", "pure_bf16")
    weight = runs[precision].tensors_after_epoch(1)["visual.conv1.weight"]
    assert weight.dtype == (torch.bfloat16 if has_bfloat16_weights else torch.float32)


# Distillation. All these runs begin with the same weights and pairs, so their first lines can be compared;
# the losses themselves are compared in test_trainer_processes.
RANKS = [term.capitalize() for term in RANK_TERMS]


@pytest.mark.slow
def test_distillation_ranks_the_student_alone_beside_the_trainers_term(runs: Runs) -> None:
    plain, distilled = (runs[name].train_lines()[0] for name in ("fp32", "distill"))
    assert [distilled[term] for term in RANKS] == [plain[term] for term in RANKS]
    assert distilled["Loss"] == pytest.approx(plain["Loss"] + distilled["Distill_loss"], rel=1e-4)


@pytest.mark.slow
def test_ranks_by_the_teacher_take_the_place_of_the_trainers_term(runs: Runs) -> None:
    distilled, by_teacher = (runs[name].train_lines()[0] for name in ("distill", "ranked by the teacher"))
    assert "Distill_loss" not in by_teacher
    for term in RANKS:
        relative_change = abs(by_teacher[term] / distilled[term] - 1)
        assert relative_change > 1e-3, "more than the rounding of logged digits"


@pytest.mark.slow
def test_the_preset_ranks_the_eight_best_alone_with_a_weight_of_64(runs: Runs) -> None:
    """Its raw terms differ from those of whole lists; a logged term is 64·λ/N times the raw one, N = 16."""
    by_teacher = runs["ranked by the teacher"].train_lines()[0]
    preset = runs["rankclip-distill"].train_lines()[0]
    first_lambda = schedules.rankclip(1, STEPS)
    for term in RANKS:
        raw = term.replace("_loss", "_raw")
        relative_change = abs(preset[raw] / by_teacher[raw] - 1)
        assert relative_change > 1e-2, "more than the rounding of logged digits"
        assert preset[term] == pytest.approx(first_lambda * 64 / 16 * preset[raw], rel=1e-3)


def test_validation_loss_stays_plain_clip(runs: Runs) -> None:
    run = runs["csv, whole set"]
    # An epoch is one step, on the pairs that validate: the second step begins where the first was validated.
    after_first_epoch, _ = map(float, re.findall(r"clip_val_loss: ([\d.]+)", run.log))
    second_step = run.train_lines()[1]
    assert after_first_epoch == pytest.approx(second_step["Contrastive_loss"], rel=1e-4)
    assert second_step["Loss"] > 1.01 * after_first_epoch, "the rank terms, which no validation has"


@pytest.mark.parametrize("name", some_slow("clip-streamed", "siglip-streamed"))
def test_streamed_losses_train_as_the_trainers_own(runs: Runs, name: str) -> None:
    stock = runs["stock" if name == "clip-streamed" else "stock siglip"]
    assert_equal_training(stock, runs[name])


# --- what is logged -------------------------------------------------------------------------------------


def test_text_log_and_tensorboard_show_the_same(runs: Runs) -> None:
    run = runs["agreement"]
    lines = run.train_lines()
    assert len(lines) == EPOCHS * STEPS
    for name in (*TERMS, *METRICS, *TAUS, "loss"):
        shown = run.scalars[name]
        first = STEPS if name.endswith("_raw") else 0  # λ is 0 in the first epoch, and nothing is ranked
        assert list(shown) == list(range(first, EPOCHS * STEPS)), "the same entries at every step"
        texts = [line[name.capitalize()] for line in lines[first:]]
        assert list(shown.values()) == pytest.approx(texts, rel=1e-4)


# --- a loss with a second caption, and a state -----------------------------------------------------------


def average(run: Run, epoch: int) -> float:
    """The state of the loss in the checkpoint of an epoch."""
    path = run.directory / "checkpoints" / f"epoch_{epoch}.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]["rankloss_open_clip"]
    assert state["loss"] == "tiny-caption"
    value: float = state["state_dict"]["average"].item()
    return value


def test_a_state_moves_once_a_step(runs: Runs) -> None:
    logged = [*runs["tiny-caption"].scalars["caption_average"].values()]
    assert len(logged) == 3  # epochs of one step
    for before, after in itertools.pairwise([1.0, *logged]):
        mean_cosine = (after - 0.75 * before) / 0.25  # of one batch, which the average took in
        assert -1 <= mean_cosine < 1
        assert after < before


def test_a_state_is_in_the_checkpoint_of_each_epoch(runs: Runs) -> None:
    run = runs["tiny-caption"]
    logged = [*run.scalars["caption_average"].values()]
    assert [average(run, epoch) for epoch in (1, 2, 3)] == pytest.approx(logged, abs=1e-7)


def test_validation_is_on_the_first_caption_alone(runs: Runs) -> None:
    """An epoch is one step on the pairs that validate: CLIP's term of a step is of the weights before it."""
    run = runs["tiny-caption"]
    after_each_epoch = [float(x) for x in re.findall(r"clip_val_loss: ([\d.]+)", run.log)]
    of_steps = [*run.scalars["contrastive_loss"].values()]
    assert len(after_each_epoch) == len(of_steps) == 3
    assert after_each_epoch[:-1] == pytest.approx(of_steps[1:], rel=1e-4)


def test_resumed_run_goes_on_with_its_state(runs: Runs) -> None:
    whole, resumed = runs["tiny-caption"], runs["tiny-caption resumed"]
    assert len(resumed.train_lines()) == 2
    assert "starts anew" not in resumed.log
    for epoch in (2, 3):
        assert average(resumed, epoch) == pytest.approx(average(whole, epoch), rel=1e-6)


# --- slow -----------------------------------------------------------------------------------------------


FEATURES = [
    "--siglip",
    "--model {tiny}-coca --accum-freq 2",
    "--distill-model {tiny} --distill-pretrained none",
    "--precision amp_bf16 --accum-freq 2",
    "--precision pure_bf16",
    "--grad-checkpointing",
]
if hasattr(open_clip.CLIP, "lock_text_tower"):  # 3.0.0 locks the text towers of Hugging Face models only
    FEATURES.append("--lock-text --lock-text-freeze-layer-norm")


@pytest.mark.slow
@pytest.mark.parametrize("options", FEATURES)
def test_epoch_at_lambda_zero_is_bit_equal_to_stock_with_every_feature(
    trainer: Trainer, options: str
) -> None:
    """In the official schedule λ is 0 in the first epoch of two, and 2 in the second."""
    feature = options.format(tiny=f"local-dir:{trainer.directory / 'tiny'}").split()

    def train(kind: str, *loss: str) -> Run:
        name_of_run = f"lambda zero{options.replace('/', '')} {kind}"
        return trainer.call(name_of_run, "--epochs", "2", *feature, *loss)

    stock, run = train("stock"), train("rankclip", *RANKCLIP_OFFICIAL)
    assert_equal_training(stock, run, epochs=(1,))
    assert not torch.equal(
        stock.tensors_after_epoch(2)["visual.proj"], run.tensors_after_epoch(2)["visual.proj"]
    ), "λ is 2 there"


@pytest.mark.slow
def test_compiled_model_logs_the_values_of_an_eager_one(trainer: Trainer, runs: Runs) -> None:
    options = ["--epochs", "1", "--loss", "rankclip", "--skip-scheduler", "--torchcompile"]
    run = trainer.call("compiled", *options)
    assert "Compiling model" in run.log
    for line, eager in zip(run.train_lines(), runs["fp32"].train_lines(), strict=True):
        assert line == pytest.approx(eager, rel=1e-3)
