"""Models of both modalities, by the name or path of ``--model``: open_clip's, or folders of transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankloss_features import opening, trained_files, transformers_clip
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Encoder, Teacher, captions, hash_of_weights, image_encoder

OWN_WEIGHTS = ("local-dir:", "hf-hub:")
"""The beginnings of models of open_clip whose weights lie beside them; it ignores others."""

_IMAGES, _TEXTS = NAMES


def check_pretrained(model: str | None, pretrained: str | None) -> None:
    """Raise a ValueError for weights beside a model that has its own: a folder's, or a hub's.

    A name of open_clip is no folder's, even where the working directory has a folder of that name.
    """
    if model is None or not pretrained:
        return
    if is_folder_of_transformers(model) or (Path(model).is_dir() and not _is_name_of_open_clip(model)):
        raise ValueError(f"--pretrained {pretrained}: the folder --model {model} has its own weights")
    if not model.startswith(OWN_WEIGHTS):
        return
    if model.startswith("local-dir:"):
        advice = (
            "loads the weights in the folder: copy its open_clip_config.json into a new folder, and your "
            "file beside it as open_clip_pytorch_model.bin"
        )
    else:
        advice = "loads the hub's weights: leave it out"
    raise ValueError(f"--pretrained {pretrained}: open_clip ignores it beside --model {model} and {advice}")


def is_folder_of_transformers(model: str) -> bool:
    """True for a folder with a model of transformers; its name would otherwise be open_clip's."""
    return Path(model, "config.json").is_file()


def _is_name_of_open_clip(model: str) -> bool:
    import open_clip

    return opening.open_clip_name(model) in open_clip.list_models()


def check_activation(model: str | None, pretrained: str | None) -> None:
    """Raise a ValueError for a tag of weights that were trained with QuickGELU, beside a model without it.

    open_clip warns of it and computes other features: OpenAI's weights need QuickGELU, which ``ViT-B-32`` has
    not and ``ViT-B-32-quickgelu`` has.
    """
    if model is None or not pretrained:
        return
    import open_clip

    name = opening.open_clip_name(model)
    if not open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False):
        return
    if not open_clip.get_model_config(name).get("quick_gelu", False):
        raise ValueError(f"the weights {pretrained} were trained with QuickGELU: give {name}-quickgelu")


def load(model: str, pretrained: str | None, device: torch.device) -> Teacher:
    """A model of both modalities, which have a common space.

    Args:
        model: The name or path of ``--model``.
        pretrained: The tag or file of ``--pretrained``, for a model of open_clip.
        device: The device that it computes on.

    Raises:
        ValueError: It is not found, its weights are of another model or activation, or nothing says how
            they want pictures to be prepared.
        ImportError: A package is not installed.
    """
    if is_folder_of_transformers(model):
        return transformers_clip.load(model, device)
    return _open_clip(model, pretrained, device)


def _open_clip(name: str, pretrained: str | None, device: torch.device) -> Teacher:
    """A model of open_clip, as :func:`load`."""
    check_activation(name, pretrained)
    options = trained_files.options_of(name, pretrained) if pretrained else {}
    model, transform, tokenizer = opening.open_clip_model(name, pretrained, device, **options)
    about = {"open_clip": name, "pretrained": pretrained, "weights": hash_of_weights(model)}
    with torch.inference_mode():
        width = model.encode_text(tokenizer([""]).to(device)).shape[1]
    encoders = {
        _IMAGES: image_encoder(transform, model.encode_image, width, device),
        _TEXTS: Encoder(partial(_tokens, tokenizer), model.encode_text, width),
    }
    return Teacher(about, encoders, float(model.logit_scale.detach().exp()), device=device)


# A function of a module, since it is pickled for the processes that read data, where these are not forked.
def _tokens(tokenizer: Any, samples: list[Sample]) -> Tensor:
    """The tokens of the samples' captions, the inputs of the model's text tower."""
    tokens: Tensor = tokenizer(captions(samples))
    return tokens
