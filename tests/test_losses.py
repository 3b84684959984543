from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from batches import VECTORS, Batch, batches, gradients, random_batch, teacher_of, vector_batch
from devices import DEVICE
from rankloss import (
    ClipLoss,
    Gather,
    InputWarning,
    MimicryLoss,
    RankClipLoss,
    RankConsistency,
    SigLipLoss,
    SpreadLoss,
    checks,
    schedules,
)
from rankloss.checks import check_teacher
from rankloss.precision import nan_unless_finite
from subjects import SUBJECTS, TEACHER, Subject, data, run

IMAGE, TEXT = TEACHER


def features() -> tuple[Tensor, Tensor, Tensor]:
    return random_batch(0, 6, 4, 10.0).leaves()


def at(value: float, **options: Any) -> RankClipLoss:
    """RankClipLoss where λ is ``value``."""
    loss = RankClipLoss(schedule=lambda i, n: value, **options)
    loss.set_epoch(1, 5)
    return loss


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_term_of_weight_zero_is_zero_and_has_no_graph(weights: tuple[float, float]) -> None:
    v, t, s = features()
    loss = RankConsistency(cross_modal=weights[0], in_modal=weights[1])
    entries = loss(v, t, s, output_dict=True)
    for entry, weight in zip(entries.values(), weights, strict=True):
        assert (entry != 0) == bool(weight)
    if not any(weights):
        assert not any(entry.requires_grad for entry in entries.values())
    assert loss(v * math.nan, t, s).isnan()


@pytest.mark.parametrize("budget", [None, 0])
def test_a_single_pair_has_the_value_that_open_clip_gives(budget: int | None) -> None:
    v, t = (x[:1] for x in features()[:2])
    assert ClipLoss(memory_budget=budget)(v, t, 10.0).item() == 0
    expected = -torch.nn.functional.logsigmoid(10.0 * (v * t).sum() - 10.0)
    torch.testing.assert_close(SigLipLoss(memory_budget=budget)(v, t, 10.0, -10.0), expected)


@pytest.mark.parametrize("key", ["0:6:4:10", "1:64:16:14.2857142857142857"])
@pytest.mark.parametrize(("epoch", "factor"), [(1, 0), (22, 1), (64, 2)])
def test_rank_clip_is_the_published_recipe_without_its_floor(key: str, epoch: int, factor: float) -> None:
    case = VECTORS[key]
    loss = RankClipLoss(schedule="official")
    loss.set_epoch(epoch, 64)
    n, rows = case["N"], case["plackett_luce"]
    mean = {k: sum(v) / n for k, v in rows.items()}
    entries = loss(*vector_batch(case).leaves(), output_dict=True)
    assert entries["contrastive_loss"].item() == pytest.approx(case["clip"], rel=1e-10)
    for name, pair in (("cross_modal", ("S|R", "R|S")), ("in_modal", ("I|X", "X|I"))):
        found = entries[f"{name}_loss"].item()
        assert found == pytest.approx(factor * sum(mean[k] for k in pair) / 32 / n, rel=1e-10)
        if factor:  # the published code's own numbers, within its 1e-10 floor's effect
            assert found == pytest.approx(factor * case["official_code"][name], rel=1e-3)


@given(batches())
def test_entries_are_weighted_and_sum_to_the_total(batch: Batch) -> None:
    loss = RankClipLoss(schedule="linear", lambda_cross=0.5, lambda_in=3.0, normalizer=0.1)
    loss.set_epoch(3, 5)  # λ = 0.5
    cross_weight, in_weight = 0.5 * 0.5 * 0.1, 0.5 * 3.0 * 0.1  # λ, the term's own weight, the normalizer
    assert loss.rank_weights == pytest.approx({"cross_modal": cross_weight, "in_modal": in_weight})
    inputs = (batch.image, batch.text, batch.scale)
    entries = loss(*inputs, output_dict=True)
    terms = RankConsistency()(*inputs, output_dict=True)
    torch.testing.assert_close(entries["cross_modal_loss"], cross_weight * terms["cross_modal_loss"])
    torch.testing.assert_close(entries["in_modal_loss"], in_weight * terms["in_modal_loss"])
    torch.testing.assert_close(entries["contrastive_loss"], ClipLoss()(*inputs))
    torch.testing.assert_close(loss(*inputs), sum(entries.values()))


@pytest.mark.parametrize(
    "loss", [at(0.0), at(1.0, lambda_cross=0, lambda_in=0), at(1.0, normalizer=0)], ids=["λ", "λs", "factor"]
)
def test_while_lambda_is_zero_value_and_gradient_are_the_bases_own_to_the_last_bit(loss: nn.Module) -> None:
    inputs = random_batch(0, 32, 16, 100.0).leaves(torch.float32)
    value, expected = loss(*inputs), ClipLoss()(*inputs)
    assert torch.equal(value, expected)
    for a, b in zip(gradients(value, inputs, 1.0), gradients(expected, inputs, 1.0), strict=True):
        assert torch.equal(a, b)
    entries = loss(*inputs, output_dict=True)
    assert list(entries) == ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert len({x.data_ptr() for x in entries.values()}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_dtype_of_every_entry_is_the_same_at_every_lambda(dtype: torch.dtype, value: float) -> None:
    inputs, loss = random_batch(0, 6, 4, 10.0).leaves(dtype), at(value)
    expected = torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in loss(*inputs, output_dict=True).values()} == {expected}
    assert loss(*inputs).dtype == expected


OF_LARGE_BATCHES = ("ClipLoss", "ClipLoss[share]", "ClipLoss[smoothed, ignore]", "SigLipLoss")
OF_LARGE_BATCHES += ("RankConsistency[bins]", "RankConsistency[top one]", "RankedLists[negatives, top k]")
OF_LARGE_BATCHES += ("RankClipLoss", "RankClipLoss[over SigLipLoss]", "MimicryLoss[default]")
OF_LARGE_BATCHES += ("SpreadLoss[similarities]",)  # and of so many pairs from the covariance
LARGE = [x for x in SUBJECTS if x.name in OF_LARGE_BATCHES or not x.covers]


HALF, SINGLE = (torch.float16, torch.bfloat16), torch.float32


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (512, SINGLE),
        *((512, x) for x in HALF),
        *(pytest.param(4096, x, marks=pytest.mark.slow) for x in HALF),
    ],
)
@pytest.mark.parametrize("subject", LARGE, ids=str)
@pytest.mark.filterwarnings("ignore:.*norm")
def test_a_large_batch_is_as_exact_as_its_dtype(n: int, subject: Subject, dtype: torch.dtype) -> None:
    """Of half precision as in float32, and of clusters in float32 as in float64.

    The cube of the norms overflows from some 400 pairs on, sums of SigLIP's terms and entropies later.
    """
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 6e-2, SINGLE: 1e-4}[dtype]
    drawn = subject.pick(data("clusters" if dtype is SINGLE else "plain", n), SINGLE)
    rounded = {k: x.to(DEVICE, dtype if k.endswith("features") else x.dtype) for k, x in drawn.items()}
    wider = torch.float64 if dtype is SINGLE else SINGLE
    exact = {k: x.to(wider) if x.is_floating_point() else x for k, x in rounded.items()}
    found, owed = (run(subject, x, upstream=torch.tensor(4096.0, device=DEVICE)) for x in (rounded, exact))
    for name, wanted in {"": owed.value, **owed.gradients}.items():
        other = found.gradients[name] if name else found.value
        assert (other - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_of_65536_rows_are_no_overflow(dtype: torch.dtype) -> None:
    rows = torch.full((2**16, 4), 0.5, dtype=dtype)
    weights = torch.ones(3, dtype=torch.float64)
    assert torch.equal(nan_unless_finite(weights, rows, rows, rows), weights)
    rows[7, 2] = math.inf
    assert nan_unless_finite(weights, rows).isnan().all()


@pytest.mark.filterwarnings("ignore:logit_bias is given")
@pytest.mark.parametrize("bias", [-10.0, -10, torch.tensor(-10.0), torch.tensor([-10.0])], ids=repr)
@pytest.mark.parametrize("loss", [ClipLoss(), ClipLoss(memory_budget=0), at(1.0), at(0.0)], ids=str)
def test_bias_changes_nothing_at_any_lambda(bias: Tensor | float, loss: nn.Module) -> None:
    v, t, s = features()
    entries = loss(v, t, s, logit_bias=bias, output_dict=True)
    torch.testing.assert_close(entries["contrastive_loss"], ClipLoss()(v, t, s), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "build", [ClipLoss, lambda: ClipLoss(memory_budget=0), lambda: at(1.0), lambda: at(0.0)]
)
def test_bias_of_a_softmax_is_warned_of_once(build: Callable[[], nn.Module]) -> None:
    """The model is one for the sigmoid loss."""
    v, t, s = features()
    loss = build()
    loss(v, t, s)
    with pytest.warns(InputWarning, match="logit_bias is given, and CLIP's softmax .*SigLipLoss"):
        loss(v, t, s, logit_bias=-10.0)
    loss(v, t, s, logit_bias=-10.0)  # a second warning would be an error


# --- λ ----------------------------------------------------------------------------------------------------


def test_lambda_follows_set_epoch_and_set_progress_and_the_later_call_counts() -> None:
    loss = RankClipLoss()
    assert loss.schedule_value is None
    for use in (lambda: loss(*features()), lambda: loss.rank_weights):
        with pytest.raises(
            RuntimeError, match=r"RankClipLoss does not know where training stands.*set_epoch.*set_progress"
        ):
            use()
    for epoch in (1, 2, 5):
        loss.set_epoch(epoch, 5)
        assert loss.schedule_value == schedules.rankclip(epoch, 5)
    loss.set_progress(np.int64(7), np.int64(100))
    assert loss.schedule_value == schedules.rankclip(7, 100)
    loss.set_epoch(3, 20)
    assert loss.schedule_value == schedules.rankclip(3, 20)
    assert RankClipLoss(schedule="constant").schedule_value == 1.0


@pytest.mark.parametrize("schedule", ["rankclip", lambda i, n: (i - 1) / (n - 1)])
def test_a_single_epoch_is_ramped_by_step(schedule: Any, caplog: pytest.LogCaptureFixture) -> None:
    loss = RankClipLoss(schedule=schedule)
    loss.set_epoch(10, 10)  # an earlier run's
    with caplog.at_level(logging.INFO, logger="rankloss"):
        loss.set_epoch(1, 1)
    assert "epochs=1 has no ramp: the schedule is evaluated per step" in caplog.text
    with pytest.raises(RuntimeError, match=r"does not know where training stands.*set_progress"):
        loss(*features())
    loss.set_progress(2, 50)
    loss.set_epoch(1, 1)  # does not undo the step's value
    assert loss.schedule_value == loss.schedule(2, 50)


@pytest.mark.parametrize("outer", [SpreadLoss, MimicryLoss])
@pytest.mark.parametrize("method", ["set_epoch", "set_progress"])
def test_a_loss_without_a_schedule_passes_the_progress_on_to_its_base(outer: Any, method: str) -> None:
    loss = outer(outer(RankClipLoss(schedule="linear")))
    getattr(loss, method)(2, 5)
    assert loss.base.base.schedule_value == 0.25


def test_after_the_end_of_a_training_lambda_is_for_evaluations_until_another_one_is_set() -> None:
    loss, inputs = RankClipLoss(schedule="linear", normalizer=1.0), features()
    loss.set_progress(3, 3)
    value = loss(*inputs)
    loss.end_training()
    with pytest.raises(
        RuntimeError, match=r"lambda of a training that has ended: .*call set_epoch.*set_progress"
    ):
        loss(*inputs)
    with torch.no_grad():
        assert torch.equal(loss(*inputs), value)
    assert torch.equal(loss.eval()(*inputs), value)
    assert loss.schedule_value == 1
    loss.train().set_epoch(1, 1)  # sets no λ
    with pytest.raises(RuntimeError, match="has ended"):
        loss(*inputs)
    loss.set_progress(1, 2)
    loss(*inputs)
    assert loss.schedule_value == 0


def test_a_constant_lambda_has_no_training_that_ends() -> None:
    loss, inputs = RankClipLoss(schedule="constant"), features()
    value = loss(*inputs)
    loss.end_training()
    assert torch.equal(loss(*inputs), value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_lambda_moves_under_no_pending_backward_and_in_no_mode(mode: Callable[[], Any]) -> None:
    loss, inputs = RankClipLoss(normalizer=1.0), features()
    loss.set_epoch(1, 10)
    value, expected = loss(*inputs), gradients(loss(*inputs), inputs, 2.0)
    with mode():
        loss.set_epoch(10, 10)
        seen = loss(*inputs)
    assert all(map(torch.equal, gradients(value, inputs, 2.0), expected))
    assert torch.equal(loss(*inputs), seen)


def frames(step: Callable[..., Any], *calls: tuple[Any, ...]) -> int:
    """The number of dynamo's compilations of a step that is called with these."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    return counter.frame_count


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 makes every float a constant")
def test_a_loss_is_one_call_between_two_graphs_that_no_number_recompiles() -> None:
    """The scale as a number, as a tensor, and the epoch, told inside of the step and outside."""
    v, t, _ = features()
    loss = RankClipLoss(schedule="official")  # 0 at first

    def step(epoch: int, scale: Any, is_told: bool) -> Tensor:
        if is_told:
            loss.set_epoch(epoch, 20)
        return 2 * loss(v, t, scale)

    def calls(is_told: bool, as_number: bool) -> Iterator[tuple[Any, ...]]:
        for epoch in range(1, 7):
            loss.set_epoch(epoch, 20)
            yield 0 if not is_told else epoch, 10.0 if as_number else torch.tensor(10.0 + epoch), is_told

    assert frames(step, *calls(False, False)) <= 2
    assert frames(step, *calls(False, True)) <= 2
    assert frames(step, *calls(True, False)) <= 5  # the epoch is a number of the graph before the call
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(v, t, 10.0)


# --- bases ------------------------------------------------------------------------------------------------


class Base(nn.Module):
    """A base of somebody else's, with entries and inputs of its own."""

    def forward(self, image_features, text_features, logit_scale, output_dict=False, labels=None):
        assert output_dict
        return {
            "caption_loss": labels.sum(),
            "contrastive_loss": logit_scale * (image_features * text_features).sum(),
        }


def scalar_base(image_features, text_features, logit_scale, output_dict):
    return logit_scale * (image_features * text_features).sum()


def test_any_base_with_the_forward_convention_composes() -> None:
    v, t, s = features()
    loss = RankClipLoss(Base(), schedule="constant")
    entries = loss(v, t, s, output_dict=True, labels=torch.ones(3))
    assert list(entries) == ["caption_loss", "contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert entries["caption_loss"] == 3
    torch.testing.assert_close(loss(v, t, s, labels=torch.ones(3)), sum(entries.values()))
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'logit_bias'"
    ):  # given, so passed on; this base takes none
        loss(v, t, s, torch.zeros(()), labels=torch.ones(3))
    scalar = RankClipLoss(scalar_base, schedule="constant")
    torch.testing.assert_close(scalar(v, t, s, output_dict=True)["contrastive_loss"], s * (v * t).sum())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_base_keeps_its_smoothing(value: float) -> None:
    v, t, s = features()
    base = ClipLoss(label_smoothing=0.2)
    entries = at(value, base=base)(v, t, s, output_dict=True)
    assert torch.equal(entries["contrastive_loss"], base(v, t, s))
    assert (base(v, t, s) - ClipLoss()(v, t, s)).abs() > 0.1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_base_is_called_where_a_hook_or_a_forward_was_set_on_it(value: float) -> None:
    v, t, s = features()
    expected = 3 * ClipLoss()(v, t, s)
    hooked, replaced = at(value), at(value)
    hooked.base.register_forward_hook(lambda module, inputs, output: {k: 3 * x for k, x in output.items()})
    own = replaced.base.forward
    replaced.base.forward = lambda **inputs: {"contrastive_loss": 3 * own(**inputs)["contrastive_loss"]}
    for loss in (hooked, replaced):
        torch.testing.assert_close(loss(v, t, s, output_dict=True)["contrastive_loss"], expected)


def test_base_that_is_built_shares_the_gathering_and_a_given_one_keeps_its_own() -> None:
    gather = Gather(local_loss=False)
    assert RankClipLoss(gather=gather).base.gather == gather
    own = ClipLoss(gather=False)
    assert RankClipLoss(own, gather=gather).base is own
    assert own.gather == Gather.of(False)


def test_a_weight_that_is_changed_counts_from_the_next_call() -> None:
    loss = RankConsistency()
    before = loss(*features(), output_dict=True)
    loss.cross_modal, loss.in_modal = 0.5, 4.0
    entries = loss(*features(), output_dict=True)
    assert list(entries) == ["cross_modal_loss", "in_modal_loss"]
    assert torch.equal(entries["cross_modal_loss"], before["cross_modal_loss"] / 2)
    assert torch.equal(entries["in_modal_loss"], before["in_modal_loss"] * 4)
    torch.testing.assert_close(loss(*features()), sum(entries.values()))
    with pytest.raises(AttributeError, match="lambda_cross"):
        RankClipLoss().lambda_cross = 2.0


V, T, S = (x.detach() for x in features())


# --- looks at values --------------------------------------------------------------------------------------


OF_UNIT_NORM = [x for x in SUBJECTS if x.takes_pairs and x.name != "SpreadLoss[covariance]"]


@pytest.mark.parametrize("subject", OF_UNIT_NORM, ids=str)
def test_suspicious_input_is_computed_with_a_warning_at_the_first_call(subject: Subject) -> None:
    inputs, loss = subject.pick(data()), subject.started()
    inputs.update(text_features=2 * inputs["text_features"], logit_scale=torch.tensor(2.66))
    with pytest.warns(InputWarning) as warned:
        assert loss(**inputs).isfinite()
    assert {"text_features", "logit_scale"} <= {str(x.message).split()[0] for x in warned}
    loss(**inputs)  # a second warning would be an error


def test_norms_are_looked_at_when_they_can_be_read() -> None:
    loss = ClipLoss()
    loss(V.to("meta") * 2, T.to("meta"), 10.0)
    with pytest.warns(InputWarning, match="image_features should be unit-norm.* off by up to 1"):
        loss(2 * V, T, S)


def test_a_small_scale_of_features_of_another_norm_is_a_scale() -> None:
    with pytest.warns(InputWarning) as warned:
        ClipLoss()(5 * V, 5 * T, 3.0)
    assert not any(str(x.message).startswith("logit_scale") for x in warned)


LOG = torch.tensor(2.66)
SCALES = {  # of which each has a warning, with its remedy
    "a temperature": (0.07, r"only 0\.07, as a temperature is: .* 1 / logit_scale$"),
    "a temperature that is learned": (
        nn.Parameter(torch.tensor(0.07)),
        r"a parameter of value 0\.07, as a temperature is: .* 1 / logit_scale$",
    ),
    "a computed temperature": (nn.Parameter(-LOG).exp(), r"only 0\.06995, as a temperature is: "),
    "a logarithm": (nn.Parameter(LOG), r"a parameter of value 2\.66\. .* logit_scale\.exp\(\)$"),
    "a number that is a logarithm": (2.66, r"only 2\.66\. .* logit_scale\.exp\(\)$"),
    "an exponential of the scale": (
        nn.Parameter(LOG).exp().exp(),
        r"1\.617e\+06, and .* no exponential of it$",
    ),
    "an infinite scale": (torch.tensor(math.inf), "inf, and CLIP models have at most 100"),
}


@pytest.mark.filterwarnings("ignore:logit_bias")
@pytest.mark.parametrize(
    "make", [RankConsistency, ClipLoss, SigLipLoss, SpreadLoss], ids=lambda x: x.__name__
)
@pytest.mark.parametrize("name", SCALES)
def test_a_scale_that_cannot_be_one_is_a_warning_with_its_remedy(name: str, make: Any) -> None:
    scale, message = SCALES[name]
    loss = make()
    with pytest.warns(InputWarning, match=f"^logit_scale is {message}") as warned:
        loss(V, T, scale)
    texts = [str(x.message) for x in warned if str(x.message).startswith("logit_scale")]
    assert len({*texts}) == 1, "Python shows an equal text of two parts once"
    loss(V, T, scale)  # a second warning would be an error
    assert checks.warn_of_scale("logit_scale", scale, V.to("meta")) is False


@pytest.mark.parametrize(
    "scale", [1.0, 5.0, 100.0, 1000.0, nn.Parameter(torch.tensor(10.0)), nn.Parameter(LOG).clamp(0, 4)]
)
def test_a_scale_that_can_be_one_is_no_warning(scale: Any) -> None:
    assert checks.warn_of_scale("logit_scale", scale, V)


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "half of zeros": (
        lambda x: x.index_fill(0, torch.arange(4, 9), 0.0),
        "must not have rows of zeros, which rank nothing; got 5 of 9, the first is row 4",
    ),
    "NaN": (lambda x: x.index_fill(0, torch.tensor(7), math.nan), "must be finite; row 7 has norm nan"),
    "infinite": (lambda x: x.index_fill(0, torch.tensor(7), math.inf), "must be finite; row 7 has norm inf"),
    "large": (
        lambda x: x.float() * 1e30,
        "must be unit-norm; row 0 has values up to 7.27564e.29, whose squares float32",
    ),
    "small": (
        lambda x: x.float() * 1e-30,
        "must be unit-norm; row 0 has values up to 7.27564e-31, whose squares float32",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_teacher_that_ranks_nothing_is_an_error_whenever_it_comes(how: str) -> None:
    inputs, teacher = random_batch(0, 9, 4, 10.0).leaves(), teacher_of(9)
    spoil, reason = SPOILT[how]
    bad = {**teacher, TEXT: spoil(teacher[TEXT])}
    for loss, before in itertools.product((at(0.0), at(1.0), RankConsistency()), (None, {}, teacher)):
        if before is not None:
            loss(*inputs, **before)
        with pytest.raises(ValueError, match=f"{TEXT} {reason}"):
            loss(*inputs, **bad)
    with pytest.raises(ValueError, match=f"{TEXT} {reason}"):
        check_teacher(TEXT, bad[TEXT])


def test_a_teacher_of_one_row_is_warned_of_and_the_loss_is_of_ties() -> None:
    """Sorted data have batches of one caption, whose features are one row of any teacher."""
    inputs, teacher = random_batch(0, 9, 4, 10.0).leaves(), teacher_of(9)
    one_row = {**teacher, TEXT: teacher[TEXT][:1].expand_as(teacher[TEXT])}
    loss = RankConsistency()
    with pytest.warns(InputWarning, match=f"^{TEXT} are one row for all pairs of a batch"):
        value = loss(*inputs, **one_row)
    value.backward()
    assert value.isfinite()
    few = random_batch(0, 7, 4, 10.0).leaves()
    loss(*few, **{name: x[:7] for name, x in one_row.items()})


def test_norms_of_a_teacher_that_comes_later_are_warned_of_once() -> None:
    loss = RankConsistency()
    loss(V, T, S)
    large = {name: 3 * x for name, x in teacher_of(6).items()}
    with pytest.warns(InputWarning) as warned:
        loss(V, T, S, **large)
    assert [str(warning.message).split()[0] for warning in warned] == [IMAGE, TEXT]
    loss(V, T, S, **large)
