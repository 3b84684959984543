from __future__ import annotations

import contextlib
import copy
import logging
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from batches import VECTORS, Batch, batches, gradients, random_batch, relative_error, vector_batch
from rankloss import (
    ClipLoss,
    Gather,
    InputWarning,
    RankClipLoss,
    RankConsistency,
    SigLipLoss,
    reference,
    schedules,
)
from rankloss.batch import Batch as Features
from rankloss.losses import rank_clip
from rankloss.losses import weights as term_weights
from rankloss.losses.weights import TermWeights
from rankloss_baselines import AlipLoss, CyClipLoss


def features() -> tuple[Tensor, Tensor, Tensor]:
    return random_batch(0, 6, 4, 10.0).leaves()


# --- RankConsistency --------------------------------------------------------------------------------------


@given(batches())
def test_rank_consistency_is_the_weighted_sum_of_its_entries(batch: Batch) -> None:
    weighted = RankConsistency(cross_modal=0.3, in_modal=2.0)
    inputs = (batch.image, batch.text, batch.scale)
    entries = weighted(*inputs, output_dict=True)
    plain = RankConsistency()(*inputs, output_dict=True)
    assert list(entries) == ["cross_modal_loss", "in_modal_loss"]
    torch.testing.assert_close(
        entries["cross_modal_loss"], 0.3 * plain["cross_modal_loss"], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(entries["in_modal_loss"], 2.0 * plain["in_modal_loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted(*inputs), sum(entries.values()), rtol=1e-12, atol=0)


def test_a_weight_of_zero_leaves_the_term_out_of_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    original = Features.matrices

    def spy(batch, term, **settings):
        computed.append(term)
        return original(batch, term, **settings)

    monkeypatch.setattr(Features, "matrices", spy)
    for weights, expected in (
        ((1, 1), ["cross_modal", "in_modal"]),
        ((0, 1), ["in_modal"]),
        ((1, 0), ["cross_modal"]),
        ((0, 0), []),
    ):
        computed.clear()
        entries = RankConsistency(cross_modal=weights[0], in_modal=weights[1])(*features(), output_dict=True)
        assert computed == expected
        assert [bool(x != 0) for x in entries.values()] == [bool(w) for w in weights]


def test_repr_shows_what_is_not_at_its_default() -> None:
    assert repr(RankConsistency()) == "RankConsistency(cross_modal=1, in_modal=1)"
    shown = repr(RankConsistency(in_modal=0, worth="shifted", top_k=8, chunk_size=64))
    assert shown == "RankConsistency(cross_modal=1, in_modal=0, worth='shifted', top_k=8, chunk_size=64)"


OFF = {"local_loss": False, "gather_with_grad": False}


def test_local_loss_without_gather_with_grad_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for flags in ({}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}):
        RankConsistency(gather=Gather(rank=0, world_size=2, **OFF | flags))
    RankConsistency(gather=Gather(gather_with_grad=False))  # one process: the flag has no effect
    assert not caplog.records
    for rank in range(2):
        RankConsistency(gather=Gather(gather_with_grad=False, rank=rank, world_size=2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "local_loss without gather_with_grad" in caplog.text


# --- ClipLoss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", VECTORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_clip_loss_matches_the_vectors(key: str, dtype: torch.dtype, tolerance: float) -> None:
    case = VECTORS[key]
    assert relative_error(ClipLoss()(*vector_batch(case).leaves(dtype)), case["clip"]) < tolerance


@given(batches())
def test_clip_loss_matches_the_reference(batch: Batch) -> None:
    expected = reference.clip(batch.image.numpy(), batch.text.numpy(), batch.scale)
    assert ClipLoss()(batch.image, batch.text, batch.scale).item() == pytest.approx(
        expected, rel=1e-10, abs=1e-12
    )


def test_clip_loss_has_open_clips_forward_convention() -> None:
    v, t, s = features()
    loss = ClipLoss()(v, t, s)
    assert ClipLoss()(v, t, s, output_dict=True) == {"contrastive_loss": loss}
    torch.testing.assert_close(ClipLoss()(v, t, s, torch.tensor(-10.0)), loss)
    with pytest.raises(ValueError, match="text_features must be floating point"):
        ClipLoss()(v, t.long(), s)


# --- RankClipLoss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["0:6:4:10", "1:64:16:14.2857142857142857"])
@pytest.mark.parametrize(("epoch", "factor"), [(1, 0), (22, 1), (64, 2)])
def test_rank_clip_is_the_published_recipe_without_its_floor(key: str, epoch: int, factor: float) -> None:
    case = VECTORS[key]
    loss = RankClipLoss(schedule="official")
    loss.set_epoch(epoch, 64)
    n, rows = case["N"], case["plackett_luce"]
    mean = {k: sum(v) / n for k, v in rows.items()}
    cross, in_ = (mean["S|R"] + mean["R|S"]) / 32 / n, (mean["I|X"] + mean["X|I"]) / 32 / n
    entries = loss(*vector_batch(case).leaves(), output_dict=True)
    assert entries["contrastive_loss"].item() == pytest.approx(case["clip"], rel=1e-10)
    assert entries["cross_modal_loss"].item() == pytest.approx(factor * cross, rel=1e-10)
    assert entries["in_modal_loss"].item() == pytest.approx(factor * in_, rel=1e-10)
    if factor:  # the published code's own numbers, within its 1e-10 floor's effect
        official = case["official_code"]
        assert entries["cross_modal_loss"].item() == pytest.approx(factor * official["cross_modal"], rel=1e-3)
        assert entries["in_modal_loss"].item() == pytest.approx(factor * official["in_modal"], rel=1e-3)


@given(batches())
def test_entries_are_weighted_and_sum_to_the_total(batch: Batch) -> None:
    loss = RankClipLoss(schedule="linear", lambda_cross=0.5, lambda_in=3.0, normalizer=0.1)
    loss.set_epoch(3, 5)  # λ = 0.5
    inputs = (batch.image, batch.text, batch.scale)
    entries = loss(*inputs, output_dict=True)
    terms = RankConsistency()(*inputs, output_dict=True)
    torch.testing.assert_close(entries["cross_modal_loss"], 0.5 * 0.5 * 0.1 * terms["cross_modal_loss"])
    torch.testing.assert_close(entries["in_modal_loss"], 0.5 * 3.0 * 0.1 * terms["in_modal_loss"])
    torch.testing.assert_close(entries["contrastive_loss"], ClipLoss()(*inputs))
    torch.testing.assert_close(loss(*inputs), sum(entries.values()))


def test_gradient_of_the_total_is_the_sum_of_the_parts() -> None:
    inputs = features()
    loss = RankClipLoss(schedule="constant", normalizer=0.25, chunk_size=4)
    total = gradients(loss(*inputs), inputs, -1.3)
    base = gradients(ClipLoss()(*inputs), inputs, -1.3)
    rank = gradients(0.25 * RankConsistency()(*inputs), inputs, -1.3)
    for a, b, c in zip(total, base, rank, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["schedule", "lambdas", "normalizer"])
def test_while_lambda_is_zero_value_and_gradient_are_the_bases_own_to_the_last_bit(how: str) -> None:
    loss = {
        "schedule": RankClipLoss(schedule="official"),
        "lambdas": RankClipLoss(lambda_cross=0, lambda_in=0),
        "normalizer": RankClipLoss(normalizer=0),
    }[how]
    loss.set_epoch(1, 10)
    inputs = random_batch(0, 32, 16, 100.0).leaves(torch.float32)
    value, expected = loss(*inputs), ClipLoss()(*inputs)
    assert torch.equal(value, expected)
    for a, b in zip(gradients(value, inputs, 1.0), gradients(expected, inputs, 1.0), strict=True):
        assert torch.equal(a, b)
    assert list(loss(*inputs, output_dict=True)) == ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]


def test_lambda_follows_set_epoch_and_set_progress_and_the_later_call_counts() -> None:
    loss = RankClipLoss()
    for epoch in (1, 2, 5):
        loss.set_epoch(epoch, 5)
        assert loss.schedule_value == schedules.rankclip(epoch, 5)
    loss.set_progress(7, 100)
    assert loss.schedule_value == schedules.rankclip(7, 100)
    loss.set_epoch(3, 20)
    assert loss.schedule_value == schedules.rankclip(3, 20)


def test_forward_says_which_call_is_missing() -> None:
    loss = RankClipLoss()
    for use in (lambda: loss(*features()), lambda: loss.schedule_value):
        with pytest.raises(
            RuntimeError, match=r"call set_epoch\(epoch, epochs\) or set_progress\(step, total_steps\)"
        ):
            use()
    loss.set_epoch(1, 4)
    loss(*features())
    assert RankClipLoss(schedule="constant").schedule_value == 1.0


def test_a_single_epoch_is_ramped_by_step_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    loss = RankClipLoss()
    with caplog.at_level(logging.INFO, logger="rankloss"):
        loss.set_epoch(1, 1)
    assert "evaluated per step" in caplog.text
    with pytest.raises(
        RuntimeError, match=r"call set_progress\(step, total_steps\), since one epoch has no ramp"
    ):
        loss(*features())
    loss.set_progress(1, 50)
    loss.set_epoch(1, 1)  # does not undo the step's value
    assert loss.schedule_value == schedules.rankclip(1, 50)


def test_a_single_epoch_does_not_keep_the_lambda_of_an_earlier_run() -> None:
    loss = RankClipLoss()
    loss.set_epoch(10, 10)
    loss.set_epoch(1, 1)
    with pytest.raises(RuntimeError, match="call set_progress"):
        _ = loss.schedule_value
    loss.set_progress(3, 4)
    loss.set_epoch(1, 1)  # at the start of an epoch in whose middle the step was told
    assert loss.schedule_value == schedules.rankclip(3, 4)


def test_a_function_is_a_schedule_and_its_values_are_checked() -> None:
    loss = RankClipLoss(schedule=lambda i, n: 0.1 * i + n)
    loss.set_epoch(2, 3)
    assert loss.schedule_value == pytest.approx(3.2)
    loss = RankClipLoss(schedule=lambda i, n: math.nan)
    with pytest.raises(ValueError, match="schedule must give finite values >= 0; got nan"):
        loss.set_epoch(1, 2)


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
    with pytest.raises(TypeError, match="logit_bias"):  # given, so passed on; this base takes none
        loss(v, t, s, torch.zeros(()), labels=torch.ones(3))
    scalar = RankClipLoss(scalar_base, schedule="constant")
    torch.testing.assert_close(scalar(v, t, s, output_dict=True)["contrastive_loss"], s * (v * t).sum())


def test_open_clips_own_losses_compose() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    v, t, s = features()
    entries = RankClipLoss(open_clip_loss.ClipLoss(), schedule="constant")(v, t, s, output_dict=True)
    torch.testing.assert_close(entries["contrastive_loss"], ClipLoss()(v, t, s))
    siglip = RankClipLoss(open_clip_loss.SigLipLoss(), schedule="constant")
    assert list(siglip(v, t, s, torch.tensor(-10.0), output_dict=True)) == [
        "contrastive_loss",
        "cross_modal_loss",
        "in_modal_loss",
    ]
    # CoCa's loss takes its arguments in another order, and logits and labels besides.
    coca = RankClipLoss(
        open_clip_loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0), schedule="constant"
    )
    logits, labels = torch.zeros(6, 5, 7, dtype=torch.float64), torch.ones(6, 5, dtype=torch.long)
    entries = coca(v, t, s, output_dict=True, logits=logits, labels=labels)
    assert list(entries) == ["contrastive_loss", "caption_loss", "cross_modal_loss", "in_modal_loss"]
    assert entries["caption_loss"].item() == pytest.approx(2 * math.log(7))


def test_the_loss_has_no_state_for_a_checkpoint_and_survives_copies_and_casts() -> None:
    loss = RankClipLoss()
    loss.set_epoch(2, 4)
    assert loss.state_dict() == {}
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.to(torch.bfloat16)):
        assert other.schedule_value == schedules.rankclip(2, 4)
        assert torch.equal(other(*features()), loss(*features()))
    copied = copy.deepcopy(loss)
    copied.set_epoch(4, 4)
    assert loss.schedule_value == schedules.rankclip(2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "schedule must be one of 'rankclip', .*; got 'step'"),
        ({"lambda_cross": -1.0}, "lambda_cross must be finite and >= 0; got -1.0"),
        ({"lambda_in": math.inf}, "lambda_in must be finite and >= 0; got inf"),
        ({"normalizer": math.nan}, "normalizer must be finite and >= 0; got nan"),
        ({"lists": "rows"}, "lists must be one of"),
        ({"reduction": "none"}, "reduction='none' gives a value per anchor"),
        (
            {"cross_modal": 0.5},
            "cross_modal is RankConsistency's weight; here use lambda_cross and lambda_in",
        ),
    ],
)
def test_bad_options_are_named_and_shown(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankClipLoss(**options)
    with pytest.raises(TypeError, match="temperature"):
        RankClipLoss(temperature=1.0)


@pytest.mark.parametrize("epoch", [1, 2])  # of the official schedule, whose first λ is 0
@pytest.mark.parametrize("name", ["reference_image_feature", "caption_features", "foo"])
def test_inputs_that_nothing_takes_are_refused_whatever_lambda_is(name: str, epoch: int) -> None:
    v, t, s = features()
    loss = RankClipLoss(schedule="official")
    loss.set_epoch(epoch, 4)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        loss(v, t, s, **{name: t})


def test_forward_that_was_set_on_the_base_is_called_whatever_lambda_is() -> None:
    loss = RankClipLoss(schedule="linear")
    own = loss.base.forward
    loss.base.forward = lambda **inputs: {"contrastive_loss": 2 * own(**inputs)["contrastive_loss"]}
    v, t, s = features()
    for epoch in (1, 2):
        loss.set_epoch(epoch, 2)
        entries = loss(v, t, s, output_dict=True)
        assert entries["contrastive_loss"].item() == pytest.approx(2 * ClipLoss()(v, t, s).item(), rel=1e-6)


def test_hooks_of_the_base_run_whatever_lambda_is() -> None:
    v, t, s = features()
    loss = RankClipLoss(schedule="official")
    loss.base.register_forward_hook(lambda module, inputs, output: {k: 3 * x for k, x in output.items()})
    for epoch in (1, 2):
        loss.set_epoch(epoch, 4)
        assert torch.equal(loss(v, t, s, output_dict=True)["contrastive_loss"], 3 * ClipLoss()(v, t, s))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (RankConsistency(), "cross_modal"),
        (RankConsistency(), "in_modal"),
        (RankClipLoss(), "lambda_cross"),
        (RankClipLoss(), "lambda_in"),
        (RankClipLoss(), "normalizer"),
    ],
)
def test_weights_cannot_be_set_where_nothing_would_read_them(loss: torch.nn.Module, name: str) -> None:
    shown = repr(loss)
    with pytest.raises(AttributeError, match=f"{name} cannot be changed once {type(loss).__name__} is built"):
        setattr(loss, name, 5.0)
    assert repr(loss) == shown


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (RankConsistency, "in_modal"),
        (RankClipLoss, "lambda_cross"),
        (RankClipLoss, "normalizer"),
        (CyClipLoss, "lambda_in"),
        (AlipLoss, "gamma_pair"),
    ],
)
def test_weight_that_would_be_learned_is_refused(owner: type, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is a number and takes no gradient"):
        owner(**{name: torch.nn.Parameter(torch.tensor(0.5))})
    assert getattr(owner(**{name: torch.tensor(0.5)}), name) == 0.5


# --- what every loss takes and refuses --------------------------------------------------------------------

MODULES = {
    "clip": ClipLoss,
    "clip, streamed": lambda **options: ClipLoss(memory_budget=0, **options),
    "siglip": SigLipLoss,
    "siglip, streamed": lambda **options: SigLipLoss(memory_budget=0, **options),
    "cyclip": CyClipLoss,
    "alip": AlipLoss,
    "rank": RankConsistency,
    "rank_clip": lambda **options: RankClipLoss(schedule="constant", **options),
    "rank_clip at 0": lambda **options: RankClipLoss(schedule=lambda i, n: 0.0, **options),
}


def called(name: str, v: object, t: object, s: object, **options: object) -> Tensor:
    loss = MODULES[name]()
    if name == "rank_clip at 0":
        loss.set_epoch(1, 5)
    return loss(v, t, s, **({"caption_features": t} if name == "alip" else {}), **options)


@pytest.mark.parametrize(
    ("owner", "options", "message"),
    [
        (
            RankClipLoss,
            {"metod": "bin"},
            "RankClipLoss got an unexpected option 'metod'; did you mean 'method'?",
        ),
        (
            ClipLoss,
            {"chunksize": 1},
            "ClipLoss got an unexpected option 'chunksize'; did you mean 'chunk_size'",
        ),
        (SigLipLoss, {"bins": 1}, "SigLipLoss got an unexpected option 'bins'"),
        (RankConsistency, {"metod": 1}, "RankConsistency got an unexpected option 'metod'; did you mean"),
        (RankClipLoss, {"lamda_in": 1.0}, "unexpected option 'lamda_in'; did you mean 'lambda_in'?"),
        (RankConsistency, {"xyz": 1}, "RankConsistency got an unexpected option 'xyz'"),
        *(
            (
                owner,
                {"local_loss": True, "rank": 0},
                f"{owner.__name__} takes no 'local_loss'; pass gather=rankloss.Gather(local_loss=…, rank=…)",
            )
            for owner in (RankClipLoss, RankConsistency)
        ),
    ],
)
def test_names_that_a_constructor_does_not_know(owner: type, options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        owner(**options)


def test_the_class_that_was_called_is_named() -> None:
    class Mine(RankClipLoss):
        pass

    with pytest.raises(TypeError, match="Mine got an unexpected option 'metod'"):
        Mine(metod="bin")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("gather", ["yes", True, 1, {}])
def test_gather_is_checked(name: str, gather: object) -> None:
    with pytest.raises(ValueError, match=r"gather must be None \(the default process group\), False"):
        MODULES[name](gather=gather)


def test_base_that_is_built_shares_the_gathering_and_a_given_one_keeps_its_own() -> None:
    gather = Gather(local_loss=False)
    for outer in (RankClipLoss, CyClipLoss):
        assert outer(gather=gather).base.gather == gather
        own = ClipLoss(gather=False)
        assert outer(own, gather=gather).base is own
        assert own.gather == Gather.of(False)
    assert RankClipLoss(lists="batch").base.gather == RankClipLoss(lists="batch").consistency.gather
    assert not RankClipLoss(lists="batch").consistency.gather.local_loss
    assert RankClipLoss(lists="batch", gather=False).consistency.gather == Gather.of(False)
    with pytest.raises(ValueError, match=r"lists='batch' .* cannot have local_loss=True"):
        RankClipLoss(lists="batch", gather=Gather())


def test_clip_loss_takes_open_clips_arguments_or_gather() -> None:
    assert ClipLoss().gather == Gather()
    in_order = ClipLoss(True, True, True, 0, 1, False)
    assert in_order.gather == Gather(rank=0, world_size=1)
    assert ClipLoss(cache_labels=True).gather == Gather.of(False)
    assert ClipLoss(local_loss=True, rank=1, world_size=2).gather == Gather(
        gather_with_grad=False, rank=1, world_size=2
    )
    with pytest.raises(ValueError, match="gather stands for open_clip's arguments; got it beside local_loss"):
        ClipLoss(local_loss=True, gather=False)
    with pytest.raises(ValueError, match="use_horovod is not supported"):
        ClipLoss(use_horovod=True)


@pytest.mark.parametrize("name", MODULES)
def test_bad_inputs_are_named_whatever_lambda_is(name: str) -> None:
    v, t, s = (x.detach() for x in features())
    for bad, message in (
        ((v.numpy(), t, s), "image_features must be a torch.Tensor; got numpy.ndarray"),
        ((v, t.tolist(), s), "text_features must be a torch.Tensor; got list"),
        ((v, t.to("meta"), s), "text_features must be on the device of image_features, cpu; got meta"),
        ((v, t, s.to("meta")), "logit_scale must be on cpu, as image_features; got meta"),
        ((v, t, -1.0), r"logit_scale must be positive \(it is the multiplier, not its log\); got -1"),
        ((v, t, -s), "logit_scale must be positive"),
        ((v, t, 0), "logit_scale must be positive"),
        ((v, t, None), "logit_scale must be a float or a torch.Tensor; got NoneType"),
        ((v, t, "10"), "logit_scale must be a float or a torch.Tensor; got str"),
        ((v, t, v), r"logit_scale must be one number; got shape \(6, 4\)"),
        ((v, t, s.view(1, 1, 1)), r"logit_scale must be one number; got shape \(1, 1, 1\)"),
    ):
        with pytest.raises(TypeError if "torch.Tensor;" in message else ValueError, match=message):
            called(name, *bad)


@pytest.mark.parametrize("name", MODULES)
def test_features_that_are_not_unit_norm_are_computed_with_a_warning_at_the_first_call(name: str) -> None:
    v, t, s = features()
    loss = MODULES[name]()
    if name == "rank_clip at 0":
        loss.set_epoch(1, 5)
    given = {"caption_features": t} if name == "alip" else {}
    with pytest.warns(InputWarning, match="text_features should be unit-norm.* norms are off by up to 1"):
        value = loss(v, 2 * t, s, **given)
    assert value.isfinite()
    loss(v, 2 * t, s, **given)  # a second warning would be an error


def test_nearly_unit_norm_infinite_and_half_precision_features_are_not_warned_of() -> None:
    v, t, s = (x.detach() for x in features())
    for image, text in ((v * 1.009, t), (v.bfloat16(), t.bfloat16()), (v * math.inf, t), (v * math.nan, t)):
        ClipLoss()(image, text, s)
    with pytest.warns(InputWarning, match="image_features"):
        ClipLoss()(v * 1.02, t, s)


def test_norms_are_looked_at_when_they_can_be_read() -> None:
    v, t, s = (x.detach() for x in features())
    loss = ClipLoss()
    for transformed in (
        lambda: torch.func.vmap(loss, (0, 0, None))(torch.stack([v, v]) * 2, torch.stack([t, t]), 10.0),
        lambda: loss(v.to("meta") * 2, t.to("meta"), 10.0),
        lambda: torch.compile(loss, backend="eager", fullgraph=True)(v * 2, t, s),
    ):
        transformed()
    with pytest.warns(InputWarning, match="image_features"):
        loss(2 * v, t, s)


@pytest.mark.parametrize("name", MODULES)
def test_parameter_that_holds_the_log_of_the_scale_is_warned_of(name: str) -> None:
    v, t, s = features()
    with pytest.warns(InputWarning, match=r"a parameter of value 2.303.*logit_scale.exp\(\)"):
        called(name, v, t, nn.Parameter(s.detach().log()))
    called(name, v, t, s.detach().log())  # a scale as good as another
    called(name, v, t, nn.Parameter(s.detach()))


@pytest.mark.parametrize(
    "loss",
    [
        ClipLoss(),
        ClipLoss(memory_budget=0),
        SigLipLoss(),
        RankClipLoss(schedule="constant"),
        RankClipLoss(schedule="constant", lambda_cross=0.0, lambda_in=0.0),
    ],
)
def test_bias_that_is_not_one_number_is_refused(loss: nn.Module) -> None:
    v, t, s = features()
    with pytest.raises(ValueError, match=r"logit_bias must be one number; got shape \(6,\)"):
        loss(v, t, s, logit_bias=torch.randn(6))


def test_gathered_features_are_as_many_as_the_loss_would_gather() -> None:
    v, t, s = features()
    for loss in (
        ClipLoss(local_loss=True),
        ClipLoss(memory_budget=0),
        RankConsistency(),
        RankClipLoss(schedule="constant"),
    ):
        with pytest.raises(ValueError, match=r"gathered must be .* 6 rows of both; got 12 and 6"):
            loss(v, t, s, gathered=(torch.cat([v, v]), t))
        assert torch.equal(loss(v, t, s, gathered=(v, t)), loss(v, t, s))


@pytest.mark.parametrize("lists", ["row", "batch"])
def test_entries_share_no_memory(lists: str) -> None:
    v, t, s = features()
    ranks = RankConsistency(cross_modal=0.0, in_modal=0.0, lists=lists)
    schedule = RankClipLoss(schedule="official", lists=lists)
    schedule.set_epoch(1, 3)
    for loss in (ranks, schedule, CyClipLoss(lambda_cross=0.0, lambda_in=0.0)):
        entries = loss(v, t, s, output_dict=True)
        assert len({x.data_ptr() for x in entries.values()}) == len(entries)


@pytest.mark.parametrize("bias", [-10.0, -10, torch.tensor(-10.0), torch.tensor([-10.0])], ids=repr)
def test_bias_is_the_same_number_at_every_lambda(bias: Tensor | float) -> None:
    v, t, s = features()
    expected = ClipLoss()(v, t, s)
    for name in ("clip", "cyclip", "rank_clip", "rank_clip at 0"):
        entries = called(name, v, t, s, logit_bias=bias, output_dict=True)
        torch.testing.assert_close(entries["contrastive_loss"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_of_every_entry_is_the_same_at_every_lambda(dtype: torch.dtype) -> None:
    inputs = random_batch(0, 6, 4, 10.0).leaves(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    for value in (0.0, 1.0):
        loss = RankClipLoss(schedule=lambda i, n, value=value: value)
        loss.set_epoch(1, 5)
        assert {x.dtype for x in loss(*inputs, output_dict=True).values()} == {expected}
        assert loss(*inputs).dtype == expected
        assert [g.dtype for g in gradients(loss(*inputs), inputs, 1.0)] == [dtype] * 3
    assert {x.dtype for x in CyClipLoss()(*inputs, output_dict=True).values()} == {expected}


# --- λ ----------------------------------------------------------------------------------------------------


def test_what_a_schedule_and_a_base_can_be() -> None:
    for options, message in (
        (
            {"base": "constant"},
            "base must be a loss, a module or function; got 'constant'; did you mean schedule=",
        ),
        ({"base": "x"}, "base must be a loss, a module or function; got 'x'"),
        ({"base": ClipLoss}, "base must be a loss, a module or function; got <class"),
        ({"schedule": 3}, "schedule must be one of 'rankclip', .*; got 3"),
        ({"schedule": None}, "schedule must be one of 'rankclip', .*; got None"),
        ({"lambda_in": "1"}, "lambda_in must be finite and >= 0; got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            RankClipLoss(**options)


@pytest.mark.parametrize("tell", ["set_epoch", "set_progress"])
@pytest.mark.parametrize(
    ("position", "message"),
    [
        ((1.5, 5), "(epoch|step) must be an integer of at least 1; got 1.5"),
        ((1, 5.0), "(epochs|total_steps) must be an integer of at least 1; got 5.0"),
        ((0, 5), "(epoch|step) must be an integer of at least 1; got 0"),
        ((True, 5), "(epoch|step) must be an integer of at least 1; got True"),
        ((6, 5), r"(epoch must be at most epochs; got epoch=6, epochs=5|step must be at most total_steps)"),
    ],
)
def test_positions_are_checked_for_every_schedule(tell: str, position: tuple, message: str) -> None:
    for schedule in ("rankclip", "constant", lambda i, n: 1.0):
        with pytest.raises(ValueError, match=message):
            getattr(RankClipLoss(schedule=schedule), tell)(*position)


def test_a_users_schedule_is_not_called_for_a_single_epoch() -> None:
    loss = RankClipLoss(schedule=lambda i, n: (i - 1) / (n - 1))
    loss.set_epoch(1, 1)
    with pytest.raises(RuntimeError, match=r"call set_progress\(step, total_steps\), since one epoch"):
        loss(*features())
    loss.set_progress(np.int64(2), np.int64(3))
    assert loss.schedule_value == 0.5
    assert type(loss.schedule_value) is float


@pytest.mark.parametrize(("epochs", "values"), [(2, "2, 2"), (3, "1, 2, 2")])
def test_short_ramp_is_logged_once(caplog: pytest.LogCaptureFixture, epochs: int, values: str) -> None:
    loss = RankClipLoss()
    with caplog.at_level(logging.INFO, logger="rankloss"):
        for epoch in range(1, epochs + 1):
            loss.set_epoch(epoch, epochs)
        RankClipLoss(schedule="constant").set_epoch(1, epochs)
        RankClipLoss().set_epoch(1, 4)
    assert [record.getMessage() for record in caplog.records] == [
        f"epochs={epochs} is a short ramp, of the values {values}; set_progress() evaluates the schedule per "
        "step"
    ]


def test_repr_shows_schedule_and_lambda() -> None:
    loss = RankClipLoss(lambda_in=0.5)
    assert "schedule='rankclip', lambda_cross=1, lambda_in=0.5, normalizer=0.0625\n" in repr(loss)
    loss.set_epoch(2, 6)
    assert "normalizer=0.0625, schedule_value=1\n" in repr(loss)

    def mine(i: int, n: int) -> float:
        return 1.0

    assert "schedule=mine," in repr(RankClipLoss(schedule=mine))


def on_meta(loss: nn.Module) -> nn.Module:
    return loss.to("meta").to_empty(device="cpu")


COPIES = {
    "itself": lambda loss: loss,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "cast": lambda loss: loss.to(torch.bfloat16),
    "to_empty": on_meta,
    "deepcopy of meta": lambda loss: copy.deepcopy(loss.to("meta")).to_empty(device="cpu"),
    "state_dict": lambda loss: (loss.load_state_dict(loss.state_dict()), loss)[1],
}
BUILT = {
    "plain": contextlib.nullcontext,
    "meta": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("where", BUILT)
@pytest.mark.parametrize("base", [lambda: None, CyClipLoss])
def test_losses_are_right_wherever_they_are_built_and_however_they_are_moved(
    base, where: str, how: str
) -> None:
    inputs = features()
    expected = RankClipLoss(base())
    with BUILT[where]():
        loss = RankClipLoss(base())
    for told in (2, 4):  # before and after the copy
        expected.set_epoch(told, 6)
        loss.set_epoch(told, 6)
        if told == 2:
            loss = COPIES[how](loss)
        value, wanted = loss(*inputs), expected(*inputs)
        assert torch.equal(value, wanted)
        for a, b in zip(gradients(value, inputs, -1.3), gradients(wanted, inputs, -1.3), strict=True):
            assert torch.equal(a, b)


def test_lambda_moves_in_place_and_not_under_a_pending_backward() -> None:
    loss, inputs = RankClipLoss(normalizer=1.0), features()
    loss.set_epoch(1, 10)
    place = loss._weights.beside(inputs[0])
    value = loss(*inputs)
    expected = gradients(loss(*inputs), inputs, 2.0)
    with torch.inference_mode():
        loss.set_epoch(10, 10)
    assert loss._weights.beside(inputs[0]) is place
    assert place.tolist() == [1.0, 2.0, 2.0]
    for a, b in zip(gradients(value, inputs, 2.0), expected, strict=True):
        assert torch.equal(a, b)


def test_graph_that_is_captured_at_lambda_zero_computes_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, inputs = RankClipLoss(schedule="official", lambda_in=0.0), features()
    loss.set_epoch(1, 10)
    assert not loss(*inputs, output_dict=True)["cross_modal_loss"].requires_grad
    monkeypatch.setattr(rank_clip, "is_capturing", lambda _: True)
    computed: list[str] = []
    original = loss.consistency.weighted_terms

    def spy(*args: object, **wanted: object) -> object:
        computed.extend(name for name in ("cross_modal", "in_modal") if wanted[name])
        return original(*args, **wanted)

    monkeypatch.setattr(loss.consistency, "weighted_terms", spy)
    entries = loss(*inputs, output_dict=True)
    assert computed == ["cross_modal"]  # the in-modal term's weight can never leave 0
    assert entries["cross_modal_loss"].requires_grad
    assert entries["cross_modal_loss"] == 0
    torch.testing.assert_close(loss(*inputs), ClipLoss()(*inputs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("recorded_at", [1, 2])  # where λ is 0, and where it is not
def test_recorded_graph_follows_lambda(monkeypatch: pytest.MonkeyPatch, recorded_at: int) -> None:
    v, t, _ = (x.detach() for x in features())
    loss = RankClipLoss(schedule="linear")
    loss.set_epoch(recorded_at, 5)
    loss(v, t, 10.0)
    with monkeypatch.context() as capturing:
        capturing.setattr(rank_clip, "is_capturing", lambda _: True)
        graph = make_fx(lambda v, t: loss(v, t, 10.0))(v, t)
    for epoch in (1, 2, 5, 3):
        loss.set_epoch(epoch, 5)
        torch.testing.assert_close(graph(v, t), loss(v, t, 10.0), rtol=1e-12, atol=0)


def test_weights_are_placed_before_a_capture_and_never_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = RankClipLoss(schedule="constant")
    elsewhere = torch.ones(6, 4, device="meta")
    monkeypatch.setattr(term_weights, "is_capturing", lambda _: True)
    assert loss._weights.beside(torch.ones(6, 4)).tolist() == [1.0, 1 / 16, 1 / 16]
    with pytest.raises(RuntimeError, match="call the loss once on meta before capturing a CUDA graph"):
        loss._weights.beside(elsewhere)
    monkeypatch.undo()
    place = loss._weights.beside(elsewhere)
    assert loss._weights.beside(elsewhere) is place


def test_compiled_before_anything_ran_on_the_device_it_is_compiled_once_more() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    lambdas = TermWeights(1.0, 2.0)
    lambdas._tensors.clear()  # as on a device where the loss was never called
    compiled = torch.compile(lambda x: lambdas.beside(x) * x.sum(), backend=counter, fullgraph=True)
    for value in (2.0, 3.0, 4.0, 5.0):
        assert compiled(torch.ones(3)).tolist() == [3.0, 3 * value]
        lambdas.set(1.0, value + 1)
    assert counter.frame_count == 2


def test_fake_features_leave_no_fake_weights_behind() -> None:
    loss = RankConsistency(cross_modal=0.5)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(6, 4))
        assert loss._weights.beside(fake).shape == (3,)
    assert type(loss._weights.beside(torch.ones(6, 4))) is Tensor
