"""Text encoders, by the name or path that ``--text-encoder`` has."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankloss_features import opening, packages
from rankloss_features.folder import NAMES
from rankloss_features.image_encoders import did_you_mean
from rankloss_features.teachers import Encoder, Teacher, captions, hash_of_weights
from rankloss_features.weights import untrained


def load(name: str, batch_size: int, device: torch.device) -> Teacher:
    """A teacher of texts.

    It is a model of sentence-transformers, or one of transformers with the mean of its tokens.

    Args:
        name: The name or path of ``--text-encoder``.
        batch_size: Captions of a forward pass.
        device: The device that it computes on.

    Raises:
        ValueError: The name is unknown, the weights do not fit, or the folder needs code of its own.
        ImportError: A package is not installed.
    """
    name = packages.SHORT.get(name, name)
    path = str(packages.TEXTS[name]()) if name in packages.TEXTS else name
    if os.path.isdir(path) and not Path(path, "modules.json").exists():
        # sentence-transformers would use the weights that are missing as they are initialised.
        untrained(opening.transformers_model(path)[1], path)
    try:
        model = opening.sentence_transformers_model(path, device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}{did_you_mean(name, [*packages.TEXTS, *packages.SHORT])}") from error
    encode: Any = partial(
        model.encode, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
    )
    about = {"text_encoder": name, "text_weights": hash_of_weights(model)}
    return Teacher(about, {NAMES[1]: Encoder(captions, encode, encode(["a picture"]).shape[1])})
