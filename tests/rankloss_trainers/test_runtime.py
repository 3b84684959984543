"""The runtime of a loss: progress, teacher, entries and state; and create(), which builds losses by name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from named_inputs import HOST, inputs_of
from other_values import OTHER_VALUES
from tiny_losses import TinyCaptionLoss, TinyLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
import rankloss_trainers
from rankloss.losses import TEACHER
from rankloss_trainers import catalog
from rankloss_trainers.composing import innermost
from rankloss_trainers.graded.term import RankedListsTerm
from rankloss_trainers.host import NEEDS, Host, read_losses
from rankloss_trainers.logging import remark_on_tf32
from rankloss_trainers.progress import listeners
from rankloss_trainers.run_options import RunOptions, Teacher
from rankloss_trainers.runtime import Runtime

SCALE, SIGMOID = torch.tensor(8.0), rankloss.SigLipLoss()
HOST_THAT_SERVES_NOTHING = dataclasses.replace(HOST, serves=())
"""A trainer that gives a loss features and the scale, and nothing else."""


def runtime_of(
    host: Host, loss: Any, loss_options: Any = None, run_options: Any = None, **given: Any
) -> Runtime:
    """The runtime of a loss by name, of joined losses, or of a module, with the options of the run."""
    return Runtime(host, read_losses(loss, loss_options), RunOptions(**run_options or {}), **given)


def pair_features(seed: int = 0) -> list[Tensor]:
    """Unit-norm features ``[6, 4]`` of six images and of their texts, which take gradients."""
    rows = normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return [x.clone().requires_grad_() for x in rows]


def loss_inputs(pair: list[Tensor]) -> dict[str, Tensor]:
    """Features of images and texts, and the scale, by the names of a loss's arguments."""
    return {"image_features": pair[0], "text_features": pair[1], "logit_scale": SCALE}


def features_of_teacher(seed: int = 1) -> dict[str, Tensor]:
    """A teacher's features of the six images and texts, by the names of a loss's arguments."""
    return dict(zip(TEACHER, (x.detach() for x in pair_features(seed=seed)), strict=True))


def at_step(run: Runtime, step: int, total_steps: int = 3) -> Runtime:
    """The run at a step of its training."""
    run.set_progress(step, total_steps)
    return run


class GivenEntries(nn.Module):
    """A loss that returns the entries it was built with, and keeps its inputs."""

    def __init__(self, **entries: Tensor) -> None:
        super().__init__()
        self.entries = entries
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        self.seen = inputs
        return self.entries


# --- entries --------------------------------------------------------------------------------------------


def test_terms_are_told_from_metrics_by_their_names() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    criterion = GivenEntries(a_loss=3 * x, depth=5 * x.detach(), b_loss=x * x)
    entries = runtime_of(HOST_THAT_SERVES_NOTHING, criterion)(**loss_inputs(pair_features()), logit_bias=None)
    assert entries.terms == {"a_loss": 6, "b_loss": 4}
    assert entries.metrics == {"depth": 10}
    entries.total.backward()
    assert x.grad == 7  # d(3x + x²) at x = 2


def test_a_loss_is_given_what_the_trainer_has() -> None:
    criterion = GivenEntries(a_loss=torch.tensor(1.0, requires_grad=True))
    inputs = {**loss_inputs(pair_features()), "logit_bias": None}
    runtime_of(HOST_THAT_SERVES_NOTHING, criterion)(**inputs)
    # ``output_dict`` is the runtime's own: it asks for entries, not for their sum.
    assert criterion.seen == {**inputs, "output_dict": True}


def test_entries_with_a_gradient_that_would_not_be_trained_are_refused() -> None:
    """The runtime trains the entries whose names end in ``_loss``, and logs the others."""
    for names, message in (
        (["depth"], "no entry ending in _loss .*depth"),
        (["a_loss", "itc"], "'itc' .* call it itc_loss .*detach it"),
    ):
        entries = {name: torch.tensor(1.0, requires_grad=True) for name in names}
        with pytest.raises(ValueError, match=f"GivenEntries.* {message}"):
            runtime_of(HOST_THAT_SERVES_NOTHING, GivenEntries(**entries))(**loss_inputs(pair_features()))


def linear_rankclip(step: int) -> Runtime:
    """A run of rankclip at a step of three; at the steps 1, 2 and 3, λ is 0, ½ and 1."""
    options = {"schedule_unit": "step", "agreement_every": 1}
    return at_step(
        runtime_of(HOST, "rankclip", loss_options={"schedule": "linear"}, run_options=options), step
    )


def test_the_summary_names_the_loss_the_version_and_the_options() -> None:
    summary = linear_rankclip(1).summary(3)
    assert summary.startswith(f"Loss: rankclip (rankloss {rankloss.__version__}), schedule linear")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_rankclip_in_a_run_has_the_value_and_gradients_of_the_loss_alone(step: int) -> None:
    alone = rankloss_trainers.create("rankclip", schedule="linear")
    alone.set_progress(step, 3)
    of_run, of_loss = pair_features(), pair_features()
    total, expected = linear_rankclip(step)(**loss_inputs(of_run)).total, alone(**loss_inputs(of_loss))
    assert torch.equal(total, expected)
    (0.3 * total).backward()  # an upstream gradient that is not 1
    (0.3 * expected).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(of_run, of_loss, strict=True))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_logs_lambda_the_agreement_and_raw_terms_where_they_are_computed(step: int) -> None:
    metrics = linear_rankclip(step)(**loss_inputs(pair_features())).metrics
    # τ, the agreement, is measured at every step; the rank terms are computed only where λ is not 0.
    kinds = ("raw", "tau") if step > 1 else ("tau",)
    of_terms = [f"{term}_{kind}" for kind in kinds for term in ("cross_modal", "in_modal")]
    assert list(metrics) == ["rank_lambda", *of_terms]
    assert metrics["rank_lambda"] == (step - 1) / 2


def test_raw_terms_are_ranked_by_the_teacher_that_is_given() -> None:
    run = at_step(runtime_of(HOST, rankloss.RankClipLoss(schedule="linear")), 2)
    pair, references = pair_features(), features_of_teacher()
    terms, metrics = run(**loss_inputs(pair), **references)
    expected = rankloss.RankConsistency()(*pair, SCALE, output_dict=True, **references)
    for term in ("cross_modal", "in_modal"):
        torch.testing.assert_close(metrics[f"{term}_raw"], expected[f"{term}_loss"].detach())
        weighted = expected[f"{term}_loss"] * 0.5 / 16  # λ is ½, and RankClipLoss's normalizer 1/16
        torch.testing.assert_close(terms[f"{term}_loss"], weighted)


BASES = {
    "CLIP": rankloss.ClipLoss(),
    "smoothed CLIP": rankloss.ClipLoss(label_smoothing=0.1),
    "SigLIP": rankloss.SigLipLoss(),
}


def under_terms(base: nn.Module) -> nn.Module:
    """A loss that adds terms of ranks and a tiny one to a base."""
    return TinyLoss(rankloss.RankClipLoss(base, schedule="linear"))


@pytest.mark.parametrize("module_of", [lambda base: base, under_terms], ids=["alone", "under terms"])
@pytest.mark.parametrize(
    ("base", "expected"), [("CLIP", "CLIP"), ("smoothed CLIP", "CLIP"), ("SigLIP", "SigLIP")]
)
def test_a_module_is_evaluated_by_its_innermost_base(base: str, expected: str, module_of: Any) -> None:
    """Of a smoothed base, the expected loss has no smoothing: smoothed targets are for training alone."""
    pair = pair_features()
    evaluated = runtime_of(HOST, module_of(BASES[base])).evaluate(**loss_inputs(pair)).total
    assert torch.equal(evaluated, BASES[expected](*pair, SCALE))


class NumberAsBase(nn.Module):
    """CLIP's loss, whose attribute ``base`` is a number and no loss."""

    base = 2.0

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **_: Any) -> Tensor:
        value: Tensor = rankloss.ClipLoss()(image_features, text_features, logit_scale)
        return value


def clip_as_function(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **_: Any) -> Any:
    """CLIP's loss as a function."""
    return rankloss.ClipLoss()(image_features, text_features, logit_scale)


@pytest.mark.parametrize("base", [NumberAsBase(), clip_as_function], ids=["with a number", "a function"])
def test_a_base_is_followed_as_far_as_it_can_be_called(base: Any) -> None:
    pair = pair_features()
    loss = rankloss.RankClipLoss(base)
    assert innermost(loss) is base
    evaluated = runtime_of(HOST, loss).evaluate(**loss_inputs(pair)).total
    assert torch.equal(evaluated, rankloss.ClipLoss()(*pair, SCALE))


@pytest.mark.parametrize("module_of", [lambda base: base, under_terms], ids=["alone", "under terms"])
@pytest.mark.parametrize("base", BASES)
def test_a_single_pair_counts_0_in_an_evaluation(base: str, module_of: Any) -> None:
    """SigLIP's loss of one pair is no 0 by itself."""
    single = [x[:1] for x in pair_features()]
    assert runtime_of(HOST, module_of(BASES[base])).evaluate(**loss_inputs(single)).total == 0


def test_fixed_entries_are_nan_while_they_have_no_value() -> None:
    """A compiled caller would be compiled again when an entry appears."""
    run = runtime_of(HOST, "rankclip", loss_options={"schedule": "linear"})
    run.has_fixed_entries = True
    first, second = (at_step(run, step)(**loss_inputs(pair_features())).metrics for step in (1, 2))
    assert first["rank_lambda"] == 0, "so no rank term is computed at the first step"
    assert first["cross_modal_raw"].isnan()
    assert second["cross_modal_raw"].isfinite()
    assert [*first] == [*second]


def test_the_agreement_of_pairs_is_refused_for_lists_alone() -> None:
    """There are no features of pairs, of which it could be logged."""
    lists = inputs_of("ranked-lists")
    del lists["image_features"], lists["text_features"]
    run = at_step(runtime_of(HOST, rankloss.RankedLists(), run_options={"agreement_every": 1}), 1)
    with pytest.raises(ValueError, match=r"agreement_every: compares the rankings of pairs, .* lists alone"):
        run(**lists)


def test_the_agreement_of_pairs_is_logged_beside_lists() -> None:
    run = at_step(runtime_of(HOST, "ranked-lists", run_options={"agreement_every": 1}), 1)
    assert "in_modal_tau" in run(**inputs_of("ranked-lists")).metrics


VALIDATED = [
    *catalog.known(),
    *("clip", "siglip", "siglip+rankclip"),
    *("clip-ids+rankclip", "clip-smooth+rankclip", "rankclip+clip-smooth"),
    *("rankclip+tiny", "tiny+rankclip", "rankclip+tiny-caption", "rankclip+ranked-lists"),
]


@pytest.mark.parametrize("name", VALIDATED)
def test_validation_is_the_innermost_base_and_lists_at_every_step(name: str) -> None:
    """The trainer gives its base as a module, or as a class.

    Expected is CLIP's or SigLIP's loss of the pairs, called by itself, plus that of the lists if there are
    any.
    """
    base = rankloss.SigLipLoss() if name.startswith("siglip") else rankloss.ClipLoss()
    # The base is the trainer's; the name of a run has the losses on it alone, rankclip where there is none.
    of_run = "rankclip" if name in ("clip", "siglip") else name.removeprefix("siglip+")
    lists = inputs_of("ranked-lists")
    pairs = {key: lists.pop(key) for key in ("image_features", "text_features", "logit_scale")}
    expected, data = base(**pairs), pairs
    if name.endswith("ranked-lists"):
        expected = expected + rankloss.RankedLists()(**lists, logit_scale=pairs["logit_scale"])
        data = {**pairs, **lists}
    for base_of_trainer in (base, type(base)):
        run = runtime_of(HOST, of_run, base=base_of_trainer)
        for step in (1, 3):
            torch.testing.assert_close(at_step(run, step).evaluate(**data).total, expected)


@pytest.mark.parametrize("name", VALIDATED)
def test_the_base_of_a_created_loss_is_its_validation_at_every_step(name: str) -> None:
    base = rankloss.SigLipLoss() if name.startswith("siglip") else rankloss.ClipLoss()
    # Of all losses, this one cannot stand on CLIP's, which is the default.
    loss = rankloss_trainers.create("siglip+siglip-streamed" if name == "siglip-streamed" else name)
    assert type(loss.base) is type(base)
    inputs = inputs_of("rankclip")
    pairs = {key: inputs[key] for key in ("image_features", "text_features", "logit_scale")}
    for step in (1, 3):
        loss.set_progress(step, 3)
        loss.set_epoch(step, 3)
        assert torch.equal(loss.base(**pairs), base(**pairs))


class NewerMatmul:
    """``torch.backends.cuda.matmul`` where TF32 was allowed by its newer name: the older one is an error."""

    fp32_precision = "tf32"

    @property
    def allow_tf32(self) -> bool:
        raise RuntimeError("mix of the legacy and new APIs")


# Stand-ins of torch.backends.cuda.matmul, by which a process allows TF32 or not.
TF32, EXACT = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=False)


def test_tf32_products_are_told_of_once_by_a_loss_that_ranks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", TF32)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    remark = remark_on_tf32(torch.device("cuda"))
    # The runs are on the CPU, and are told that they are on the card.
    monkeypatch.setattr("rankloss_trainers.logging.remark_on_tf32", lambda _: remark)
    ranking = at_step(runtime_of(HOST, "rankclip"), 2)
    without_ranks = at_step(runtime_of(HOST, "clip-streamed"), 2)
    with caplog.at_level(logging.INFO, "rankloss_trainers"):
        for run in (ranking, ranking, without_ranks):
            run(**loss_inputs(pair_features()))
    told = [message for message in caplog.messages if "TF32" in message]
    assert len(told) == 1
    assert told[0].startswith("rankclip: float32 products are computed in TF32")


def test_tf32_is_not_told_of_on_a_cpu_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", TF32)
    assert remark_on_tf32(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("hip", "card", "matmul", "has_tf32"),
    [
        pytest.param(None, (7, 5), TF32, False, id="NVIDIA 7.5"),
        pytest.param(None, (8, 0), TF32, True, id="NVIDIA 8.0"),
        pytest.param(None, (8, 9), TF32, True, id="NVIDIA 8.9"),
        pytest.param(None, (12, 0), TF32, True, id="NVIDIA 12.0"),
        pytest.param("7.0", "gfx90a:sramecc+:xnack-", TF32, False, id="AMD gfx90a"),
        pytest.param("7.0", "gfx1100", TF32, False, id="AMD gfx1100"),
        pytest.param("7.0", "gfx942:sramecc+:xnack-", TF32, True, id="AMD gfx942"),
        pytest.param("7.0", "gfx950", TF32, True, id="AMD gfx950"),
        pytest.param(None, (8, 0), EXACT, False, id="not allowed"),
        pytest.param(None, (8, 0), NewerMatmul(), True, id="allowed by the newer name"),
    ],
)
def test_tf32_is_told_of_on_cards_that_have_it_where_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, card: Any, matmul: Any, has_tf32: bool
) -> None:
    """The card is NVIDIA's capability, or, with HIP, the name of AMD's architecture."""
    device = torch.device("cuda", 1)  # the only one that is asked for
    # AMD's capabilities are 9.0 and above, with TF32 or without.
    capabilities = {device: (9, 0) if hip else card}
    properties = {device: SimpleNamespace(gcnArchName=card)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert (remark_on_tf32(device) is not None) is has_tf32


# --- progress -------------------------------------------------------------------------------------------


class Epochs(nn.Module):
    """A part that goes by epochs alone, and keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int, int]] = []

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.told.append(("epoch", epoch, epochs))


class Both(Epochs):
    """A part that goes by epochs or by steps."""

    def set_progress(self, step: int, total_steps: int) -> None:
        self.told.append(("step", step, total_steps))


@pytest.mark.parametrize(("unit", "told"), [("epoch", ("epoch", 1, 2)), ("step", ("step", 3, 4))])
def test_every_part_is_told_by_the_method_that_it_has(unit: str, told: tuple[str, int, int]) -> None:
    """Once: where the unit is the step, a part with both methods is not told of the epoch.

    The run is told of epoch 1 of 2 and of step 3 of 4.
    """
    both, epochs = Both(), Epochs()
    run = runtime_of(HOST, nn.Sequential(both, nn.ModuleList([epochs])), run_options={"schedule_unit": unit})
    run.begin(epochs=2, total_steps=4)
    run.set_epoch(1, 2)
    run.set_progress(3, 4)
    assert both.told == [told]
    assert epochs.told == [("epoch", 1, 2)]


def test_the_listeners_to_epochs_are_all_parts_that_have_the_method() -> None:
    both, epochs = Both(), Epochs()
    loss = nn.Sequential(both, nn.ModuleList([epochs]))
    assert [method.__self__ for method in listeners(loss, "epoch", preferred="epoch")] == [both, epochs]


def test_a_part_that_goes_by_epochs_is_refused_where_there_are_none() -> None:
    run = runtime_of(HOST, nn.Sequential(Epochs()))
    endless = float("inf")  # as a trainer says of a stream
    with pytest.raises(ValueError, match="Sequential goes by epochs, but data without a length"):
        run.begin(epochs=endless, total_steps=4)


def test_loss_that_is_told_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"rankclip is not told .*: give callbacks=\[Progress\(\)\]"):
        runtime_of(HOST, "rankclip")(**loss_inputs(pair_features()))


def test_a_loss_of_an_ended_training_is_told_of_the_next_or_is_an_error() -> None:
    """Its λ would be that of the last step: after a training has ended, or the next has begun."""
    run = runtime_of(HOST, "rankclip")
    begin = functools.partial(run.begin, epochs=1, total_steps=3)
    begin()
    at_step(run, 3)(**loss_inputs(pair_features()))
    for end_or_begin in (run.end, begin):
        at_step(run, 3)
        end_or_begin()
        with pytest.raises(RuntimeError, match="rankclip is not told where training stands"):
            run(**loss_inputs(pair_features()))


def test_a_loss_without_a_schedule_is_called_after_the_end_of_a_training() -> None:
    run = runtime_of(HOST, "clip-smooth")
    run.end()
    assert run(**loss_inputs(pair_features())).total > 0


def saved_state_of_run(
    resumed_from: Any,
    schedule: Any = "linear",
    unit: str = "step",
    epochs: int = 2,
    loss: Any = "rankclip",
    options: Any = None,
) -> Any:
    """The saved state of a run of so many epochs of ten steps, resumed from another's, or from None."""
    if loss == "rankclip":
        options = {"schedule": schedule, **(options or {})}
    run = runtime_of(HOST, loss, loss_options=options, run_options={"schedule_unit": unit})
    run.restore(resumed_from, warn=resumed_from is not None)
    run.begin(epochs, total_steps=10 * epochs)
    return run.saved()


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param({}, {}, id="the same run"),
        pytest.param(
            {"schedule": "constant"}, {"schedule": "constant", "epochs": 9}, id="a constant, longer"
        ),
        pytest.param(
            {"loss": rankloss.SpreadLoss()},
            {"loss": rankloss.SpreadLoss(), "epochs": 9},
            id="no schedule, longer",
        ),
        pytest.param(
            {"schedule": functools.partial(max, 0)},
            {"schedule": functools.partial(max, 0)},
            id="a schedule without a name, of which only the address differs",
        ),
    ],
)
def test_a_checkpoint_of_the_same_course_gives_no_warning(
    caplog: pytest.LogCaptureFixture, before: dict[str, Any], now: dict[str, Any]
) -> None:
    checkpoint = saved_state_of_run(None, **before)
    saved_state_of_run(checkpoint, **now)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "now"),
    [
        ({"epochs": 3}, "(schedule linear): linear per step over 30 step(s)"),
        ({"unit": "epoch"}, "(schedule linear): linear per epoch over 2 epoch(s)"),
        ({"schedule": "cosine"}, "(schedule cosine): cosine per step over 20 step(s)"),
        ({"schedule": "constant"}, "(schedule constant): constant"),
        ({"options": {"lambda_in": 8}}, "(schedule linear, lambda-in 8): linear per step over 20 step(s)"),
    ],
)
def test_a_checkpoint_of_another_length_unit_or_schedule_is_one_warning_that_shows_both(
    caplog: pytest.LogCaptureFixture, change: dict[str, Any], now: str
) -> None:
    checkpoint = saved_state_of_run(None)
    saved_state_of_run(checkpoint, **change)
    (message,) = caplog.messages
    before = "trained with rankclip (schedule linear): linear per step over 20 step(s); "
    assert message.endswith(f"{before}this run trains with rankclip {now}")


@pytest.mark.parametrize(
    ("before", "now", "shown"),
    [
        ({}, {"loss": "spread"}, ["rankclip (schedule linear): linear per step over 20 step(s)", "spread"]),
        (
            {"loss": "spread"},
            {"loss": "spread", "options": {"weight": 0.5}},
            ["spread", "spread (weight 0.5)"],
        ),
        (
            {"loss": rankloss.SpreadLoss()},
            {"loss": rankloss.SpreadLoss(weight=1)},
            ["SpreadLoss(weight=0.3 (base): ClipLoss())", "SpreadLoss(weight=1 (base): ClipLoss())"],
        ),
        (
            {"loss": TinyLoss()},
            {"loss": TinyLoss(weight=2)},
            [f"TinyLoss(weight={weight} (base): ClipLoss())" for weight in ("0.5", "2")],
        ),
        (None, {"loss": "spread"}, ["no loss of rankloss", "spread"]),
    ],
)
def test_a_checkpoint_of_another_loss_or_option_is_one_warning_that_shows_both(
    caplog: pytest.LogCaptureFixture, before: Any, now: Any, shown: list[str]
) -> None:
    checkpoint = None if before is None else saved_state_of_run(None, **before)
    run = runtime_of(HOST, now["loss"], loss_options=now.get("options"))
    run.restore(checkpoint)
    run.begin(epochs=2, total_steps=20)
    (message,) = caplog.messages
    assert message.endswith(f"trained with {shown[0]}; this run trains with {shown[1]}")
    run.begin(epochs=2, total_steps=20)
    assert caplog.messages == [message], "a second training is not resumed"


def test_a_loss_of_lists_shows_its_options_in_a_checkpoint() -> None:
    loss = RankedListsTerm(rankloss.RankedLists(top_k=3), weight=2.0)
    description = saved_state_of_run(None, loss=loss)["training"]
    assert "weight=2" in description
    assert "top_k=3" in description


# --- a teacher ------------------------------------------------------------------------------------------


class Taught(nn.Module):
    """A loss that has to be given a teacher's images."""

    def forward(
        self, image_features: Tensor, reference_image_features: Tensor, **_: Any
    ) -> dict[str, Tensor]:
        return {"a_loss": (image_features @ reference_image_features.T).square().sum()}


@pytest.mark.parametrize(
    ("loss", "teacher"),
    [
        pytest.param(Taught(), None, id="a module that needs a teacher"),
        pytest.param(TinyLoss(Taught()), None, id="a term on a module that needs a teacher"),
        pytest.param("rankclip", "given", id="a loss that may have a teacher, which is announced"),
        pytest.param("rankclip-distill", None, id="a loss that needs a teacher"),
    ],
)
def test_a_teacher_that_is_needed_is_demanded_and_reaches_the_loss(loss: Any, teacher: str | None) -> None:
    run = at_step(runtime_of(HOST, loss, run_options={"teacher": teacher}), 2)
    run.teaching.name_columns(["image"])  # of the data, which the error shows
    with pytest.raises(ValueError, match="needs a teacher's features: give the columns; the data have image"):
        run(**loss_inputs(pair_features()))
    of_one_teacher, of_another = (
        run(**loss_inputs(pair_features()), **features_of_teacher(seed)).total for seed in (1, 2)
    )
    assert of_one_teacher != of_another


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param("clip-streamed", id="by name"),
        pytest.param(GivenEntries(), id="a module without the argument"),
    ],
)
def test_teacher_that_nobody_uses_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"have reference_text_features, but \S+ does not use a teacher"):
        at_step(runtime_of(HOST, loss), 2)(
            **loss_inputs(pair_features()), reference_text_features=pair_features()[0]
        )


def test_teacher_of_the_data_is_used_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rankloss_trainers")
    run = at_step(runtime_of(HOST, "rankclip", loss_options={"schedule": "linear"}), 2)
    untaught, first_taught, second_taught = (
        run(**loss_inputs(pair_features()), **features).total
        for features in ({}, features_of_teacher(), features_of_teacher())
    )
    assert untaught != first_taught, "the teacher is used"
    assert first_taught == second_taught, "the second batch is as the first"
    message = "rankclip uses a teacher: reference_image_features and reference_text_features"
    assert [x for x in caplog.messages if "uses a teacher" in x] == [message]


def test_a_folder_that_is_not_there_whose_name_has_an_equals_sign_is_said_to_be_missing() -> None:
    """Text with the sign may also name encoders by their modality."""
    with pytest.raises(ValueError, match="'lr' is no modality; nor is there a folder of this name"):
        Teacher("lr=3")


# --- needs and state ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "teacher", "message"),
    [
        pytest.param("tiny-caption", None, "tiny-caption needs a column", id="a column"),
        pytest.param("clip-ids", None, "clip-ids needs ids", id="ids"),
        pytest.param("ranked-lists", None, "ranked-lists needs a list", id="lists"),
        pytest.param(TinyCaptionLoss(), None, "TinyCaptionLoss needs a state", id="a state"),
        pytest.param("rankclip", "x", "rankclip needs a folder", id="a folder"),
        pytest.param(
            rankloss.RankClipLoss(nn.Linear(2, 2)), None, "RankClipLoss needs parameters", id="parameters"
        ),
    ],
)
def test_loss_that_a_host_does_not_serve_is_refused_by_name(
    loss: Any, teacher: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runtime_of(HOST_THAT_SERVES_NOTHING, loss, run_options={"teacher": teacher})


def test_a_sigmoid_loss_is_refused_on_a_softmax_base() -> None:
    with pytest.raises(ValueError, match="siglip-streamed needs --siglip"):
        runtime_of(HOST, "siglip-streamed", base=rankloss.ClipLoss())


def test_loss_that_replaces_the_trainers_own_is_refused_on_another() -> None:
    for name in ("clip-streamed", "clip-smooth", "clip-ids", "tiny-caption"):
        with pytest.raises(ValueError, match=f"{name} .* cannot replace TinyLoss"):
            runtime_of(HOST, name, base=TinyLoss())


def test_smoothed_targets_of_the_trainer_are_kept_or_refused() -> None:
    smooth = rankloss.ClipLoss(label_smoothing=0.1)
    assert runtime_of(HOST, "clip-ids", base=smooth).criterion.label_smoothing == 0.1
    with pytest.raises(ValueError, match=r"clip-streamed .*label_smoothing=0\.1"):
        runtime_of(HOST, "clip-streamed", base=smooth)


def test_the_losses_stand_on_the_loss_that_the_trainer_built() -> None:
    run = runtime_of(HOST, "rankclip", loss_options={"top_k": 3})
    base = TinyLoss()
    other = run.on(base)
    assert other is not run
    assert other.criterion.base is base
    assert other.criterion.consistency.options == run.criterion.consistency.options


def test_a_run_is_kept_where_the_trainers_loss_is_of_the_class_of_its_base() -> None:
    run = runtime_of(HOST, "rankclip", loss_options={"top_k": 3})
    assert run.on(rankloss.ClipLoss) is run
    assert run.on(rankloss.SigLipLoss) is not run


def test_a_loss_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="loss must be a module"):
        runtime_of(HOST, 3)  # type: ignore[arg-type]


def test_an_entry_of_several_values_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"GivenEntries .* one value; a_loss is \(3,\)"):
        runtime_of(HOST, GivenEntries(a_loss=torch.zeros(3)))(**loss_inputs(pair_features()))


def test_options_beside_a_module_are_refused() -> None:
    with pytest.raises(TypeError, match="options are for a loss"):
        runtime_of(HOST, rankloss.ClipLoss(), loss_options={"top_k": 3})


def test_a_softmax_loss_of_the_catalogue_is_refused_on_a_sigmoid_base() -> None:
    with pytest.raises(ValueError, match="clip-streamed does not work with --siglip"):
        runtime_of(HOST, "clip-streamed", base=rankloss.SigLipLoss())


def test_softmax_given_as_a_module_is_refused_on_a_sigmoid_base() -> None:
    """The bias of the model would be trained by nothing."""
    sigmoid = rankloss.SigLipLoss()
    for module, reason in (
        (rankloss.ClipLoss(), "it is a softmax loss; give SigLipLoss"),
        (TinyLoss(rankloss.RankClipLoss()), "it stands on ClipLoss, a softmax loss; build TinyLoss on a"),
        (rankloss_trainers.create("clip+mimicry"), "it stands on ClipLoss, a softmax"),
    ):
        with pytest.raises(ValueError, match=f"{type(module).__name__} .* --siglip: {reason}"):
            runtime_of(HOST, module, base=sigmoid)


def test_a_module_that_is_no_softmax_loss_is_taken_on_a_sigmoid_base() -> None:
    sigmoid = rankloss.SigLipLoss()
    for module in (sigmoid, rankloss.RankClipLoss(sigmoid), GivenEntries(a_loss=SCALE)):
        assert runtime_of(HOST, module, base=sigmoid).criterion is module


def run_with_a_moved_average() -> Runtime:
    """A run of a loss with a state, which has trained one step: its average is no longer 1."""
    run = at_step(runtime_of(HOST, TinyCaptionLoss()), 1)
    run(**loss_inputs(pair_features()), caption_features=pair_features(seed=2)[0])
    assert run.criterion.average != 1
    return run


def test_a_saved_state_does_not_move_with_the_loss() -> None:
    run = run_with_a_moved_average()
    average, saved = run.criterion.average.clone(), run.saved()
    at_step(run, 2)(**loss_inputs(pair_features()), caption_features=pair_features(seed=3)[0])
    assert not torch.equal(run.criterion.average, average)
    assert torch.equal(saved["state_dict"]["average"], average)


@pytest.mark.parametrize("form", ["tensors", "lists"])
def test_a_state_is_restored_to_the_last_bit(form: str) -> None:
    """Checkpoints of JSON have lists."""
    run, resumed = run_with_a_moved_average(), runtime_of(HOST, TinyCaptionLoss())
    saved = run.saved()
    if form == "lists":
        saved = {**saved, "state_dict": {key: x.tolist() for key, x in saved["state_dict"].items()}}
    resumed.restore(saved)
    assert torch.equal(resumed.criterion.average, run.criterion.average)


@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "of another loss"])
def test_a_state_that_is_missing_or_of_another_loss_starts_anew_with_a_warning(
    caplog: pytest.LogCaptureFixture, is_missing: bool
) -> None:
    run = run_with_a_moved_average()
    if is_missing:
        run.restore(None)
        in_checkpoint = "no state of a loss"
    else:
        run.restore({**run.saved(), "loss": "another"})
        in_checkpoint = "the state of the loss another"
    assert f"holds {in_checkpoint}: the state of TinyCaptionLoss starts anew" in caplog.text
    assert run.criterion.average == 1, "as a new loss has it"


def test_state_that_no_checkpoint_holds_is_refused_before_the_first_step() -> None:
    class Counted(GivenEntries):
        """A state that is no tensor, while checkpoints hold tensors."""

        def get_extra_state(self) -> dict[str, int]:
            return {"n": 3}

    run = runtime_of(HOST, Counted())
    with pytest.raises(ValueError, match=r"Counted.*_extra_state"):
        run.begin(epochs=1, total_steps=4)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(3, "holds no state of rankloss; got 3", id="a number"),
        pytest.param([{"loss": "Counting"}], "holds no state of rankloss; got ", id="a list"),
        pytest.param({"state_dict": {}}, "holds no state of rankloss; got ", id="no loss"),
        pytest.param({"loss": "Counting"}, "holds no state of rankloss; got ", id="no state_dict"),
        pytest.param(
            {"loss": "Counting", "state_dict": {}, "training": 7},
            "holds no state of rankloss; got ",
            id="a training that is a number",
        ),
        pytest.param(
            {"loss": "Counting", "state_dict": {"count": "x"}},
            "does not fit the loss: .*'str'",
            id="a buffer that is text",
        ),
        pytest.param(
            {"loss": "Counting", "state_dict": {"count": [1, 2]}},
            r"does not fit the loss: .*\n.*size mismatch",
            id="a buffer of another shape",
        ),
        pytest.param(
            {"loss": "Counting", "state_dict": {"other": 1}},
            "does not fit the loss: .*\n.*count",
            id="a buffer of another name",
        ),
    ],
)
def test_a_strangers_state_in_a_checkpoint_is_an_error_that_says_so(state: Any, message: str) -> None:
    class Counting(GivenEntries):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    with pytest.raises(ValueError, match=f"^the checkpoint resumed from .*{message}"):
        runtime_of(HOST, Counting()).restore(state)


def test_a_buffer_without_rows_is_restored() -> None:
    class Queue(GivenEntries):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(0, 4))

    run = runtime_of(HOST, Queue())
    run.restore({"loss": "Queue", "state_dict": {"rows": []}})
    assert run.criterion.rows.shape == (0, 4)


# --- create() -------------------------------------------------------------------------------------------


def test_joined_losses_have_the_attributes_of_each() -> None:
    created = rankloss_trainers.create("rankclip-distill+mimicry", mimicry={"weight": 3.0})
    created.set_epoch(2, 3)
    assert created.schedule_value == rankloss.schedules.rankclip(2, 3) > 0, "of rankclip-distill"
    assert created.weight == 3.0, "of mimicry"


def test_an_attribute_that_no_loss_has_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'schedule_value'"):
        rankloss_trainers.create("clip-ids").schedule_value  # noqa: B018


def test_the_epoch_of_a_copy_of_a_created_loss_is_not_that_of_the_original() -> None:
    original = rankloss_trainers.create("rankclip", schedule="linear")
    original.set_epoch(1, 3)  # λ is 0 at the first of three epochs, ½ at the second, 1 at the last
    for duplicate in (copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        duplicate.set_epoch(2, 3)
        assert duplicate.schedule_value == 0.5
        duplicate.set_progress(3, 3)
        assert (duplicate.schedule_value, original.schedule_value) == (1, 0)


def test_joined_losses_are_told_by_the_keywords_of_a_single_loss() -> None:
    joined = rankloss_trainers.create("rankclip+mimicry", rankclip={"schedule": "linear"})
    for loss in (rankloss.RankClipLoss(schedule="linear"), joined):
        loss.set_epoch(epoch=2, epochs=3)
        assert loss.schedule_value == 0.5
        loss.set_progress(step=3, total_steps=3)
        assert loss.schedule_value == 1


def test_the_epoch_of_a_copy_of_joined_losses_is_not_that_of_the_original() -> None:
    original = rankloss_trainers.create("rankclip+mimicry", rankclip={"schedule": "linear"})
    duplicate = copy.deepcopy(original)
    original.set_epoch(1, 3)  # λ is 0 at the first of three epochs, and ½ at the second
    duplicate.set_epoch(2, 3)
    assert (duplicate.schedule_value, original.schedule_value) == (0.5, 0)


@pytest.mark.parametrize("name", [*catalog.known(), "rankclip+tiny", "rankclip-distill+mimicry+tiny"])
def test_a_created_loss_has_the_value_of_a_run(name: str) -> None:
    base = rankloss.SigLipLoss() if name == "siglip-streamed" else rankloss.ClipLoss()
    # As a plain loop, this trainer computes no teacher, which rankclip-encoders would have by default.
    trainer = dataclasses.replace(HOST, serves={*NEEDS} - {"teacher"})
    run = at_step(runtime_of(trainer, name, base=base), 2, total_steps=3)
    created = rankloss_trainers.create(name, base)
    created.set_progress(2, 3)
    inputs = inputs_of(name.partition("+")[0])  # the first of joined losses takes all that the others take
    assert torch.equal(created(**inputs), run(**inputs).total)


@pytest.mark.parametrize("name", [name for name in catalog.known() if name.startswith(("clip", "siglip"))])
def test_a_loss_without_a_schedule_may_be_told_of_an_epoch(name: str) -> None:
    base = rankloss.SigLipLoss() if name == "siglip-streamed" else rankloss.ClipLoss()
    rankloss_trainers.create(name, base).set_epoch(2, 3)


@pytest.mark.parametrize("name", catalog.known())
def test_every_created_loss_takes_features_and_scale_by_position(name: str) -> None:
    created, inputs = rankloss_trainers.create(name).eval(), inputs_of(name)
    created.set_progress(2, 3)
    by_name = created(**inputs, output_dict=True)
    positions = [inputs.pop(key) for key in ("image_features", "text_features", "logit_scale")]
    assert created(*positions, output_dict=True, **inputs) == by_name


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("rankclp", {}, ValueError, "loss must be one of .*did you mean rankclip"),
        ("rankclip", {"teacher": "no-folder"}, ValueError, "teacher: no-folder is no folder"),
        ("rankclip", {"teacher": "text=minilm"}, ValueError, "rankloss features --text-encoder minilm"),
        ("clip-ids", {"key": "column"}, ValueError, "clip-ids.key: .*'column'"),
        ("clip", {"top_k": 3}, TypeError, "clip has no option 'top_k'"),
        ("clip+", {}, ValueError, "loss must be one of .*; got ''"),
        ("clip+rankclip", {"top_k": 3}, TypeError, "are given by loss, rankclip=.*'top_k'"),
        (torch.nn.Identity(), {}, TypeError, "name .*Identity"),
        ("rankclip+mimicry", {"mimicry": 8}, TypeError, "mimicry .*8"),
        ("rankclip", {"chunk_size": 0}, ValueError, "rankclip.chunk_size.*0"),
        (
            "clip+rankclip",
            {"clip": {"label_smooth": 0.1}},
            TypeError,
            "clip has .*did you mean label_smoothing",
        ),
        ("clip", {"label_smoothing": 2}, ValueError, "clip.label_smoothing.*2"),
        ("clip", {"teacher": "given"}, ValueError, "clip does not use a teacher"),
        ("rankclip+clip", {}, ValueError, "clip.*leave it out"),
        ("rankclip+mimicry", {"mimicry": {"weigt": 1}}, TypeError, "'weigt'; did you mean weight"),
        ("rankclip+mimicry", {"mimicry": {"weight": -1}}, ValueError, "mimicry.weight .*-1"),
        ("rankclip+mimicry", {"rankclip": {"bins": 9}}, ValueError, "rankclip.bins: .*method='bin'"),
        ("rankclip+rankclip", {}, ValueError, r"rankclip\+rankclip names a loss twice"),
        # A preset of the same loss.
        ("rankclip+rankclip-in", {}, ValueError, r"rankclip\+rankclip-in names a loss twice"),
        ("clip-ids+clip-smooth", {}, ValueError, "clip-smooth .* would lose its same_id"),
        ("clip-ids", {"same_id": None}, ValueError, "clip-ids.same_id must be one of .*None"),
        ("clip-ids", {"base": SIGMOID, "label_smoothing": 0.1}, ValueError, r"label_smoothing.*0\.1.*SigLIP"),
        (
            "clip-ids",
            {"base": rankloss.ClipLoss(same_id="share")},
            ValueError,
            "clip-ids has a same_id .*'share'",
        ),
    ],
    ids=lambda cell: str(cell) if isinstance(cell, dict | nn.Module) else None,
)
def test_create_refuses_names_and_options_that_it_cannot_build(
    name: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rankloss_trainers.create(name, **options)


@pytest.mark.parametrize("name", ["rankclip", "clip"])
@pytest.mark.parametrize(("key", "value"), [x for x in OTHER_VALUES.items() if x[0] != "teacher"])
def test_create_refuses_the_options_of_a_trainers_run(key: str, value: Any, name: str) -> None:
    """All but the teacher, which a loop of one's own may have."""
    message = f"{name} has no option {key!r}; it is an option of a trainer's run"
    with pytest.raises(TypeError, match=message):
        rankloss_trainers.create(name, **{key: value})


def test_options_of_joined_losses_are_given_by_loss_and_so_are_the_bases() -> None:
    options = {"rankclip": {"top_k": 3, "schedule": "constant"}, "clip": {"label_smoothing": 0.2}}
    joined = rankloss_trainers.create("clip+rankclip", **options, gather=False)
    base = rankloss.ClipLoss(label_smoothing=0.2, gather=False)
    expected = rankloss.RankClipLoss(base, top_k=3, schedule="constant", gather=False)
    assert torch.equal(joined(*pair_features(), SCALE), expected(*pair_features(), SCALE))


@pytest.mark.parametrize("name", ["clip-ids", "clip-smooth", "clip-streamed"])
def test_a_loss_in_place_of_its_base_gathers_and_streams_as_that_but_for_its_options(name: str) -> None:
    gather = rankloss.Gather(local_loss=True)
    base = rankloss.ClipLoss(gather=gather, chunk_size=3, memory_budget=0)
    for options, chunk_size in (({}, 3), ({"chunk_size": 5}, 5)):
        loss = rankloss_trainers.create(name, base, **options)
        assert loss.gather == gather
        assert loss.streaming == {"chunk_size": chunk_size, "memory_budget": 0}


def test_a_loss_gathers_as_its_base_unless_an_attribute_is_no_gathering() -> None:
    base, other = rankloss.RankClipLoss(gather=False), GivenEntries(contrastive_loss=torch.tensor(1.0))
    other.gather = print  # an attribute that has the name alone
    assert rankloss_trainers.create("mimicry", base).gather == base.gather == rankloss.Gather.of(False)
    assert rankloss_trainers.create("mimicry", other).gather == rankloss.MimicryLoss().gather


@pytest.mark.parametrize("name", ["tiny+rankclip", "tiny+mimicry"])
def test_joined_losses_as_the_module_of_a_trainer_may_have_a_teacher(name: str) -> None:
    assert runtime_of(HOST, rankloss_trainers.create(name)).teaching.use == "optional"


@pytest.mark.parametrize(("base", "added"), [("tiny+rankclip", "mimicry"), ("tiny+mimicry", "rankclip")])
def test_joined_losses_are_a_base_that_takes_its_teacher(base: str, added: str) -> None:
    """A loss that is created on them has the entries of all that are joined at once."""
    in_two_steps = rankloss_trainers.create(added, rankloss_trainers.create(base))
    whole = rankloss_trainers.create(f"{base}+{added}")
    entries = []
    for loss in (in_two_steps, whole):
        loss.set_progress(2, 3)
        entries.append(loss(*pair_features(), SCALE, output_dict=True, **features_of_teacher()))
    torch.testing.assert_close(*entries, rtol=0, atol=0)


def test_a_loss_with_a_teacher_of_its_own_names_the_command_that_computes_it() -> None:
    """In a loop of one's own, which computes no teacher."""
    loss = rankloss_trainers.create("rankclip-encoders")
    command = (
        "`rankloss features --image-encoder efficientnet-lite0 --text-encoder minilm --align --data PAIRS"
    )
    with pytest.raises(ValueError, match=f"needs a teacher's features: compute them, {command}"):
        loss(*pair_features(), SCALE)


def test_created_loss_demands_its_teacher_after_pickling_too() -> None:
    loss = rankloss_trainers.create("rankclip-distill", schedule="constant", gather=False)
    loss = pickle.loads(pickle.dumps(loss))
    with pytest.raises(ValueError, match="rankclip-distill needs a teacher's features"):
        loss(*pair_features(), SCALE)
    taught = loss(*pair_features(), SCALE, **features_of_teacher())
    assert taught > loss.base(*pair_features(), SCALE), "the terms of the teacher's ranks are added"


def test_created_loss_refuses_a_teacher_that_it_does_not_use() -> None:
    with pytest.raises(ValueError, match="does not use a teacher"):
        rankloss_trainers.create("clip-smooth")(*pair_features(), SCALE, **features_of_teacher())
