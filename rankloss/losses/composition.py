"""Composition: a loss adds its terms to the entries of a base loss."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rankloss.distributed import Gather
from rankloss.losses.clip import ClipLoss

Base: TypeAlias = Callable[..., Any]
"""A module or function with the forward convention of open_clip's losses, including ``output_dict``."""


def check_base(base: Base | None, gather: Gather, streaming: dict[str, Any] | None = None) -> Base:
    """``base``; for None CLIP's loss with the same gathering and streaming.

    Raises:
        ValueError: for a base that cannot be called, or a class in place of a loss.
    """
    if base is None:
        return ClipLoss(gather=gather, **(streaming or {}))
    if not callable(base) or isinstance(base, type):
        raise ValueError(f"base must be a loss, a module or function; got {base!r}")
    return base


def is_streamed_clip(base: Base, gather: Gather) -> bool:
    """True if the pass of the rank terms, which gather by ``gather``, can also compute this base.

    It computes CLIP's loss of the same features, without ids and smoothing. Hooks, or a ``forward`` that was
    set on the module, need a call of the base.
    """
    attributes_of_hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return (
        type(base) is ClipLoss
        and base.same_id is None
        and base.label_smoothing == 0
        and base.gather == gather
        and "forward" not in base.__dict__
        and not any(getattr(base, hooks) for hooks in attributes_of_hooks)
    )


TEACHER = ("reference_image_features", "reference_text_features")
"""Names of a teacher's features of each pair, ``[N, D']``: a loss's arguments and columns of data."""


@functools.cache  # each call of a loss asks
def _keyword_only(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The keyword-only arguments of a function, by name."""
    parameters = inspect.signature(function).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def own_inputs(loss: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The inputs that ``own_terms`` of a loss names, its keyword-only arguments; none without this method."""
    own_terms = getattr(type(loss), "own_terms", None)
    return {} if own_terms is None else _keyword_only(own_terms)


def call_arguments(loss: Base) -> Mapping[str, inspect.Parameter]:
    """The arguments that a loss is called with, by name: those of ``forward`` and :func:`own_inputs`."""
    if not isinstance(loss, nn.Module):
        return inspect.signature(loss).parameters
    return {**inspect.signature(loss.forward).parameters, **own_inputs(loss)}


def base_under(loss: Base) -> Base | None:
    """The loss that a loss stands on, its attribute ``base``; None without one.

    In a loss of one's own the attribute may be something else, as a number: one that cannot be called is no
    loss.
    """
    base = getattr(loss, "base", None)
    return base if callable(base) else None


def takes_teacher(loss: Base) -> bool:
    """True if a loss, or a base to which it passes its inputs on, takes a teacher's features.

    A loss takes them if the signature of its ``forward`` or ``own_terms`` names one of :data:`TEACHER`, or if
    it passes unnamed inputs on to a ``base`` or another module of its own that takes them.

    Example:
        >>> import rankloss
        >>> takes_teacher(rankloss.RankClipLoss()), takes_teacher(rankloss.ClipLoss())
        (True, False)
    """
    arguments = call_arguments(loss)
    if not set(TEACHER).isdisjoint(arguments):
        return True
    kinds = {argument.kind for argument in arguments.values()}
    passes_inputs_on = inspect.Parameter.VAR_KEYWORD in kinds  # **inputs
    if not passes_inputs_on:
        return False
    losses_within: list[Base] = list(loss.children()) if isinstance(loss, nn.Module) else []
    base = base_under(loss)  # a function, which is no child, or a module
    if base is not None:
        losses_within.insert(0, base)
    return any(takes_teacher(within) for within in losses_within)


def base_entries(
    base: Base,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    teacher: Mapping[str, Tensor | None] | None = None,
    **base_inputs: Any,
) -> dict[str, Tensor]:
    """Call a base loss with the forward convention of open_clip's losses, and return its entries.

    Args:
        base: takes the three inputs by name, and ``output_dict``.
        image_features: ``[N, D]``.
        text_features: ``[N, D]``.
        logit_scale: the multiplier s.
        logit_bias: passed on unless None, since not every loss takes a bias.
        teacher: a teacher's features that the calling loss itself uses, by the names of :data:`TEACHER`. With
            it these features, and others of a teacher among the base's inputs, are passed on only to a base
            that takes them (:func:`takes_teacher`). None for a loss that uses none: the base then gets its
            inputs as they are.
        **base_inputs: further arguments of the base.

    Returns:
        The entries of the base's dict; a plain scalar becomes ``{"contrastive_loss": …}``. Half-precision
        values become float32, the dtype of the added terms. Entries that are no floating-point tensor stay as
        they are.

    Raises:
        ValueError: for a floating-point entry of several values: the terms would be added to each of them.

    Example:
        >>> import rankloss, torch
        >>> v = torch.eye(2)
        >>> list(base_entries(rankloss.ClipLoss(), v, v, 1.0))
        ['contrastive_loss']
    """
    if logit_bias is not None:
        base_inputs["logit_bias"] = logit_bias
    if teacher is not None:
        of_base = {name: base_inputs.pop(name, None) for name in TEACHER}
        all_features = {**of_base, **teacher}
        known_features = {name: x for name, x in all_features.items() if x is not None}
        if known_features and takes_teacher(base):
            base_inputs.update(known_features)
    base_output = base(
        image_features=image_features,  # by name: the order differs between losses
        text_features=text_features,
        logit_scale=logit_scale,
        output_dict=True,
        **base_inputs,
    )
    entries = base_output if isinstance(base_output, Mapping) else {"contrastive_loss": base_output}
    return {name: _checked_entry(name, value) for name, value in entries.items()}


def _checked_entry(name: str, value: Tensor) -> Tensor:
    """An entry of a base, if it is floating-point in float32 at least; a ValueError for several values."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    if value.numel() != 1:
        raise ValueError(
            f"base must give one value per entry, reduced over the batch; {name} has {tuple(value.shape)}"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def combined(
    entries: Mapping[str, Tensor], own: Mapping[str, Tensor], output_dict: bool
) -> Tensor | dict[str, Tensor]:
    """The sum of the base's entries and a loss's own, or with ``output_dict`` all entries by name.

    Raises:
        ValueError: if both have an entry of the same name.

    Example:
        >>> import torch
        >>> combined({"contrastive_loss": torch.tensor(2.0)}, {"my_loss": torch.tensor(0.5)}, False)
        tensor(2.5000)
    """
    both = sorted(entries.keys() & own.keys())
    if both:
        raise ValueError(f"the base has an entry {both[0]!r} of its own, so a second one cannot be added")
    terms = {**entries, **own}
    return terms if output_dict else functools.reduce(operator.add, terms.values())
