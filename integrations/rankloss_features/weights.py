"""Weights of encoders, which have to fill their models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rankloss_features import opening

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")  # by preference
_SHOWN = 3  # keys in an error


def check_complete(report: dict[str, Any], name: str) -> None:
    """Raise a ValueError for weights that a model of transformers lacks; those of its pooler may be missing.

    Args:
        report: The report of ``from_pretrained``, whose ``missing_keys`` are the weights as initialised.
        name: The model.
    """
    missing = sorted(map(str, report["missing_keys"]))
    needed = [key for key in missing if "pooler" not in key.split(".")]
    if needed:
        raise ValueError(f"the weights do not fit the model: {_listed(needed)} missing in {name}")


def fill(model: Any, name: str, path: str) -> None:
    """Load weights, all of them, into a model of timm without its classifier.

    timm's own ``pretrained_cfg_overlay`` leaves what a file lacks as it is initialised, once a model has no
    classifier.

    Args:
        model: The model.
        name: Its name in timm.
        path: A file, or a folder with one.

    Raises:
        ValueError: Keys are missing, or there are others, which the model has not with a classifier either.
        RuntimeError: Weights are of another shape.
    """
    # timm's conversion of weights that a model's authors published; it leaves those of timm as they are.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    file = _file_of(path)
    missing, unexpected = opening.load_timm_weights(model, file, convert)
    classifiers = model.pretrained_cfg.get("classifier") or ()  # a name or several
    if isinstance(classifiers, str):
        classifiers = (classifiers,)
    beginnings = tuple(f"{classifier}." for classifier in classifiers)
    unexpected = [key for key in unexpected if not key.startswith(beginnings)]
    if unexpected:  # before some classifiers there are layers that belong to the head, too
        of_whole_model = opening.timm_model(name, num_classes=1).state_dict()
        unexpected = [key for key in unexpected if key not in of_whole_model]
    misfits = []
    if missing:
        misfits.append(f"{_listed(missing)} missing")
    if unexpected:
        misfits.append(f"{_listed(unexpected)} unexpected")
    if misfits:
        raise ValueError(f"--image-weights {path} does not fit the model: {'; '.join(misfits)}")


def _file_of(path: str) -> str:
    """The file of weights that a path names, or the only one in its folder of the first kind that is there.

    Raises:
        ValueError: There is no such file or folder, or the folder has none, or several of that kind.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise ValueError(f"--image-weights {path}: there is no such file or folder")
    files: list[Path] = []
    for suffix in SUFFIXES:
        files = sorted(Path(path).glob(f"*{suffix}"))
        if files:
            break
    if len(files) != 1:
        shown = ", ".join(file.name for file in files) or f"no file of {', '.join(SUFFIXES)}"
        raise ValueError(f"--image-weights {path} must be a file, or a folder with one; it has {shown}")
    return str(files[0])


def _listed(keys: list[str]) -> str:
    """The number of keys, and the first of them."""
    noun = "key" if len(keys) == 1 else "keys"
    more = ", …" if len(keys) > _SHOWN else ""
    return f"{len(keys)} {noun} ({', '.join(keys[:_SHOWN])}{more})"
