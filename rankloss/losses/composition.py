"""How a loss stands on another one: the base's entries, and its own beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from torch import Tensor

from rankloss.distributed import Gather
from rankloss.losses.clip import ClipLoss

__all__ = ["base_entries", "combined", "shares_gathering"]


def shares_gathering(base: Callable[..., Any], gather: Gather) -> bool:
    """Whether a base is CLIP's loss of the rows that ``gather`` serves, so that one gathering serves both."""
    return type(base) is ClipLoss and base.gather == gather


def base_entries(
    base: Callable[..., Any],
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    **base_inputs: Any,
) -> dict[str, Tensor]:
    """Call a base with the forward convention of open_clip's losses, and take what it gives by name.

    Args:
        base: a module or function that takes the three inputs by name, and ``output_dict``.
        image_features: ``[N, D]``.
        text_features: ``[N, D]``.
        logit_scale: the multiplier s.
        logit_bias: handed on unless it is None, since not every loss takes one.
        **base_inputs: whatever else the base takes, handed on as it is.

    Returns:
        The entries of the base's dict; a plain scalar becomes ``{"contrastive_loss": …}``.

    Example:
        >>> import rankloss, torch
        >>> v = torch.eye(2)
        >>> list(base_entries(rankloss.ClipLoss(), v, v, 1.0))
        ['contrastive_loss']
    """
    if logit_bias is not None:
        base_inputs["logit_bias"] = logit_bias
    base_output = base(
        image_features=image_features,  # by name: not every loss has them in this order
        text_features=text_features,
        logit_scale=logit_scale,
        output_dict=True,
        **base_inputs,
    )
    return dict(base_output) if isinstance(base_output, Mapping) else {"contrastive_loss": base_output}


def combined(
    entries: Mapping[str, Tensor], own: Mapping[str, Tensor], output_dict: bool
) -> Tensor | dict[str, Tensor]:
    """The sum of the base's entries and of a loss's own, or with ``output_dict`` all of them by name.

    Raises:
        ValueError: if both have an entry of one name: one of the two would be lost.

    Example:
        >>> import torch
        >>> combined({"contrastive_loss": torch.tensor(2.0)}, {"my_loss": torch.tensor(0.5)}, False)
        tensor(2.5000)
    """
    both = sorted(entries.keys() & own.keys())
    if both:
        raise ValueError(f"the base has an entry {both[0]!r} of its own, so a second one cannot be added")
    terms = {**entries, **own}
    return terms if output_dict else reduce(operator.add, terms.values())
