"""What a loss needs of a model of transformers: embeddings, scale and bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_EMBEDDINGS = {"image_features": "image_embeds", "text_features": "text_embeds"}


def features_of(outputs: Any) -> dict[str, Tensor]:
    """The embeddings of a model's output, by the names that losses have for them.

    Raises:
        ValueError: The output has none.
    """
    missing = [name for name in _EMBEDDINGS.values() if getattr(outputs, name, None) is None]
    if missing:
        given = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"the model's output has no {' and no '.join(missing)}, got {given}")
    return {feature: getattr(outputs, name) for feature, name in _EMBEDDINGS.items()}


def logit_scale(model: Any) -> Tensor:
    """The multiplier of the similarities, from the parameter of a model.

    Raises:
        ValueError: The model has none, or this process does not hold it whole.
    """
    name = next((n for n in ("logit_scale", "temperature") if _has(model, n)), None)
    if name is None:
        raise ValueError(f"{type(model).__name__} has neither a logit_scale nor a temperature")
    scale = _whole(model, name)
    limit = getattr(model, "max_log_logit_scale", None)  # AIMv2's, which its own loss applies as well
    if name == "logit_scale" and limit is not None:
        scale = scale.clamp(0.0, limit)
    return scale.exp() if name == "logit_scale" else 1 / scale


def has_bias(model: Any) -> bool:
    """Whether the model's own loss is a sigmoid loss, which alone has a bias."""
    return _has(model, "logit_bias")


def logit_bias(model: Any) -> Tensor:
    """The bias that is added to the scaled similarities.

    Raises:
        ValueError: This process does not hold it whole.
    """
    return _whole(model, "logit_bias")


def _has(model: Any, name: str) -> bool:
    return isinstance(getattr(model, name, None), Tensor)


def _whole(model: Any, name: str) -> Tensor:
    parameter = getattr(model, name)
    whole: Tensor = _gathered(parameter) if hasattr(parameter, "full_tensor") else parameter
    if whole.numel() != 1:
        raise ValueError(
            f"{name} has {whole.numel()} elements on this process: ZeRO stage 3 and FSDP with flat "
            "parameters do not show it outside the forward pass; use ZeRO stage 2 or FSDP version 2"
        )
    return whole.reshape(())


def _gathered(parameter: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    # The gradient is that of this process's share of the batch. Where FSDP has resharded the parameter by
    # now, nothing else averages it, and torch would assume that it is the same on every process.
    mean = tuple(Partial("avg") for _ in parameter.placements)
    whole: Tensor = parameter.full_tensor(grad_placements=mean)
    return whole


# --- a second caption of each image ---------------------------------------------------------------------


def with_captions(inputs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The inputs of a model that encodes both captions of each image in one forward pass.

    Args:
        inputs: A batch. The columns of the second caption are those of the first with a prefix:
            ``PREFIX_input_ids`` beside ``input_ids``.
        prefix: The prefix.

    Returns:
        The batch without these columns, each appended to that of the first caption: text embeddings
        ``[2N, D]``.

    Raises:
        ValueError: There are no such columns, or they are of another length.
    """
    plain = without_captions(inputs, prefix)
    for name, captions in inputs.items():
        if name in plain:
            continue
        first = plain.get(name.removeprefix(f"{prefix}_"))
        if first is None or first.shape != captions.shape:
            raise ValueError(
                f"{name} must have the shape of the column without the prefix, got {tuple(captions.shape)} "
                f"beside {None if first is None else tuple(first.shape)}; pad both captions to one length"
            )
        plain[name.removeprefix(f"{prefix}_")] = torch.cat([first, captions])
    if len(plain) == len(inputs):
        raise ValueError(f"no column of the batch begins with {prefix}_, got {', '.join(inputs)}")
    return plain


def without_captions(inputs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The batch without the columns of the second caption."""
    return {name: value for name, value in inputs.items() if not name.startswith(f"{prefix}_")}


# --- a teacher's features of each pair ------------------------------------------------------------------

REFERENCES = ("reference_image_features", "reference_text_features")
"""The columns of a teacher's features, ``[N, D']``: what losses call them, too."""


def without_references(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The batch without the columns of a teacher's features, and these columns."""
    references = {name: inputs[name] for name in REFERENCES if name in inputs}
    return {name: value for name, value in inputs.items() if name not in REFERENCES}, references
