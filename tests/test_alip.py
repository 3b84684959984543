from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from batches import gradients, relative_error, unit_rows
from rankloss import AlipLoss, ClipLoss, CyClipLoss, RankClipLoss, reference

KEYS = ("contrastive_loss", "caption_contrastive_loss")


@dataclass(frozen=True)
class Triples:
    """Unit-norm float64 features of images, raw texts and synthetic captions."""

    image: Tensor
    text: Tensor
    caption: Tensor
    scale: float

    def leaves(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = torch.tensor(self.scale, dtype=torch.float64)
        tensors = self.image, self.text, self.caption, scale
        return tuple(x.detach().to(dtype).requires_grad_() for x in tensors)  # type: ignore[return-value]


def random_triples(seed: int, n: int, d: int, scale: float) -> Triples:
    rng = np.random.default_rng(seed)
    return Triples(*(torch.from_numpy(unit_rows(rng, n, d)) for _ in range(3)), scale)


@st.composite
def triples(draw: st.DrawFn, *, max_n: int = 10) -> Triples:
    seed, n, d = draw(st.integers(0, 2**32 - 1)), draw(st.integers(2, max_n)), draw(st.integers(2, 8))
    return random_triples(seed, n, d, draw(st.sampled_from([1.0, 1 / 0.07, 100.0])))


def call(loss: AlipLoss, inputs: tuple[Tensor, ...], **options) -> Tensor:
    v, t, c, s = inputs
    return loss(v, t, s, caption_features=c, **options)


# Values of the published code: the recipe of data/vectors.json, the captions drawn third.
R0, R1 = (0, 6, 4, 10.000000000000002), (1, 64, 16, 1 / 0.07)
PUBLISHED = {
    "R0, H=1, step 1": (R0, 1.0, 1, {
        "histories": (0.994007661253154, 0.987500512357093, 0.988909850448204),
        "mean weights": (0.360453399271319, 0.118589279460584, 0.174001282034709),
        "parts": (0.299368457435125, 0.253992792978738),
        "gradient": 0.485387526165668,
    }),
    "R0, H=1, step 2": (R0, 1.0, 2, {
        "histories": (0.988075245893776, 0.975126019590615, 0.977930602391925),
        "mean weights": (0.36475558974686, 0.121560863997554, 0.177864346834844),
        "parts": (0.310532613131939, 0.2627306122853),
        "gradient": 0.502661528160466,
    }),
    "R0, H=0, step 1": (R0, 0.0, 1, {
        "histories": (0.00400766125315378, -0.00249948764290719, -0.00109014955179645),
        "mean weights": (0.952557284370538, 0.881203809534855, 0.94774192888312),
        "parts": (8.38668220144151, 7.25807625327218),
        "gradient": 10.1854445396349,
    }),
    "R1, H=1, step 1": (R1, 1.0, 1, {
        "histories": (0.989458637171888, 0.989784167069164, 0.990514056321693),
        "mean weights": (0.140969177517109, 0.145038540275615, 0.169208032491092),
        "parts": (0.163924845165852, 0.157374771104709),
        "gradient": 0.0835407451560408,
    }),
    "R1, H=0, step 1": (R1, 0.0, 1, {
        "histories": (-0.000541362828112465, -0.00021583293083633, 0.000514056321692686),
        "mean weights": (0.805136970453055, 0.9877617739814, 1.10895474784322),
        "parts": (6.59273048716526, 6.30180614646276),
        "gradient": 2.82116042404587,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_code(name: str) -> None:
    recipe, start, steps, expected = PUBLISHED[name]
    batch = random_triples(*recipe)
    assert batch.caption[0, 0].item() == pytest.approx(
        {6: 0.703251906904219, 64: 0.286877938844114}[len(batch.caption)], rel=1e-14
    )
    inputs = batch.leaves()
    loss, histories = AlipLoss(initial_history=start), np.full(3, start)
    for _ in range(steps):
        entries = call(loss, inputs, output_dict=True)
        oracle = reference.alip(*(x.detach().numpy() for x in inputs), histories=histories)
        histories = oracle["histories"]
    assert tuple(entries) == KEYS
    for actual, wanted in zip(loss.histories.tolist(), expected["histories"], strict=True):
        assert actual == pytest.approx(wanted, rel=1e-9)
    for entry, wanted in zip(entries.values(), expected["parts"], strict=True):
        assert entry.item() == pytest.approx(wanted, rel=1e-9)
    (dv,) = torch.autograd.grad(sum(entries.values()), inputs[0])
    assert dv.norm().item() == pytest.approx(expected["gradient"], rel=1e-9)
    # The oracle too, whose weights the published ones are compared with.
    assert (oracle["text"], oracle["caption"]) == pytest.approx(expected["parts"], rel=1e-9)
    assert tuple(oracle["weights"].mean(1)) == pytest.approx(expected["mean weights"], rel=1e-9)
    if name == "R0, H=0, step 1":  # five of six gates are open
        w = oracle["weights"]
        assert w[:, 2].tolist() == pytest.approx(
            [0.715343706223228, 0.28722285720913, 0.686451573298721], rel=1e-9
        )
        assert (np.delete(w, 2, axis=1) == 1).all()


@given(triples(), st.sampled_from([0.0, 0.5, 1.0]))
def test_value_matches_the_reference_over_steps(batch: Triples, start: float) -> None:
    options = {"gamma_sample": 1.5, "gamma_pair": 3.0, "momentum": 0.7}
    loss, histories = AlipLoss(initial_history=start, **options), np.full(3, start)
    arrays = [x.numpy() for x in (batch.image, batch.text, batch.caption)]
    for order in (list(range(len(arrays[0]))), list(range(len(arrays[0])))[::-1]):
        v, t, c = (x[order] for x in (batch.image, batch.text, batch.caption))
        entries = loss(v, t, batch.scale, caption_features=c, output_dict=True)
        step = reference.alip(*(x[order] for x in arrays), batch.scale, histories=histories, **options)
        histories = step["histories"]
        np.testing.assert_allclose(loss.histories, histories, rtol=1e-12, atol=1e-14)
        for entry, name in zip(entries.values(), ("text", "caption"), strict=True):
            assert entry.item() == pytest.approx(step[name], rel=1e-9, abs=1e-12)


@given(triples(max_n=6), st.sampled_from([0.0, 1.0]))
def test_gradients_are_those_of_the_weighted_nll_with_constant_weights(batch: Triples, start: float) -> None:
    v, t, c, s = inputs = batch.leaves()
    loss = AlipLoss(initial_history=start)
    step = reference.alip(*(x.detach().numpy() for x in (v, t, c)), batch.scale, histories=np.full(3, start))
    w_s, w_r, w_c = torch.from_numpy(step["weights"]).unbind()
    expected = torch.zeros((), dtype=torch.float64)
    for u, w in ((t, w_r), (c, w_c)):
        logits = s * v @ u.T
        nll = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2
        expected = expected + (nll * w_s * w).sum() / len(v)
    total = call(loss, inputs)
    for a, b in zip(gradients(total, inputs, -1.7), gradients(expected, inputs, -1.7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    # With γ = 0 the weights are constants to the finite differences too; momentum 1 leaves the gate at rest.
    loss = AlipLoss(gamma_sample=0.0, gamma_pair=0.0, momentum=1.0)
    v, t, c, s = random_triples(0, 5, 3, 10.0).leaves()
    assert torch.autograd.gradcheck(lambda v, t, c, s: loss(v, t, s, caption_features=c), (v, t, c, s))


@given(triples())
def test_open_gates_give_clips_loss_twice(batch: Triples) -> None:
    # A history of −3 is below every cosine: g > 1 everywhere.
    loss = AlipLoss(initial_history=-3.0, momentum=1.0)
    v, t, c, s = batch.leaves()
    expected = ClipLoss()(v, t, s) + ClipLoss()(v, c, s)
    torch.testing.assert_close(loss(v, t, s, caption_features=c), expected, rtol=1e-12, atol=1e-14)


@given(triples(), st.randoms(use_true_random=False))
def test_order_of_the_batch_does_not_matter(batch: Triples, random) -> None:
    order = list(range(len(batch.image)))
    random.shuffle(order)
    losses = AlipLoss(), AlipLoss()
    v, t, c, s = batch.leaves()
    values = [
        losses[0](v, t, s, caption_features=c),
        losses[1](v[order], t[order], s, caption_features=c[order]),
    ]
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(losses[0].histories, losses[1].histories, rtol=1e-13, atol=0)


@given(triples())
def test_weights_do_not_depend_on_the_scale(batch: Triples) -> None:
    losses = AlipLoss(), AlipLoss()
    for loss, scale in zip(losses, (1.0, 100.0), strict=True):
        loss(batch.image, batch.text, scale, caption_features=batch.caption)
    assert torch.equal(losses[0].histories, losses[1].histories)


# --- histories ------------------------------------------------------------------------------------------


def test_histories_move_once_a_training_step_and_not_in_evaluation() -> None:
    inputs = random_triples(*R0).leaves()
    loss = AlipLoss()
    call(loss, inputs)
    once = loss.histories.clone()
    assert not torch.equal(once, torch.ones(3, dtype=torch.float64))
    before = call(loss, inputs, update_histories=False)
    assert torch.equal(loss.histories, once)
    loss.eval()
    assert torch.equal(call(loss, inputs), before)
    assert torch.equal(loss.histories, once)
    loss.train()
    call(loss, inputs)
    assert not torch.equal(loss.histories, once)
    moved = loss.histories.clone()
    loss.eval()
    call(loss, inputs, update_histories=True)
    assert not torch.equal(loss.histories, moved)


def test_accumulated_step_is_the_step_of_the_whole_batch() -> None:
    """What a trainer with gradient accumulation does: K calls, in each the gradient of one chunk."""
    v, t, c, s = random_triples(3, 8, 5, 20.0).leaves()
    whole, accumulated = AlipLoss(), AlipLoss()
    for _ in range(2):
        expected = gradients(whole(v, t, s, caption_features=c), (v, t, c), 1.0)
        got = [torch.zeros_like(x) for x in (v, t, c)]
        for j, rows in enumerate(torch.arange(8).chunk(4)):
            alive = torch.zeros(8, 1, dtype=torch.bool).index_fill(0, rows, True)
            chunk = [torch.where(alive, x, x.detach()) for x in (v, t, c)]
            value = accumulated(chunk[0], chunk[1], s, caption_features=chunk[2], update_histories=j == 0)
            got = [a + b for a, b in zip(got, torch.autograd.grad(value, (v, t, c)), strict=True)]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        assert torch.equal(whole.histories, accumulated.histories)


def test_checkpoint_resumes_the_histories() -> None:
    batches = [random_triples(seed, 6, 4, 10.0).leaves() for seed in range(4)]
    whole, first = AlipLoss(), AlipLoss()
    values = [call(whole, batch) for batch in batches]
    for batch in batches[:2]:
        call(first, batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AlipLoss(initial_history=0.3)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [
        torch.equal(call(second, batch), value) for batch, value in zip(batches[2:], values[2:], strict=True)
    ] == [
        True,
        True,
    ]
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(other.histories, whole.histories)


def test_casting_the_module_does_not_round_the_histories() -> None:
    loss = AlipLoss()
    call(loss, random_triples(*R0).leaves())
    before = loss.histories.clone()
    for cast in (loss.to(torch.bfloat16), loss.half(), loss.float(), loss.double(), loss.to("cpu")):
        assert cast is loss
        assert loss.histories.dtype == torch.float64
        assert torch.equal(loss.histories, before)
    assert list(loss.state_dict()) == ["histories"]
    assert loss.to("meta").histories.device.type == "meta"


def test_built_on_meta_the_histories_have_values() -> None:
    inputs = random_triples(*R0).leaves()
    with torch.device("meta"):
        loss = AlipLoss(initial_history=0.3)
    assert loss.histories.tolist() == [0.3] * 3
    assert torch.equal(call(loss, inputs), call(AlipLoss(initial_history=0.3), inputs))


def test_moved_through_meta_the_histories_start_again_and_a_checkpoint_brings_them_back() -> None:
    inputs = random_triples(*R0).leaves()
    loss = AlipLoss(initial_history=0.3)
    call(loss, inputs)
    state = copy.deepcopy(loss.state_dict())
    emptied = nn.ModuleList([loss.to("meta")])
    with pytest.raises(RuntimeError, match=r"histories are on the meta device .*: call to_empty\(\) first"):
        call(loss, inputs)
    with pytest.raises(NotImplementedError, match="meta"):
        emptied.to("cpu")
    assert loss.histories.dtype == torch.float64
    emptied.to_empty(device="cpu")
    assert loss.histories.tolist() == [0.3] * 3
    loss.load_state_dict(state)
    assert torch.equal(loss.histories, state["histories"])
    loss.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(loss.histories, state["histories"])
    loss.to_empty(device="cpu")  # of a module that has values they are kept
    assert torch.equal(loss.histories, state["histories"])
    loss.reset_parameters()
    assert loss.histories.tolist() == [0.3] * 3


def test_built_in_inference_mode_it_can_be_trained() -> None:
    with torch.inference_mode():
        loss = AlipLoss()
    inputs = random_triples(*R0).leaves()
    assert torch.equal(call(loss, inputs), call(AlipLoss(), inputs))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_step_shows_in_the_loss_and_not_in_the_histories(value: float) -> None:
    v, t, c, s = inputs = random_triples(*R0).leaves()
    bad = v.detach().clone()
    bad[1, 2] = value
    loss, spared = AlipLoss(), AlipLoss()
    assert not loss(bad, t, s, caption_features=c).isfinite()
    assert loss.histories.isfinite().all()
    spared(v, t, s, caption_features=c)
    assert loss.histories[0] == spared.histories[0]  # text · caption has nothing to do with the image
    assert loss.histories[1:].tolist() == [1.0, 1.0]
    assert call(loss, inputs).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    inputs = random_triples(*R1).leaves(dtype)
    expected = call(AlipLoss(), tuple(x.detach().double() for x in inputs))
    loss = AlipLoss()
    value = call(loss, inputs)
    assert value.dtype == torch.float32
    assert relative_error(value, expected) < (1e-5 if dtype == torch.float32 else 0.02)
    assert loss.histories.dtype == torch.float64
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, inputs))


# --- conventions ----------------------------------------------------------------------------------------


def test_forward_convention() -> None:
    v, t, c, s = random_triples(*R0).leaves()
    total = AlipLoss()(v, t, s, caption_features=c)
    entries = AlipLoss()(v, t, s, output_dict=True, caption_features=c)
    torch.testing.assert_close(total, sum(entries.values()), rtol=1e-15, atol=0)
    torch.testing.assert_close(AlipLoss()(v, t, s, torch.tensor(-10.0), caption_features=c), total)
    with pytest.raises(TypeError, match="caption_features"):
        AlipLoss()(v, t, s)
    assert "gamma_sample=2, gamma_pair=2, momentum=0.99" in repr(AlipLoss())


@pytest.mark.parametrize("outer", [CyClipLoss, lambda base: RankClipLoss(base, schedule="constant")])
def test_it_is_a_base(outer) -> None:
    v, t, c, s = random_triples(*R0).leaves()
    alip = AlipLoss()
    entries = outer(alip)(v, t, s, output_dict=True, caption_features=c, update_histories=False)
    assert list(entries)[:2] == list(KEYS)
    assert len(entries) == 4
    assert alip.histories.tolist() == [1, 1, 1]
    assert list(outer(alip).state_dict()) == ["base.histories"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_sample": -1.0}, "gamma_sample must be finite and >= 0; got -1.0"),
        ({"gamma_pair": math.inf}, "gamma_pair must be finite and >= 0; got inf"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\]; got 1.5"),
        ({"momentum": math.nan}, r"momentum must be in \[0, 1\]; got nan"),
        ({"initial_history": math.nan}, "initial_history must be finite; got nan"),
        ({"gather": True}, "gather must be None .*; got True"),
    ],
)
def test_bad_options_are_named_and_shown(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlipLoss(**options)


def test_bad_features_are_named_and_shown() -> None:
    v, t, c, s = random_triples(*R0).leaves()
    for bad, message in (
        (
            c[:5],
            r"caption_features and text_features must have one shape \[N, D\]; got \(5, 4\) and \(6, 4\)",
        ),
        (c.long(), "caption_features must be floating point; got torch.int64"),
        (c.to("meta"), "caption_features and text_features must be on one device; got meta and cpu"),
        (c.detach().numpy(), "caption_features must be a torch.Tensor; got ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            AlipLoss()(v, t, s, caption_features=bad)
    with pytest.raises(ValueError, match="at least two pairs"):
        AlipLoss()(v[:1], t[:1], s, caption_features=c[:1])
