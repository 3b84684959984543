"""Text encoders, by the name or path that ``--text-encoder`` has."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rankloss_features import opening, packages
from rankloss_features.captions import DIMENSIONS, MOST_CAPTIONS, CaptionVectors, sample
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES
from rankloss_features.image_encoders import did_you_mean
from rankloss_features.teachers import Encoder, Teacher, captions, hash_of_weights
from rankloss_features.weights import untrained

_BATCH = 250  # captions that may share a word
_HARDLY = 0.1  # of them, below which words teach little
_logger = logging.getLogger("rankloss_features")


def load(name: str, batch_size: int, device: torch.device) -> Teacher:
    """A teacher of texts.

    It is a model of sentence-transformers, one of transformers with the mean of its tokens, or ``captions``.

    Args:
        name: The name or path of ``--text-encoder``.
        batch_size: Captions of a forward pass.
        device: The device that it computes on.

    Raises:
        ValueError: The name is unknown, the weights do not fit, or the folder needs code of its own.
        ImportError: A package is not installed.
    """
    options = parse_captions(name)
    if options is not None:
        import sklearn  # noqa: F401

        encoder = Encoder(
            captions, torch.stack, options["dimensions"], fit=partial(_fit, options), fitted=_read
        )
        return Teacher({"text_encoder": "captions", **options}, {NAMES[1]: encoder})
    name = packages.SHORT.get(name, name)
    path = str(packages.TEXTS[name]()) if name in packages.TEXTS else name
    if os.path.isdir(path) and not Path(path, "modules.json").exists():
        # sentence-transformers would use the weights that are missing as they are initialised.
        untrained(opening.transformers_model(path)[1], path)
    try:
        model = opening.sentence_transformers_model(path, device)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}{did_you_mean(name, [*packages.TEXTS, *packages.SHORT, 'captions'])}"
        ) from error
    encode: Any = partial(
        model.encode, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
    )
    about = {"text_encoder": name, "text_weights": hash_of_weights(model)}
    return Teacher(about, {NAMES[1]: Encoder(captions, encode, encode(["a picture"]).shape[1])})


# --- the captions themselves ------------------------------------------------------------------------------


def parse_captions(name: str) -> dict[str, Any] | None:
    """The options of ``captions``, ``captions:64``, or either with ``:characters``; None for other names.

    Raises:
        ValueError: Something else follows the colon.

    Example:
        >>> parse_captions("captions:64:characters"), parse_captions("minilm")
        ({'dimensions': 64, 'characters': True}, None)
    """
    kind, *options = name.split(":")
    if kind != "captions":
        return None
    characters = options[-1:] == ["characters"]
    numbers = options[: len(options) - characters]
    if len(numbers) > 1 or not all(x.isdecimal() and int(x) for x in numbers):
        raise ValueError(f"captions is followed by :DIMENSIONS, :characters or both; got {name!r}")
    return {"dimensions": int(numbers[0]) if numbers else DIMENSIONS, "characters": characters}


def _fit(options: dict[str, Any], captions: Iterable[str], file: BinaryIO) -> int:
    """Fit the vectors on at most a million captions, log whether these share words, and return the width."""
    used = sample(captions, MOST_CAPTIONS)
    try:
        vectors = CaptionVectors.fit(used, **options)
    except ValueError as error:
        raise ValueError(f"encoder captions: {error}") from error
    if vectors.width < options["dimensions"]:
        counts = vectors.width, len(used), len(vectors.tokens), options["dimensions"]
        _logger.info("captions: %d dimensions, as %d captions share %d tokens; %d were asked for", *counts)
    share = vectors.share(used, _BATCH)
    level, end = (
        (logging.INFO, "") if share >= _HARDLY else (logging.WARNING, ": hardly any, so they teach little")
    )
    said = "%.1f %% of the captions share a counted token with another of a batch of %d%s"
    _logger.log(level, said, 100 * share, _BATCH, end)
    vectors.save(file)
    return vectors.width


def _read(file: Path) -> Encoder:
    try:
        vectors = CaptionVectors.load(file)
    except Exception as error:  # of NumPy and scikit-learn, for a file of another's
        raise ValueError(f"{file} is no encoder of captions: {type(error).__name__}: {error}") from error
    return Encoder(partial(_transform, vectors), lambda rows: rows, vectors.width)


# Sent to other processes, where these are not forked.
def _transform(vectors: CaptionVectors, samples: list[Sample]) -> torch.Tensor:
    return torch.from_numpy(vectors.transform(captions(samples)))
