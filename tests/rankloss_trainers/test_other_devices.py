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


def loss_with(name: str, **changed: Any) -> Tensor:
    """The value of a loss in the middle of a training, with some of its inputs changed."""
    loss: Any = rankloss_trainers.create(name)
    loss.set_progress(5, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a teacher and a width that are drawn
        value: Tensor = loss(**{**inputs_of(name), **changed})
    return value


@pytest.mark.parametrize(("name", "key"), CASES)
def test_an_input_on_another_device_is_refused_by_its_name_or_that_of_one_beside_it(
    name: str, key: str
) -> None:
    with pytest.raises(ValueError, match=r"^\w+ must be (on the device of|like) \w+") as refusal:
        loss_with(name, **{key: inputs_of(name)[key].to("meta")})
    assert all(device in str(refusal.value) for device in ("cpu", "meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_texts_of_another_dtype_are_computed_in_the_widest(name: str, dtype: torch.dtype) -> None:
    """And so are those of a second caption, which come from the same tower."""
    inputs = inputs_of(name)
    narrow = {key: inputs[key].to(dtype) for key in ("text_features", "caption_features") if key in inputs}
    value = loss_with(name, **narrow)
    exact = loss_with(name, **{key: x.double() for key, x in narrow.items()})
    assert value.dtype == torch.float64
    # A loss of the tests compares its captions in their own dtype.
    tolerance = 1e-3 if "caption_features" in inputs else 1e-6
    assert value.item() == pytest.approx(exact.item(), rel=tolerance)
