"""Losses joined by +: their options, their teacher, and the joins that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from named_inputs import HOST, inputs_of
from taught import ROWS, teacher_features, write_teacher_folder
from tiny_losses import TinyLoss

import rankloss_trainers
from rankloss import ClipLoss, Gather, MimicryLoss, RankClipLoss, SigLipLoss, SpreadLoss
from rankloss_trainers.catalog import choose
from rankloss_trainers.composing import base_of
from rankloss_trainers.declared import Named
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Runtime
from registered import register


def runtime_of(name: str, options: Any, teacher: str | None = None) -> Runtime:
    """The runtime of losses by name, with their options, in a run with a teacher or without one."""
    return Runtime(HOST, choose(name, options), RunOptions(teacher=teacher), gather=False)


def test_the_terms_are_those_of_each_loss_and_the_base_is_one() -> None:
    """The expected entries are those of each loss called alone, with the preset's defaults written out."""
    taught = inputs_of("rankclip-distill")
    pairs = {key: x for key, x in taught.items() if not key.startswith("reference_")}
    loss = rankloss_trainers.create(
        "rankclip-distill+mimicry+tiny",
        **{"rankclip-distill": {"schedule": "constant", "top_k": 3}},
        mimicry={"weight": 0.5},
        tiny={"weight": 2.0},
    )
    ranks = RankClipLoss(schedule="constant", lambda_cross=16, lambda_in=16, top_k=3)
    expected = {
        **ranks(**taught, output_dict=True),
        **MimicryLoss(weight=0.5)(**taught, output_dict=True),
        **TinyLoss(weight=2.0)(**pairs, output_dict=True),
    }
    actual = loss(**taught, output_dict=True)
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(list(actual.values()), list(expected.values()))
    assert [type(part) for part in loss.modules()].count(ClipLoss) == 1


@pytest.mark.parametrize("base", [None, SigLipLoss()], ids=["CLIP", "SigLIP"])
@pytest.mark.parametrize("other", ["rankclip", "clip-ids"])
def test_the_spread_joins_in_any_order_and_changes_no_other_entry(other: str, base: Any) -> None:
    taught = inputs_of(other) | inputs_of("siglip-streamed" if base else "clip-streamed")
    of_pairs = {key: taught[key] for key in ("image_features", "text_features", "logit_scale")}
    spread = SpreadLoss()(**of_pairs, output_dict=True)["spread_loss"]
    assert spread > 0.1, "the term is there"
    alone = rankloss_trainers.create(other, base)
    alone.set_progress(2, 4)
    expected = {**alone(**taught, output_dict=True), "spread_loss": spread}
    for name in (f"spread+{other}", f"{other}+spread"):
        joined = rankloss_trainers.create(name, base)
        joined.set_progress(2, 4)
        torch.testing.assert_close(dict(joined(**taught, output_dict=True)), expected)


@pytest.mark.parametrize("base", [None, SigLipLoss()], ids=["CLIP", "SigLIP"])
def test_the_preset_of_two_encoders_is_mimicry(base: Any) -> None:
    taught = inputs_of("mimicry") | inputs_of("siglip-streamed" if base else "clip-streamed")
    expected = MimicryLoss(base)(**taught, output_dict=True)
    actual = rankloss_trainers.create("rankclip-encoders", base)(**taught, output_dict=True)
    assert actual["mimicry_loss"] > 0.1, "the term is there"
    torch.testing.assert_close(actual, expected)


def test_the_softmax_of_two_encoders_with_spread_is_rankclip_in_and_spread_by_options() -> None:
    """The form that rankclip-encoders had, as docs/teachers.md and the changelog tell it."""
    taught = inputs_of("rankclip-in") | inputs_of("mimicry")
    of_pairs = {key: x for key, x in taught.items() if not key.startswith("reference_")}
    options = {
        "lambda_in": 16.0,
        "schedule": "constant",
        "model": "top_one",
        "reference_scale": 40.0,
        "diagonal": False,
    }
    expected = {
        **RankClipLoss(lambda_cross=0.0, **options)(**taught, output_dict=True),
        **SpreadLoss()(**of_pairs, output_dict=True),
    }
    joined = rankloss_trainers.create("rankclip-in+spread", **{"rankclip-in": options})
    actual = joined(**taught, output_dict=True)
    assert actual.keys() == expected.keys()
    assert min(actual["in_modal_loss"], actual["spread_loss"]) > 0.1, "both terms are there"
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "loss", "key", "value"),
    [
        ("rankclip-distill+tiny", "rankclip-distill", "top_k", 8),  # as alone
        ("rankclip-distill+mimicry", "rankclip-distill", "top_k", 4),
        ("rankclip-distill+mimicry", "mimicry", "weight", 16.0),
        ("mimicry+rankclip-distill", "mimicry", "weight", 16.0),
        ("tiny+mimicry+rankclip-distill", "mimicry", "weight", 16.0),
        ("mimicry+rankclip", "mimicry", "weight", 8.0),  # as alone
        ("rankclip-in+rankclip-encoders", "rankclip-encoders", "weight", 8.0),  # as alone
    ],
)
def test_rankclip_distill_and_mimicry_have_other_defaults_beside_each_other_alone(
    name: str, loss: str, key: str, value: Any
) -> None:
    """In either order, as docs/teachers.md has them."""
    values = {chosen.name: chosen.values for chosen in choose(name)}
    assert values[loss][key] == value


@pytest.mark.parametrize(
    ("name", "loss", "key", "value"),
    [
        ("rankclip+mimicry", "mimicry", "weight", 2),
        ("rankclip-distill+mimicry", "rankclip-distill", "top_k", 8),
    ],
)
def test_options_are_given_by_loss(name: str, loss: str, key: str, value: Any) -> None:
    values = {chosen.name: chosen.values for chosen in choose(name, {loss: {key: value}})}
    assert values[loss][key] == value


@pytest.mark.parametrize("name", ["clip-ids", "clip-smooth", "clip-streamed", "tiny-caption"])
def test_a_loss_in_place_of_the_trainers_is_the_innermost_wherever_it_stands(name: str) -> None:
    options = {name: {"caption_key": "x"}} if name == "tiny-caption" else {}  # which it has to be given
    losses = choose(f"rankclip+{name}+mimicry", options)
    assert [loss.name for loss in losses] == [name, "rankclip", "mimicry"]
    last, first = (runtime_of(joined, options) for joined in (f"rankclip+{name}", f"{name}+rankclip"))
    assert str(last.criterion) == str(first.criterion), "their classes and options"
    for run in (last, first):
        assert run.own_base not in run.criterion.modules(), "the loss stands in its place"


def test_another_packages_chunk_size_and_memory_budget_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may mean something else, and leave the base as it is; those of rankloss's losses reach it."""

    def in_chunks(base: Any, *, chunk_size: int = 1, memory_budget: int = 1, gather: Any = None) -> TinyLoss:
        """A loss in chunks of words."""
        return TinyLoss(base, weight=chunk_size * memory_budget, gather=gather)

    register(monkeypatch, words=in_chunks)
    of_words = {"chunk_size": 7, "memory_budget": 2}
    assert runtime_of("words", of_words).criterion.weight == 7 * 2, "the loss itself has them"
    assert base_of(choose("words", of_words), Gather()).streaming == ClipLoss().streaming
    of_rankclip = {"chunk_size": 3, "memory_budget": 0}
    for name in ("rankclip+words", "words+rankclip"):
        joined = choose(name, {"rankclip": of_rankclip, "words": of_words})
        assert base_of(joined, Gather()).streaming == of_rankclip


def test_a_row_has_other_defaults_beside_a_loss_whatever_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    light = Named(TinyLoss, {"weight": 3.0}, beside={"spread": {"weight": 0.25}})
    register(monkeypatch, light=light)
    for name, weight in (
        ("light", 3.0),
        ("light+spread", 0.25),
        ("spread+light", 0.25),
        ("light+rankclip", 3.0),
    ):
        values = {loss.name: loss.values for loss in choose(name)}
        assert values["light"]["weight"] == weight
    light_of_user, _spread = choose("light+spread", {"light": {"weight": 1.0}})
    assert light_of_user.values["weight"] == 1.0


ENCODERS = "image=efficientnet-lite0,text=minilm"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"mimicry": {"weight": 2.0}}, id="an option of mimicry"),
        pytest.param({"rankclip-in": {"lambda_cross": 1.0}}, id="cross-modal ranks, refused too"),
    ],
)
@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        pytest.param(
            ENCODERS, "two encoders that have no common space; image=A,text=B,align", id="two encoders"
        ),
        pytest.param("text=minilm", "an encoder of one modality$", id="one encoder"),
    ],
)
def test_mimicry_of_encoders_is_refused_for_its_one_reason(options: Any, teacher: str, reason: str) -> None:
    for name in ("rankclip-in+mimicry", "mimicry+rankclip-in"):
        with pytest.raises(ValueError, match=f"mimicry cannot copy {reason}"):
            runtime_of(name, options, teacher)


def folder_of_teacher(place: Path, spaces: str) -> str:
    """A folder of features of images and texts in ``common`` or ``separate`` spaces; its path."""
    columns = {side: [f"{side} {i}" for i in range(ROWS)] for side in ("image", "text")}
    data = pytest.importorskip("datasets").Dataset.from_dict(columns)
    return write_teacher_folder(
        place / spaces, data, teacher_features(), image_column="image", caption_column="text", spaces=spaces
    )


@pytest.fixture(params=["two encoders", "a folder"])
def without_common_space(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A teacher whose images and texts cannot be compared."""
    return ENCODERS if request.param == "two encoders" else folder_of_teacher(tmp_path, "separate")


@pytest.mark.parametrize("name", ["rankclip", "rankclip-distill"])
def test_a_teacher_without_a_common_space_is_refused_for_cross_modal_lists(
    name: str, without_common_space: str
) -> None:
    with pytest.raises(ValueError, match="lambda_cross must be 0"):
        runtime_of(name, {}, without_common_space)


def test_a_teacher_without_a_common_space_is_taken_for_in_modal_lists(without_common_space: str) -> None:
    assert runtime_of("rankclip-in", {}, without_common_space).teaching.use == "required"


def test_a_teacher_without_a_common_space_is_refused_for_a_copy_beside_its_ranks(
    without_common_space: str,
) -> None:
    with pytest.raises(ValueError, match="mimicry cannot copy"):
        runtime_of("rankclip-in+mimicry", {}, without_common_space)


@pytest.mark.parametrize("name", ["rankclip", "rankclip-distill"])
def test_a_folder_of_a_common_space_is_taken_for_all_lists(name: str, tmp_path: Path) -> None:
    assert runtime_of(name, {}, folder_of_teacher(tmp_path, "common")).teaching.use == "required"


def test_an_encoder_is_looked_up_before_the_lists_that_it_can_rank() -> None:
    """One encoder cannot rank rankclip's cross-modal lists, but the error is about its misspelt name."""
    with pytest.raises(ValueError, match=r"teacher: .*resnet181"):
        runtime_of("rankclip", {}, "image=resnet181")


def test_a_teacher_of_a_loss_that_uses_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher: .*tiny.*x/"):
        runtime_of("tiny", {}, "x/")


def test_a_preset_with_a_teacher_of_its_own_needs_no_option() -> None:
    run = runtime_of("rankclip-encoders", {})
    assert run.teaching.teacher is not None
    assert (run.teaching.teacher.text, run.teaching.use) == (f"{ENCODERS},align", "required")
