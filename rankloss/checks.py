"""Checks of the losses' inputs: each raises an error that names the argument and shows its value."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from rankloss.precision import can_be_read, can_sync


class InputWarning(UserWarning):
    """An input is suspicious, and used unchanged."""


def check_matrix(name: str, x: object) -> None:
    """Raise an error that names the argument unless it is a dense floating ``[N, D]`` with D at least 1.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for all else.
    """
    check_is_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise ValueError(f"{name} must be a dense tensor; got {kind}")
    _check_untransformed(name, x)
    if x.dim() != 2:
        hint = ". Several captions per image are several batches: see docs/data.md" if x.dim() == 3 else ""
        raise ValueError(f"{name} must have shape [N, D]; got {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {x.dtype}")
    if x.dtype.itemsize < 2:
        raise ValueError(f"{name} must be floating point of at least 16 bits; got {x.dtype}")
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column; got shape {tuple(x.shape)}")


def _check_untransformed(name: str, x: Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(
            f"{name} must not be transformed by torch.func; losses are differentiated by autograd"
        )


def check_features(image_features: Tensor, text_features: Tensor, *, min_pairs: int = 2) -> None:
    """Raise an error that names the argument unless both are floating ``[N, D]`` of one N and device.

    N must be at least ``min_pairs``: a list needs two items, but a process may hold one of many.

    Raises:
        TypeError: for features that are no tensor.
        ValueError: for all else.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        check_matrix(name, features)
    if len(image_features) != len(text_features):
        raise ValueError(
            "image_features and text_features must have one row per pair; "
            f"got shapes {tuple(image_features.shape)} and {tuple(text_features.shape)}. "
            "Extra texts are for the base loss: see docs/data.md"
        )
    if image_features.shape[0] < min_pairs:
        pairs = "one pair" if min_pairs == 1 else "two pairs"
        raise ValueError(
            f"image_features and text_features must hold at least {pairs}; "
            f"got shape {tuple(image_features.shape)}"
        )
    check_device("text_features", text_features, image_features)


WITHOUT_CROSS_MODAL = (
    "leave the cross-modal term out, cross_modal=0 (RankClipLoss: lambda_cross=0, open_clip: "
    "--rankclip-lambda-cross 0)"
)


def check_one_space(image_features: Tensor, text_features: Tensor) -> None:
    """Raise a ValueError unless image and text features have one width, as those of one space have.

    What compares images with texts calls this. The in-modal term does not.
    """
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            "image_features and text_features must have one shape [N, D]; "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}. For encoders that share no "
            f"space {WITHOUT_CROSS_MODAL}"
        )


# --- a teacher's features ---------------------------------------------------------------------------------


def check_teacher(
    name: str, features: Tensor, image_features: Tensor | None = None, *, first_look: bool = True
) -> bool:
    """Raise an error that names the argument unless a teacher can have given these features.

    Every entry point that takes a teacher's features, as a loss's argument, a file or a column, calls this.
    They must be a dense floating matrix of finite values without a row of zeros, and eight rows or more must
    not all be equal: that is what a file that is half filled, or filled with one row, looks like. Values are
    looked at where that is free (on a CPU), and elsewhere at the first look, which waits for the accelerator.

    Args:
        name: of the argument.
        features: ``[N, D']``.
        image_features: the features of the same pairs, whose number of rows and device must be the same; None
            where they are not known yet.
        first_look: whether the argument comes for the first time. Only then values on an accelerator are
            looked at, and norms that are not 1 are warned of.

    Returns:
        Whether values were read: not so while a graph is captured, and where there are none.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for all else.

    Example:
        >>> check_teacher("reference_text_features", torch.eye(4))
        True
    """
    if image_features is None:
        check_matrix(name, features)
    else:
        check_reference_features(name, features, image_features)
    if not first_look and not can_sync(features):
        return False
    return look_at_rows(name, features, is_teacher=True, warns=first_look)


def check_reference_features(name: str, reference: Tensor, image_features: Tensor) -> None:
    """The part of :func:`check_teacher` that is free on every device: floating ``[N, D']``, on the device.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for all else.
    """
    check_matrix(name, reference)
    if len(reference) != len(image_features):
        raise ValueError(
            f"{name} must have one row per pair, {len(image_features)}; got shape {tuple(reference.shape)}"
        )
    check_device(name, reference, image_features)


_UNIT = 0.01  # largest distance of a norm from 1
_FEWEST_THAT_DIFFER = 8  # fewer may be pairs of one caption


def look_at_rows(name: str, x: Tensor, *, is_teacher: bool = False, warns: bool = True) -> bool:
    """Check the norms of ``[N, D]``; False where no value can be read.

    Raises:
        ValueError: for a teacher's rows that are not finite, are zero, or are all the same.
    """
    if not can_be_read(x) or not len(x):
        return False
    x = x.detach()
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    all_equal = (x == x[0]).all() if is_teacher and len(x) >= _FEWEST_THAT_DIFFER else norms.new_zeros(())
    least, most, all_equal = torch.stack([*norms.aminmax(), all_equal.to(norms.dtype)]).tolist()
    if is_teacher:
        if not math.isfinite(most):
            row = int((~norms.isfinite()).long().argmax())
            raise ValueError(f"{name} must be finite; row {row} has norm {norms[row].item():g}")
        if least == 0:
            rows = (norms == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"{name} must not have rows of zeros, which rank nothing; got {len(rows)} of {len(x)}, the "
                f"first is row {rows[0]}. A file that is filled in part looks like this"
            )
        if all_equal:
            raise ValueError(f"{name} must not be one row {len(x)} times, which ranks nothing")
    off = max(abs(least - 1), abs(most - 1))
    if warns and _UNIT < off < math.inf:  # a student's infinities and NaN show in the loss
        warnings.warn(
            f"{name} should be unit-norm, as CLIP models return them; norms are off by up to {off:.4g}. "
            "Features are used unnormalised",
            InputWarning,
            stacklevel=1,  # one place for all losses, so that Python shows an equal text once
        )
    return True


# --- other arguments ---------------------------------------------------------------------------------------


def check_is_tensor(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {kind_of(value)}")


def check_is_number(name: str, value: object, features: Tensor) -> None:
    """Raise an error that names the argument unless it is one number, which features can be multiplied by.

    Raises:
        TypeError: for what is neither a tensor nor a number of Python's or NumPy's.
        ValueError: for all else.
    """
    if isinstance(value, bool) or not isinstance(value, (Tensor, float, int, np.number)):
        raise TypeError(f"{name} must be a float or a torch.Tensor; got {kind_of(value)}")
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 2:  # more dimensions would not broadcast with features
            raise ValueError(f"{name} must be one number; got shape {tuple(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{name} must be a real number; got {value.dtype}")
        _check_untransformed(name, value)
        if value.is_meta:  # on other devices torch takes it, or says that it does not
            check_device(name, value, features)


def kind_of(value: object) -> str:
    """The type of a value, as an error message shows it."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_device(name: str, x: Tensor, like: Tensor, like_name: str = "image_features") -> None:
    """Raise a ValueError that names the argument unless both tensors are on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {x.device}")


def check_scale(logit_scale: Tensor | float, features: Tensor) -> None:
    """Raise an error unless the scale is one positive number; its value is looked at where that is free.

    Raises:
        TypeError: as :func:`check_is_number`.
        ValueError: for all else.
    """
    check_is_number("logit_scale", logit_scale, features)
    if isinstance(logit_scale, Tensor):
        if not can_sync(logit_scale):
            return
        logit_scale = logit_scale.item()
    if logit_scale <= 0:
        raise ValueError(
            f"logit_scale must be positive (it is the multiplier, not its log); got {logit_scale:g}"
        )


_LARGEST_LOG = 5.0  # CLIP clamps the logarithm at log 100 = 4.6052


def look_at_scale(name: str, scale: Tensor | float, features: Tensor) -> bool:
    """Warn of a scale that looks like its logarithm; False where its value cannot be read.

    CLIP models keep the logarithm of the scale in a parameter, and clamp it at log 100. A parameter of at
    most 5 is warned of; so is another number above 1 and at most 5 that was not computed from a parameter,
    beside unit-norm ``features``, where no model trains with a scale that small.
    """
    is_parameter = isinstance(scale, nn.Parameter)
    if not (can_be_read(features) and (not isinstance(scale, Tensor) or can_be_read(scale))):
        return False
    if isinstance(scale, Tensor) and scale.requires_grad and not is_parameter:
        return True
    value = scale.item() if isinstance(scale, Tensor) else scale
    if value < _LARGEST_LOG and (is_parameter or (value > 1 and _are_unit(features))):
        kind = "a parameter of value" if is_parameter else "only"
        warnings.warn(
            f"{name} is {kind} {value:.4g}. CLIP models keep the logarithm of the scale in their parameter; "
            f"the loss takes the scale itself, {name}.exp()",
            InputWarning,
            stacklevel=1,
        )
    return True


def _are_unit(features: Tensor) -> bool:
    norms = torch.linalg.vector_norm(features.detach().float(), dim=-1)
    return bool((norms - 1).abs().amax() < _UNIT)


def check_bias(logit_bias: Tensor | float | None, features: Tensor) -> None:
    """Raise an error unless the bias is one number, or None: see :func:`check_is_number`."""
    if logit_bias is not None:
        check_is_number("logit_bias", logit_bias, features)
