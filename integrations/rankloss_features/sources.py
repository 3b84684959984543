"""The teacher that a command line names: encoders, or features that are stored already."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloss.checks import check_teacher
from rankloss_features import clip_models, heads, image_encoders, opening, text_encoders
from rankloss_features.data import Sample
from rankloss_features.errors import flag, named_errors
from rankloss_features.folder import (
    COMMON_SPACE,
    NAMES,
    SEPARATE_SPACES,
    Array,
    Features,
    check_rows_differ,
    read_about,
)
from rankloss_features.teachers import Encoder, Teacher

_CHOICES = "--model, --features, --image-encoder, --text-encoder, or the latter two"
_TWO_ENCODERS = ["image_encoder", "text_encoder"]
_OWNER_OF = {"pretrained": "model", "image_weights": "image_encoder", "spaces": "features"}


def options_of_teacher(args: Any) -> list[str]:
    """The options that name the teacher of a command line: one, or an encoder of each modality.

    Raises:
        ValueError: There are others, or an option without the one that it belongs to; ``--pretrained`` stands
            beside a model with its own weights, or ``--align`` beside one modality.
    """
    names = ("model", "features", *_TWO_ENCODERS)
    options = [name for name in names if getattr(args, name) is not None]
    if len(options) != 1 and options != _TWO_ENCODERS:
        shown = " and ".join(map(flag, options)) or "none"
        raise ValueError(f"the teacher must be one of {_CHOICES}; got {shown}")
    for name, owner in _OWNER_OF.items():
        value = getattr(args, name)
        if value is not None and owner not in options:
            raise ValueError(f"{flag(name)} {value} belongs to {flag(owner)}, which is not given")
    clip_models.check_pretrained(args.model, args.pretrained)
    has_one_modality = options in (["image_encoder"], ["text_encoder"])
    if args.align is not None and has_one_modality:
        raise ValueError(
            f"--align brings images and texts into one space: {flag(options[0])} has one modality; give "
            "--image-encoder and --text-encoder"
        )
    return options


def device_of(name: str | None, default: str) -> torch.device:
    """The device of the option ``--device``.

    Raises:
        ValueError: Torch knows no such device, or cannot use it here.
    """
    try:
        device = torch.device(name or default)
    except RuntimeError as error:
        raise ValueError(
            f"--device must be a device of torch, such as cpu or cuda:0; got {name!r}"
        ) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        first_line = str(error).splitlines()[0]
        raise ValueError(f"--device {device} is not here: {first_line}") from error
    if device.type == "meta":
        raise ValueError(f"--device {name} computes nothing: give cpu or cuda:0")
    return device


def load(options: list[str], args: Any, device: torch.device) -> Teacher:
    """The teacher that a command line names.

    Args:
        options: The options that name it, of :func:`options_of_teacher`.
        args: The parsed command line.
        device: The device that computes.

    Raises:
        ValueError: It is not installed, not found, or has no weights; or both the teacher and the command
            line have a background for pictures.
    """
    if options == _TWO_ENCODERS:
        images, texts = (_load_option(option, args, device) for option in options)
        encoders = {**images.encoders, **texts.encoders}
        return Teacher({**images.about, **texts.about}, encoders, device=device, spaces=SEPARATE_SPACES)
    (option,) = options
    return _load_option(option, args, device)


def _load_option(option: str, args: Any, device: torch.device) -> Teacher:
    """The teacher, or the encoder of one modality, that one option names; errors begin with the option.

    Raises:
        ValueError: As :func:`load`.
    """
    with named_errors(f"{flag(option)} {getattr(args, option)}"):
        if option == "model":
            return _model_of_both(args, device)
        if option == "features":
            return _stored_features(args, device)
        if option == "image_encoder":
            return image_encoders.load(args.image_encoder, args.image_weights, device)
        return text_encoders.load(args.text_encoder, args.batch_size, device)


# A function of a module, since it is pickled for the processes that read data, where these are not forked.
def _rows(array: Array, samples: list[Sample]) -> Tensor:
    """The rows of an array for some samples, row i for sample i of the data."""
    return torch.from_numpy(array[[sample.row for sample in samples]].astype(np.float32))


def _model_of_both(args: Any, device: torch.device) -> Teacher:
    """A model of pictures and texts, or a folder of ``rankloss heads``.

    Raises:
        ValueError: Heads and the command line have a background for pictures; and as :func:`load`.
    """
    if not (Path(args.model) / heads.ABOUT).is_file():
        return clip_models.load(args.model, args.pretrained, device)
    of_heads = heads.load_heads(args.model, device)
    background = getattr(args, "background", None)  # a trainer's command line has none
    if background is not None:
        raise ValueError(f"it has its own background, {of_heads.rendering.background}: no --background")
    return of_heads.teacher


def _stored_features(args: Any, device: torch.device) -> Teacher:
    """Arrays that are there already, row i for row i of the data.

    Raises:
        ValueError: They cannot be read, or are no teacher's features; or they have separate spaces, beside
            ``--spaces common``.
    """
    arrays, folder = _stored_arrays(Path(args.features))
    rows = _checked_rows(arrays)
    widths = {name: array.shape[1] for name, array in arrays.items()}
    has_separate_spaces = folder is not None and not folder.common_space
    if has_separate_spaces or len(set(widths.values())) > 1:
        if args.spaces == COMMON_SPACE:
            raise ValueError(
                f"--spaces {args.spaces}: these features have separate spaces, of widths {widths}"
            )
        spaces = SEPARATE_SPACES
    else:
        spaces = args.spaces or COMMON_SPACE
    digests, encoders = {}, {}
    for name, array in arrays.items():
        digests[name] = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        encoders[name] = Encoder(partial(_rows, array), _as_they_are, widths[name])
    about = {"features": digests}
    return Teacher(about, encoders, rows=rows, device=device, stored=folder, spaces=spaces)


def _stored_arrays(place: Path) -> tuple[dict[str, Any], Features | None]:
    """The arrays of a file, of a folder of files, or of a folder of features, which is returned with them."""
    if not place.is_dir():
        return opening.stored_arrays(place, NAMES), None
    if read_about(place) is None:
        files = {name: place / f"{name}.npy" for name in NAMES}
        arrays = {name: opening.stored_array(file) for name, file in files.items() if file.exists()}
        return arrays, None
    folder = Features(str(place)).check()
    if folder.about["skipped"]:
        raise ValueError(f"{folder.about['skipped']} rows have no features: their pictures could not be read")
    return {name: rows[:] for name, rows in folder.arrays.items()}, folder


def _checked_rows(arrays: dict[str, Any]) -> int:
    """The number of rows of each array.

    Raises:
        ValueError: There is no array, their lengths differ, one is no teacher's features, or all rows of one
            are the same.
    """
    if not arrays:
        raise ValueError(f"there are neither {' nor '.join(NAMES)}")
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        # At a first look norms other than 1 give a warning; a folder's features are normalised where they
        # are written.
        check_teacher(name, tensor, first, first_look=False)
        check_rows_differ(name, [tensor.numpy()])
    return len(first)


def _as_they_are(rows: Tensor) -> Tensor:
    """Features that need no encoder."""
    return rows
