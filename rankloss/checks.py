"""Checks of the losses' inputs: each raises an error that names the argument and shows its value."""

from __future__ import annotations

import math
import warnings
from numbers import Integral
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from rankloss.options import RankOptions, shown
from rankloss.precision import can_be_read


class InputWarning(UserWarning):
    """Warning of a suspicious input, which is used unchanged."""


def check_matrix(name: str, x: object) -> None:
    """Raise an error that names the argument unless it is a dense ``[N, D]`` of floats, with D at least 1.

    Floats must have 16 bits at least, and the tensor must not be inside a transform of torch.func.

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
        hint = ". Several captions per image are several batches: see docs/losses.md" if x.dim() == 3 else ""
        raise ValueError(f"{name} must have shape [N, D]; got {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {x.dtype}")
    if x.dtype.itemsize < 2:
        raise ValueError(f"{name} must be floating point of at least 16 bits; got {x.dtype}")
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column; got shape {tuple(x.shape)}")


def _check_untransformed(name: str, x: Tensor) -> None:
    """Raise a ValueError for a tensor inside a transform of torch.func, such as ``grad`` or ``vmap``."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(
            f"{name} must not be transformed by torch.func; losses are differentiated by autograd"
        )


def check_features(
    image_features: Tensor, text_features: Tensor, *, min_pairs: int = 2, one_space: bool = True
) -> None:
    """Raise an error that names the argument unless both are floating ``[N, D]`` of one N and device.

    N must be at least ``min_pairs``: a list needs two items, but a process may hold one of many. With
    ``one_space`` both must have one width, as comparisons of images with texts require; the in-modal term
    does not.

    Raises:
        TypeError: for features that are not tensors.
        ValueError: for all else.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        check_matrix(name, features)
    if len(image_features) != len(text_features):
        raise ValueError(
            "image_features and text_features must have one row per pair; "
            f"got shapes {tuple(image_features.shape)} and {tuple(text_features.shape)}. "
            "Extra texts are for the base loss: see docs/losses.md"
        )
    pairs = len(image_features)
    if pairs < min_pairs:
        fewest = "one pair" if min_pairs == 1 else "two pairs"
        hint = ". A last batch of one pair is left out by a data loader with drop_last=True" if pairs else ""
        raise ValueError(
            f"image_features and text_features must hold at least {fewest}; got shape "
            f"{tuple(image_features.shape)}{hint}"
        )
    check_device("text_features", text_features, image_features)
    if one_space:
        _check_one_space("image_features", image_features, "text_features", text_features)


def _check_one_space(of_images: str, image_features: Tensor, of_texts: str, text_features: Tensor) -> None:
    """Raise a ValueError that names the arguments unless images and texts have one width."""
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"{of_images} and {of_texts} must have one shape [N, D]; got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}. For encoders that share no space {_WITHOUT_CROSS_MODAL}"
        )


_WITHOUT_CROSS_MODAL = (
    "leave the cross-modal term out, cross_modal=0 (RankClipLoss: lambda_cross=0, open_clip: "
    "--rankclip-lambda-cross 0)"
)


# --- a teacher's features ---------------------------------------------------------------------------------


def check_teacher(
    name: str, features: Tensor, image_features: Tensor | None = None, *, first_look: bool = True
) -> bool:
    """Raise an error that names the argument unless these are valid features of a teacher.

    Every entry point for a teacher's features (a loss's argument, a file, a column) calls this function.
    Features must be a dense floating matrix of finite values without a row of zeros, as a half-filled file
    has them. On a CPU values are always read; on an accelerator only at the first look, which waits for the
    device.

    Args:
        name: of the argument.
        features: ``[N, D']``.
        image_features: the features of the same pairs, with the same number of rows and device; None if not
            yet known.
        first_look: True for the first call with the argument. Only then values on an accelerator are read,
            and norms other than 1 give a warning.

    Returns:
        True if values were read; False on an accelerator after the first look, while a graph is captured,
        and for a tensor without values.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for all else.

    Example:
        >>> check_teacher("reference_text_features", torch.eye(4))
        True
    """
    check_matrix(name, features)
    if image_features is not None:
        if len(features) != len(image_features):
            raise ValueError(
                f"{name} must have one row per pair, {len(image_features)}; got shape {tuple(features.shape)}"
            )
        check_device(name, features, image_features)
    are_read = (first_look or features.is_cpu) and _has_values(features)
    if are_read:
        _check_teacher_rows(name, features.detach())
        if first_look:
            warn_of_norms(name, features)
    return are_read


def _has_values(x: Tensor) -> bool:
    """True for a tensor with values that can be read."""
    return len(x) > 0 and can_be_read(x)


def _check_teacher_rows(name: str, features: Tensor) -> None:
    """Raise a ValueError for a teacher's rows that are zero or not finite, or whose norms are out of range.

    The message describes the first such row.
    """
    norms = _norms(features)
    is_finite = norms.isfinite()
    if not is_finite.all():
        first = int((~is_finite).long().argmax())
        if features[first].isfinite().all():  # its squares overflow
            _refuse_extreme(name, features, first)
        raise ValueError(f"{name} must be finite; row {first} has norm {norms[first].item():g}")
    if not norms.all():
        rows_without_norm = (norms == 0).nonzero().flatten().tolist()
        first = rows_without_norm[0]
        if features[first].any():  # its squares underflow
            _refuse_extreme(name, features, first)
        raise ValueError(
            f"{name} must not have rows of zeros, which rank nothing; got {len(rows_without_norm)} of "
            f"{len(features)}, the first is row {first}. A file that is filled in part looks like this"
        )


def _refuse_extreme(name: str, x: Tensor, row: int) -> NoReturn:
    """Raise the error about a row of finite values whose squares overflow, or all underflow."""
    largest = x[row].abs().amax().item()
    raise ValueError(
        f"{name} must be unit-norm; row {row} has values up to {largest:g}, whose squares float32 cannot hold"
    )


FEWEST_THAT_DIFFER = 8
"""Fewer equal rows of a teacher are no reason to suspect it."""


def warn_of_one_row(name: str, features: Tensor) -> None:
    """Warn of a teacher whose rows of a batch are all equal, and therefore rank nothing.

    No error: a batch may be of one caption or of one picture. Nothing for fewer than ``FEWEST_THAT_DIFFER``
    rows.

    Args:
        name: of the argument.
        features: ``[N, D']``, whose values :func:`check_teacher` has read.
    """
    if len(features) >= FEWEST_THAT_DIFFER and bool((features == features[0]).all()):
        warnings.warn(
            f"{name} are one row for all pairs of a batch, which ranks nothing. Unless these pairs have one "
            "caption or one picture, the teacher's features are damaged",
            InputWarning,
            stacklevel=1,  # one place for all losses, so that Python shows an equal text once
        )


def check_references(
    options: RankOptions,
    *,
    cross_modal: bool,
    reference_image_features: Tensor | None,
    reference_text_features: Tensor | None,
) -> None:
    """Raise a ValueError unless a teacher's features fit the options and the wanted terms.

    Args:
        options: of the rank terms.
        cross_modal: True if the cross-modal term is wanted.
        reference_image_features: a teacher's features, or None.
        reference_text_features: a teacher's features, or None.
    """
    image, text = reference_image_features, reference_text_features
    if image is None and text is None:
        if options.reference_scale is not None:
            raise ValueError(
                f"reference_scale={options.reference_scale!r} multiplies a teacher's similarities; it needs "
                "reference_image_features or reference_text_features"
            )
        return
    given_name = "reference_text_features" if image is None else "reference_image_features"
    if options.fixed_reference is not None:
        raise ValueError(
            f"fixed_reference={options.fixed_reference!r} fixes one of the batch's own rankings; it does not "
            f"apply beside {given_name}"
        )
    if not cross_modal:  # the in-modal term takes a teacher of one modality, and modalities of any width
        return
    if image is None or text is None:
        raise ValueError(
            "the cross-modal term needs reference_image_features and reference_text_features; got "
            f"{given_name} alone, which ranks the in-modal term: {_WITHOUT_CROSS_MODAL}"
        )
    _check_one_space("reference_image_features", image, "reference_text_features", text)


# --- norms ------------------------------------------------------------------------------------------------

_UNIT = 0.01  # largest distance of a norm from 1


def _norms(x: Tensor) -> Tensor:
    """The norms of the rows of ``[N, D]``, in float32 at least."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norms


def warn_of_norms(name: str, x: Tensor) -> None:
    """Warn of rows of ``[N, D]`` that are not unit-norm; nothing where there are no values to read.

    Infinities and NaN are no case of it: they show in the loss.
    """
    if not _has_values(x):
        return
    least, most = torch.stack(_norms(x.detach()).aminmax()).tolist()
    error = max(abs(least - 1), abs(most - 1))
    if _UNIT < error < math.inf:
        warnings.warn(
            f"{name} should be unit-norm, as CLIP models return them; norms are off by up to {error:.4g}. "
            "Features are used unnormalised",
            InputWarning,
            stacklevel=1,  # one place for all losses, so that Python shows an equal text once
        )


# --- other arguments ---------------------------------------------------------------------------------------

INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""The dtypes of ids and of indices."""


def check_ids(name: str, ids: Tensor, image_features: Tensor) -> None:
    """Raise an error that names the argument unless it has an integer for every pair, on its device.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for all else.

    Example:
        >>> check_ids("pair_ids", torch.tensor([0, 1, 0]), torch.eye(3))
    """
    check_is_tensor(name, ids)
    n = len(image_features)
    if ids.dtype not in INTEGERS or ids.shape != (n,):
        raise ValueError(f"{name} must be {n} integers, one for every pair; got {ids.dtype} {[*ids.shape]}")
    check_device(name, ids, image_features)


def check_id(name: str, value: object, row: int) -> None:
    """Raise a ValueError for an id of a row that is missing, a bool, or neither a text nor an integer.

    Missing ids, None, NaN, an empty or a blank text, would make one group of all their rows, and so would
    floats that are rounded alike.

    Example:
        >>> check_id("image_ids", "red-shoe", 0)
        >>> check_id("image_ids", " ", 7)
        Traceback (most recent call last):
        ValueError: image_ids must be texts or integers; row 7 has none: ' '
    """
    if isinstance(value, bool) or not isinstance(value, (str, Integral)):
        raise ValueError(f"{name} must be texts or integers; row {row} has {kind_of(value)} {value!r}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} must be texts or integers; row {row} has none: {value!r}")


def check_several(name: str, values: object) -> None:
    """Raise a ValueError for one text in place of several, whose letters would be taken for them."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be several, one for each row; got {values!r}")


def check_is_tensor(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {kind_of(value)}")
    _check_is_of_this_process(name, value)


def _check_is_of_this_process(name: str, x: Tensor) -> None:
    """Raise a ValueError for a tensor that is shared among processes, as FSDP2 has parameters."""
    if hasattr(x, "device_mesh"):
        raise ValueError(
            f"{name} must be a tensor of this process; got a {type(x).__name__} {tuple(x.shape)}: give its "
            "full_tensor(), or the to_local() of features whose rows are sharded"
        )


def check_is_number(name: str, value: object, features: Tensor) -> None:
    """Raise an error that names the argument unless it is one number, as a factor of features.

    Raises:
        TypeError: unless it is a tensor or a number of Python or NumPy; a bool is none.
        ValueError: for all else.
    """
    if isinstance(value, bool) or not isinstance(value, (Tensor, float, int, np.integer, np.floating)):
        raise TypeError(f"{name} must be a float or a torch.Tensor; got {kind_of(value)}")
    if not isinstance(value, Tensor):
        try:
            float(value)
        except OverflowError as error:
            raise ValueError(f"{name} must be a number that a float holds; got {shown(value)}") from error
        return
    _check_is_of_this_process(name, value)
    if value.numel() != 1 or value.dim() > 2:  # a factor of more dimensions would add one to the product
        raise ValueError(f"{name} must be one number; got shape {tuple(value.shape)}")
    if value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name} must be a real number; got {value.dtype}")
    _check_untransformed(name, value)
    if value.is_meta:  # on other devices torch accepts it or raises its own error
        check_device(name, value, features)


def kind_of(value: object) -> str:
    """The type of a value, for error messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_device(name: str, x: Tensor, like: Tensor, like_name: str = "image_features") -> None:
    """Raise a ValueError that names the argument unless both tensors are on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {x.device}")


def check_scale(logit_scale: Tensor | float, features: Tensor) -> None:
    """Raise an error unless the scale is one positive number; its value is read only on a CPU.

    NaN passes, and shows in the loss.

    Raises:
        TypeError: as :func:`check_is_number`.
        ValueError: for all else.
    """
    check_is_number("logit_scale", logit_scale, features)
    is_read = not isinstance(logit_scale, Tensor) or logit_scale.is_cpu
    if is_read and logit_scale <= 0:
        value = float(logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale)
        raise ValueError(f"logit_scale must be positive (it is the multiplier, not its log); got {value:g}")


_LARGEST_LOG = 5.0  # CLIP clamps the logarithm at log 100 = 4.6052
_SCALES = 1.0, 1000.0  # outside is no CLIP model's: they clamp theirs at 100, many also at 1 from below


def warn_of_scale(name: str, scale: Tensor | float, *features: Tensor) -> bool:
    """Warn of a scale that no CLIP model has, with the remedy.

    Beside unit-norm features a scale is between 1 and 1,000. One below is likely a temperature, one above has
    been exponentiated twice. CLIP models keep the logarithm of the scale in a parameter, and clamp it at log
    100, so a parameter between 1 and 5 is taken for it, and so is another number between 1 and 5 that was not
    computed from a parameter.

    Args:
        name: of the argument.
        scale: the multiplier s.
        *features: ``[N, D]`` each, whose products it multiplies.

    Returns:
        False if a value cannot be read. Otherwise True, also where features are not unit-norm, beside which
        any scale may be right.

    Example:
        >>> warn_of_scale("logit_scale", 100.0, torch.eye(2))
        True
    """
    if not all(can_be_read(x) for x in (*features, scale) if isinstance(x, Tensor)):
        return False
    if not all(_are_unit(x) for x in features):
        return True
    value = scale.item() if isinstance(scale, Tensor) else float(scale)
    least, most = _SCALES
    is_parameter = isinstance(scale, nn.Parameter)
    small_value = f"{name} is {'a parameter of value' if is_parameter else 'only'} {value:.4g}"
    warning = None
    if value < least:
        warning = f"{small_value}, as a temperature is: the loss takes the scale, its reciprocal, 1 / {name}"
    elif value > most:
        warning = (
            f"{name} is {value:.4g}, and CLIP models have at most 100. The loss takes the scale itself; "
            "where a model returns the scale, take no exponential of it"
        )
    elif _may_be_logarithm(scale, value):
        warning = (
            f"{small_value}. CLIP models keep the logarithm of the scale in their parameter; the loss "
            f"takes the scale itself, {name}.exp()"
        )
    if warning is not None:
        warnings.warn(warning, InputWarning, stacklevel=1)
    return True


def _may_be_logarithm(scale: Tensor | float, value: float) -> bool:
    """True if a scale from 1 on may be the logarithm that CLIP models keep in their parameter."""
    if isinstance(scale, nn.Parameter):
        return value < _LARGEST_LOG
    # A tensor that was computed with a gradient is the parameter's exponential, and 1 the scale of calls that
    # give none.
    was_computed = isinstance(scale, Tensor) and scale.requires_grad
    return not was_computed and 1 < value < _LARGEST_LOG


def _are_unit(features: Tensor) -> bool:
    """True if there are rows, and all are unit-norm."""
    is_unit = (_norms(features.detach()) - 1).abs() < _UNIT
    return len(is_unit) > 0 and bool(is_unit.all())
