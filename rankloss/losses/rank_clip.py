"""RankCLIP: a base loss and the two rank terms, whose weights grow over training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from rankloss import schedules
from rankloss.checks import check_bias, check_one_space
from rankloss.distributed import Gathered, GatherOption
from rankloss.losses.clip import with_idle_bias
from rankloss.losses.composition import (
    Base,
    base_entries,
    check_base,
    combined,
    must_be_called,
    shares_gathering,
)
from rankloss.losses.rank_consistency import FixedWeights, RankConsistency
from rankloss.options import OPTION_NAMES, check_count, check_names, check_weight
from rankloss.schedules import Schedule

_log = logging.getLogger(__name__)


class RankClipLoss(FixedWeights, nn.Module):
    r"""RankCLIP: ``L_base + λ1·cross + λ2·in``, with λ growing over training.

        λ1 = schedule(i, n) · lambda_cross · normalizer,   λ2 = schedule(i, n) · lambda_in · normalizer

    cross and in are the terms of :class:`RankConsistency`, ranked by a teacher where its features are given.
    Tell the loss where training stands, once per epoch with :meth:`set_epoch` or once per step with
    :meth:`set_progress`; the later call counts. λ is a pure function of their arguments: the loss has no
    state for a checkpoint.

    λ enters each forward pass as a small tensor, a copy made at that call. So a loss that is still to be
    differentiated keeps its λ, and a compiled forward is not compiled again when λ moves (only once, when λ
    leaves 0). A CUDA graph would keep the λ of its capture; torch refuses to capture the copy to the device.

    Args:
        base: the loss that the rank terms are added to: a module or function with the forward convention of
            open_clip's losses, including ``output_dict``; it may also return a plain scalar. None:
            :class:`ClipLoss`.
        schedule: a name from :data:`rankloss.schedules.NAMES`, or a function (i, n) → λ with i counted
            from 1.
        lambda_cross: multiplies the schedule for the cross-modal term; 0 leaves the term out.
        lambda_in: multiplies the schedule for the in-modal term; 0 leaves the term out.
        normalizer: the constant factor of both terms; 1/16 is the published recipe's (1/32 on a sum of two
            directions).
        gather: how features of other processes are gathered, for the terms and for the base that None builds.
            None: from the default process group, if one of more than one process is initialised, exactly.
            False: not at all. Else a :class:`rankloss.Gather`.
        **options: of the rank terms: the fields of :class:`rankloss.RankOptions`.

    Shapes:
        As :class:`RankConsistency`: unit-norm features, and the multiplier s itself as ``logit_scale``.
        ``output_dict=True`` gives the base's own entries, then the weighted ``cross_modal_loss`` and
        ``in_modal_loss``; they add up to the loss, and each is float32 at least. While λ is 0 the rank terms
        are not computed, and value and gradient are the base's own to the last bit.

    Raises:
        ValueError: for an unknown schedule, a value that an option cannot have, a weight that is negative or
            not finite, or a base that cannot be called.
        TypeError: for an option that does not exist.
        RuntimeError: in ``forward``, where the schedule needs the progress and was not given it.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025.

    Example:
        >>> import rankloss, torch
        >>> loss = rankloss.RankClipLoss()
        >>> loss.set_epoch(1, epochs=64)
        >>> round(loss.schedule_value, 4)
        0.0317
        >>> v = torch.eye(2)
        >>> sorted(loss(v, v, logit_scale=1.0, output_dict=True))
        ['contrastive_loss', 'cross_modal_loss', 'in_modal_loss']
    """

    _fixed = frozenset({"lambda_cross", "lambda_in", "normalizer", "schedule"})

    def __init__(
        self,
        base: Base | None = None,
        *,
        schedule: str | Schedule = "rankclip",
        lambda_cross: float = 1.0,
        lambda_in: float = 1.0,
        normalizer: float = 1 / 16,
        gather: GatherOption = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_names(type(self), options, OPTION_NAMES)
        if options.get("reduction") == "none":
            raise ValueError(
                "reduction='none' gives a value per anchor, which cannot be added to the base loss"
            )
        self.lambda_cross = check_weight("lambda_cross", lambda_cross)
        self.lambda_in = check_weight("lambda_in", lambda_in)
        # A term that the run leaves out for good has the weight 0 there too.
        self.consistency = RankConsistency(
            cross_modal=float(self.lambda_cross != 0),
            in_modal=float(self.lambda_in != 0),
            gather=gather,
            **options,
        )
        self.base = check_base(base, self.consistency.gather, self.consistency.options.streaming)
        if not callable(schedule):
            schedule = schedules.by_name(schedule)
        self.schedule = schedule
        self.normalizer = check_weight("normalizer", normalizer)
        self._missing: str | None = "set_epoch(epoch, epochs) or set_progress(step, total_steps)"
        self._goes_by_epochs = False  # whether λ is of an epoch
        self._schedule_value = 0.0
        self._is_zero = True  # a bool beside the number: a compiled forward depends on its value
        self._weights: Tensor  # of the three terms; a compiled forward takes it as an input
        self._set_value(0.0)
        if self.schedule is schedules.constant:
            self._missing = None
            self._set_value(1.0)

    @property
    def schedule_value(self) -> float:
        """The schedule's present λ, before ``lambda_cross``, ``lambda_in`` and ``normalizer``.

        Raises:
            RuntimeError: if the schedule needs the progress and was not given it.
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
        weight = self._schedule_value * self.normalizer
        return {"cross_modal": weight * self.lambda_cross, "in_modal": weight * self.lambda_in}

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Evaluate the schedule at epoch ``epoch`` of ``epochs``, counted from 1.

        With ``epochs=1`` there is no ramp: the schedule is not evaluated, whatever function it is, and λ has
        to come from :meth:`set_progress` (unless the schedule is ``"constant"``).

        Raises:
            ValueError: unless both are integers and 1 ≤ epoch ≤ epochs.
        """
        self._tell("epoch", epoch, "epochs", epochs)

    def set_progress(self, step: int, total_steps: int) -> None:
        """Evaluate the schedule at step ``step`` of ``total_steps``, counted from 1.

        Raises:
            ValueError: unless both are integers and 1 ≤ step ≤ total_steps.
        """
        self._tell("step", step, "total_steps", total_steps)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        gathered: Gathered | None = None,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: passed on to the base, if it is not None.
            output_dict: return the summands by name instead of their sum.
            gathered: ``self.consistency.gather(image_features, text_features)``, from a caller that has it
                already; it serves a base that is CLIP's loss of the same rows, too.
            **base_inputs: ``reference_image_features`` and ``reference_text_features``, ``[N, D']`` each, a
                teacher's, for the rank terms, see :class:`RankConsistency`; what is left is passed on to the
                base.
        """
        self._check_progress()
        teacher = {name: base_inputs.pop(name, None) for name in _TEACHER}
        self.consistency.check_inputs(image_features, text_features, logit_scale, **teacher)
        is_on = self.normalizer != 0 and not self._is_zero
        ranked = self.lambda_cross != 0 and is_on, self.lambda_in != 0 and is_on
        # What only a base could take goes to the base, which refuses what it does not know.
        fused = self._fuses and any(ranked) and not base_inputs
        entries: dict[str, Tensor] = {}
        if fused:
            check_one_space(image_features, text_features)
            check_bias(logit_bias, image_features)
        else:
            if gathered is not None and shares_gathering(self.base, self.consistency.gather):
                base_inputs["gathered"] = gathered
            entries = base_entries(
                self.base, image_features, text_features, logit_scale, logit_bias, **base_inputs
            )
        contrastive, cross, in_ = self.consistency.weighted_terms(
            (image_features, text_features, logit_scale),
            self.consistency.options,
            self._weights,
            (fused, *ranked),
            gathered,
            tuple(teacher.values()),
        )
        if fused:
            entries["contrastive_loss"] = with_idle_bias(contrastive, logit_bias)
        return combined(entries, {"cross_modal_loss": cross, "in_modal_loss": in_}, output_dict)

    def extra_repr(self) -> str:
        """The schedule and its factors."""
        schedule = getattr(self.schedule, "__name__", repr(self.schedule))
        factors = (f"{name}={getattr(self, name):g}" for name in ("lambda_cross", "lambda_in", "normalizer"))
        return ", ".join([f"schedule={schedule}", *factors])

    @property
    def _fuses(self) -> bool:
        """Whether the base is CLIP's loss of the same rows, which the rank terms' pass gives as well."""
        return (
            not self.consistency.options.is_dense
            and shares_gathering(self.base, self.consistency.gather)
            and not must_be_called(self.base)
        )

    def _tell(self, name: str, now: int, end_name: str, end: int) -> None:
        """Evaluate the schedule at position ``now`` of ``end``, which are arguments of these names."""
        if torch.compiler.is_compiling():
            # Outside of the graph, where an epoch that changes would be a constant.
            torch.compiler.disable(RankClipLoss._tell)(self, name, now, end_name, end)
            return
        now, end = check_count(name, now), check_count(end_name, end)
        if now > end:
            raise ValueError(f"{name} must be at most {end_name}; got {name}={now!r}, {end_name}={end!r}")
        is_epoch = name == "epoch"
        if is_epoch and end == 1 and self.schedule is not schedules.constant:
            if self.consistency.gather.place[0] == 0:
                _log.info("epochs=1 has no ramp: the schedule is evaluated per step, from set_progress()")
            # λ of an earlier run's epochs is not this run's.
            if self._missing is not None or self._goes_by_epochs:
                self._missing = "set_progress(step, total_steps), as epochs=1 has no ramp"
            return
        self._set_value(self.schedule(now, end))
        self._missing, self._goes_by_epochs = None, is_epoch

    def _set_value(self, value: float) -> None:
        number = check_weight("schedule's value", value)
        weight = number * self.normalizer
        self._schedule_value = number
        # A new tensor, so that a shallow copy of this module keeps its own. Wherever a default device or a
        # context points, it is on the CPU: it has values before the module leaves the meta device.
        weights = [1.0, weight * self.lambda_cross, weight * self.lambda_in]
        self._weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self._is_zero = number == 0

    def _check_progress(self) -> None:
        if self._missing is not None:
            raise RuntimeError(f"RankClipLoss does not know where training stands: call {self._missing}")


_TEACHER = ("reference_image_features", "reference_text_features")
