"""Checks of what losses are given: each raises an error that names the argument and shows what came."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from rankloss.precision import may_look_at

__all__ = [
    "check_bias",
    "check_device",
    "check_features",
    "check_is_number",
    "check_is_tensor",
    "check_reference_features",
    "check_scale",
    "kind_of",
    "refuse_forward_mode",
]


def check_features(image_features: Tensor, text_features: Tensor, *, min_pairs: int = 2) -> None:
    """Raise an error that names the argument unless both are floating ``[N, D]`` of one shape and device.

    N must be at least ``min_pairs``: a list needs two items, but a process may hold one of many.

    Raises:
        TypeError: for features that are no tensor.
        ValueError: for all else.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        check_is_tensor(name, features)
        if features.dim() != 2:
            raise ValueError(f"{name} must have shape [N, D]; got {tuple(features.shape)}")
        if not features.is_floating_point():
            raise ValueError(f"{name} must be floating point; got {features.dtype}")
    if image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must have one shape [N, D]; "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if image_features.shape[0] < min_pairs or image_features.shape[1] < 1:
        pairs = "one pair" if min_pairs == 1 else "two pairs"
        raise ValueError(
            f"image_features and text_features must hold at least {pairs}; "
            f"got shape {tuple(image_features.shape)}"
        )
    check_device("text_features", text_features, image_features)


def check_reference_features(name: str, reference: Tensor, image_features: Tensor) -> None:
    """Raise an error that names the argument unless it is floating ``[N, D']``, on the features' device.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for all else.
    """
    check_is_tensor(name, reference)
    if reference.dim() != 2 or reference.shape[0] != len(image_features) or reference.shape[1] < 1:
        raise ValueError(
            f"{name} must have shape [N, D'] with one row per pair, N = {len(image_features)}; "
            f"got {tuple(reference.shape)}"
        )
    if not reference.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {reference.dtype}")
    check_device(name, reference, image_features)


def check_is_tensor(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {kind_of(value)}")


def check_is_number(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless it is a tensor or a number of Python's or NumPy's."""
    if not isinstance(value, (Tensor, float, int, np.number)):
        raise TypeError(f"{name} must be a float or a torch.Tensor; got {kind_of(value)}")


def kind_of(value: object) -> str:
    """The type of a value, as an error message shows it."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_device(name: str, x: Tensor, like: Tensor, like_name: str = "image_features") -> None:
    """Raise a ValueError that names the argument unless both tensors are on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {x.device}")


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise a RuntimeError in forward-mode differentiation, in which operators of ours would give 0."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "this loss has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use "
            "reverse mode, as torch.autograd.grad does"
        )


def check_scale(logit_scale: Tensor | float, features: Tensor) -> None:
    """Raise an error unless the scale is one positive number; its value is looked at where that is free.

    Raises:
        TypeError: as :func:`check_is_number`.
        ValueError: for all else.
    """
    check_is_number("logit_scale", logit_scale)
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1 or logit_scale.dim() > 2:  # more would not broadcast with features
            raise ValueError(f"logit_scale must be one number; got shape {tuple(logit_scale.shape)}")
        if logit_scale.is_meta and not features.is_meta:
            raise ValueError(f"logit_scale must be on {features.device}, as image_features; got meta")
        value = _value_of(logit_scale) if may_look_at(logit_scale) else None
    else:
        value = None if torch.compiler.is_compiling() else float(logit_scale)
    if value is not None and value <= 0:
        raise ValueError(f"logit_scale must be positive (it is the multiplier, not its log); got {value:g}")


def check_bias(logit_bias: Tensor | float | None, features: Tensor) -> None:
    """Raise an error unless the bias is one number, or None.

    Raises:
        TypeError: as :func:`check_is_number`.
        ValueError: for a tensor of several numbers, or on another device.
    """
    if isinstance(logit_bias, Tensor):
        if logit_bias.numel() != 1:
            raise ValueError(f"logit_bias must be one number; got shape {tuple(logit_bias.shape)}")
        if not (logit_bias.dim() == 0 and logit_bias.device.type == "cpu"):  # torch takes such one anywhere
            check_device("logit_bias", logit_bias, features)
    elif logit_bias is not None:
        check_is_number("logit_bias", logit_bias)


def _value_of(x: Tensor) -> float | None:
    """The value of a scalar; None where there is none to read, as under vmap."""
    try:
        return float(x.item())
    except RuntimeError:
        return None
