"""The catalogue: what it finds, and options from one place."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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
        ("", None, "per epoch over 3 epoch(s) (few values of lambda; --rankclip-schedule-unit step"),
        (
            "--rankclip-reference teacher --rankclip-lambda-in 64",
            None,
            ", reference teacher, the rank terms weigh lambda * 64/16 by design",
        ),
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
    if refused is None:
        assert reason is None
        assert described in RANKCLIP.described(options, 3)
    else:
        assert reason.startswith(refused)


def test_one_list_of_the_batch_leaves_local_loss_where_that_is_exact() -> None:
    options = {**parsed(), "lists": "batch"}
    for local_loss, with_grad in ((True, True), (False, True), (False, False)):
        gather = dataclasses.replace(ALONE, local_loss=local_loss, gather_with_grad=with_grad)
        assert RANKCLIP.refuse(options, gather) is None
        assert RANKCLIP.build(nn.Identity(), options, gather).consistency.gather.local_loss is False
    approximate = dataclasses.replace(ALONE, local_loss=True)
    assert RANKCLIP.refuse(options, approximate).startswith("lists=")


def test_weights_are_finite_numbers_of_at_least_0() -> None:
    assert [catalog.weight(text) for text in ("0", "1e3")] == [0, 1000]
    for text in ("-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}'"):
            catalog.weight(text)
