"""Embeddings, scale and bias of a model of transformers, for a loss."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankloss_trainers.cached import Split, embedding_in

_EMBEDDINGS = {"image_features": "image_embeds", "text_features": "text_embeds"}


def embedded(
    call: Any, model: Any, inputs: Mapping[str, Any], split: Split | None
) -> tuple[Any, dict[str, Any]]:
    """Call a model, at once or in mini-batches.

    Args:
        call: The model, in its wrappers.
        model: The model itself.
        inputs: Its inputs.
        split: Their split into mini-batches; None embeds all at once.

    Returns:
        Its output; and the embeddings, the scale and the bias, as losses call them.
    """
    with embedding_in(model, split, embeddings_of, functools.partial(scale_of, model)):
        outputs = call(**inputs)
    if split is not None:  # within the context the model gave the features themselves
        return outputs, dict(outputs)
    return outputs, {**embeddings_of(outputs), **scale_of(model)}


def embeddings_of(outputs: Any) -> dict[str, Tensor]:
    """The embeddings of a model's output, as losses call them.

    Raises:
        ValueError: It has none.
    """
    missing = [name for name in _EMBEDDINGS.values() if getattr(outputs, name, None) is None]
    if missing:
        shown = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"the model's output has no {' and no '.join(missing)}, got {shown}")
    return {feature: getattr(outputs, name) for feature, name in _EMBEDDINGS.items()}


def scale_of(model: Any) -> dict[str, Tensor]:
    """The scale of a model, and its bias if it has one, as losses call them.

    Raises:
        ValueError: As :func:`logit_scale`, of the bias too.
    """
    bias = {"logit_bias": _whole(model.logit_bias, "logit_bias")} if has_bias(model) else {}
    return {"logit_scale": logit_scale(model), **bias}


def logit_scale(model: Any) -> Tensor:
    """The multiplier of the similarities, from the parameter of a model.

    Raises:
        ValueError: The model has none, this process does not hold it, or it is no single number.
    """
    if isinstance(getattr(model, "logit_scale", None), Tensor):
        log_scale = _whole(model.logit_scale, "logit_scale")
        limit = getattr(model, "max_log_logit_scale", None)  # AIMv2's, which its own loss applies as well
        if limit is not None:
            log_scale = log_scale.clamp(0.0, limit)
        return log_scale.exp()
    if isinstance(getattr(model, "temperature", None), Tensor):
        return 1 / _whole(model.temperature, "temperature")
    raise ValueError(f"{type(model).__name__} has neither a logit_scale nor a temperature")


def has_bias(model: Any) -> bool:
    """True if the model's own loss is a sigmoid loss, which alone has a bias."""
    return isinstance(getattr(model, "logit_bias", None), Tensor)


def _whole(parameter: Any, name: str) -> Tensor:
    """A parameter of one number as a scalar, also where FSDP has shared it out among processes.

    Raises:
        ValueError: This process does not hold it, as under ZeRO stage 3; or it has several numbers.
    """
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import Partial

        # The gradient is that of this process's share of the batch. Where FSDP has resharded the parameter by
        # now, nothing else averages the gradient, and torch would take it for the same on every process.
        mean = tuple(Partial("avg") for _ in parameter.placements)
        parameter = parameter.full_tensor(grad_placements=mean)
    if parameter.numel() == 0:
        remedy = "use ZeRO stage 2 or FSDP version 2, which show it outside the forward pass"
        raise ValueError(f"{name} has no element on this process: {remedy}")
    if parameter.numel() > 1:
        raise ValueError(f"{name} must be one number; got shape {tuple(parameter.shape)}")
    scalar: Tensor = parameter.reshape(())
    return scalar
