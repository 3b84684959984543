"""Ids of pairs as data: the same in every process, refused where they are none, counted, and in the loss."""

from __future__ import annotations

import itertools
import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from named_inputs import inputs_of
from torch import Tensor

import rankloss
import rankloss_trainers
from rankloss_trainers.clip_ids import PartnersLog
from rankloss_trainers.pair_ids import CAPTIONS, check_column, count_partners, hash_tokens, make_ids

TEXTS = ["a cat", "a dog", "a cat", "a cat ", ""]
OF_A_CAT = 1032509871426853262  # whatever the seed of Python's own hashes


def test_texts_have_equal_ids_where_they_are_equal() -> None:
    ids = make_ids(TEXTS, CAPTIONS)
    assert ids.dtype == torch.int64
    assert (ids[:, None] == ids).tolist() == [[a == b for b in TEXTS] for a in TEXTS]


def test_a_text_has_one_id_in_every_process() -> None:
    assert make_ids(TEXTS, CAPTIONS)[0] == OF_A_CAT


def test_texts_of_an_array_have_the_ids_of_a_list() -> None:
    assert torch.equal(make_ids(np.array(TEXTS), CAPTIONS), make_ids(TEXTS, CAPTIONS))


def test_integers_are_ids_as_they_are() -> None:
    of_one_dtype = torch.tensor([3, -1], dtype=torch.int8), np.array([3, -1], dtype=np.int32)
    for values in ([3, -1, 2**63 - 1, -(2**63)], [np.int16(3), np.int64(-1)], *of_one_dtype):
        ids = make_ids(values, "id")
        assert ids.dtype == torch.int64
        assert ids.tolist() == [int(x) for x in values]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0.5], r"row 0 has float 0\.5"),
        (["a", None], "row 1 has NoneType None"),
        ([1, math.nan], "row 1 has float nan"),
        ([True, False], "row 0 has bool True"),
        ([("a", "b")], "tuple"),
        ([1, "1"], "id .*1 in row 0 .*'1' in row 1"),
        ([2**63], "9223372036854775808 in row 0"),
        (torch.ones(3), r"id .*float32 \[3\]"),
        (torch.ones(3, dtype=torch.bool), r"bool \[3\]"),
        (torch.ones(3, 1, dtype=torch.int64), r"int64 \[3, 1\]"),
    ],
)
def test_values_that_are_no_ids_are_shown(values: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_ids(values, "id")


def test_a_column_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split .*5 rows"):
        check_column(make_ids(["train"] * 5, "split"), "split")
    for ids in ([7, 7, 8], [7], []):  # two values, and columns too short to tell
        check_column(torch.tensor(ids), "split")


@given(st.lists(st.integers(-3, 3)))
def test_partners_are_counted(ids: list[int]) -> None:
    assert count_partners(torch.tensor(ids, dtype=torch.int64)) == sum(ids.count(x) > 1 for x in ids)


TOKENIZED = st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=2)


@given(TOKENIZED)
def test_ids_of_tokens_are_equal_for_equal_texts_alone(texts: list[list[int]]) -> None:
    """Wherever the padding is, however long a batch's other texts are, and without padding, as in bags."""

    def padded(width: int, left: bool, pad: int) -> Tensor:
        rows = []
        for text in texts:
            padding = [pad] * (width - len(text))
            rows.append([*padding, *text] if left else [*text, *padding])
        return torch.tensor(rows)

    # A bag: all tokens in a row, and where each text begins.
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)[:-1]
    bag = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    ids = hash_tokens({"input_ids": bag, "offsets": starts}, None)
    assert (ids[:, None] == ids).tolist() == [[a == b for b in texts] for a in texts]
    tokenizer = SimpleNamespace(pad_token_id=9)  # no token of a text
    for width, left in itertools.product((4, 7), (False, True)):
        mask = {"attention_mask": (padded(width, left, 9) != 9).float()}
        assert torch.equal(hash_tokens({"input_ids": padded(width, left, 0), **mask}, None), ids)
        for processor in (tokenizer, SimpleNamespace(tokenizer=tokenizer)):
            assert torch.equal(hash_tokens({"input_ids": padded(width, left, 9)}, processor), ids)


def test_inputs_whose_padding_is_unknown_have_no_ids() -> None:
    for inputs, tokenizer, named in (
        ({"pixel_values": torch.ones(2, 3)}, None, "^input_ids .*pixel_values"),
        ({"input_ids": torch.ones(2, 3)}, None, "^attention_mask,"),
        ({"input_ids": torch.ones(2, 3)}, SimpleNamespace(pad_token_id=None), "^attention_mask,"),
    ):
        with pytest.raises(ValueError, match=named):
            hash_tokens(inputs, tokenizer)


# --- the loss clip-ids ---------------------------------------------------------------------------------

IDS = torch.tensor([5, 1, 5, 2, 1, 5, 3, 4])
ALONE = rankloss.Gather(rank=0, world_size=1)


SAME_ID = ["ignore", "share"]
WITH_IDS = [
    "clip-ids",
    "clip-ids+rankclip",
    "clip-ids+tiny",
    "clip-ids+rankclip-distill+tiny+mimicry",
    "clip-ids+ranked-lists",
]


def options_of_ids(name: str, same_id: str) -> dict[str, Any]:
    """The option as ``create`` takes it: of joined losses, by the loss that has it."""
    return {"clip-ids": {"same_id": same_id}} if "+" in name else {"same_id": same_id}


@pytest.mark.parametrize("same_id", SAME_ID)
@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_reach_the_base_under_other_terms(name: str, same_id: str) -> None:
    loss = rankloss_trainers.create(name, **options_of_ids(name, same_id))
    inputs = inputs_of(name.rpartition("+")[2])  # the last loss has all inputs that are needed
    v, t, s = (inputs[key] for key in ("image_features", "text_features", "logit_scale"))
    ids = inputs.pop("pair_ids", IDS)
    expected = rankloss.ClipLoss(same_id=same_id)(v, t, s, pair_ids=ids)
    for step in (1, 3):
        loss.set_progress(step, 3)
        entries = loss(**inputs, pair_ids=ids, output_dict=True)
        torch.testing.assert_close(entries["contrastive_loss"], expected)


@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_that_are_missing_are_named_under_other_terms(name: str) -> None:
    loss = rankloss_trainers.create(name)
    loss.set_progress(3, 3)
    inputs = inputs_of(name.rpartition("+")[2])
    inputs.pop("pair_ids", None)
    with pytest.raises(ValueError, match="pair_ids"):
        loss(**inputs)


@pytest.mark.parametrize("same_id", SAME_ID)
@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_reach_a_sigmoid_base_under_other_terms(name: str, same_id: str) -> None:
    base = rankloss.SigLipLoss(gather=False)
    loss = rankloss_trainers.create(name, base, gather=ALONE, **options_of_ids(name, same_id))
    bases = [x for x in loss.modules() if isinstance(x, rankloss.SigLipLoss)]
    assert [x.same_id for x in bases] == [same_id]


def test_the_log_has_the_share_of_pairs_with_a_partner_and_warns_of_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning, after a hundred steps or so without a partner."""
    loss = rankloss.ClipLoss(same_id="ignore", gather=False)
    for ids, share, warnings in ((IDS, 5 / 8, 0), (torch.arange(8), 0.0, 1)):
        log = PartnersLog()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rankloss_trainers"):
            entries = [log(loss, {}, step, {"pair_ids": ids}) for step in range(150)]
        assert {x["pairs_with_partner"].item() for x in entries} == {share}
        assert len(caplog.records) == warnings
