"""Image encoders, by the name or path that ``--image-encoder`` has."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from rankloss_features import opening, packages
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Teacher, hash_of_weights, image_encoder
from rankloss_features.weights import SUFFIXES, check_complete, fill

Loaded: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Any], Tensor], str]
"""An encoder of pixels ``[n, 3, height, width]``, the transform of a picture, and the hash of the weights."""


def load(name: str, weights: str | None, device: torch.device) -> Teacher:
    """A teacher of images.

    Args:
        name: The name or path of ``--image-encoder``.
        weights: The file or folder of ``--image-weights``, for a model of timm.
        device: The device that it computes on.

    Raises:
        ValueError: The name is unknown, the weights do not fit, or the model gives no vector per picture, one
            with NaN or infinity, or another one each time.
        ImportError: A package is not installed.
    """
    name = packages.SHORT.get(name, name)
    loader = loader_of(name)
    if weights is not None and loader is not _timm:
        raise ValueError(f"--image-weights {weights} is for a name of timm alone")
    encode, transform, digest = loader(name, weights, device)
    probe = transform(Image.linear_gradient("L").convert("RGB"))[None].to(device)
    with torch.inference_mode():
        first, second = encode(probe), encode(probe)
    if first.dim() != 2:
        raise ValueError(f"its output must be one vector per picture; got shape {tuple(first.shape)}")
    if not first.isfinite().all():
        raise ValueError("its features of a picture have NaN or infinity: its weights may be damaged")
    if not torch.equal(first, second):
        raise ValueError("it gives other features of the same picture each time: its forward pass is random")
    encoder = image_encoder(transform, encode, first.shape[1], device)
    return Teacher({"image_encoder": name, "image_weights": digest}, {NAMES[0]: encoder}, device=device)


def loader_of(name: str) -> Callable[[str, str | None, torch.device], Loaded]:
    """The loader of a name or path.

    Raises:
        ValueError: No loader has it, or it is a file of weights.
    """
    import timm
    from timm.models import split_model_name_tag

    if name in packages.IMAGES:
        return _package
    if os.path.isdir(name):
        file = Path(name, "config.json")
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for key, loader in _FOLDERS.items():
            if key in config:
                return loader
        raise ValueError(f"the folder has no config.json with {' or '.join(_FOLDERS)}")
    if os.path.isfile(name) and name.endswith(SUFFIXES):
        raise ValueError("a file of weights is given by --image-weights, beside its model's name")
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(split_model_name_tag(name)[0]):
        return _timm
    if "/" in name and not os.path.isfile(name):  # OWNER/NAME of a hub
        return _transformers
    known = [*timm.list_models(), *packages.IMAGES, *packages.SHORT]
    _, _, last_part = name.rpartition(":")  # of what may be open_clip's MODEL:PRETRAINED
    hint = did_you_mean(last_part, known) or "; --features takes the rows of any other model"
    raise ValueError(f"unknown name{hint}")


def did_you_mean(name: str, known: list[str]) -> str:
    """The names that are like an unknown one, as the end of an error; empty if none is."""
    close = difflib.get_close_matches(name, known)
    return f"; did you mean {', '.join(close)}?" if close else ""


# --- kinds ------------------------------------------------------------------------------------------------


def _package(name: str, weights: str | None, device: torch.device) -> Loaded:  # noqa: ARG001
    """A model whose weights are inside a package."""
    return _of_timm(packages.IMAGES[name](), device)


def _timm(name: str, weights: str | None, device: torch.device) -> Loaded:
    """A model of timm, by its name or its folder, with the hub's weights, its folder's or those given."""
    folder = name.removeprefix("local-dir:")
    if os.path.isdir(folder):
        name = f"local-dir:{folder}"
        weights = weights or folder
    model = opening.timm_model(name, pretrained=weights is None, num_classes=0)
    if weights is not None:
        fill(model, name, weights)
    return _of_timm(model, device)


def _of_timm(model: nn.Module, device: torch.device) -> Loaded:
    """A model of timm, with the transform that its configuration names."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    model = model.to(device).eval()
    return model, create_transform(**config, is_training=False), hash_of_weights(model)


def _transformers(name: str, weights: str | None, device: torch.device) -> Loaded:  # noqa: ARG001
    """The image features of a model of both modalities, the pooled output of one of images.

    The first token stands for a pooler that the weights do not have.
    """
    processor = opening.image_processor(name)
    model, report = opening.transformers_model(name)
    check_complete(report, name)
    has_pooler = not report["missing_keys"]  # those of a pooler are the only ones that pass the check
    model = model.float().to(device).eval()
    encode = partial(_image_features, model, has_pooler)
    return encode, partial(_pixels, processor), hash_of_weights(model)


def _image_features(model: Any, has_pooler: bool, pixels: Tensor) -> Tensor:
    """The image features of a model of transformers: ``[n, width]``.

    Of a model of images alone they are the pooled output. The first token stands for it without a pooler, and
    with one whose weights are random, for which ``has_pooler`` is False.
    """
    features: Tensor
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=pixels)
        features = output if isinstance(output, Tensor) else output.pooler_output  # since transformers 5
    else:
        output = model(pixel_values=pixels)
        pooled = output.get("pooler_output") if has_pooler else None
        features = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
    return features


def _pixels(processor: Any, picture: Any) -> Tensor:
    """The pixels of a picture, as a model of transformers takes them."""
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels


_FOLDERS = {"architecture": _timm, "model_type": _transformers}  # by a key of config.json
