"""The split of a batch into mini-batches; its gradients are tested in each trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankloss_trainers.cached import Split, embedding_in


class Doubled(nn.Module):
    """A model that lists the shapes of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append((len(pixel_values), len(input_ids)))
        return {"image_features": 2 * pixel_values, "text_features": 2 * input_ids}


@pytest.mark.parametrize(("size", "seen"), [(1, [1] * 7), (3, [3, 2, 2]), (7, [7]), (100, [7])])
def test_a_batch_is_split_evenly_into_mini_batches_of_at_most_the_size(size: int, seen: list[int]) -> None:
    model, columns = Doubled(), {"pixel_values": torch.randn(7, 2), "input_ids": torch.randn(7, 3)}
    with embedding_in(model, Split.of_pairs(columns, size), dict):
        features = model(**columns)
    assert model.seen == [(n, n) for n in seen]
    assert torch.equal(features["image_features"], 2 * columns["pixel_values"])
    assert torch.equal(features["text_features"], 2 * columns["input_ids"])


# Pictures that a processor flattens to patches are many more rows than pairs, and stand first here.
PATCHES_OF_8_PAIRS = {"pixel_values": torch.randn(40, 2), "input_ids": torch.randn(8, 3)}


def test_the_texts_tell_the_number_of_pairs() -> None:
    assert Split.of_pairs(PATCHES_OF_8_PAIRS, 3) == Split(3, (8,))


def test_without_texts_the_pictures_tell_the_number_of_pairs() -> None:
    assert Split.of_pairs({"pixel_values": torch.randn(40, 2)}, 3) == Split(14, (40,))


def test_without_a_size_nothing_is_split() -> None:
    assert Split.of_pairs(PATCHES_OF_8_PAIRS, None) is None


def test_columns_that_have_no_row_for_each_pair_or_are_lists_are_named() -> None:
    model = Doubled()
    message = "mini_batch_size cannot split pixel_values, names: each column must be a tensor of 8 rows"
    split = Split.of_pairs(PATCHES_OF_8_PAIRS, 3)
    with embedding_in(model, split, dict), pytest.raises(ValueError, match=message):
        model(**PATCHES_OF_8_PAIRS, names=["a text"] * 8)
    assert model.seen == []


class OfOneDict(nn.Module):
    """A model that is called as those of sentence-transformers: with one dict, and keywords beside it."""

    def forward(self, columns: dict[str, torch.Tensor], factor: int = 1) -> dict[str, torch.Tensor]:
        return {"image_features": factor * columns["pixel_values"]}


def test_what_stands_beside_a_dict_of_columns_reaches_every_mini_batch() -> None:
    model, pictures = OfOneDict(), torch.randn(8, 4)
    split = Split.of_pairs({"pixel_values": pictures}, 3)
    with embedding_in(model, split, dict):
        by_keyword, by_place = (
            model({"pixel_values": pictures}, factor=2),
            model({"pixel_values": pictures}, 2),
        )
    for output in (by_keyword, by_place):
        torch.testing.assert_close(output["image_features"], 2 * pictures)
