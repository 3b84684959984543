"""A frozen encoder, known again by what it computes: its features of fixed inputs.

The hash of its weights says nothing of a tokenizer, the preparation of pictures, or a library's version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rankloss_features.data import Sample
from rankloss_features.teachers import Teacher

PREFIX = "probe."
"""The beginning of the names of these features among the tensors of heads."""

_LITTLE_ENDIAN_FLOAT16 = "<f2"
_LEAST_COSINE = 0.99  # other devices and kernels round; another preparation of inputs is below
_TEXT = "2 small Dogs, one red & one black, run by a café; the other's asleep."
_REASON = (
    "The encoder's weights are the same; its tokenizer, its preparation of pictures or its library is another"
)


def features_of(teacher: Teacher) -> dict[str, Tensor]:
    """The features of a fixed picture and a fixed text, ``[width]``: ``probe.image_features`` and so on."""
    prepared: dict[str, Any] = {name: encoder.prepare([FIXED]) for name, encoder in teacher.encoders.items()}
    encoded = teacher.encode(prepared, torch.float32)
    return {PREFIX + name: features[0].contiguous() for name, features in encoded.items()}


def entry_of(teacher: Teacher) -> dict[str, str]:
    """The entry ``probe`` of ``folder.json``: these features by modality, float16 in hexadecimal digits."""
    return {
        name.removeprefix(PREFIX): features.numpy().astype(_LITTLE_ENDIAN_FLOAT16).tobytes().hex()
        for name, features in features_of(teacher).items()
    }


def check_same_as_in_folder(place: str, about: Mapping[str, Any], teacher: Teacher, remedy: str) -> None:
    """Compare encoders with those of a folder of features, by the entry that :func:`entry_of` made.

    Args:
        place: The folder, which begins the error.
        about: The entries of its ``folder.json``.
        teacher: The encoders.
        remedy: The end of the error.

    Raises:
        ValueError: As :func:`check_same`.
    """
    stored = {}
    for modality, digits in about.get("probe", {}).items():
        features = np.frombuffer(bytes.fromhex(digits), _LITTLE_ENDIAN_FLOAT16).astype(np.float32)
        stored[PREFIX + modality] = torch.from_numpy(features)
    check_same(f"{place} has the features of", stored, teacher, remedy)


def check_same(beginning: str, tensors: Mapping[str, Tensor], teacher: Teacher, remedy: str = "") -> None:
    """Compare encoders with those that a folder was made with.

    Args:
        beginning: The beginning of the error: the folder and its verb.
        tensors: The tensors of the folder. Those of earlier folders have no such features, and pass.
        teacher: The encoders.
        remedy: The end of the error.

    Raises:
        ValueError: One has other features of its fixed input.
    """
    if not any(name.startswith(PREFIX) for name in tensors):
        return
    for name, computed in features_of(teacher).items():
        modality = name.removeprefix(PREFIX)
        stored = tensors.get(name, torch.empty(0))
        cosine = float(stored @ computed) if stored.shape == computed.shape else math.nan
        # Features that are equal and zero have a cosine of 0.
        if not (cosine >= _LEAST_COSINE or torch.equal(stored, computed)):
            raise ValueError(
                f"{beginning} another {_encoder_of(modality, teacher)}: {modality} of a fixed input have a "
                f"cosine of {cosine:.2f}. {_REASON}{remedy}"
            )


def _encoder_of(modality: str, teacher: Teacher) -> str:
    """The words for the encoder of a modality: its entry of ``folder.json``, or the noun alone."""
    encoder = f"{modality.removesuffix('_features')}_encoder"
    for entry in (encoder, "open_clip", "transformers"):
        if entry in teacher.about:
            return f"{entry} {teacher.about[entry]}"
    return encoder


def _picture() -> Image.Image:
    """A picture with other colours in each corner, which is wider than high."""
    gradient = Image.linear_gradient("L")
    channels = gradient, gradient.transpose(Image.Transpose.ROTATE_90), Image.radial_gradient("L")
    return Image.merge("RGB", channels).resize((480, 320))


FIXED = Sample(0, "", _TEXT, _picture, 0)
"""The fixed picture and text."""
