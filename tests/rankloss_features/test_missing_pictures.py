"""A table with an empty cell in the place of a picture is refused by the cell's row."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from tiny_teacher import picture, teacher

from rankloss_features.caching import Spec, cached, of_dataset
from rankloss_features.evaluation import Pairs, encode_rows

SPEC = Spec.of("image=some,text=other")


def table_without_a_picture(row: int) -> datasets.Dataset:
    """Four pairs, of which one has no picture."""
    images = [None if number == row else {"bytes": picture(number), "path": None} for number in range(4)]
    columns = {"image": images, "caption": [f"caption {number}" for number in range(4)]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_a_picture_that_is_missing_is_named_by_a_teachers_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankloss_features.sources.load", lambda *_: teacher())
    monkeypatch.setattr("rankloss_features.caching._WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    data = of_dataset(table_without_a_picture(2), SPEC)
    with pytest.raises(ValueError, match=r"row 2: the picture of .* cannot be read: there is none"):
        cached(SPEC, data, tmp_path, torch.device("cpu"))


def test_a_picture_that_is_missing_is_named_by_an_evaluation() -> None:
    data = of_dataset(table_without_a_picture(1), SPEC)
    Pairs.of(data)  # which counts them
    with pytest.raises(ValueError, match=r"row 1: the picture of .* cannot be read: there is none"):
        encode_rows(teacher(), data, batch_size=4)
