"""A model of pictures and texts of transformers, by its folder: CLIP, SigLIP and the like."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankloss_features import opening
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Encoder, Teacher, captions, hash_of_weights, image_encoder
from rankloss_features.weights import check_complete


def load(folder: str, device: torch.device) -> Teacher:
    """The model in a folder that ``save_pretrained`` wrote, with its processor.

    Args:
        folder: The folder.
        device: The device that it computes on.

    Raises:
        ValueError: The folder has weights of another model, or one without a common space.
    """
    model, report = opening.transformers_model(folder)
    check_complete(report, folder)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"{type(model).__name__} has no common space of pictures and texts")
    model = model.float().to(device).eval()
    tokenizer = opening.text_processor(folder)
    # SigLIP has seen texts of one length alone.
    padding = "max_length" if isinstance(getattr(model, "logit_bias", None), Tensor) else "longest"
    tokens_of = partial(_tokens, tokenizer, padding, _most_tokens(model, tokenizer))
    encode_texts = partial(_texts, model, device)
    with torch.inference_mode():
        width = encode_texts(tokens_of([Sample(0, "", "a picture")])).shape[1]
    transform = partial(_pixels, opening.image_processor(folder))
    encoders = {
        NAMES[0]: image_encoder(transform, partial(_images, model), width, device),
        NAMES[1]: Encoder(tokens_of, encode_texts, width),
    }
    scale = float(model.logit_scale.detach().exp()) if hasattr(model, "logit_scale") else None
    about = {"transformers": folder, "weights": hash_of_weights(model)}
    return Teacher(about, encoders, scale, device=device)


def _most_tokens(model: Any, tokenizer: Any) -> int | None:
    """The number of tokens to which texts are cut, and those of SigLIP padded; None if nothing bounds it.

    It is the smaller of two bounds, of which either may be missing: the positions of the text tower, and the
    tokenizer's own bound, which SigLIP 2's has not.
    """
    tower = getattr(model.config, "text_config", model.config)
    positions = getattr(tower, "max_position_embeddings", None) or sys.maxsize
    # transformers gives a tokenizer without a bound a larger one than any integer of 64 bits.
    most = min(tokenizer.model_max_length, positions)
    return None if most >= sys.maxsize else int(most)


def _images(model: Any, pixels: Tensor) -> Tensor:
    """The features of pictures: ``[n, width]``."""
    return _pooled(model.get_image_features(pixel_values=pixels))


def _texts(model: Any, device: torch.device, tokens: dict[str, Tensor]) -> Tensor:
    """The features of texts: ``[n, width]``."""
    inputs = {name: of_texts.to(device) for name, of_texts in tokens.items()}
    return _pooled(model.get_text_features(**inputs))


def _pooled(output: Any) -> Tensor:
    """The features in a model's output."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output  # since transformers 5
    return features


# Functions of a module, since they are pickled for the processes that read data, where these are not forked.
def _pixels(processor: Any, picture: Any) -> Tensor:
    """The pixels of a picture, as the model takes them."""
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def _tokens(tokenizer: Any, padding: str, longest: int | None, samples: list[Sample]) -> dict[str, Tensor]:
    """The tokens of the samples' captions, as the model takes them, cut at the longest that it takes."""
    options = {"padding": padding, "truncation": True, "max_length": longest}
    tokens = tokenizer(captions(samples), **options, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
