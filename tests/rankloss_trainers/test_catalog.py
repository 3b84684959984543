"""The catalogue: what it finds, and options from one place."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankloss.distributed import Gather
from rankloss.options import CHOICES, RankOptions
from rankloss_trainers import catalog
from rankloss_trainers.command_line import LossArguments

ALONE = Gather(local_loss=False, gather_with_grad=False, rank=0, world_size=1)


# --- options from RankOptions ---------------------------------------------------------------------------

RANKCLIP: Any = catalog.load("rankclip")


IN_PYTHON_ALONE = {"reduction", "lists", "worth", "ties", "discount", "fixed_reference"}
FIELDS = [field for field in dataclasses.fields(RankOptions) if field.name not in IN_PYTHON_ALONE]


def test_every_option_of_the_rank_terms_can_be_typed_but_those_without_a_use() -> None:
    own = {"schedule", "schedule_unit", "lambda_cross", "lambda_in", "agreement_every"}
    own |= {"reference", "reference_features", "teacher", "distill_loss"}
    assert {*RANKCLIP.options()} == own | {field.name for field in FIELDS}


def parsed(*argv: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    losses = LossArguments(parser, ["rankclip"], default="rankclip")
    return losses.chosen(parser.parse_args(argv))


def test_defaults_are_those_of_the_library() -> None:
    loss = parsed().build(None, ALONE)
    assert loss.consistency.options == RankOptions()


@given(st.data())
def test_what_is_typed_is_what_the_library_gets(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([f for f in FIELDS if f.name not in ("reference_scale", "bins")]))
    spelled = {None: "none", True: "include", False: "exclude"}
    if CHOICES[field.name]:
        value = data.draw(st.sampled_from(CHOICES[field.name]))
        text = spelled[value] if value is None or isinstance(value, bool) else value
    else:
        bounds = field.metadata["bounds"]
        value = data.draw(st.integers(bounds.get("at_least", 1), bounds.get("at_most", 2**31 - 1)))
        text = str(value)
    options = parsed(f"--rankclip-{field.name.replace('_', '-')}", text)
    loss = options.build(nn.Identity(), ALONE)
    assert loss.consistency.options == RankOptions(**{field.name: value})
    # From Python the same, as text and as Python has it.
    assert all(RANKCLIP.of({field.name: given}) == options for given in (text, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "reference",
            "Teacher",
            "reference must be one of auto, own, teacher; got 'Teacher'; did you mean teacher",
        ),
        ("distill_loss", "exclud", "distill_loss .*did you mean exclude"),
        ("schedule_unit", "x", "schedule_unit must be one of auto, epoch, step; got 'x'$"),
        ("diagonal", 1, "diagonal must be one of include, exclude; got 1"),
        ("lambda_in", None, "lambda_in must be a finite number of at least 0; got None"),
        *(("lambda_in", x, "lambda_in must be a finite number") for x in (math.nan, True, "x")),
        *(("top_k", x, "top_k must be an integer") for x in (2.5, "2.5", True)),
        ("reference_features", 3, "reference_features must be text; got 3"),
    ],
)
def test_value_that_an_option_cannot_have_is_refused(key: str, value: Any, message: str) -> None:
    """The same from a command line, where it can be typed."""
    with pytest.raises(ValueError, match=message):
        RANKCLIP(**{key: value})
    if isinstance(value, str):
        with pytest.raises(argparse.ArgumentError, match=message.partition(" ")[2]):
            parsed(f"--rankclip-{key.replace('_', '-')}", value)


def test_values_that_python_has_are_taken() -> None:
    values = {"top_k": np.int64(3), "lambda_in": 2, "reference_features": Path("x"), "diagonal": False}
    options = RANKCLIP(**values)
    assert {key: getattr(options, key) for key in values} == {**values, "reference_features": "x"}
    assert catalog.load("rankclip-distill").of({"top_k": None}).top_k is None
    with pytest.raises(TypeError, match="rankclip has no option 'topk'; did you mean top_k"):
        RANKCLIP.of({"topk": 1})


SCALED = "--rankclip-model top_one --rankclip-reference-scale 2.5"


@pytest.mark.parametrize(
    ("typed", "refused", "described"),
    [
        ("", None, "per step over 3 epoch(s) (in fewer than ten epochs a ramp per epoch has few steps; "),
        ("--loss-schedule-unit epoch", None, "per epoch over 3 epoch(s)"),
        (
            "--loss-teacher given --rankclip-lambda-in 64",
            None,
            ", reference teacher, the rank terms weigh lambda * 64/16",
        ),
        (f"{SCALED} --loss-teacher t", None, ", reference-scale 2.5, reference-features t"),
        ("--loss-teacher given", None, "distill-loss exclude"),
        (SCALED, "--rankclip-reference-scale: multiplies a teacher's", ""),
        (
            "--rankclip-reference own --loss-teacher t",
            "--loss-teacher: t .*reference own",
            "",
        ),
        ("", "--rankclip-distill-loss: exclude", ""),
        ("--rankclip-model top_one --rankclip-top-k 2", "--rankclip-model: model='top_one' needs top_k", ""),
        ("--loss-teacher ViT-B-33:openai", "--loss-teacher: --model ViT-B-33: unknown model", ""),
        (
            "--loss-teacher text=minilm --rankclip-reference own",
            "--loss-teacher: text=minilm excl",
            "",
        ),
        (
            "--loss-teacher text=minilm --loss-teacher t",
            "--loss-teacher: text=minilm",
            "",
        ),
        ("--rankclip-bins 9", "--rankclip-bins: bins=9 needs method='bin'", ""),
    ],
)
def test_teacher_is_asked_for_by_an_option(typed: str, refused: str | None, described: str) -> None:
    if refused is not None:
        with pytest.raises(ValueError, match=f"^{refused}"):
            parsed(*typed.split())
        return
    options = parsed(*typed.split())
    assert (options.use_of_teacher == "required") == ("teacher" in typed or "-features" in typed)
    assert described in options.describe(3)


def test_two_encoders_without_a_common_space_rank_the_in_modal_lists() -> None:
    encoders = catalog.load("rankclip-encoders").of({})
    assert encoders.teacher == "image=efficientnet-lite0,text=minilm"
    assert (encoders.lambda_cross, encoders.lambda_in, encoders.model) == (0, 16, "top_one")
    one = catalog.load("rankclip-distill").of({"teacher": "text=minilm"})
    assert (one.lambda_cross, one.lambda_in, one.model, one.top_k) == (0, 16, "plackett_luce", 16)
    with pytest.raises(ValueError, match=r"^teacher must be of encoders; rankclip-distill learns from a mod"):
        catalog.load("rankclip-encoders").of({"teacher": "ViT-B-32:openai"})
    assert RANKCLIP.of({"teacher": "text=minilm"}).lambda_cross == 0
    assert RANKCLIP.of({"teacher": "ViT-B-32:openai"}).lambda_cross == 1
    with pytest.raises(ValueError, match=r"^lambda_cross must be 0, as .*separate spaces"):
        RANKCLIP.of({"teacher": "text=minilm", "lambda_cross": 1})
    with pytest.raises(ValueError, match=r"^teacher: the teacher's images and texts have separate spaces"):
        catalog.choose("mimicry", {"teacher": "text=minilm"})
    joined = catalog.choose("rankclip-distill+mimicry", {"mimicry": {"teacher": "ViT-B-32:openai"}})
    assert [part.teacher for part in joined.parts] == ["ViT-B-32:openai"] * 2


@pytest.mark.parametrize(
    ("given", "epochs", "unit"),
    [
        ({}, 9, "step"),
        ({}, 10, "epoch"),
        ({}, 2.5, "step"),
        ({}, math.inf, "step"),
        ({"schedule_unit": "epoch"}, 2, "epoch"),
        ({"schedule_unit": "epoch"}, 1, "step"),
        ({"schedule_unit": "step"}, 64, "step"),
    ],
)
def test_a_short_run_goes_by_steps(given: Any, epochs: float, unit: str) -> None:
    chosen = RANKCLIP.of(given)
    assert chosen.unit(epochs) == unit
    assert f"per {unit}" in chosen.describe(epochs)
