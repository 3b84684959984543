"""Weights of encoders, which have to fit their models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")  # by preference
_SHOWN = 3  # keys in an error


def untrained(info: dict[str, Any], name: str) -> bool:
    """True if the weights of a model of transformers have its pooler, if it has one.

    Args:
        info: The report of ``from_pretrained``.
        name: The model.

    Raises:
        ValueError: They lack other keys.
    """
    missing = sorted(map(str, info["missing_keys"]))
    lacking = [key for key in missing if "pooler" not in key.split(".")]
    if lacking:
        raise ValueError(f"the weights do not fit the model: {_listed(lacking)} missing in {name}")
    return not missing


def fill(
    model: nn.Module,
    path: str,
    heads: tuple[str, ...],
    convert: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> None:
    """Load weights, all of them, into a model without its classifier.

    Args:
        model: The model.
        path: A file, or a folder with one.
        heads: The names of the layers that the model lacks.
        convert: A conversion of weights that do not fit as they are.

    Raises:
        ValueError: They do not fit.
    """
    from timm.models import load_state_dict

    stored: dict[str, Tensor] = load_state_dict(_file_of(path))
    misfits = _misfits(model, stored, heads)
    if misfits and convert is not None:
        stored = convert(stored, model)
        misfits = _misfits(model, stored, heads)
    if misfits:
        raise ValueError(f"--image-weights {path} does not fit the model: {'; '.join(misfits)}")
    model.load_state_dict(stored, strict=False)


def _file_of(path: str) -> str:
    if not os.path.isdir(path):
        return path
    found = [sorted(map(str, Path(path).glob(f"*{suffix}"))) for suffix in _SUFFIXES]
    files = next(filter(None, found), [])
    if len(files) != 1:
        shown = ", ".join(os.path.basename(x) for x in files) or f"no file of {', '.join(_SUFFIXES)}"
        raise ValueError(f"--image-weights {path} must be a file, or a folder with one; it has {shown}")
    return files[0]


def _misfits(model: nn.Module, stored: dict[str, Tensor], heads: tuple[str, ...]) -> list[str]:
    """Descriptions of the keys that are missing, unexpected or of another shape."""
    needed = model.state_dict()
    kinds = {
        "missing": [x for x in needed if x not in stored and not x.endswith("num_batches_tracked")],
        "unexpected": [
            x for x in stored if x not in needed and not x.startswith(tuple(f"{head}." for head in heads))
        ],
        "of another shape": [x for x in needed if x in stored and needed[x].shape != stored[x].shape],
    }
    return [f"{_listed(keys)} {kind}" for kind, keys in kinds.items() if keys]


def _listed(keys: list[str]) -> str:
    more = ", …" if len(keys) > _SHOWN else ""
    return f"{len(keys)} keys ({', '.join(keys[:_SHOWN])}{more})"
