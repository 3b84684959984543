"""Ids of pairs as data: the same in every process, refused where they are none, counted, and in the loss."""

from __future__ import annotations

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
ID_OF_A_CAT = 1032509871426853262  # as it was in another process: no seed of Python's own hashes is in it


def test_texts_have_equal_ids_where_they_are_equal() -> None:
    ids = make_ids(TEXTS, CAPTIONS)
    assert ids.dtype == torch.int64
    assert (ids[:, None] == ids).tolist() == [[a == b for b in TEXTS] for a in TEXTS]


def test_a_text_has_one_id_in_every_process() -> None:
    assert make_ids(TEXTS, CAPTIONS)[0] == ID_OF_A_CAT


def test_texts_of_an_array_have_the_ids_of_a_list() -> None:
    assert torch.equal(make_ids(np.array(TEXTS), CAPTIONS), make_ids(TEXTS, CAPTIONS))


def test_integers_are_ids_as_they_are() -> None:
    for values in (
        [3, -1, 2**63 - 1, -(2**63)],
        [np.int16(3), np.int64(-1)],
        torch.tensor([3, -1], dtype=torch.int8),
        np.array([3, -1], dtype=np.int32),
    ):
        ids = make_ids(values, "id")
        assert ids.dtype == torch.int64
        assert ids.tolist() == [int(x) for x in values]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        pytest.param([0.5], r"row 0 has float 0\.5", id="float"),
        pytest.param(["a", None], "row 1 has NoneType None", id="None"),
        pytest.param([1, math.nan], "row 1 has float nan", id="NaN"),
        pytest.param([True, False], "row 0 has bool True", id="bool"),
        pytest.param([("a", "b")], "row 0 has tuple", id="tuple"),
        pytest.param(["a", ""], "row 1 has none: ''", id="an empty text that is no caption"),
        pytest.param("ab", "must be several, one for each row; got 'ab'", id="one text"),
        pytest.param([1, "1"], "id .*1 in row 0 .*'1' in row 1", id="integer and text"),
        pytest.param([2**63], "9223372036854775808 in row 0", id="beyond int64"),
        pytest.param(
            torch.tensor([3, 2**63], dtype=torch.uint64), "9223372036854775808 in row 1", id="uint64 tensor"
        ),
        pytest.param(torch.ones(3), r"id .*float32 \[3\]", id="float tensor"),
        pytest.param(torch.ones(3, dtype=torch.bool), r"bool \[3\]", id="bool tensor"),
        pytest.param(torch.ones(3, 1, dtype=torch.int64), r"int64 \[3, 1\]", id="matrix"),
    ],
)
def test_values_that_are_no_ids_are_shown(values: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        make_ids(values, "id")


def test_a_column_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split .*5 rows"):
        check_column(make_ids(["train"] * 5, "split"), "split")


@pytest.mark.parametrize("ids", [[7, 7, 8], [7], []], ids=["two values", "too short to tell", "empty"])
def test_a_column_of_two_values_or_less_than_two_rows_is_no_error(ids: list[int]) -> None:
    check_column(torch.tensor(ids), "split")


@given(st.lists(st.integers(-3, 3)))
def test_the_rows_whose_id_another_row_has_are_counted(ids: list[int]) -> None:
    assert count_partners(torch.tensor(ids, dtype=torch.int64)) == sum(ids.count(x) > 1 for x in ids)


TEXTS_OF_TOKENS = st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=2)
"""Two or more texts of at most four tokens each, which are 0, 1 or 2."""


def ids_in_a_bag(texts: list[list[int]]) -> Tensor:
    """The ids of texts in a bag: the tokens of all in one row, and where each text begins."""
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)[:-1]
    bag = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return hash_tokens({"input_ids": bag, "offsets": starts}, None)


def padded(texts: list[list[int]], *, width: int, is_left: bool, pad: int) -> Tensor:
    """The texts in rows of a width, with padding on the left or on the right."""
    rows = []
    for text in texts:
        padding = [pad] * (width - len(text))
        rows.append([*padding, *text] if is_left else [*text, *padding])
    return torch.tensor(rows)


@given(TEXTS_OF_TOKENS)
def test_ids_of_tokens_are_equal_for_equal_texts_alone(texts: list[list[int]]) -> None:
    ids = ids_in_a_bag(texts)
    assert (ids[:, None] == ids).tolist() == [[a == b for b in texts] for a in texts]


@pytest.mark.parametrize("is_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("width", [4, 7])
@given(texts=TEXTS_OF_TOKENS)
def test_padding_changes_no_id_of_tokens(texts: list[list[int]], width: int, is_left: bool) -> None:
    """Padding is known by the attention mask, or by the padding token of a tokenizer or of a processor's."""
    pad_in_texts, pad_in_no_text = 0, 9  # texts have 0, 1 and 2; a mask tells padding of any token
    told_by_token = padded(texts, width=width, is_left=is_left, pad=pad_in_no_text)
    is_text = told_by_token != pad_in_no_text
    told_by_mask = padded(texts, width=width, is_left=is_left, pad=pad_in_texts)
    masked = {"input_ids": told_by_mask, "attention_mask": is_text.float()}
    assert torch.equal(hash_tokens(masked, None), ids_in_a_bag(texts))
    tokenizer = SimpleNamespace(pad_token_id=pad_in_no_text)
    for processor in (tokenizer, SimpleNamespace(tokenizer=tokenizer)):
        assert torch.equal(hash_tokens({"input_ids": told_by_token}, processor), ids_in_a_bag(texts))


@pytest.mark.parametrize(
    ("inputs", "tokenizer", "missing"),
    [
        pytest.param({"pixel_values": torch.ones(2, 3)}, None, "^input_ids .*pixel_values", id="no tokens"),
        pytest.param({"input_ids": torch.ones(2, 3)}, None, "^attention_mask,", id="no tokenizer"),
        pytest.param(
            {"input_ids": torch.ones(2, 3)},
            SimpleNamespace(pad_token_id=None),
            "^attention_mask,",
            id="a tokenizer without a padding token",
        ),
    ],
)
def test_inputs_whose_padding_is_unknown_have_no_ids(inputs: Any, tokenizer: Any, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        hash_tokens(inputs, tokenizer)


# --- the loss clip-ids ---------------------------------------------------------------------------------

IDS = torch.tensor([5, 1, 5, 2, 1, 5, 3, 4])
WITH_A_PARTNER = 5 / 8  # the three rows of id 5, and the two of id 1
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
    """The option ``same_id`` as ``create`` takes it: of joined losses, by the loss that has it."""
    return {"clip-ids": {"same_id": same_id}} if "+" in name else {"same_id": same_id}


@pytest.mark.parametrize("same_id", SAME_ID)
@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_reach_the_base_under_other_terms(name: str, same_id: str) -> None:
    loss = rankloss_trainers.create(name, **options_of_ids(name, same_id))
    inputs = inputs_of(name.rpartition("+")[2])  # the last loss has all inputs that are needed
    ids = inputs.pop("pair_ids", IDS)
    pairs = {key: inputs[key] for key in ("image_features", "text_features", "logit_scale")}
    expected = rankloss.ClipLoss(same_id=same_id)(**pairs, pair_ids=ids)
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
    bases = [part for part in loss.modules() if isinstance(part, rankloss.SigLipLoss)]
    assert [base.same_id for base in bases] == [same_id]
    inputs = inputs_of(name.rpartition("+")[2]) | inputs_of("siglip-streamed")
    ids = inputs.pop("pair_ids", IDS)
    pairs = {key: inputs[key] for key in ("image_features", "text_features", "logit_scale", "logit_bias")}
    loss.set_progress(3, 3)
    entries = loss(**inputs, pair_ids=ids, output_dict=True)
    expected = rankloss.SigLipLoss(same_id=same_id)(**pairs, pair_ids=ids)
    torch.testing.assert_close(entries["contrastive_loss"], expected)


@pytest.mark.parametrize(
    ("ids", "share", "number_of_warnings"),
    [
        pytest.param(IDS, WITH_A_PARTNER, 0, id="partners"),
        pytest.param(torch.arange(8), 0.0, 1, id="no partner"),
    ],
)
def test_the_log_has_the_share_of_pairs_with_a_partner_and_warns_once_of_none(
    caplog: pytest.LogCaptureFixture, ids: Tensor, share: float, number_of_warnings: int
) -> None:
    loss, log = rankloss.ClipLoss(same_id="ignore", gather=False), PartnersLog()
    steps = 150  # more than the hundred after which the warning comes
    with caplog.at_level(logging.WARNING, "rankloss_trainers"):
        entries = [log(loss, {}, step, {"pair_ids": ids}) for step in range(steps)]
    assert {entry["pairs_with_partner"].item() for entry in entries} == {share}
    assert len(caplog.records) == number_of_warnings
