from __future__ import annotations

import math
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

KEYS = ("contrastive_loss", "caption_contrastive_loss")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def triples(seed: int, n: int, d: int, scale: float, dtype: torch.dtype = torch.float64) -> Inputs:
    """Unit-norm features of images, raw texts and synthetic captions, and the scale."""
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(unit_rows(rng, n, d)) for _ in range(3)]
    tensors = (*rows, torch.tensor(scale, dtype=torch.float64))
    return tuple(x.to(dtype).requires_grad_() for x in tensors)  # type: ignore[return-value]


random_triples = st.builds(
    triples,
    st.integers(0, 2**32 - 1),
    st.integers(2, 10),
    st.integers(2, 8),
    st.sampled_from([1.0, 14.0, 100.0]),
)


def call(loss: AlipLoss, inputs: Inputs, **options: Any) -> Any:
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
    sample, raw, synthetic = cosines - after[:, None]
    fits = sample >= 0  # g ≥ 1
    w_s = torch.where(fits, 1.0, (gamma_sample * sample).exp())
    w_r, w_c = (torch.where(fits, 1.0, (gamma_pair * x).exp()) for x in (raw, synthetic))
    return {
        "histories": after,
        "weights": torch.stack([w_s, w_r, w_c]),
        "text": (pair_nll(v, t, logit_scale) * w_s * w_r).mean(),
        "caption": (pair_nll(v, c, logit_scale) * w_s * w_c).mean(),
    }


def pair_nll(v: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """``½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]`` of every pair k."""
    own = torch.arange(len(v))
    logits = scale * v @ u.T
    return sum(cross_entropy(x, own, reduction="none") for x in (logits, logits.T)) / 2  # type: ignore[return-value]


# Values of the published code: the recipe of data/vectors.json, the captions drawn third.
R0, R1 = (0, 6, 4, 10.000000000000002), (1, 64, 16, 1 / 0.07)
PUBLISHED = {
    "R0, H=1, step 2": (R0, 1.0, 2, {
        "histories": (0.988075245893776, 0.975126019590615, 0.977930602391925),
        "mean weights": (0.36475558974686, 0.121560863997554, 0.177864346834844),
        "parts": (0.310532613131939, 0.2627306122853),
        "gradient": 0.502661528160466,
    }),
    "R1, H=0, step 1": (R1, 0.0, 1, {
        "histories": (-0.000541362828112465, -0.00021583293083633, 0.000514056321692686),
        "mean weights": (0.805136970453055, 0.9877617739814, 1.10895474784322),
        "parts": (6.59273048716526, 6.30180614646276),
        "gradient": 2.82116042404587,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_histories_weights_and_gradient_are_the_published_codes(name: str) -> None:
    recipe, start, steps, expected = PUBLISHED[name]
    inputs = triples(*recipe)
    loss, histories = AlipLoss(initial_history=start), np.full(3, start)
    for _ in range(steps):
        entries = call(loss, inputs, output_dict=True)
        step = alip(*inputs, histories=histories)
        histories = step["histories"]
    assert tuple(entries) == KEYS
    assert loss.histories.tolist() == pytest.approx(expected["histories"], rel=1e-9)
    assert [x.item() for x in entries.values()] == pytest.approx(expected["parts"], rel=1e-9)
    (dv,) = torch.autograd.grad(sum(entries.values()), inputs[0])
    assert dv.norm().item() == pytest.approx(expected["gradient"], rel=1e-9)
    # The oracle too, whose weights the published ones are compared with.
    assert (step["text"].item(), step["caption"].item()) == pytest.approx(expected["parts"], rel=1e-9)
    assert step["weights"].mean(1).tolist() == pytest.approx(expected["mean weights"], rel=1e-9)


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
        terms, expected_terms = [*entries.values()], [step["text"], step["caption"]]
        torch.testing.assert_close(terms, expected_terms, rtol=1e-9, atol=1e-12)
        found = gradients(sum(terms), inputs, upstream)
        expected = gradients(sum(expected_terms), inputs, upstream)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- histories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announced", "modes", "moves"),
    [
        ([], "tttt", "1111"),  # each call in training mode is a step
        ([], "teet", "1001"),
        ([0, 2], "tttt", "1010"),  # two calls a step
        ([0, 0, 2], "ettt", "0110"),  # an evaluation takes nothing from the step, nor does a second word
        ([1], "tttt", "1100"),  # announced late
    ],
)
def test_histories_move_once_a_training_step(announced: list[int], modes: str, moves: str) -> None:
    inputs, loss = triples(*R0), AlipLoss()
    moved = ""
    for k, mode in enumerate(modes):
        for step in (step for step in announced if step == k):
            loss.set_progress(step + 1, 9)
        before = loss.histories.clone()
        call(loss.train(mode == "t"), inputs)
        moved += str(int(not torch.equal(loss.histories, before)))
    assert moved == moves


def test_after_the_end_of_an_announced_training_each_call_is_a_step_again() -> None:
    loss, inputs = AlipLoss(), triples(*R0)
    loss.set_progress(1, 1)
    call(loss, inputs)
    loss.end_training()
    for _ in range(2):
        before = loss.histories.clone()
        call(loss, inputs)
        assert not torch.equal(loss.histories, before)


def test_casting_the_module_does_not_round_the_histories() -> None:
    loss = AlipLoss()
    call(loss, triples(*R0))
    before = loss.histories.clone()
    for cast in (loss.to(torch.bfloat16), loss.half(), loss.float(), loss.double(), loss.to("cpu")):
        assert cast is loss
        assert torch.equal(loss.histories, before)
    with torch.device("meta"):
        other = AlipLoss(initial_history=0.5)
    other.to_empty(device="cpu").reset_parameters()
    assert torch.equal(call(other, triples(*R0)), call(AlipLoss(initial_history=0.5), triples(*R0)))


def test_histories_that_a_wrapper_rounds_are_refused() -> None:
    """FSDP casts buffers in place; in bfloat16 a step of a hundredth is none."""
    loss = AlipLoss()
    loss.histories.data = loss.histories.bfloat16()
    v = torch.eye(3)
    with pytest.raises(ValueError, match=r"rounded to torch\.bfloat16.*buffer_dtype"):
        loss(v, v, 1.0, caption_features=v)


def test_a_device_without_float64_has_histories_of_float32() -> None:
    inputs = triples(*R1)
    expected = call(AlipLoss(initial_history=0.0), inputs)
    single = tuple(x.detach().float() for x in inputs)
    with no_float64():
        loss = AlipLoss(initial_history=0.0)
        value = call(loss.half(), single)  # type: ignore[arg-type]
        assert loss.histories.dtype == torch.float32
    assert relative_error(value, expected) < 1e-5
    moved = AlipLoss()
    with meta_is(MPS):
        with MPS:
            built = AlipLoss()
        for there in (built, built.half(), moved.to(MPS)):
            assert (there.histories.device, there.histories.dtype) == (MPS, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_step_shows_in_the_loss_and_not_in_the_histories(value: float) -> None:
    v, t, c, s = inputs = triples(*R0)
    bad = v.detach().clone()
    bad[1, 2] = value
    loss, spared = AlipLoss(), AlipLoss()
    assert not call(loss, (bad, t, c, s)).isfinite()
    call(spared, inputs)
    assert loss.histories[0] == spared.histories[0]  # text · caption has nothing to do with the image
    assert loss.histories[1:].tolist() == [1.0, 1.0]
    assert call(loss, inputs).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_batch_in_half_precision_has_the_value_and_gradients_of_float32(dtype: torch.dtype) -> None:
    rounded = triples(0, 512, 16, 1 / 0.07, dtype)
    exact: Inputs = tuple(x.detach().float().requires_grad_() for x in rounded)  # type: ignore[assignment]
    results = []
    for inputs in (rounded, exact):
        value = call(AlipLoss(initial_history=0.0), inputs)
        results.append([value, *gradients(value, inputs, 4096.0)])
    for found, expected in zip(*results, strict=True):
        tolerance = 6e-2 if dtype is torch.bfloat16 else 3e-3
        assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_other_dtypes_are_float32(dtype: torch.dtype) -> None:
    inputs = triples(*R1, dtype)
    value = call(AlipLoss(), inputs)
    assert value.dtype == torch.float32
    expected = call(AlipLoss(), tuple(x.detach().double() for x in inputs))  # type: ignore[arg-type]
    assert relative_error(value, expected) < (1e-5 if dtype == torch.float32 else 0.02)


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


def test_bad_captions_are_named() -> None:
    v, t, c, s = triples(*R0)
    for bad in (c[:5], normalize(c[:, :3]), c.long(), c.to("meta"), c.detach().numpy()):
        with pytest.raises((ValueError, TypeError), match="caption_features"):
            AlipLoss()(v, t, s, caption_features=bad)
    with pytest.raises(ValueError, match="image_features"):
        AlipLoss()(v[:1], t[:1], s, caption_features=c[:1])
