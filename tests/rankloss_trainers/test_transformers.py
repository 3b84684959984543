"""Hugging Face's Trainer with a loss of the catalogue, on tiny models of random weights."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from other_values import OTHER_VALUES
from tiny_pairs import CONFIGS, Pairs, tiny_clip, tiny_model
from tiny_transformers import (
    LOG_ROUNDING,
    METRICS,
    SGD,
    TERMS,
    PictureProcessor,
    arguments,
    build_trainer,
    graded_table,
    logged_lines,
    logged_values,
    train,
    train_in_plain_loop,
    weights,
)
from torch import Tensor, nn

import rankloss
from rankloss_trainers import catalog
from rankloss_trainers.command_line import LossArguments
from rankloss_trainers.option import options_of
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.transformers import ContrastiveTrainer
from rankloss_trainers.transformers.embeddings import logit_scale
from registered import NAMES, input_names

TEACHER = ("image", "text")
"""The modalities of a teacher's features, as ``Pairs`` adds them."""


def linear(**options: Any) -> rankloss.RankClipLoss:
    """RankCLIP's loss with a λ that grows from 0 at the first step to 1 at the last."""
    return rankloss.RankClipLoss(schedule="linear", **options)


# --- what is trained ------------------------------------------------------------------------------------


def kept_in_evaluation() -> Any:
    """A model that stays in evaluation mode; it has no dropout, so that the mode changes no number."""
    model = tiny_clip().eval()
    model.train = lambda _=True: model
    return model


@pytest.mark.parametrize(
    ("make", "teacher", "options", "loss"),
    [
        pytest.param(tiny_clip, (), {}, linear, id="no teacher"),
        pytest.param(kept_in_evaluation, (), {}, linear, id="a model in evaluation mode"),
        pytest.param(tiny_clip, TEACHER, {"loss": linear()}, linear, id="a teacher, a module"),
        pytest.param(
            tiny_clip,
            TEACHER,
            {"loss": "rankclip-distill", "loss_options": {"schedule": "linear", "top_k": 4}},
            lambda: linear(lambda_cross=64.0, lambda_in=64.0, top_k=4),  # 64 is the preset's
            id="a teacher, a preset",
        ),
        pytest.param(
            tiny_clip,
            ("text",),
            {"loss": "rankclip", "loss_options": {"schedule": "linear", "lambda_cross": 0.0}},
            lambda: linear(lambda_cross=0.0),
            id="a teacher of texts alone",
        ),
        pytest.param(tiny_clip, TEACHER, {"mini_batch_size": 3}, linear, id="cached gradients"),
        pytest.param(
            tiny_clip,
            (),
            {"mini_batch_size": 3, "gradient_accumulation_steps": 3},
            linear,
            id="cached gradients, accumulated",
        ),
    ],
)
def test_every_step_is_the_step_of_an_own_loop(
    tmp_path: Path,
    make: Any,
    teacher: tuple[str, ...],
    options: dict[str, Any],
    loss: Callable[[], nn.Module],
) -> None:
    """The data have the columns of this teacher, which the loss ranks by wherever they are."""
    pairs, model = Pairs(72, *teacher), make()  # three steps of at most three batches of eight
    micro_batches = [8] * options.get("gradient_accumulation_steps", 1)
    expected = train_in_plain_loop(model, loss(), pairs, micro_batches)
    trained = train(tmp_path, model=make(), pairs=pairs, max_steps=3, **SGD, **options)
    torch.testing.assert_close(weights(trained.model), weights(model), rtol=1e-5, atol=1e-6)
    for line, terms in zip(logged_lines(trained), expected, strict=True):
        assert {name: line[name] for name in terms} == pytest.approx(terms, rel=1e-4, abs=1e-6)
        assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)
    assert not torch.equal(weights(model), weights(make()))


@dataclasses.dataclass(frozen=True)
class EveryModel:
    """A training of one epoch, evaluated before and after it on 17 pairs: the last batch of one counts 0.

    Attributes:
        kind: The name of the model.
        held_out: The pairs of the evaluation.
        trained: The trainer.
        predictions: What ``compute_metrics`` was given in each evaluation.
    """

    kind: str
    held_out: Pairs
    trained: Any
    predictions: list[Any]

    def mean_of_unsmoothed_loss(self, model: Any) -> float:
        """The model's own loss with labels that are not smoothed, as the mean over all pairs.

        The sum is over the pairs of whole batches.
        """
        total = 0.0
        for start in (0, 8):
            with torch.no_grad():
                output = model.eval()(**self.held_out.batch(start, start + 8), return_loss=True)
            value = output.loss
            if self.kind == "Align":  # its own loss smooths the labels
                logits, labels = output.logits_per_image, torch.arange(8)
                cross_entropy = nn.functional.cross_entropy
                value = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
            total += 8 * value.item()
        return total / len(self.held_out)


@pytest.fixture(
    scope="module",
    params=[*((kind, None) for kind in CONFIGS), ("CLIP", 3)],
    ids=[*CONFIGS, "CLIP, mini-batches"],
)
def every_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EveryModel:
    kind, mini_batch_size = request.param
    more = ["patches"] if kind == "Siglip2" else []
    held_out, predictions = Pairs(17, *more), []

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        predictions.append(evaluated.predictions)
        return {}

    trained = train(
        tmp_path_factory.mktemp("every_model"),
        model=tiny_model(kind),
        pairs=Pairs(32, *more),
        eval_dataset=held_out,
        eval_on_start=True,
        eval_strategy="epoch",
        num_train_epochs=1,
        mini_batch_size=mini_batch_size,
        compute_metrics=compute_metrics,
    )
    return EveryModel(kind, held_out, trained, predictions)


def test_every_model_is_evaluated_with_its_own_loss_unsmoothed(every_model: EveryModel) -> None:
    first, last = logged_values(every_model.trained, "eval_loss")
    untrained, trained = tiny_model(every_model.kind), every_model.trained.model
    assert first == pytest.approx(every_model.mean_of_unsmoothed_loss(untrained), rel=1e-5)
    assert last == pytest.approx(every_model.mean_of_unsmoothed_loss(trained), rel=1e-5)


def test_every_model_trains_its_scale_and_its_bias(every_model: EveryModel) -> None:
    untrained, trained = tiny_model(every_model.kind), every_model.trained.model
    names = {"logit_scale", "logit_bias", "temperature"} & dict(untrained.named_parameters()).keys()
    assert names
    for name in names:
        assert not torch.equal(getattr(trained, name), getattr(untrained, name)), name


def test_every_model_trains_the_sum_of_the_terms(every_model: EveryModel) -> None:
    for line in logged_lines(every_model.trained):
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), rel=1e-4)
    assert logged_lines(every_model.trained)[-1]["in_modal_loss"] > 0, "λ is no longer 0"


@pytest.mark.parametrize("every_model", [("CLIP", 3)], indirect=True, ids=["CLIP, mini-batches"])
def test_in_mini_batches_an_evaluation_has_the_embeddings_of_all_pairs(every_model: EveryModel) -> None:
    before, after = every_model.predictions
    for (images, texts, *_others), model in (
        (before, tiny_model(every_model.kind)),
        (after, every_model.trained.model),
    ):
        with torch.no_grad():
            expected = model.eval()(**every_model.held_out.batch())
        torch.testing.assert_close(torch.from_numpy(images), expected.image_embeds)
        torch.testing.assert_close(torch.from_numpy(texts), expected.text_embeds)


def is_served(name: str) -> bool:
    """True for a loss whose columns of data the Trainer reads: none, ids or lists."""
    return "caption_features" not in input_names(name)


@pytest.mark.parametrize("name", [name for name in NAMES if not is_served(name)])
def test_a_loss_of_columns_that_are_open_clips_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a column"):
        build_trainer(tmp_path, loss=name, loss_options={"caption_key": "x"})


def batch_for(name: str) -> dict[str, Any]:
    """The keywords of :func:`train` by which a Trainer has the data of one step of a named loss."""
    if name == "ranked-lists":
        return {
            "pairs": graded_table(queries_are_texts=False, own=[f"{n}" for n in range(8)]),
            "processing_class": PictureProcessor(),
        }
    pairs = Pairs(8, *TEACHER) if catalog.load(name).teacher else Pairs(8)
    for key, column in pairs.columns.items():
        if key.startswith("reference_"):
            pairs.columns[key] = nn.functional.pad(column, (0, 2))  # from 6 to the model's width of 8
    pairs.columns["input_ids"][1] = pairs.columns["input_ids"][0]  # two captions that are one id
    return {"pairs": pairs, "teacher": "given" if catalog.load(name).teacher else None}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One step of a loss with its defaults: of the whole model, and of adapters on the same weights.

    Attributes:
        start: The parameters before the step.
        full: The trainer of the whole model.
        adapted: The trainer of the model with adapters.
    """

    start: dict[str, Tensor]
    full: Any
    adapted: Any

    @property
    def own(self) -> Any:
        """The model in which the adapters are."""
        return self.adapted.model.base_model.model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Adapted]:
    """Trainings by the name of the loss and the size of mini-batches, or None.

    Adapters freeze the scale. With a size of mini-batches it is thawed, so that both cases are there.
    """
    peft = pytest.importorskip("peft")

    @functools.cache
    def of(name: str, size: int | None) -> Adapted:
        kind = "Siglip" if catalog.load(name).kind == "sigmoid" else "CLIP"
        names = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["logit_scale"]}
        model = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(r=2, lora_alpha=4, **names))
        model.base_model.model.logit_scale.requires_grad_(size is not None)
        one_large_step = {"max_steps": 1, **SGD, "learning_rate": 1.0}
        given = {**batch_for(name), "loss": name, **one_large_step}
        place_of_full, place_of_adapted = map(tmp_path_factory.mktemp, ("full", "adapted"))
        return Adapted(
            start=dict(tiny_model(kind).named_parameters()),
            full=train(place_of_full, model=tiny_model(kind), **given),
            adapted=train(place_of_adapted, model=model, mini_batch_size=size, **given),
        )

    return of


Adaptations = Callable[[str, int | None], Adapted]
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
# Adapters change the model; of a loss they could change what reaches it. So: a loss of each set of inputs.
WITH_ADAPTERS = {input_names(name): name for name in reversed(NAMES) if is_served(name)}.values()
of_every_set_of_inputs = pytest.mark.parametrize(
    ("name", "size"), [*((name, 3) for name in WITH_ADAPTERS), ("rankclip", None), ("tiny", None)]
)


@peft_warns
@of_every_set_of_inputs
def test_a_model_with_adapters_has_the_loss_of_the_whole_model(
    adapted: Adaptations, name: str, size: int | None
) -> None:
    one = adapted(name, size)
    assert logged_lines(one.adapted)[0]["loss"] == pytest.approx(logged_lines(one.full)[0]["loss"], rel=1e-5)


@peft_warns
@of_every_set_of_inputs
def test_adapters_learn_what_the_whole_layers_learn(
    adapted: Adaptations, name: str, size: int | None
) -> None:
    """At their start W + 2·B·A has B = 0, so SGD moves B by 2·ΔW·Aᵀ where it moves the full layer by ΔW.

    The factor 2 is the adapters' ``lora_alpha / r``.
    """
    one = adapted(name, size)
    moved = {key: x - one.start[key] for key, x in one.full.model.named_parameters()}
    layers = [key for key in moved if key.endswith(("q_proj.weight", "v_proj.weight"))]
    assert len(layers) == 4, "two in the one layer of each tower"
    assert max(moved[key].abs().max() for key in layers) > 1e-4, "far above the tolerance"
    for key in layers:
        layer = one.own.get_submodule(key.removesuffix(".weight"))
        expected = 2 * moved[key] @ layer.lora_A["default"].weight.T
        torch.testing.assert_close(layer.lora_B["default"].weight, expected, rtol=1e-3, atol=1e-6)


@peft_warns
@of_every_set_of_inputs
def test_the_scale_learns_beside_adapters_if_it_is_thawed(
    adapted: Adaptations, name: str, size: int | None
) -> None:
    """``modules_to_save`` does not reach it; it is thawed where there are mini-batches."""
    one = adapted(name, size)
    is_thawed = size is not None
    scale, start = one.own.logit_scale, one.start["logit_scale"]
    expected = one.full.model.logit_scale if is_thawed else start
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(scale, start) is not is_thawed


@peft_warns
@of_every_set_of_inputs
def test_weights_that_are_frozen_under_adapters_stay(
    adapted: Adaptations, name: str, size: int | None
) -> None:
    one = adapted(name, size)
    frozen = {key: x for key, x in one.own.named_parameters() if not x.requires_grad}
    assert frozen
    assert all(torch.equal(x, one.start[key.replace(".base_layer", "")]) for key, x in frozen.items())


# --- cached gradients -------------------------------------------------------------------------------------


@pytest.fixture
def double() -> Iterator[None]:
    """Models, and all that they compute, are of float64."""
    torch.set_default_dtype(torch.float64)  # models of former releases cannot be converted to it
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("kind", "dropout"), [("CLIP", 0.0), ("Siglip", 0.5), ("Siglip2", 0.0)])
def test_mini_batches_have_the_loss_and_gradients_of_the_batch(
    tmp_path: Path, kind: str, dropout: float
) -> None:
    """The expected gradients are of one graph of all embeddings.

    Dropout draws its random numbers anew for each mini-batch, and the same ones again in the backward pass.
    So with dropout the expected embeddings, too, are computed in mini-batches.
    """
    batch = Pairs(8, *TEACHER, *(["patches"] if kind == "Siglip2" else [])).batch()
    model = tiny_model(kind).train()
    for part in model.modules():
        if hasattr(part, "dropout"):  # of the attention
            part.dropout = dropout
    given = {"loss_options": {"schedule": "constant"}, "teacher": "given", "mini_batch_size": 3}
    cached = build_trainer(tmp_path, model=model, loss="rankclip", **given)
    cached.loss_runtime.set_progress(1, 1)
    torch.manual_seed(1)
    loss = cached.compute_loss(model, batch)
    state = torch.get_rng_state()
    (loss / 4).backward()  # a factor as of accumulated batches
    assert torch.equal(torch.get_rng_state(), state), "the backward pass draws nothing"

    torch.manual_seed(1)
    columns = {name: x for name, x in batch.items() if not name.startswith("reference_")}
    number_of_calls = 3 if dropout else 1  # eight pairs in mini-batches of at most three, or at once
    split_columns = [column.tensor_split(number_of_calls) for column in columns.values()]
    calls = zip(*split_columns, strict=True)
    outputs = [model(**dict(zip(columns, of_call, strict=True))) for of_call in calls]
    inputs = {name: x for name, x in batch.items() if name not in columns}
    for side in ("image", "text"):
        embeddings = [getattr(output, f"{side}_embeds") for output in outputs]
        inputs[f"{side}_features"] = torch.cat(embeddings)
    base: Any = rankloss.ClipLoss()
    if kind != "CLIP":
        base, inputs["logit_bias"] = rankloss.SigLipLoss(), model.logit_bias
    expected = rankloss.RankClipLoss(base, schedule="constant")(logit_scale=model.logit_scale.exp(), **inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(expected / 4, [*model.parameters()], allow_unused=True)
    rtol = 1e-6 if kind == "Siglip2" else 1e-9  # interpolates its positions in float32
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=rtol, atol=1e-3 * rtol, msg=name)


# --- λ, the log, resuming ------------------------------------------------------------------


class Remembering(rankloss.ClipLoss):
    """CLIP's loss, weighted by a moving average of its own values in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones((), dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().forward(*args, **kwargs)["contrastive_loss"]
        if torch.is_grad_enabled():
            self.average.lerp_(loss.detach().double(), 0.3)
        return {"contrastive_loss": loss / self.average.float()}


def average(trained: Any) -> float:
    """The moving average of a trainer's loss."""
    (loss,) = (x for x in trained.loss_runtime.modules() if isinstance(x, Remembering))
    return loss.average.item()  # type: ignore[no-any-return, operator]


class Run:
    """A training of twelve steps in two epochs, and the same run resumed, of a loss that remembers."""

    def __init__(self, directory: Path) -> None:
        given = {"pairs": Pairs(48), "save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
        given.update(eval_dataset=Pairs(8), eval_strategy="epoch", eval_on_start=True)
        given.update(agreement_every=4)
        self.whole = train(directory, loss=linear(base=Remembering()), **given)
        checkpoint = str(directory / "checkpoint-5")
        self.rest = train(directory / "again", loss=linear(base=Remembering()), resume=checkpoint, **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def test_resumed_run_is_the_uninterrupted_one(run: Run) -> None:
    assert torch.equal(weights(run.rest.model), weights(run.whole.model))
    assert average(run.rest) == average(run.whole) != 1
    for name in (*TERMS, *METRICS):
        assert logged_values(run.rest, name) == logged_values(run.whole, name)


def test_a_run_logs_its_entries_at_every_step_at_which_they_are_computed(run: Run) -> None:
    for name in (*TERMS, *METRICS):
        steps = 11 if name.endswith("_raw") else 12  # λ is 0 at the first step, and nothing is ranked
        assert len(logged_values(run.whole, name)) == steps


def test_agreement_is_held_between_measurements(run: Run) -> None:
    taus = logged_values(run.whole, "cross_modal_tau")  # measured at the steps 1, 5 and 9
    assert taus == [taus[0]] * 4 + [taus[4]] * 4 + [taus[8]] * 4
    assert len(set(taus)) == 3


def test_agreement_is_measured_where_a_run_is_resumed(run: Run) -> None:
    taus = logged_values(run.whole, "cross_modal_tau")
    first_resumed, *others = logged_values(run.rest, "cross_modal_tau")[5:]  # from step 6 on
    at_step_9 = taus[8]
    assert others == [first_resumed] * 2 + [at_step_9] * 4, "of the steps 7 and 8, and 9 to 12"
    assert first_resumed not in taus, "which the whole run measures at the steps 1, 5 and 9"


class Sometimes(rankloss.ClipLoss):
    """CLIP's loss, which logs something at every other call."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        extra = {} if self.calls % 2 else {"of_even_calls": torch.tensor(float(self.calls))}
        return {**super().forward(*args, **kwargs), **extra}


def test_means_are_of_the_calls_that_gave_an_entry_and_of_one_training(tmp_path: Path) -> None:
    """Each training logs one line, of its first three of five calls; the loss counts the calls of both."""
    trained = train(tmp_path, loss=Sometimes(), max_steps=5, logging_steps=3)
    assert logged_values(trained, "of_even_calls") == [2], "of the calls 1 to 3"
    trained.train()  # which begins a new log
    # Of the calls 6 to 8; call 4, after the line of the first training, is in no mean.
    assert logged_values(trained, "of_even_calls") == [(6 + 8) / 2]


class Halving(transformers.TrainerCallback):
    """Ends an epoch at every second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step % 2 == 0


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Pairs without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(Pairs().__getitem__, range(32))


def test_a_resume_with_smaller_batches_stays_at_the_last_epoch(tmp_path: Path) -> None:
    """At step 8 two epochs of four steps are over, but one of eight: the Trainer repeats the second."""
    given = {"num_train_epochs": 3, "schedule_unit": "epoch"}
    train(tmp_path, save_strategy="epoch", **given)
    checkpoint = str(tmp_path / "checkpoint-8")
    resumed = train(tmp_path, resume=checkpoint, per_device_train_batch_size=4, **given)
    assert logged_values(resumed, "rank_lambda") == [0] * 4 + [0.5] * 4 + [1] * 16


@pytest.mark.parametrize(
    ("unit", "options", "logged_unit", "expected"),
    [
        pytest.param(
            "epoch",
            {"max_steps": 11, "num_train_epochs": 5},
            "epoch",
            [0] * 4 + [0.5] * 4 + [1] * 3,
            id="three epochs, as max_steps overrides five",
        ),
        pytest.param(
            "epoch",
            {"max_steps": 3, "num_train_epochs": 5},
            "step",
            [0, 0.5, 1],
            id="one epoch, which has no ramp and goes by steps",
        ),
        pytest.param(
            "epoch",
            {"num_train_epochs": 3, "callbacks": [Halving()]},
            "epoch",
            [0, 0, 0.5, 0.5, 1, 1],
            id="epochs that a callback ends after two steps",
        ),
        pytest.param(
            "step",
            {"gradient_accumulation_steps": 2, "num_train_epochs": 1},
            "step",
            [0, 1],
            id="four batches that are accumulated to two steps",
        ),
        pytest.param(
            "step",
            {"pairs": Stream(), "max_steps": 6},
            "step",
            [0, 0.2, 0.4, 0.6, 0.8, 1],
            id="six steps of a stream",
        ),
        pytest.param(
            "auto",
            {"num_train_epochs": 9, "pairs": Pairs(8)},
            "step",
            [step / 8 for step in range(9)],
            id="nine epochs of one step",
        ),
        pytest.param(
            "auto",
            {"num_train_epochs": 10, "pairs": Pairs(16)},
            "epoch",
            [epoch / 9 for epoch in range(10) for _ in range(2)],
            id="ten epochs of two steps",
        ),
    ],
)
def test_lambda_follows_what_the_trainer_trains_and_the_log_says_it(
    tmp_path: Path,
    unit: str,
    options: dict[str, Any],
    logged_unit: str,
    expected: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By default an epoch has four batches of eight pairs."""
    with caplog.at_level(logging.INFO, "rankloss_trainers"):
        trained = train(tmp_path, schedule_unit=unit, **options)
    assert logged_values(trained, "rank_lambda") == pytest.approx(expected)
    assert f"schedule per {logged_unit}" in caplog.text


class Odd(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """A stream of so many pairs; the last batch of eight is one pair where they are 1 or 17."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(Pairs().__getitem__, range(self.pairs))


@pytest.mark.parametrize("loss", ["rankclip", "spread"])
def test_a_last_pair_of_a_stream_counts_0_and_the_log_says_so_once(
    tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch of the stream is two batches of eight and, at the third step, one of one."""
    options = {"schedule": "constant"} if loss == "rankclip" else None
    before_it, at_it, beyond_it = (
        train(tmp_path, pairs=Odd(17), max_steps=steps, loss=loss, loss_options=options, **SGD)
        for steps in (2, 3, 6)
    )
    assert torch.equal(weights(at_it.model), weights(before_it.model))
    assert logged_values(at_it, "loss")[2] == 0
    of_full_batches = logged_values(beyond_it, "loss")[3:5]
    assert min(of_full_batches) > 1, "the next epoch trains: a random model's loss is near log 8"
    assert caplog.text.count("A batch of one pair counts 0") == 2  # once in each training that reaches it


def test_a_first_batch_of_one_pair_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least two pairs; got shape \(1, 8\)\. .* drop_last=True"):
        train(tmp_path, pairs=Odd(1), max_steps=2)


# --- what changes nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            1e-3,
            marks=pytest.mark.slow,
            id="compiled",
        ),
        pytest.param({"bf16": True, "mini_batch_size": 3}, 0.05, id="autocast to bfloat16, mini-batches"),
    ],
)
def test_numbers_are_an_own_loops_but_for_rounding(tmp_path: Path, given: Any, tolerance: float) -> None:
    model = tiny_clip()
    expected = train_in_plain_loop(model, linear(), Pairs(), [8])
    trained = train(tmp_path, max_steps=3, eval_dataset=Pairs(8), eval_strategy="steps", **SGD, **given)
    for line, terms in zip(logged_lines(trained), expected, strict=True):
        # A rank term is 0 at the first step, in both.
        assert {name: line[name] for name in terms} == pytest.approx(terms, rel=tolerance, abs=1e-6)
    output = model(**Pairs(8).batch(), return_loss=True)
    assert logged_values(trained, "eval_loss")[-1] == pytest.approx(output.loss.item(), rel=tolerance)


def of_dtype(dtype: torch.dtype) -> Any:
    """The model with all parameters of a dtype."""
    return tiny_clip().to(dtype)


def with_a_scale_of(dtype: torch.dtype) -> Any:
    """The model in float32 with a scale of another dtype."""
    model = tiny_clip()
    model.logit_scale.data = model.logit_scale.data.to(dtype)
    return model


@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (of_dtype, torch.bfloat16, 2e-2),
        (of_dtype, torch.float16, 3e-3),
        (with_a_scale_of, torch.float64, 1e-4),
    ],
    ids=["bfloat16", "float16", "a scale of float64"],
)
def test_a_model_of_another_dtype_has_the_loss_but_for_its_rounding(
    tmp_path: Path, make: Any, dtype: torch.dtype, tolerance: float
) -> None:
    given: dict[str, Any] = {"max_steps": 3, "loss_options": {"schedule": "constant"}, **SGD}
    given["eval_dataset"] = Pairs(8)
    single = train(tmp_path, **given)
    model = make(dtype)

    def collate(examples: Any) -> Any:
        batch = transformers.default_data_collator(examples)
        return {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}

    trained = train(tmp_path, model=model, data_collator=collate, **given)
    assert logged_values(trained, "loss") == pytest.approx(logged_values(single, "loss"), rel=tolerance)
    # Of the same weights: rounded steps lead to other ones, on another processor to yet others.
    expected = copy.deepcopy(model).float()(**Pairs(8).batch(), return_loss=True).loss.item()
    assert trained.evaluate()["eval_loss"] == pytest.approx(expected, rel=tolerance)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fsdp_version", "devices", "message"),
    [
        pytest.param(2, 2, "DataParallel over 2 GPUs", id="DataParallel"),
        pytest.param(1, 1, "FSDP version 1 hides", id="FSDP 1"),
    ],
)
def test_engines_that_hide_pairs_or_the_scale_are_refused(
    tmp_path: Path, fsdp_version: int, devices: int, message: str
) -> None:
    class Sharded(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # As on a machine with so many GPUs, and under FSDP of this version.
            self.args._n_gpu = devices
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=fsdp_version)

    class Trainer(ContrastiveTrainer, Sharded):
        pass

    with pytest.raises(ValueError, match=message):
        Trainer(model=tiny_clip(), args=arguments(tmp_path))


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_several_processes_with_the_pairs_of_one_batch_are_refused(tmp_path: Path, kind: str) -> None:
    class Sharded(ContrastiveTrainer):
        pass

    setattr(Sharded, f"get_{kind}_size", lambda _: 2)
    with pytest.raises(ValueError, match="parallelism over 2 processes gives one batch to several processes"):
        Sharded(model=tiny_clip(), args=arguments(tmp_path))


class Scaled(transformers.Trainer):
    """A Trainer of one's own that says, in each way, that its loss is divided by the accumulated batches."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True


def test_accumulated_batches_are_averaged_whatever_the_trainer_behind_says(tmp_path: Path) -> None:
    class Mine(ContrastiveTrainer, Scaled):
        loss_is_scaled_for_ga = True

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(64))

    model = tiny_clip()
    expected = train_in_plain_loop(model, linear(), Pairs(64), [8] * 4, steps=2)
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=4, **SGD)
    given = {"args": args, "train_dataset": Pairs(64), "loss_options": {"schedule": "linear"}}
    mine = Mine(model=tiny_clip(), **given)
    mine.train()
    torch.testing.assert_close(weights(mine.model), weights(model), rtol=1e-5, atol=1e-6)
    for line, terms in zip(logged_lines(mine), expected, strict=True):
        assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-4, abs=LOG_ROUNDING)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_is_scaled_for_ga", True), ("model_accepts_loss_kwargs", True), ("compute_loss_func", max)],
)
def test_an_attribute_that_would_multiply_gradients_is_refused_before_the_first_step(
    tmp_path: Path, name: str, value: Any
) -> None:
    trained = build_trainer(tmp_path, max_steps=1)
    setattr(trained, name, value)
    with pytest.raises(ValueError, match=f"^{name} must not be set: .* gradient_accumulation_steps; got "):
        trained.train()
    assert torch.equal(weights(trained.model), weights(tiny_clip()))


class WithoutEmbeddings(nn.Module):
    """A model with a scale and without embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"logits": pixel_values.sum() * self.logit_scale}


def collate_with_positions(examples: Any) -> dict[str, Tensor]:
    """A batch with one row of positions for all pairs."""
    return {**transformers.default_data_collator(examples), "position_ids": torch.arange(8)[None]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mini_batch_size": 0}, "mini_batch_size must be an integer of at least 1.* 0"),
        ({"loss": "clip-streamed", "model": tiny_model("Siglip")}, "clip-streamed .*logit_bias"),
        ({"loss": "siglip-streamed"}, "siglip-streamed .*logit_bias"),
        (
            {"loss": rankloss.RankClipLoss(), "loss_options": None, "model": tiny_model("Siglip")},
            "RankClipLoss does not work with a model that has a logit_bias: it stands on ClipLoss, a softmax",
        ),
        ({"compute_loss_func": print}, "compute_loss_func is ignored"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for labels"),
        ({"model": nn.Linear(2, 2)}, "Linear has neither a logit_scale nor a temperature"),
        ({"model": WithoutEmbeddings()}, "no image_embeds and no text_embeds, got logits"),
        ({"pairs": Stream(), "schedule_unit": "epoch"}, "rankclip goes by epochs, .* schedule_unit 'step'"),
        ({"pairs": Pairs(9)}, "last batch .* 1 pair.* 9 pairs in batches of 8 on 1 .*dataloader_drop_last"),
        ({"mini_batch_size": 3, "torch_compile_backend": "eager"}, "mini_batch_size .*compiled"),
        (
            {"mini_batch_size": 3, "data_collator": collate_with_positions},
            "mini_batch_size cannot split position_ids: .* of 8 rows",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    """Before the training, or by its data at the first step."""
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **{"loss": "rankclip", "max_steps": 2, **given})


def test_a_training_without_data_is_refused_as_by_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        ContrastiveTrainer(tiny_clip(), arguments(tmp_path), loss="rankclip").train()


@pytest.mark.parametrize(("name", "value"), [("loss_options", {"lambda_in": 2.0}), *OTHER_VALUES.items()])
def test_options_beside_a_command_lines_choice_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    """The choice has its own, and these would be dropped."""
    message = f"choice, which has its own {name}; got {name}={re.escape(repr(value))}"
    with pytest.raises(TypeError, match=message):
        build_trainer(tmp_path, **{"loss": typed_choice(), "loss_options": None, name: value})


def typed_choice() -> Any:
    """The losses of a command line, with their options and those of the run."""
    parser = argparse.ArgumentParser()
    losses = LossArguments(parser, ["spread"])
    return losses.chosen(parser.parse_args(["--loss", "spread", "--spread-weight", "0.7"]))


def test_a_command_lines_choice_is_a_loss_of_the_trainer(tmp_path: Path) -> None:
    built = build_trainer(tmp_path, loss=typed_choice(), loss_options=None)
    loss = built.loss_runtime.criterion
    assert isinstance(loss, rankloss.SpreadLoss)
    assert loss.weight == 0.7


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_every_option_of_a_run_is_a_keyword_of_the_trainer(tmp_path: Path, name: str, value: Any) -> None:
    shown = inspect.signature(ContrastiveTrainer).parameters[name]
    assert shown.default == options_of(RunOptions)[name].default
    run = build_trainer(tmp_path, **{name: value}).loss_runtime
    assert run.options == RunOptions(**{name: value})


class OwnLoss(transformers.Trainer):
    """A Trainer with a loss of its own."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        return model(**inputs).logits_per_image.square().mean()


def one_step(directory: Path) -> dict[str, Any]:
    """The arguments and the data of a training of one step."""
    return {"args": arguments(directory, max_steps=1, **SGD), "train_dataset": Pairs(8)}


def test_a_trainers_own_loss_that_the_named_one_would_replace_is_refused(tmp_path: Path) -> None:
    class Lost(ContrastiveTrainer, OwnLoss):
        pass

    with pytest.raises(TypeError, match=r"OwnLoss\.compute_loss would be replaced .*super\(\)\.compute_loss"):
        Lost(model=tiny_clip(), **one_step(tmp_path))


def test_a_trainers_own_loss_is_not_trained_in_place_of_the_named_one(tmp_path: Path) -> None:
    class Reversed(OwnLoss, ContrastiveTrainer):
        pass

    model = tiny_clip()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"loss rankclip was not used: Reversed .*compute_loss"):
        Reversed(model=model, **one_step(tmp_path)).train()
    assert torch.equal(weights(model), before)


def test_a_trainer_may_change_the_named_loss_by_its_own_method(tmp_path: Path) -> None:
    class Doubled(ContrastiveTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    doubled, single = (
        kind(model=tiny_clip(), **one_step(tmp_path)) for kind in (Doubled, ContrastiveTrainer)
    )
    doubled.train()
    single.train()
    twice = [2 * loss for loss in logged_values(single, "loss")]
    rounding = 3 * LOG_ROUNDING  # one of the doubled loss, and two of twice the single one
    assert logged_values(doubled, "loss") == pytest.approx(twice, rel=1e-5, abs=rounding)


@pytest.mark.parametrize(("log_scale", "limited"), [(9.0, 2.0), (1.5, 1.5), (-1.0, 0.0)])
def test_the_scale_is_the_multiplier_from_1_to_its_limit(log_scale: float, limited: float) -> None:
    model = SimpleNamespace(logit_scale=torch.tensor(log_scale), max_log_logit_scale=2.0)
    assert torch.equal(logit_scale(model), torch.tensor(limited).exp())


def test_a_scale_that_another_process_holds_is_refused() -> None:
    model = SimpleNamespace(logit_scale=torch.zeros(0), max_log_logit_scale=None)
    with pytest.raises(ValueError, match="logit_scale has no element on this process: use ZeRO stage 2"):
        logit_scale(model)


def test_a_scale_of_several_numbers_is_refused_by_its_shape() -> None:
    model = SimpleNamespace(logit_scale=torch.zeros(512))
    with pytest.raises(ValueError, match=r"^logit_scale must be one number; got shape \(512,\)$"):
        logit_scale(model)


# --- a loss that remembers --------------------------------------------------------------------------------


def test_checkpoint_of_another_loss_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, loss="clip-streamed")
    stateless = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())
    assert stateless["stateful_callbacks"]["rankloss"]["training"] == "clip-streamed"
    train(tmp_path, max_steps=2, resume=True, loss=Remembering())
    assert "holds the state of the loss clip-streamed: the state of Remembering starts anew" in caplog.text


def test_a_resumed_run_of_another_length_or_loss_is_one_warning_that_shows_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, max_steps=4, **saving)
    checkpoint = str(tmp_path / "checkpoint-2")
    before = "trained with rankclip (schedule linear): linear per step over 4 step(s)"
    for given, now in (
        ({"max_steps": 4}, None),
        ({"max_steps": 6}, "rankclip (schedule linear): linear per step over 6 step(s)"),
        ({"max_steps": 4, "loss": "spread"}, "spread"),
    ):
        caplog.clear()
        train(tmp_path, resume=checkpoint, **given, **saving)
        if now is None:
            assert "trained with" not in caplog.text
        else:
            assert caplog.text.count(f"{before}; this run trains with {now}") == 1


def test_model_that_is_made_anew_is_not_given_the_state_of_the_last(tmp_path: Path) -> None:
    trials = build_trainer(tmp_path, model_init=tiny_clip, max_steps=3, loss=Remembering())
    results = []
    for _ in range(2):
        trials.train()
        results.append((logged_values(trials, "loss"), average(trials)))
    assert results[0] == results[1]
    _, moved_average = results[0]
    assert moved_average != 1, "there is a state that the second training could have been given"
