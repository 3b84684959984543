"""Batches of embeddings for the tests: drawn by hypothesis, or read from ``data/vectors.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from devices import DEVICE

VECTORS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data/vectors.json").read_text())[
    "cases"
]


@dataclass(frozen=True)
class Batch:
    """Unit-norm float64 features and a scale."""

    image: Tensor
    text: Tensor
    scale: float

    def leaves(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """Image, text and scale as tensors that take a gradient."""
        tensors = (self.image, self.text, torch.tensor(self.scale, dtype=torch.float64))
        return tuple(x.detach().to(DEVICE, dtype).requires_grad_() for x in tensors)  # type: ignore[return-value]


def unit_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """An array of rows of unit norm."""
    rows = rng.standard_normal((n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of rows of unit norm."""
    rows = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


def random_batch(seed: int, n: int, d: int, scale: float, *, duplicates: int = 0) -> Batch:
    """A batch whose last ``duplicates`` texts repeat earlier ones; if any do, the last pair is the first."""
    rng = np.random.default_rng(seed)
    image, text = unit_rows(rng, n, d), unit_rows(rng, n, d)
    for k in range(1, duplicates + 1):
        text[-k] = text[rng.integers(n - duplicates)]
    if duplicates:
        image[-1] = image[0]
        text[-1] = text[0]
    return Batch(torch.from_numpy(image), torch.from_numpy(text), scale)


@st.composite
def batches(draw: st.DrawFn, *, min_n: int = 2, max_n: int = 12, ties: bool = True) -> Batch:
    """Random batches; with ties some of them have equal rows."""
    n = draw(st.integers(min_n, max_n))
    duplicates = draw(st.integers(0, n // 2)) if ties else 0
    return random_batch(
        draw(st.integers(0, 2**32 - 1)),
        n,
        draw(st.integers(2, 9)),
        draw(st.sampled_from([1.0, 10.0, 1 / 0.07, 100.0])),
        duplicates=duplicates,
    )


def vector_batch(case: dict[str, Any]) -> Batch:
    """The batch of a case of ``vectors.json``, by the file's recipe."""
    rng = np.random.default_rng(case["seed"])
    image, text = (unit_rows(rng, case["N"], case["D"]) for _ in range(2))
    if case["dup"]:
        image[1], text[1] = image[0], text[0]
    assert image[0, 0] == case["check"]["V00"]
    assert text[0, 0] == case["check"]["T00"]
    return Batch(torch.from_numpy(image), torch.from_numpy(text), case["scale"])


def teacher_of(n: int, d: int = 5, *, seed: int = 7, duplicates: int = 0) -> dict[str, Tensor]:
    """A teacher's features of another dimension; the last ``duplicates`` rows repeat the first."""
    rng = np.random.default_rng(seed)
    teacher = {}
    for name in ("reference_image_features", "reference_text_features"):
        rows = unit_rows(rng, n, d)
        rows[n - duplicates :] = rows[:duplicates]
        teacher[name] = torch.from_numpy(rows).to(DEVICE)
    return teacher


def relative_error(actual: Any, expected: Any) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    a, b = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (actual, expected))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def assert_close(found: Iterable[Any], wanted: Iterable[Any], tolerance: float) -> None:
    """Tensor by tensor; the tolerance is relative to a tensor's norm, or to 1 where that is less."""
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        a, b = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (a, b))
        assert a.shape == b.shape, (k, a.shape, b.shape)
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1.0), (k, a, b)


def assert_same(found: Iterable[Tensor], wanted: Iterable[Tensor], tolerance: float = 1e-10) -> None:
    """Entry by entry, relative to the entry, or to 1/100 where that is less."""
    torch.testing.assert_close([*found], [*wanted], rtol=tolerance, atol=tolerance / 100)


def gradients(value: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor | float) -> list[Tensor]:
    """Gradients by all inputs under a given upstream gradient; an input that gets none is a failure."""
    upstream = torch.as_tensor(upstream, dtype=value.dtype, device=value.device).expand_as(value)
    return list(torch.autograd.grad(value, inputs, upstream))


def upstream_for(value: Tensor) -> Tensor:
    """A gradient from above that is neither 1 nor the same for every entry."""
    return torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype, device=value.device).view_as(value)


def assert_slopes(value: Tensor, inputs: tuple[Tensor, ...], literal: Callable[..., Any]) -> None:
    """Every input's gradient, along a random direction, is the difference quotient of a NumPy function.

    The inputs are images, texts, the scale and further numbers.
    """
    upstream, rng = upstream_for(value), np.random.default_rng(0)
    slopes = torch.autograd.grad(value, inputs, upstream, allow_unused=True, materialize_grads=True)
    arrays = [x.detach().numpy() for x in inputs]
    scale = max(1.0, float(arrays[2]))

    def literal_at(place: int, moved: np.ndarray) -> np.ndarray:
        """The function where the input at this place is another."""
        return np.asarray(literal(*arrays[:place], moved, *arrays[place + 1 :]))

    for place, (slope, array) in enumerate(zip(slopes, arrays, strict=True)):
        # A score is the scale times a cosine: features move by less, the larger it is, and numbers by more.
        is_feature = array.ndim > 0
        step = min(1e-5, 1e-4 / scale) if is_feature else 1e-6 * scale
        direction = rng.standard_normal(array.shape)
        difference = literal_at(place, array + step * direction) - literal_at(place, array - step * direction)
        quotient = (difference * upstream.numpy()).sum() / (2 * step)
        along_direction = (slope.detach().numpy() * direction).sum()
        assert along_direction == pytest.approx(quotient, rel=1e-5, abs=max(1e-5, 1e-7 * scale))
