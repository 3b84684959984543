"""Weights of encoders, which have to fill their models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rankloss_features import opening

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")  # by preference
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


def fill(model: Any, path: str) -> None:
    """Load weights, all of them, into a model of timm without its classifier.

    timm's own ``pretrained_cfg_overlay`` leaves what a file lacks as it is initialised, once a model has no
    classifier.

    Args:
        model: The model.
        path: A file, or a folder with one.

    Raises:
        ValueError: Keys are missing, or there are others than the model's and its classifier's.
        RuntimeError: Weights are of another shape.
    """
    # timm's conversion of the weights that a model's authors published; it changes none of its own.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    file = _file_of(path)
    missing, unexpected = opening.load_timm_weights(model, file, convert)
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    unexpected = [key for key in unexpected if not key.startswith(heads)]
    kinds = {"missing": missing, "unexpected": unexpected}
    misfits = [f"{_listed(keys)} {kind}" for kind, keys in kinds.items() if keys]
    if misfits:
        raise ValueError(f"--image-weights {path} does not fit the model: {'; '.join(misfits)}")


def _file_of(path: str) -> str:
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise ValueError(f"--image-weights {path}: there is no such file or folder")
    found = [sorted(map(str, Path(path).glob(f"*{suffix}"))) for suffix in SUFFIXES]
    files = next(filter(None, found), [])
    if len(files) != 1:
        shown = ", ".join(os.path.basename(x) for x in files) or f"no file of {', '.join(SUFFIXES)}"
        raise ValueError(f"--image-weights {path} must be a file, or a folder with one; it has {shown}")
    return files[0]


def _listed(keys: list[str]) -> str:
    more = ", …" if len(keys) > _SHOWN else ""
    return f"{len(keys)} keys ({', '.join(keys[:_SHOWN])}{more})"
