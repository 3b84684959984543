"""What all losses have in common: how they see other processes, and what they check of their inputs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rankloss.batch import Batch
from rankloss.checks import check_features, check_reference_features, check_scale
from rankloss.distributed import Gather, Gathered, GatherOption
from rankloss.losses.weights import is_capturing, is_plain

__all__ = ["GatheringLoss", "InputWarning", "gather_of_open_clip"]

_LARGEST_LOG_SCALE = math.log(100)  # where CLIP clamps its logit_scale


class InputWarning(UserWarning):
    """An input is computed as it is, though it is probably not what was meant."""


class GatheringLoss(nn.Module):
    """A loss of features that are gathered from all processes.

    Args:
        gather: see :class:`rankloss.Gather`. None: the default process group if one of more than one process
            is initialised at the call, with both flags. False: the pairs of this process only.
    """

    def __init__(self, gather: GatherOption = None) -> None:
        super().__init__()
        self.gather = Gather.of(gather)
        self._has_looked = False

    def check_inputs(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        **references: Tensor | None,
    ) -> None:
        """Raise an error that names a wrong input; at the first call, warn of a suspicious one.

        ``references`` are features of the same pairs that take no gradient, where they are given.

        The first call computes the norms of the features and the value of the scale, which waits for an
        accelerator once. It is left for a later call while a graph is compiled or captured.
        """
        check_features(image_features, text_features, min_pairs=self.gather.min_pairs)
        check_scale(logit_scale, image_features)
        given = {name: x for name, x in references.items() if x is not None}
        for name, x in given.items():
            check_reference_features(name, x, image_features)
        if not torch.compiler.is_compiling() and not self._has_looked:
            features = {"image_features": image_features, "text_features": text_features, **given}
            self._has_looked = _look(features, logit_scale)

    def whole_batch(
        self, image_features: Tensor, text_features: Tensor, gathered: Gathered | None = None
    ) -> Gathered:
        """The features of all processes: ``gathered``, from a caller that has them already, or gathered now.

        Raises:
            ValueError: where ``gathered`` is not as many pairs as this loss's own gathering would give.
        """
        if gathered is None:
            return self.gather(image_features, text_features)
        n, rows = len(image_features) * self.gather.place[1], [len(x) for x in gathered]
        if rows != [n, n]:
            raise ValueError(
                "gathered must be what the loss's own gather(image_features, text_features) gives, "
                f"{n} rows of both; got {' and '.join(map(str, rows))}"
            )
        return gathered

    def batch_of(
        self,
        gathered: Gathered,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        reference_image: Tensor | None = None,
        reference_text: Tensor | None = None,
    ) -> Batch:
        """The whole batch, with this process's own features as the anchors where only they have lists.

        Args:
            gathered: ``self.gather(image_features, text_features)``.
            image_features: ``[N, D]``, this process's own.
            text_features: likewise.
            logit_scale: the multiplier s.
            reference_image: a teacher's features of the whole batch.
            reference_text: likewise.
        """
        local = self.gather.anchors_are_local
        return Batch.of(
            *gathered,
            logit_scale,
            anchors=(image_features, text_features) if local else None,
            first_row=self.gather.first_row(len(image_features)),
            reference_image=reference_image,
            reference_text=reference_text,
        )


def gather_of_open_clip(
    gather: GatherOption, defaults: dict[str, Any], *, without_effect: dict[str, Any], **layout: Any
) -> GatherOption:
    """``gather``, or what open_clip's arguments ask for where any of them is given (is not None).

    Args:
        gather: this library's argument.
        defaults: open_clip's, of the arguments in ``layout``.
        without_effect: arguments of open_clip's class that change nothing here.
        **layout: those that a :class:`rankloss.Gather` has too.

    Raises:
        ValueError: for arguments of both kinds.
    """
    given = {name: value for name, value in {**layout, **without_effect}.items() if value is not None}
    if not given:
        return gather
    if gather is not None:
        raise ValueError(f"gather stands for open_clip's arguments; got it beside {', '.join(given)}")
    return Gather(**{**defaults, **{name: x for name, x in given.items() if name in layout}})


def _look(features: dict[str, Tensor], logit_scale: Tensor | float) -> bool:
    """Warn of features that are not unit-norm and of a log in place of the scale; False if unreadable."""
    for name, x in features.items():
        if not is_plain(x) or is_capturing(x.device):
            return False
        off = _value((x.detach().float().norm(dim=-1) - 1).abs().amax())
        if off is None:
            return False
        if 0.01 < off < math.inf:  # infinities and NaN show in the loss
            warnings.warn(
                f"{name} should be unit-norm, as CLIP models return them; norms are off by up to {off:.4g}. "
                "The loss is computed of the features as they are",
                InputWarning,
                stacklevel=1,  # one place for all losses, so that Python shows an equal text once
            )
    if isinstance(logit_scale, nn.Parameter):
        value = _value(logit_scale)
        if value is not None and value <= _LARGEST_LOG_SCALE:
            warnings.warn(
                f"logit_scale is a parameter of value {value:.4g}. CLIP models keep the logarithm of the "
                "scale in theirs; the loss takes the scale itself, logit_scale.exp()",
                InputWarning,
                stacklevel=1,
            )
    return True


def _value(x: Tensor) -> float | None:
    """The value of a scalar; None where there is none to read (on the meta device, under vmap)."""
    try:
        return float(x.item())
    except RuntimeError:
        return None
