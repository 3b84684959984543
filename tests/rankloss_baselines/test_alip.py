from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from batches import gradients, relative_error, unit_rows
from fake_devices import MPS, meta_is, no_float64
from rankloss_baselines.alip import AlipLoss

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Features of images, raw texts and synthetic captions, and the scale."""


def triples(*, seed: int, n: int, d: int, scale: float, dtype: torch.dtype = torch.float64) -> Inputs:
    """n rows each of images, raw texts and captions, of unit norm in d dimensions; and the scale.

    Drawn by the recipe of data/vectors.json, the captions after the texts.
    """
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(unit_rows(rng, n, d)) for _ in range(3)]
    tensors = (*rows, torch.tensor(scale, dtype=torch.float64))
    return tuple(x.to(dtype).requires_grad_() for x in tensors)  # type: ignore[return-value]


random_triples = st.builds(
    triples,
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 10),
    d=st.integers(2, 8),
    scale=st.sampled_from([1.0, 14.0, 100.0]),
)
SMALL: dict[str, Any] = {"seed": 0, "n": 6, "d": 4, "scale": 10.000000000000002}
LARGE: dict[str, Any] = {"seed": 1, "n": 64, "d": 16, "scale": 1 / 0.07}


def call(loss: AlipLoss, inputs: Inputs, **options: Any) -> Any:
    """The loss of images, texts, captions and the scale."""
    v, t, c, s = inputs
    return loss(v, t, s, caption_features=c, **options)


def alip(
    v: Tensor,
    t: Tensor,
    c: Tensor,
    logit_scale: Tensor,
    *,
    histories: Any = (1.0, 1.0, 1.0),
    gamma_sample: float = 2.0,
    gamma_pair: float = 2.0,
    momentum: float = 0.99,
) -> dict[str, Tensor]:
    """One step of ALIP: the histories H, Hʳ, Hᶜ after it, the weights, and the two parts of the loss."""
    cosines = torch.stack([(t * c).sum(-1), (t * v).sum(-1), (c * v).sum(-1)]).detach()
    after = momentum * torch.as_tensor(histories, dtype=torch.float64) + (1 - momentum) * cosines.mean(-1)
    of_sample, of_text, of_caption = cosines - after[:, None]
    fits = of_sample >= 0  # the sample's two texts are closer than usual: all its weights are 1
    sample_weight = torch.where(fits, 1.0, (gamma_sample * of_sample).exp())
    text_weight = torch.where(fits, 1.0, (gamma_pair * of_text).exp())
    caption_weight = torch.where(fits, 1.0, (gamma_pair * of_caption).exp())
    return {
        "histories": after,
        "weights": torch.stack([sample_weight, text_weight, caption_weight]),
        "text": (pair_nll(v, t, logit_scale) * sample_weight * text_weight).mean(),
        "caption": (pair_nll(v, c, logit_scale) * sample_weight * caption_weight).mean(),
    }


def pair_nll(v: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """``½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]`` of every pair k."""
    own = torch.arange(len(v))
    logits = scale * v @ u.T
    return sum(cross_entropy(x, own, reduction="none") for x in (logits, logits.T)) / 2  # type: ignore[return-value]


@dataclass(frozen=True)
class Published:
    """What the published code gave for the last of some steps with the same triples."""

    triples: dict[str, Any]
    initial_history: float
    steps: int
    histories: tuple[float, float, float]
    mean_weights: tuple[float, float, float]
    parts: tuple[float, float]
    gradient_norm: float
    """By the images, of the sum of the parts."""


published = pytest.mark.parametrize(
    "published",
    [
        pytest.param(
            Published(
                SMALL,
                initial_history=1.0,
                steps=2,
                histories=(0.988075245893776, 0.975126019590615, 0.977930602391925),
                mean_weights=(0.36475558974686, 0.121560863997554, 0.177864346834844),
                parts=(0.310532613131939, 0.2627306122853),
                gradient_norm=0.502661528160466,
            ),
            id="second step, histories from 1",
        ),
        pytest.param(
            Published(
                LARGE,
                initial_history=0.0,
                steps=1,
                histories=(-0.000541362828112465, -0.00021583293083633, 0.000514056321692686),
                mean_weights=(0.805136970453055, 0.9877617739814, 1.10895474784322),
                parts=(6.59273048716526, 6.30180614646276),
                gradient_norm=2.82116042404587,
            ),
            id="first step, histories from 0",
        ),
    ],
)


@published
def test_parts_histories_and_gradient_of_a_step_are_the_published_codes(published: Published) -> None:
    inputs, loss = triples(**published.triples), AlipLoss(initial_history=published.initial_history)
    for _ in range(published.steps):
        entries = call(loss, inputs, output_dict=True)
    assert tuple(entries) == ("contrastive_loss", "caption_contrastive_loss")
    assert loss.histories.tolist() == pytest.approx(published.histories, rel=1e-9)
    assert [part.item() for part in entries.values()] == pytest.approx(published.parts, rel=1e-9)
    (by_images,) = torch.autograd.grad(sum(entries.values()), inputs[0])
    assert by_images.norm().item() == pytest.approx(published.gradient_norm, rel=1e-9)


@published
def test_the_oracles_parts_and_weights_are_the_published_codes(published: Published) -> None:
    inputs, histories = triples(**published.triples), np.full(3, published.initial_history)
    for _ in range(published.steps):
        step = alip(*inputs, histories=histories)
        histories = step["histories"]
    assert (step["text"].item(), step["caption"].item()) == pytest.approx(published.parts, rel=1e-9)
    assert step["weights"].mean(1).tolist() == pytest.approx(published.mean_weights, rel=1e-9)


@given(random_triples, st.sampled_from([0.0, 0.5, 1.0]))
def test_values_gradients_and_histories_of_two_steps_are_the_oracles(inputs: Inputs, start: float) -> None:
    options = {"gamma_sample": 1.5, "gamma_pair": 3.0, "momentum": 0.7}
    upstream = -1.7  # neither 1 nor positive
    loss = AlipLoss(initial_history=start, **options)
    histories = np.full(3, start)
    for _ in range(2):
        entries = call(loss, inputs, output_dict=True)
        step = alip(*inputs, histories=histories, **options)
        histories = step["histories"]
        torch.testing.assert_close(loss.histories, histories, rtol=1e-12, atol=1e-14)
        parts, owed_parts = [*entries.values()], [step["text"], step["caption"]]
        torch.testing.assert_close(parts, owed_parts, rtol=1e-9, atol=1e-12)
        slopes = gradients(sum(parts), inputs, upstream)
        owed_slopes = gradients(sum(owed_parts), inputs, upstream)  # by autograd
        torch.testing.assert_close(slopes, owed_slopes, rtol=1e-9, atol=1e-12)


# --- histories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "calls_that_move"),
    [
        ("train train train train", [0, 1, 2, 3]),
        ("train eval eval train", [0, 3]),
        ("step train train step train train", [0, 2]),
        ("step step eval train step train train", [1, 2]),
        ("train step train train train", [0, 1]),
    ],
    ids=["no steps announced", "evaluations", "two calls a step", "a step announced twice", "announced late"],
)
def test_histories_move_once_a_training_step(events: str, calls_that_move: list[int]) -> None:
    """Each call in training mode is a step, until steps are announced."""
    inputs, loss = triples(**SMALL), AlipLoss()
    has_moved: list[bool] = []
    for event in events.split():
        if event == "step":
            loss.set_progress(1 + len(has_moved), total_steps=9)  # more than there are calls
            continue
        before = loss.histories.clone()
        call(loss.train(event == "train"), inputs)
        has_moved.append(not torch.equal(loss.histories, before))
    assert [number for number, moved in enumerate(has_moved) if moved] == calls_that_move


def test_after_the_end_of_an_announced_training_each_call_is_a_step_again() -> None:
    loss, inputs = AlipLoss(), triples(**SMALL)
    loss.set_progress(1, total_steps=1)
    call(loss, inputs)
    loss.end_training()
    for _ in range(2):
        before = loss.histories.clone()
        call(loss, inputs)
        assert not torch.equal(loss.histories, before)


def test_casting_the_module_does_not_round_the_histories() -> None:
    loss = AlipLoss()
    call(loss, triples(**SMALL))
    before = loss.histories.clone()
    for cast in (loss.to(torch.bfloat16), loss.half(), loss.float(), loss.double(), loss.to("cpu")):
        assert cast is loss
        assert torch.equal(loss.histories, before)


def test_a_loss_that_is_built_on_the_meta_device_has_its_first_histories_after_a_reset() -> None:
    with torch.device("meta"):
        loss = AlipLoss(initial_history=0.5)
    loss.to_empty(device="cpu").reset_parameters()
    assert torch.equal(call(loss, triples(**SMALL)), call(AlipLoss(initial_history=0.5), triples(**SMALL)))


def test_histories_that_a_wrapper_rounds_are_refused() -> None:
    """FSDP casts buffers in place; in bfloat16 a step of a hundredth is none."""
    loss = AlipLoss()
    loss.histories.data = loss.histories.bfloat16()
    v = torch.eye(3)
    with pytest.raises(ValueError, match=r"rounded to torch\.bfloat16.*buffer_dtype"):
        loss(v, v, 1.0, caption_features=v)


def test_a_device_without_float64_has_histories_of_float32() -> None:
    with no_float64():
        assert AlipLoss().half().histories.dtype == torch.float32


def test_histories_of_float32_give_the_value_of_float64() -> None:
    inputs = triples(**LARGE)
    expected = call(AlipLoss(initial_history=0.0), inputs)
    in_float32: Inputs = tuple(x.detach().float() for x in inputs)  # type: ignore[assignment]
    with no_float64():
        value = call(AlipLoss(initial_history=0.0).half(), in_float32)
    assert relative_error(value, expected) < 1e-5  # of a loss in float32


@pytest.mark.parametrize("how", ["built there", "built there and cast", "moved there"])
def test_histories_on_mps_are_float32_however_the_loss_came_there(how: str) -> None:
    loss = AlipLoss()  # on the CPU
    with meta_is(MPS):
        if how == "moved there":
            loss = loss.to(MPS)
        else:
            with MPS:
                loss = AlipLoss()
        if how == "built there and cast":
            loss = loss.half()
        assert (loss.histories.device, loss.histories.dtype) == (MPS, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_image_shows_in_the_loss_of_its_step_alone(value: float) -> None:
    """Histories with images stay at their start, 1; that of texts and captions moves as in a good step."""
    v, t, c, s = inputs = triples(**SMALL)
    bad_images = v.detach().clone()
    bad_images[1, 2] = value
    loss, of_good_step = AlipLoss(), AlipLoss()
    assert not call(loss, (bad_images, t, c, s)).isfinite()
    call(of_good_step, inputs)
    of_texts_and_captions = of_good_step.histories[0].item()
    assert loss.histories.tolist() == [of_texts_and_captions, 1.0, 1.0]
    assert call(loss, inputs).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_batch_in_half_precision_has_the_value_and_gradients_of_float32(dtype: torch.dtype) -> None:
    rounded = triples(seed=0, n=512, d=16, scale=1 / 0.07, dtype=dtype)
    in_float32: Inputs = tuple(x.detach().float().requires_grad_() for x in rounded)  # type: ignore[assignment]

    def value_and_gradients(inputs: Inputs) -> list[Tensor]:
        value = call(AlipLoss(initial_history=0.0), inputs)
        return [value, *gradients(value, inputs, upstream=4096.0)]  # as of a gradient scaler

    # Some roundings of the dtype: 2⁻⁸ in bfloat16, 2⁻¹¹ in float16.
    tolerance = 6e-2 if dtype is torch.bfloat16 else 3e-3
    for in_half, exact in zip(value_and_gradients(rounded), value_and_gradients(in_float32), strict=True):
        assert relative_error(in_half, exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_other_dtypes_are_float32(dtype: torch.dtype) -> None:
    inputs = triples(**LARGE, dtype=dtype)
    value = call(AlipLoss(), inputs)
    assert value.dtype == torch.float32
    expected = call(AlipLoss(), tuple(x.detach().double() for x in inputs))  # type: ignore[arg-type]
    roundings_of_the_logits = 1e-5 if dtype == torch.float32 else 0.02
    assert relative_error(value, expected) < roundings_of_the_logits


# --- conventions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("gamma_sample", -1.0, "must be a finite number >= 0.* -1.0"),
        ("momentum", 1.5, r"must be in \[0, 1\].* 1.5"),
        ("initial_history", math.nan, "must be finite.* nan"),
        ("gather", True, "must be None.* True"),
    ],
)
def test_bad_options_are_named(argument: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} {reason}"):
        AlipLoss(**{argument: value})


@pytest.mark.parametrize(
    ("spoil", "shown"),
    [
        pytest.param(lambda c: c[:5], r"torch\.Size\(\[5, 4\]\)", id="too few"),
        pytest.param(lambda c: normalize(c[:, :3]), r"torch\.Size\(\[6, 3\]\)", id="too narrow"),
        pytest.param(lambda c: c.long(), r"torch\.int64", id="integers"),
        pytest.param(lambda c: c.to("meta"), "type='meta'", id="elsewhere"),
        pytest.param(lambda c: c.detach().numpy(), r"\(6, 4\), dtype\('float64'\)", id="an array"),
    ],
)
def test_bad_captions_are_named_and_shown(spoil: Any, shown: str) -> None:
    v, t, c, s = triples(**SMALL)
    with pytest.raises(ValueError, match=f"caption_features must be like text_features, .*; got .*{shown}"):
        AlipLoss()(v, t, s, caption_features=spoil(c))


def test_a_single_pair_is_refused() -> None:
    v, t, c, s = triples(**SMALL)
    with pytest.raises(ValueError, match="image_features and text_features must hold at least two pairs"):
        AlipLoss()(v[:1], t[:1], s, caption_features=c[:1])
