from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from batches import VECTORS, Batch, batches, gradients, random_batch, relative_error, vector_batch
from rankloss import ClipLoss, RankClipLoss, RankConsistency, reference, schedules
from rankloss.embeddings import Embeddings


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
    original = Embeddings.lists

    def spy(embeddings, term):
        computed.append(term)
        return original(embeddings, term)

    monkeypatch.setattr(Embeddings, "lists", spy)
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


def test_local_loss_without_gather_with_grad_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for flags in ({}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}):
        RankConsistency(world_size=2, **flags)
    RankConsistency(local_loss=True)  # one process: the flag has no effect
    assert not caplog.records
    for rank in range(2):
        RankConsistency(local_loss=True, rank=rank, world_size=2)
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
