"""A frozen encoder, known again by what it computes: its features of fixed inputs.

The hash of its weights says nothing of a tokenizer, the preparation of pictures, or a library's version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rankloss_features.data import Sample
from rankloss_features.teachers import Teacher

PREFIX = "probe."
"""The beginning of the names of these features among the tensors of heads."""

_LEAST_COSINE = 0.99  # other devices and kernels round; another preparation of inputs is below
_TEXT = "2 small Dogs, one red & one black, run by a café; the other's asleep."


def features_of(teacher: Teacher) -> dict[str, Tensor]:
    """The features of a fixed picture and a fixed text, ``[width]``: ``probe.image_features`` and so on."""
    sample = Sample(0, "", _TEXT, _picture, 0)
    prepared: dict[str, Any] = {name: x.prepare([sample]) for name, x in teacher.encoders.items()}
    encoded = teacher.encode(prepared, torch.float32)
    return {PREFIX + name: x[0].contiguous() for name, x in encoded.items()}


def check_same(place: str, tensors: Mapping[str, Tensor], teacher: Teacher) -> None:
    """Compare encoders with those that some heads were trained on.

    Args:
        place: The folder of the heads, for the error.
        tensors: The tensors of the heads. Those of earlier folders have no such features, and pass.
        teacher: The encoders.

    Raises:
        ValueError: One has other features of its fixed input.
    """
    if not any(name.startswith(PREFIX) for name in tensors):
        return
    for name, found in features_of(teacher).items():
        stored = tensors.get(name, torch.empty(0))
        cosine = float(stored @ found) if stored.shape == found.shape else math.nan
        if not (cosine >= _LEAST_COSINE or torch.equal(stored, found)):
            raise ValueError(
                f"{place} was trained on other {name.removeprefix(PREFIX)}: those of a fixed input have a "
                f"cosine of {cosine:.2f}. The encoder's weights are the same; its tokenizer, its preparation "
                "of pictures or its library is another"
            )


def _picture() -> Image.Image:
    """A picture with other colours in each corner, which is wider than high."""
    gradient = Image.linear_gradient("L")
    channels = gradient, gradient.transpose(Image.Transpose.ROTATE_90), Image.radial_gradient("L")
    return Image.merge("RGB", channels).resize((480, 320))
