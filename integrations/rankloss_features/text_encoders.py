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
from rankloss_features.weights import check_complete


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
    is_of_transformers = os.path.isdir(path) and not Path(path, "modules.json").exists()
    if is_of_transformers:
        # sentence-transformers would use the weights that are missing as they are initialised.
        _, report = opening.transformers_model(path)
        check_complete(report, path)
    try:
        model = opening.sentence_transformers_model(path, device)
    except (OSError, ValueError) as error:
        hint = did_you_mean(name, [*packages.TEXTS, *packages.SHORT])
        raise ValueError(f"{error}{hint}") from error
    encode: Any = partial(
        model.encode, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
    )
    width = encode(["a picture"]).shape[1]
    about = {"text_encoder": name, "text_weights": hash_of_weights(model)}
    return Teacher(about, {NAMES[1]: Encoder(captions, encode, width)}, device=device)
