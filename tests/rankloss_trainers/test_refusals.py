"""The table of refusals: every row is reached, and says what its user typed."""

from __future__ import annotations

import doctest
import string
from typing import Any

import pytest
from torch import nn

import rankloss_trainers.refusals
from rankloss.distributed import Gather
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry
from rankloss_trainers.refusals import TABLE, Refusal, check_criterion, reason_against, refuse_run

ALONE = Gather(local_loss=False, gather_with_grad=False, rank=0, world_size=1)


def entry_that_needs(needs: tuple[str, ...]) -> LossEntry:
    return LossEntry(
        build=lambda base, *_: base,
        caption_key=lambda _: "key" if "caption" in needs else None,
        uses_teacher=lambda _: bool({"teacher", "features", "distill_loss"} & set(needs)),
        reference_features=lambda _: "features.npz" if "features" in needs else None,
        keeps_distillation=lambda _: "distillation" in needs,
        no_sigmoid="it needs a softmax" * ("softmax" in needs),
        only_sigmoid="it needs a bias" * ("sigmoid" in needs),
    )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join((*row.needs, "where", *row.when)))
def test_every_row_is_the_answer_somewhere(row: Refusal) -> None:
    words = {condition: f"--{condition.replace('_', '-')}" for condition in row.when}
    options = {"distill_loss": "include"} if "distill_loss" in row.needs else {}
    said = reason_against("mine", entry_that_needs(row.needs), options, ALONE, words)
    shown = {name for _, name, _, _ in string.Formatter().parse(row.reason) if name}
    values = {**words, "loss": "mine", "no_sigmoid": "a softmax", "only_sigmoid": "a bias"}
    assert said is not None
    assert all(values[name] in said for name in shown)
    # Nothing is refused without one of the conditions, or one of the needs.
    for condition in row.when:
        fewer = {name: said for name, said in words.items() if name != condition}
        assert reason_against("mine", entry_that_needs(row.needs), options, ALONE, fewer) is None
    if row.needs:
        assert reason_against("mine", entry_that_needs(()), {}, ALONE, words) is None
        refuse_run(words)
    else:
        with pytest.raises(ValueError, match=r".+"):
            refuse_run(words)


def test_what_the_loss_refuses_itself_comes_after_the_table() -> None:
    entry = LossEntry(build=lambda base, *_: base, refuse=lambda options, _: f"depth: {options['depth']}")
    assert reason_against("mine", entry, {"depth": 3}, ALONE, {}) == "depth: 3"
    assert "torchrun" in str(reason_against("mine", entry, {"depth": 3}, ALONE, {"horovod": "--horovod"}))


@pytest.mark.parametrize("name", catalog.candidates())
def test_rows_about_an_option_begin_with_its_key(name: str) -> None:
    keys = {option.key for option in catalog.candidates()[name].load().options}
    rows = [row.reason.partition(":")[0] for row in TABLE if row.reason.partition(":")[0].isidentifier()]
    assert rows
    assert "reference_features" not in keys or keys >= set(rows)


@pytest.mark.parametrize(
    ("criterion", "error"), [(3, TypeError), (nn.Linear(2, 2), ValueError), (nn.Identity(), None)]
)
def test_what_can_be_trained_with_is_a_module_without_parameters(criterion: Any, error: Any) -> None:
    if error is None:
        assert check_criterion("mine", criterion) is criterion
    else:
        with pytest.raises(error, match="mine"):
            check_criterion("mine", criterion)


def test_examples() -> None:
    assert doctest.testmod(rankloss_trainers.refusals).failed == 0
