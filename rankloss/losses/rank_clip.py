"""RankCLIP: a base loss and the two rank terms, whose weights grow over training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankloss import schedules
from rankloss.distributed import Gathered
from rankloss.losses.clip import ClipLoss
from rankloss.losses.composition import base_entries, combined, shares_gathering
from rankloss.losses.rank_consistency import RankConsistency
from rankloss.losses.weights import check_weight
from rankloss.schedules import Schedule

__all__ = ["RankClipLoss"]

_log = logging.getLogger(__name__)


class RankClipLoss(nn.Module):
    r"""RankCLIP: ``L_base + λ1·cross + λ2·in``, with λ growing over training.

        λ1 = schedule(i, n) · lambda_cross · normalizer,   λ2 = schedule(i, n) · lambda_in · normalizer

    cross and in are :class:`RankConsistency`'s. Tell the loss where training stands, once an epoch with
    :meth:`set_epoch` or once a step with :meth:`set_progress`; the later call counts. λ is a pure function of
    what they were given: the loss has no state to put into a checkpoint.

    Args:
        base: the loss that the rank terms are added to: a module or function with the forward convention of
            open_clip's losses, including ``output_dict``; a plain scalar is taken as well. None:
            :class:`ClipLoss`.
        schedule: a name from :data:`rankloss.schedules.NAMES`, or a function (i, n) → λ with i counted
            from 1.
        lambda_cross: multiplies the schedule for the cross-modal term; 0 leaves the term out.
        lambda_in: multiplies the schedule for the in-modal term; 0 leaves the term out.
        normalizer: the constant factor of both terms; 1/16 is the published recipe's (1/32 on a sum of two
            directions).
        **rank_options: everything that :class:`RankConsistency` takes except its two weights.

    Shapes:
        As :class:`RankConsistency`. ``output_dict=True`` gives the base's own entries, then the weighted
        ``cross_modal_loss`` and ``in_modal_loss``; they add up to the loss. While λ is 0 the rank terms are
        not computed, and the gradient is the base's own to the last bit.

    Raises:
        ValueError: for an unknown schedule or option, or a weight that is negative or not finite.
        RuntimeError: in ``forward``, where the schedule needs to know the progress and was not told.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025.

    Example:
        >>> import rankloss
        >>> loss = rankloss.RankClipLoss()
        >>> loss.set_epoch(1, epochs=64)
        >>> round(loss.schedule_value, 4)
        0.0317
        >>> v = torch.eye(2)
        >>> sorted(loss(v, v, logit_scale=1.0, output_dict=True))
        ['contrastive_loss', 'cross_modal_loss', 'in_modal_loss']
    """

    def __init__(
        self,
        base: Callable[..., Any] | None = None,
        *,
        schedule: str | Schedule = "rankclip",
        lambda_cross: float = 1.0,
        lambda_in: float = 1.0,
        normalizer: float = 1 / 16,
        **rank_options: Any,
    ) -> None:
        super().__init__()
        for name in ("cross_modal", "in_modal"):
            if name in rank_options:
                raise ValueError(f"{name} is RankConsistency's weight; here use lambda_cross and lambda_in")
        if rank_options.get("reduction") == "none":
            raise ValueError(
                "reduction='none' gives a value per anchor, which cannot be added to the base loss"
            )
        self.consistency = RankConsistency(**rank_options)
        if base is None:
            base = ClipLoss(**vars(self.consistency.gather))
        self.base = base
        self.schedule = schedules.by_name(schedule) if isinstance(schedule, str) else schedule
        self.lambda_cross = check_weight("lambda_cross", lambda_cross)
        self.lambda_in = check_weight("lambda_in", lambda_in)
        self.normalizer = check_weight("normalizer", normalizer)
        self._missing: str | None = "set_epoch(epoch, epochs) or set_progress(step, total_steps)"
        # A tensor, so that a compiled forward reads a new λ without being compiled again; not a buffer, so
        # that .to(bfloat16) does not round it and no checkpoint holds it.
        self._weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        self._schedule_value = 0.0
        self._is_zero = True
        if self.schedule is schedules.constant:
            self._set(1.0)

    @property
    def schedule_value(self) -> float:
        """The schedule's present λ, before ``lambda_cross``, ``lambda_in`` and ``normalizer``.

        Raises:
            RuntimeError: if the schedule needs to know the progress and was not told.
        """
        self._check_progress()
        return self._schedule_value

    @property
    def rank_weights(self) -> dict[str, float]:
        """What each rank term is multiplied by at present: λ1 and λ2.

        Raises:
            RuntimeError: as :attr:`schedule_value`.

        Example:
            >>> RankClipLoss(schedule="constant", lambda_in=0.5).rank_weights
            {'cross_modal': 0.0625, 'in_modal': 0.03125}
        """
        self._check_progress()
        _, cross_modal, in_modal = self._weights.tolist()
        return {"cross_modal": cross_modal, "in_modal": in_modal}

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Evaluate the schedule at epoch ``epoch`` of ``epochs``, counted from 1.

        A single epoch has no ramp to walk along, so with ``epochs=1`` λ has to come from :meth:`set_progress`
        (unless the schedule is ``"constant"``).

        Raises:
            ValueError: unless 1 ≤ epoch ≤ epochs.
        """
        value = self.schedule(epoch, epochs)
        if epochs == 1 and self.schedule is not schedules.constant:
            if self._missing is not None:
                self._missing = "set_progress(step, total_steps), since one epoch has no ramp of its own"
                _log.info("epochs=1 has no ramp: the schedule is evaluated per step, from set_progress()")
            return
        self._set(value)

    def set_progress(self, step: int, total_steps: int) -> None:
        """Evaluate the schedule at step ``step`` of ``total_steps``, counted from 1.

        Raises:
            ValueError: unless 1 ≤ step ≤ total_steps.
        """
        self._set(self.schedule(step, total_steps))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        gathered: Gathered | None = None,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands; ``base_inputs`` go to the base alone.

        ``gathered`` is ``self.consistency.gather(image_features, text_features)``, from a caller that has it
        already; a base that is CLIP's loss of the same rows is given it, too.
        """
        self._check_progress()
        cross_modal = self.lambda_cross != 0 and not self._is_zero
        in_modal = self.lambda_in != 0 and not self._is_zero
        fused = self._fuses and (cross_modal or in_modal)
        entries: dict[str, Tensor] = {}
        if not fused:
            if gathered is not None and shares_gathering(self.base, self.consistency.gather):
                base_inputs["gathered"] = gathered
            entries = base_entries(
                self.base, image_features, text_features, logit_scale, logit_bias, **base_inputs
            )
        contrastive, cross, in_ = self.consistency.weighted_terms(
            image_features,
            text_features,
            logit_scale,
            self._weights.clone(),  # the next epoch may be set before this loss is differentiated
            contrastive=fused,
            cross_modal=cross_modal,
            in_modal=in_modal,
            gathered=gathered,
        )
        if fused:
            # A bias moves all logits alike, to no effect; it stays in the graph, as DDP wants of a parameter.
            bias = 0.0 if logit_bias is None else 0 * logit_bias.sum()
            entries["contrastive_loss"] = contrastive + bias
        return combined(entries, {"cross_modal_loss": cross, "in_modal_loss": in_}, output_dict)

    @property
    def _fuses(self) -> bool:
        """Whether the base is CLIP's loss of the same rows, which the rank terms' pass gives as well."""
        options = self.consistency.options
        return (
            shares_gathering(self.base, self.consistency.gather)
            and options.lists == "row"
            and options.worth == "exp"
        )

    def _set(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"schedule must give finite values >= 0; got {value!r}")
        weight = value * self.normalizer
        self._schedule_value = value
        self._weights[1] = weight * self.lambda_cross
        self._weights[2] = weight * self.lambda_in
        self._is_zero = weight == 0
        self._missing = None

    def _check_progress(self) -> None:
        if self._missing is not None:
            raise RuntimeError(f"RankClipLoss does not know where training stands: call {self._missing}")
