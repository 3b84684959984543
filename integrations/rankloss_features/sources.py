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
_BELONG = {"pretrained": "model", "image_weights": "image_encoder", "spaces": "features"}


def given(args: Any) -> list[str]:
    """The options that name the teacher of a command line: one, or an encoder of each modality.

    Raises:
        ValueError: There are others, or an option without the one that it belongs to.
    """
    found = [x for x in ("model", "features", *_TWO_ENCODERS) if getattr(args, x) is not None]
    if len(found) != 1 and found != _TWO_ENCODERS:
        shown = " and ".join(map(flag, found)) or "none"
        raise ValueError(f"the teacher must be one of {_CHOICES}; got {shown}")
    for name, owner in _BELONG.items():
        if getattr(args, name) is not None and owner not in found:
            raise ValueError(
                f"{flag(name)} {getattr(args, name)} belongs to {flag(owner)}, which is not given"
            )
    clip_models.check_pretrained(args.model, args.pretrained)
    if args.align is not None and len(found) == 1 and "encoder" in found[0]:
        raise ValueError(
            f"--align brings images and texts into one space: {flag(found[0])} has one modality; give "
            "--image-encoder and --text-encoder"
        )
    return found


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


def load(given: list[str], args: Any, device: torch.device) -> Teacher:
    """The teacher that the options of a command line name.

    Raises:
        ValueError: It is not installed, not found, or has no weights.
    """
    loaders = {
        "model": lambda: _joint(args, device),
        "features": lambda: _stored(args),
        "image_encoder": lambda: image_encoders.load(args.image_encoder, args.image_weights, device),
        "text_encoder": lambda: text_encoders.load(args.text_encoder, args.batch_size, device),
    }
    parts = []
    for name in given:
        with named_errors(f"{flag(name)} {getattr(args, name)}"):
            parts.append(loaders[name]())
    about = {key: value for part in parts for key, value in part.about.items()}
    encoders = {key: encoder for part in parts for key, encoder in part.encoders.items()}
    spaces = SEPARATE_SPACES if given == _TWO_ENCODERS else parts[0].spaces
    first, background = parts[0], getattr(args, "background", None)
    if first.rendering is not None and background is not None:
        raise ValueError(
            f"--background {background}: --model {args.model} has its own, {first.rendering.background}"
        )
    return Teacher(about, encoders, first.scale, first.rows, device, spaces, first.stored, first.rendering)


# It is sent to other processes, where these are not forked.
def _rows(array: Array, samples: list[Sample]) -> Tensor:
    return torch.from_numpy(array[[sample.row for sample in samples]].astype(np.float32))


def _joint(args: Any, device: torch.device) -> Teacher:
    """A model of pictures and texts, or a folder of ``rankloss heads``."""
    if (Path(args.model) / heads.ABOUT).is_file():
        return heads.load_heads(args.model, device).teacher
    return clip_models.load(args.model, args.pretrained, device)


def _stored(args: Any) -> Teacher:
    """Arrays that are there already, row i for row i of the data."""
    arrays, folder = _stored_arrays(Path(args.features))
    rows = _check_stored(arrays)
    widths = {name: array.shape[1] for name, array in arrays.items()}
    has_two_spaces = folder is not None and not folder.common_space
    is_separate = has_two_spaces or len(set(widths.values())) > 1
    if is_separate and args.spaces == COMMON_SPACE:
        raise ValueError(f"--spaces {args.spaces}: these features have separate spaces, of widths {widths}")
    digests, encoders = {}, {}
    for name, array in arrays.items():
        digests[name] = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        encoders[name] = Encoder(partial(_rows, array), _as_they_are, widths[name])
    spaces = args.spaces or (SEPARATE_SPACES if is_separate else COMMON_SPACE)
    return Teacher({"features": digests}, encoders, rows=rows, stored=folder, spaces=spaces)


def _stored_arrays(place: Path) -> tuple[dict[str, Any], Features | None]:
    """The arrays of a file, of a folder of files, or of a folder of features, which is returned with them."""
    if not place.is_dir():
        return opening.stored_arrays(place, NAMES), None
    if read_about(place) is None:
        files = {name: place / f"{name}.npy" for name in NAMES}
        return {name: opening.stored_array(file) for name, file in files.items() if file.exists()}, None
    folder = Features(str(place)).check()
    return {name: rows[:] for name, rows in folder.arrays.items()}, folder


def _check_stored(arrays: dict[str, Any]) -> int:
    """The number of rows of each array.

    Raises:
        ValueError: There is no array, one is no teacher's features, or has rows that are all the same.
    """
    if not arrays:
        raise ValueError(f"there are neither {' nor '.join(NAMES)}")
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        check_teacher(name, tensor, first, first_look=False)
        check_rows_differ(name, [tensor.numpy()])
    return len(first)


def _as_they_are(rows: Tensor) -> Tensor:
    """Features that need no encoder."""
    return rows
