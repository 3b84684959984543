"""The table of refusals: every row is reached, and says what its user typed."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from torch import nn

import rankloss_trainers.refusals
from rankloss.distributed import Gather
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry
from rankloss_trainers.refusals import TABLE, check_criterion, reason_against, refuse_run

ALONE = Gather(local_loss=False, gather_with_grad=False, rank=0, world_size=1)


ROWS = [(needs, when, reason) for needs, rows in TABLE.items() for when, reason in rows.items()]


def entry_that_needs(needs: str) -> LossEntry:
    return LossEntry(
        build=lambda base, *_: base,
        caption_key=lambda _: "key" if {"caption", "companion"} & {*needs.split()} else None,
        uses_teacher=lambda _: bool({"teacher", "features"} & {*needs.split()}),
        reference_features=lambda _: "features.npz" if "features" in needs else None,
        keeps_distillation=lambda _: "distillation" in needs,
        no_sigmoid="it needs a softmax" * ("softmax" in needs),
        only_sigmoid="it needs a bias" * ("sigmoid" in needs),
    )


@pytest.mark.parametrize(("needs", "when", "reason"), ROWS)
def test_every_row_is_the_answer_somewhere(needs: str, when: str, reason: str) -> None:
    words = {condition: f"--{condition.replace('_', '-')}" for condition in when.split()}
    options = {"distill_loss": "include"} if "distill_loss" in needs else {}
    said = reason_against("mine", entry_that_needs(needs), options, ALONE, words)
    values = {**words, "loss": "mine", "no_sigmoid": "it needs a softmax", "only_sigmoid": "it needs a bias"}
    assert said == reason.format(**values)
    # Nothing is refused without one of the conditions, or without the needs.
    for condition in words:
        fewer = {name: said for name, said in words.items() if name != condition}
        assert reason_against("mine", entry_that_needs(needs), options, ALONE, fewer) is None
    if needs:
        assert reason_against("mine", entry_that_needs(""), {}, ALONE, words) is None
        refuse_run(words)
    else:
        with pytest.raises(ValueError, match=r".+"):
            refuse_run(words)


def test_what_the_loss_refuses_itself_comes_after_the_table() -> None:
    entry = LossEntry(build=lambda base, *_: base, refuse=lambda options, _: f"depth: {options['depth']}")
    assert reason_against("mine", entry, {"depth": 3}, ALONE, {}) == "depth: 3"
    assert "torchrun" in str(reason_against("mine", entry, {"depth": 3}, ALONE, {"horovod": "--horovod"}))


def test_rows_about_an_option_begin_with_its_key() -> None:
    keys = {option.key for option in catalog.candidates()["rankclip"].load().options}
    heads = {reason.partition(":")[0] for _, _, reason in ROWS}
    assert {head for head in heads if head.isidentifier()} <= keys


@pytest.mark.parametrize(("criterion", "error"), [(3, TypeError), (nn.Linear(2, 2), ValueError)])
def test_what_can_be_trained_with_is_a_module_without_parameters(criterion: Any, error: Any) -> None:
    with pytest.raises(error, match="mine"):
        check_criterion("mine", criterion)


def test_examples() -> None:
    assert doctest.testmod(rankloss_trainers.refusals).failed == 0
