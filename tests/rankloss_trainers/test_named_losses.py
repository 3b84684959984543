"""Properties of every loss that has a name, by a walk over the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from named_inputs import N, inputs_of
from torch import Tensor

import rankloss_trainers
from rankloss.losses import TEACHER
from rankloss_trainers import catalog

NAMES = sorted(catalog.known())
ASYMMETRIC = {"alip", "ranked-lists"}  # whose images and texts have different parts
ROWS = ("pair_ids", "caption_features", "candidate_features", "grades", "query_features", *TEACHER)


def value_and_gradients(
    name: str, inputs: dict[str, Any], upstream: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    loss = rankloss_trainers.create(name, gather=False)
    loss.set_epoch(2, 3), loss.set_progress(2, 3)
    features = [inputs[key].clone().requires_grad_() for key in ("image_features", "text_features")]
    given = {**inputs, "image_features": features[0], "text_features": features[1]}
    if "query_features" in given:
        given["query_features"] = features[0]
    value = loss(**given)
    return value.detach(), list(torch.autograd.grad(upstream * value, features))


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_pairs_counts_for_nothing(name: str) -> None:
    inputs = inputs_of(name)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    permuted = {
        key: x[order] if key in (*ROWS, "image_features", "text_features") else x for key, x in inputs.items()
    }
    value, gradients = value_and_gradients(name, inputs)
    other, moved = value_and_gradients(name, permuted)
    torch.testing.assert_close(other, value)
    for x, y in zip(moved, gradients, strict=True):
        torch.testing.assert_close(x, y[order])


@pytest.mark.parametrize("name", [x for x in NAMES if x not in ASYMMETRIC])
def test_modalities_can_be_swapped(name: str) -> None:
    inputs = inputs_of(name)
    swapped = {
        key.replace("image", "?").replace("text", "image").replace("?", "text"): x
        for key, x in inputs.items()
    }
    value, gradients = value_and_gradients(name, inputs)
    other, exchanged = value_and_gradients(name, swapped)
    torch.testing.assert_close(other, value)
    for x, y in zip(exchanged, gradients[::-1], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_scales_with_the_upstream_gradient(name: str) -> None:
    inputs = inputs_of(name)
    _, once = value_and_gradients(name, inputs)
    _, thrice = value_and_gradients(name, inputs, upstream=-3.0)
    for x, y in zip(thrice, once, strict=True):
        torch.testing.assert_close(x, -3.0 * y)
