"""Inputs of named losses on another device than the features, or of another dtype."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from named_inputs import inputs_of
from torch import Tensor

import rankloss_trainers
from registered import NAMES

CASES = [(name, key) for name in NAMES for key in inputs_of(name)]


def called(name: str, **others: Any) -> Tensor:
    """A loss in the middle of a training, called with some inputs other than the others."""
    loss: Any = rankloss_trainers.create(name)
    loss.set_progress(5, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a teacher and a width that are drawn
        value: Tensor = loss(**{**inputs_of(name), **others})
    return value


@pytest.mark.parametrize(("name", "key"), CASES)
def test_an_input_on_another_device_is_refused_by_its_name_or_that_of_one_beside_it(
    name: str, key: str
) -> None:
    with pytest.raises(ValueError, match=r"^\w+ must be (on the device of|like) \w+") as refusal:
        called(name, **{key: inputs_of(name)[key].to("meta")})
    assert all(device in str(refusal.value) for device in ("cpu", "meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_texts_of_another_dtype_are_computed_in_the_widest_or_an_error_names_them(
    name: str, dtype: torch.dtype
) -> None:
    narrow = inputs_of(name)["text_features"].to(dtype)
    try:
        value = called(name, text_features=narrow)
    except ValueError as refusal:  # of a second caption, whose features come from the same tower
        assert "caption_features must be like text_features" in str(refusal)
        return
    exact = called(name, text_features=narrow.double())
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
