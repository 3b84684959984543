"""The frame of losses that write their own terms: what a subclass of ``OwnTerms`` or ``AddedTerms`` gets.

The conditions and the tests of processes have MimicryLoss, SpreadLoss and those that packages register.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from batches import gradients, random_batch, teacher_of
from process_pool import Pool
from rankloss import AddedTerms, ClipLoss, MimicryLoss, OwnTerms, RankClipLoss, SigLipLoss
from rankloss.losses import check_choice, check_count, check_weight, takes_teacher

IMAGE, TEXT = "reference_image_features", "reference_text_features"


class Distance(AddedTerms):
    """w·s·mean_i ‖v_i − t_i‖ᵖ, or the sum: a term with an option of each kind, w, p and mean or sum."""

    def __init__(
        self, base: Any = None, *, weight: float = 0.5, power: int = 2, kind: str = "mean", gather: Any = None
    ) -> None:
        super().__init__(base, gather=gather)
        self.weight = check_weight("weight", weight)
        self.power = check_count("power", power)
        self.kind = check_choice("kind", kind, ("mean", "sum"))

    def own_terms(self, image_features: Tensor, text_features: Tensor, scale: Any) -> dict[str, Tensor]:
        distances = (image_features - text_features).norm(dim=-1) ** self.power
        reduced = distances.mean() if self.kind == "mean" else distances.sum()
        return {"distance_loss": self.weight * scale * reduced}


class Taught(AddedTerms):
    """mean_i w_i·‖t_i − t'_i‖²: a term that needs a teacher's texts t', and takes weights w of the pairs."""

    one_space = False  # it compares no image with a text

    def own_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        scale: Any,
        *,
        reference_text_features: Tensor,
        pair_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        distances = (text_features - reference_text_features).square().sum(-1)
        return {"taught_loss": (distances if pair_weights is None else pair_weights * distances).mean()}


class Alone(OwnTerms):
    """s·mean_i v_i·t_i and twice as much: two terms, added to no other loss."""

    def own_terms(self, image_features: Tensor, text_features: Tensor, scale: Any) -> dict[str, Tensor]:
        term = scale * (image_features * text_features).sum(-1).mean()
        return {"first_loss": term, "second_loss": 2 * term}


class Recording(ClipLoss):
    """CLIP's loss, which keeps the names of its last call's inputs; it takes any, and names no teacher's."""

    def forward(self, **inputs: Any) -> Any:
        self.names_of_inputs = {*inputs}
        of_clip = ("image_features", "text_features", "logit_scale", "output_dict")
        return super().forward(**{name: inputs[name] for name in of_clip})


def distance_by_hand(v: Tensor, t: Tensor, s: Tensor, weight: float) -> Tensor:
    """The term of ``Distance`` with the default power 2, by its formula."""
    return weight * s * (v - t).square().sum(-1).mean()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and the scale of six pairs."""
    return random_batch(seed=0, n=6, d=4, scale=10.0).leaves()


# --- terms on a base ----------------------------------------------------------------------------------------


def test_the_terms_stand_after_the_bases_entries_and_all_add_up() -> None:
    v, t, s = batch()
    entries = Distance(weight=0.3)(v, t, s, output_dict=True)
    assert list(entries) == ["contrastive_loss", "distance_loss"]
    assert torch.equal(entries["contrastive_loss"], ClipLoss()(v, t, s))
    torch.testing.assert_close(entries["distance_loss"], distance_by_hand(v, t, s, weight=0.3))
    assert torch.equal(Distance(weight=0.3)(v, t, s), sum(entries.values()))


def test_every_input_has_the_gradient_of_base_and_terms() -> None:
    v, t, s = inputs = batch()
    owed = ClipLoss()(v, t, s) + distance_by_hand(v, t, s, weight=0.5)  # the default weight
    slopes, owed_slopes = (gradients(x, inputs, upstream=-1.7) for x in (Distance()(v, t, s), owed))
    torch.testing.assert_close(slopes, owed_slopes)


def test_options_of_every_kind_are_shown() -> None:
    assert Distance(weight=2, power=3).extra_repr() == "weight=2, power=3, kind='mean'"


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("weight", -1, "weight must be a finite number >= 0; got -1"),
        ("power", 1.5, "power must be an integer of at least 1; got 1.5"),
        ("kind", "max", "kind must be one of 'mean', 'sum'; got 'max'"),
        ("base", 3, "base must be a loss, a module or function; got 3"),
    ],
    ids=lambda x: str(x).partition(" ")[0],
)
def test_a_bad_value_of_an_option_is_named_and_shown(option: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        Distance(**{option: value})


def test_inputs_that_the_terms_do_not_name_are_the_bases_alone() -> None:
    v, t, s = batch()
    base, ids = ClipLoss(same_id="ignore"), torch.arange(6) // 2
    entries = Distance(base)(v, t, s, pair_ids=ids, output_dict=True)
    assert torch.equal(entries["contrastive_loss"], base(v, t, s, pair_ids=ids))


def test_an_input_that_neither_the_terms_nor_the_base_take_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'pair_weights'"):
        Distance()(*batch(), pair_weights=torch.ones(6))


def test_inputs_that_the_terms_name_are_theirs() -> None:
    v, t, s = batch()
    teacher = teacher_of(n=6, d=4)
    last_pair_alone = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 6.0], dtype=v.dtype)  # the mean weight is 1
    entries = Taught()(v, t, s, **teacher, pair_weights=last_pair_alone, output_dict=True)
    distance_of_last_pair = (t[-1] - teacher[TEXT][-1]).square().sum()
    torch.testing.assert_close(entries["taught_loss"], distance_of_last_pair)


def test_a_teachers_features_are_the_terms_and_the_bases() -> None:
    teacher = teacher_of(n=6, d=4)
    entries = Taught(MimicryLoss())(*batch(), **teacher, output_dict=True)
    of_base = MimicryLoss()(*batch(), **teacher, output_dict=True)
    assert list(entries) == ["contrastive_loss", "mimicry_loss", "taught_loss"]
    assert torch.equal(entries["mimicry_loss"], of_base["mimicry_loss"])


def test_a_base_that_takes_no_teacher_gets_none() -> None:
    base = Recording()
    Taught(base)(*batch(), **teacher_of(n=6, d=4))
    assert base.names_of_inputs == {"image_features", "text_features", "logit_scale", "output_dict"}


def test_a_bias_is_the_bases() -> None:
    v, t, s = batch()
    bias = torch.tensor(-3.0, dtype=v.dtype, requires_grad=True)
    entries = Distance(SigLipLoss())(v, t, s, bias, output_dict=True)
    assert torch.equal(entries["contrastive_loss"], SigLipLoss()(v, t, s, bias))


def test_an_entry_of_the_base_with_a_terms_name_is_refused() -> None:
    with pytest.raises(ValueError, match="the base has an entry 'distance_loss' of its own"):
        Distance(Distance())(*batch())


# --- a teacher and the checks -------------------------------------------------------------------------------


def test_terms_that_name_a_teachers_features_take_a_teacher() -> None:
    assert takes_teacher(Taught())
    assert takes_teacher(Distance(Taught())), "through the base"
    assert not takes_teacher(Distance())
    with_a_number = Recording()
    with_a_number.base = 2.0
    assert not takes_teacher(with_a_number), "the attribute base is no loss"


def test_required_inputs_that_are_missing_are_named() -> None:
    with pytest.raises(TypeError, match=f"Taught.own_terms.*'{TEXT}'"):
        Taught()(*batch())


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (torch.zeros(6, 4), f"{TEXT} must not have rows of zeros"),
        (torch.full((6, 4), torch.nan), f"{TEXT} must be finite; row 0 has norm nan"),
        (torch.ones(5, 4) / 2, rf"{TEXT} must have one row per pair, 6; got shape \(5, 4\)"),
    ],
    ids=["zeros", "NaN", "a row too few"],
)
def test_a_teachers_features_are_checked_before_the_terms(features: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Taught()(*batch(), **{TEXT: features})


def base_of_any_widths() -> RankClipLoss:
    """A base that compares no image with a text: rank terms within each modality, added to a constant."""
    return RankClipLoss(lambda *_, **__: torch.ones(()), lambda_cross=0.0, schedule="constant")


def test_terms_within_each_modality_allow_two_widths() -> None:
    v, t, s = batch()
    narrow = F.normalize(t[:, :3], dim=-1)
    its_own_teacher = {TEXT: narrow.detach()}
    entries = Taught(base_of_any_widths())(v, narrow, s, **its_own_teacher, output_dict=True)
    assert entries["taught_loss"] == 0


def test_terms_of_one_space_refuse_two_widths() -> None:
    v, t, s = batch()
    with pytest.raises(ValueError, match=r"must have one shape \[N, D\]; got \(6, 4\) and \(6, 3\)"):
        Distance(base_of_any_widths())(v, t[:, :3], s)


def error_of_integers_on_the_last_rank(rank: int, world_size: int) -> str:
    """The error of each process where the last one's texts are integers."""
    v, t, s = (x.detach() for x in batch())
    if rank == world_size - 1:
        t = t.long()
    with pytest.raises(ValueError, match="text_features must be floating point") as error:
        Alone()(v, t, s)
    return str(error.value)


def test_a_bad_input_of_one_process_is_the_error_of_all(pool: Pool) -> None:
    first, *others = pool.run(error_of_integers_on_the_last_rank)  # the message of each rank
    last_rank = pool.world_size - 1
    assert f"on rank {last_rank} of {pool.world_size}" in first
    assert others == [first] * len(others)


# --- terms on no other loss ---------------------------------------------------------------------------------


def test_terms_on_no_other_loss_are_the_loss() -> None:
    v, t, s = batch()
    entries = Alone()(v, t, s, output_dict=True)
    assert list(entries) == ["first_loss", "second_loss"]
    first = s * (v * t).sum(-1).mean()
    torch.testing.assert_close(Alone()(v, t, s), first + 2 * first)
    assert not hasattr(Alone(), "base")


def test_a_bias_without_a_base_has_a_gradient_of_zero_and_changes_nothing() -> None:
    v, t, s = batch()
    bias = torch.tensor(-3.0, dtype=v.dtype, requires_grad=True)
    value = Alone()(v, t, s, bias)
    assert torch.equal(value, Alone()(v, t, s))
    assert torch.autograd.grad(value, bias)[0] == 0


def test_an_input_that_terms_on_no_other_loss_do_not_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Alone\.forward\(\) got an unexpected keyword argument 'pair_ids'"):
        Alone()(*batch(), pair_ids=torch.arange(6))


def test_a_class_without_terms_says_so() -> None:
    with pytest.raises(NotImplementedError, match="OwnTerms must have a method own_terms"):
        OwnTerms()(*batch())


def test_a_compiled_call_breaks_the_graph_and_has_the_same_value_and_gradients() -> None:
    loss, inputs = Distance(), batch()

    def step(v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The call between two operations, which are compiled."""
        return loss(v.flip(0), t, s) + 1

    torch._dynamo.reset()  # forgets what other tests compiled
    graphs = CompileCounterWithBackend("eager")
    value, compiled_value = step(*inputs), torch.compile(step, backend=graphs)(*inputs)
    assert graphs.frame_count == 2  # before the call and after it
    torch.testing.assert_close(compiled_value, value)
    slopes, compiled_slopes = (gradients(x, inputs, upstream=1.3) for x in (value, compiled_value))
    torch.testing.assert_close(compiled_slopes, slopes)
