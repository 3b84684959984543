"""The catalogue: what it finds, and options from one place."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankloss
from rankloss.distributed import Gather
from rankloss.options import RankOptions, choices_of
from rankloss_trainers import catalog

ALONE = Gather(local_loss=False, gather_with_grad=False, rank=0, world_size=1)


# --- options from RankOptions ---------------------------------------------------------------------------

RANKCLIP = catalog.candidates()["rankclip"].load()


HIDDEN = {"reduction"}
FIELDS = [field for field in dataclasses.fields(RankOptions) if field.name not in HIDDEN]


def test_every_option_of_the_rank_terms_can_be_typed_but_those_without_a_use() -> None:
    own = {"schedule", "schedule_unit", "lambda_cross", "lambda_in", "agreement_every"}
    own |= {"reference", "reference_features", "distill_loss"}
    assert {option.key for option in RANKCLIP.options} == own | {field.name for field in FIELDS}


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in RANKCLIP.options:
        parser.add_argument(
            catalog.flag("rankclip", RANKCLIP, option), default=option.default, help="", **option.keywords
        )
    return catalog.option_values("rankclip", RANKCLIP, parser.parse_args(argv))


def test_defaults_are_those_of_the_library() -> None:
    loss = RANKCLIP.build(None, parsed(), ALONE)
    assert loss.consistency.options == RankOptions()


@given(st.data())
def test_what_is_typed_is_what_the_library_gets(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([f for f in FIELDS if f.name not in ("reference_scale", "bins")]))
    spelled = {None: "none", True: "include", False: "exclude"}
    if choices_of(field.name):
        value = data.draw(st.sampled_from(choices_of(field.name)))
        text = spelled[value] if value is None or isinstance(value, bool) else value
    else:
        bounds = field.metadata["bounds"]
        value = data.draw(st.integers(bounds["at_least"], bounds["at_most"]))
        text = str(value)
    options = parsed(f"--rankclip-{field.name.replace('_', '-')}", text)
    loss = RANKCLIP.build(nn.Identity(), options, ALONE)
    assert loss.consistency.options == RankOptions(**{field.name: value})
    # A trainer that is given values instead of text gives them as Python has them.
    loss = RANKCLIP.build(nn.Identity(), {**parsed(), field.name: value}, ALONE)
    assert loss.consistency.options == RankOptions(**{field.name: value})


SCALED = "--rankclip-model top_one --rankclip-reference-scale 2.5"


@pytest.mark.parametrize(
    ("typed", "refused", "described"),
    [
        ("", None, "schedule rankclip per epoch over 3 epoch(s)"),
        (f"{SCALED} --rankclip-reference teacher", None, ", reference teacher"),
        (f"{SCALED} --rankclip-reference-features t", None, ", reference-scale 2.5, reference-features t"),
        ("--rankclip-reference teacher --rankclip-distill-loss exclude", None, "distill-loss exclude"),
        (SCALED, "reference_scale", ""),
        ("--rankclip-reference teacher --rankclip-fixed-reference text", "fixed_reference", ""),
        ("--rankclip-distill-loss exclude", "distill_loss", ""),
        ("--rankclip-lists batch --rankclip-diagonal exclude --rankclip-ties random", "diagonal", ""),
    ],
)
def test_teacher_is_asked_for_by_an_option(typed: str, refused: str | None, described: str) -> None:
    options = parsed(*typed.split())
    assert RANKCLIP.uses_teacher(options) == ("teacher" in typed or "-features" in typed)
    reason = RANKCLIP.refuse(options, ALONE)
    assert (reason is None) if refused is None else reason.startswith(refused)
    assert described in RANKCLIP.described(options, 3)


def test_preset_of_a_teacher_is_rankclip_with_other_defaults() -> None:
    preset = catalog.candidates()["rankclip-distill"].load()
    options = catalog.option_values("rankclip-distill", preset, argparse.Namespace())
    changed = {key: value for key, value in options.items() if value != parsed()[key]}
    weights = dict.fromkeys(("lambda_cross", "lambda_in"), 64.0)
    assert changed == {"reference": "teacher", "top_k": 8, "distill_loss": "exclude", **weights}
    loss = preset.build(nn.Identity(), options, ALONE)
    loss.set_epoch(3, 3)
    assert loss.rank_weights == {"cross_modal": 8.0, "in_modal": 8.0}
    assert not preset.keeps_distillation(options)
    assert "weigh lambda * 64/16 by design" in preset.described(options, 3)


@pytest.mark.parametrize(
    "gather", [ALONE, dataclasses.replace(ALONE, local_loss=True, gather_with_grad=True)]
)
def test_every_own_loss_is_built_by_its_defaults(gather: Gather) -> None:
    for name, candidate in catalog.candidates().items():
        entry = candidate.load()
        options = {option.key: option.default for option in entry.options}
        if name == "alip":
            assert entry.refuse(options, gather) is not None
            options["caption_key"] = "synthetic"
        assert entry.refuse(options, gather) is None
        loss = entry.build(rankloss.ClipLoss(gather=gather), options, gather)
        assert isinstance(loss, nn.Module)


def test_one_list_of_the_batch_leaves_local_loss_where_that_is_exact() -> None:
    options = {**parsed(), "lists": "batch"}
    for local_loss, with_grad in ((True, True), (False, True), (False, False)):
        gather = dataclasses.replace(ALONE, local_loss=local_loss, gather_with_grad=with_grad)
        assert RANKCLIP.refuse(options, gather) is None
        assert RANKCLIP.build(nn.Identity(), options, gather).consistency.gather.local_loss is False
    approximate = dataclasses.replace(ALONE, local_loss=True)
    assert RANKCLIP.refuse(options, approximate).startswith("lists: batch needs the whole batch")


@pytest.mark.parametrize(
    ("type_", "good", "bad"),
    [
        (catalog.weight, {"0": 0.0, "1e3": 1000.0}, ["-1", "nan", "inf", "x"]),
        (catalog.number_type(), {"-2.5": -2.5}, ["nan", "-inf", ""]),
        (catalog.count, {"1": 1, "12": 12}, ["0", "1.5", "-3", "x"]),
        (catalog.number_type(int, at_least=0, at_most=4), {"0": 0, "4": 4}, ["-1", "5", ""]),
    ],
)
def test_types_take_what_is_in_range(type_: Any, good: dict[str, float], bad: list[str]) -> None:
    assert {text: type_(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}'"):
            type_(text)
