"""RankCLIP: a base loss and the two rank terms, with weights that grow over training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankloss import schedules
from rankloss.distributed import Gather, GatherOption, gather_once
from rankloss.losses.clip import ClipLoss
from rankloss.losses.composition import (
    TEACHER,
    Base,
    base_entries,
    check_base,
    combined,
    is_streamed_clip,
)
from rankloss.losses.rank_consistency import RankConsistency
from rankloss.options import check_position, check_weight
from rankloss.precision import outside_graphs
from rankloss.schedules import Schedule

_log = logging.getLogger(__name__)
_PROGRESS = "set_epoch(epoch, epochs) or set_progress(step, total_steps)"


class RankClipLoss(nn.Module):
    r"""RankCLIP: ``L_base + λ1·cross + λ2·in``, with λ growing over training.

        λ1 = schedule(i, n) · lambda_cross · normalizer,   λ2 = schedule(i, n) · lambda_in · normalizer

    cross and in are the terms of :class:`RankConsistency`, ranked by a teacher if its features are given. Set
    the progress of the training once per epoch with :meth:`set_epoch` or once per step with
    :meth:`set_progress`; the later call counts. λ is a pure function of their arguments: the loss has no
    state for a checkpoint.

    λ is read at each forward pass and kept for its backward pass. Under ``torch.compile`` a loss is one call
    between two graphs; a new λ does not recompile them, and with ``fullgraph=True`` torch raises its own
    error. A CUDA graph would keep the λ of its capture; torch refuses to capture its copy to the device.

    Args:
        base: The base loss, to which the rank terms are added: a module or function with the forward
            convention of open_clip's losses, including ``output_dict``; it may also return a plain scalar.
            None: :class:`ClipLoss`.
        schedule: Course of lambda over training: rankclip, official, constant, linear or cosine. Or a
            function (i, n) → λ with i counted from 1; see :mod:`rankloss.schedules`.
        lambda_cross: Multiplier of the schedule for the cross-modal term; 0 leaves the term out.
        lambda_in: Multiplier of the schedule for the in-modal term; 0 leaves the term out.
        normalizer: Constant factor of both terms. 1/16 is the published recipe's (1/32 on a sum of two
            directions).
        gather: Gathering of other processes' features, for the terms and for the default base. None: exact,
            from the default process group, if one of several processes is initialised. False: none. Otherwise
            a :class:`rankloss.Gather`.
        **options: Those of the rank terms: the fields of :class:`rankloss.RankOptions`.

    Shapes:
        As :class:`RankConsistency`: unit-norm features, and the multiplier s itself as ``logit_scale``.
        ``output_dict=True`` gives the base's entries, then the weighted ``cross_modal_loss`` and
        ``in_modal_loss``; they add up to the loss, and each is float32 at least. While λ is 0 the rank terms
        are not computed, and value and gradient are bit-equal to the base's.

    Raises:
        ValueError: for an unknown schedule, an invalid value of an option, a weight that is negative or not
            finite, or a base that cannot be called.
        TypeError: for an option that does not exist, or that :mod:`rankloss.reference` alone has.
        RuntimeError: in ``forward``, if the schedule needs the progress and it was not set, or, in training
            mode, if it is that of a training that has ended (:meth:`end_training`).

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
        if options.get("reduction") == "none":
            raise ValueError(
                "reduction='none' gives a value per anchor, which cannot be added to the base loss"
            )
        self.consistency = RankConsistency(
            cross_modal=check_weight("lambda_cross", lambda_cross),
            in_modal=check_weight("lambda_in", lambda_in),
            gather=gather,
            **options,
        )
        streaming = {name: options.get(name) for name in ("chunk_size", "memory_budget")}
        self.base = check_base(base, self.consistency.gather, streaming)
        self.schedule = schedule if callable(schedule) else schedules.by_name(schedule)
        self.normalizer = check_weight("normalizer", normalizer)
        # The schedule's λ, and the call without which it is not known; None as soon as it is.
        self._schedule_value = 0.0
        self._missing_call: str | None = _PROGRESS
        self._goes_by_epochs = False  # True if λ is of an epoch
        self._training_has_ended = False  # True if λ is of a training that has ended
        if self.schedule is schedules.constant:
            self._schedule_value = 1.0
            self._missing_call = None

    @property
    def gather(self) -> Gather:
        """The gathering of the rank terms."""
        return self.consistency.gather

    @property
    def lambda_cross(self) -> float:
        """The factor of the schedule for the cross-modal term."""
        return self.consistency.cross_modal

    @property
    def lambda_in(self) -> float:
        """The factor of the schedule for the in-modal term."""
        return self.consistency.in_modal

    @property
    def schedule_value(self) -> float | None:
        """The schedule's present λ, before ``lambda_cross``, ``lambda_in`` and ``normalizer``.

        None if the schedule needs the progress and it was not set.
        """
        return None if self._missing_call else self._schedule_value

    @property
    def rank_weights(self) -> dict[str, float]:
        """The present factors of the rank terms, λ1 and λ2.

        Raises:
            RuntimeError: if the schedule needs the progress and it was not set.

        Example:
            >>> RankClipLoss(schedule="constant", lambda_in=0.5).rank_weights
            {'cross_modal': 0.0625, 'in_modal': 0.03125}
        """
        if self._missing_call is not None:
            raise RuntimeError(f"RankClipLoss does not know where training stands: call {self._missing_call}")
        weight = self._schedule_value * self.normalizer
        return {
            "cross_modal": weight * self.consistency.cross_modal,
            "in_modal": weight * self.consistency.in_modal,
        }

    @property
    def needs_common_space(self) -> str:
        """The option by which a teacher's images are compared with its texts; empty if it is 0."""
        return "lambda_cross" if self.lambda_cross else ""

    @outside_graphs
    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Evaluate the schedule at epoch ``epoch`` of ``epochs``, counted from 1.

        With ``epochs=1`` there is no ramp: no schedule except ``"constant"`` is evaluated, and
        :meth:`set_progress` must set λ. One that it has set stays.

        Raises:
            ValueError: unless both are integers and 1 ≤ epoch ≤ epochs.
        """
        epoch, epochs = check_position("epoch", epoch, "epochs", epochs)
        if epochs > 1 or self.schedule is schedules.constant:
            self._evaluate_schedule(epoch, epochs, goes_by_epochs=True)
            return
        if self.consistency.gather.place.rank == 0:
            _log.info("epochs=1 has no ramp: the schedule is evaluated per step, from set_progress()")
        # λ from the epochs of an earlier run is not valid for this run.
        if self._missing_call is not None or self._goes_by_epochs:
            self._missing_call = "set_progress(step, total_steps), as epochs=1 has no ramp"

    @outside_graphs
    def set_progress(self, step: int, total_steps: int) -> None:
        """Evaluate the schedule at step ``step`` of ``total_steps``, counted from 1.

        Raises:
            ValueError: unless both are integers and 1 ≤ step ≤ total_steps.
        """
        step, total_steps = check_position("step", step, "total_steps", total_steps)
        self._evaluate_schedule(step, total_steps, goes_by_epochs=False)

    def end_training(self) -> None:
        """The training ends: the next one has to set its progress.

        Until then a call in training mode with gradients is an error, unless the schedule is constant. Other
        calls, as an evaluation makes them, have the last λ.

        Example:
            >>> loss = RankClipLoss(schedule="linear")
            >>> loss.set_progress(2, 2)
            >>> loss.end_training()
            >>> loss.schedule_value
            1.0
        """
        self._training_has_ended = self.schedule is not schedules.constant

    @outside_graphs
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        reference_image_features: Tensor | None = None,
        reference_text_features: Tensor | None = None,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: passed on to the base, if it is not None.
            output_dict: return the summands by name instead of their sum.
            reference_image_features: ``[N, D']``, a teacher's features, which rank the terms' lists, see
                :class:`RankConsistency`. A base whose signature takes a teacher's features gets them, too.
            reference_text_features: ``[N, D']``, also a teacher's.
            **base_inputs: passed on to the base, such as ``pair_ids``; it refuses unknown ones.
        """
        teacher = dict(zip(TEACHER, (reference_image_features, reference_text_features), strict=True))
        inputs = image_features, text_features, logit_scale, logit_bias
        cross, in_ = self.rank_weights.values()
        if self._training_has_ended and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "RankClipLoss has the lambda of a training that has ended: in the next one call "
                f"{_PROGRESS}, before an evaluation eval()"
            )
        gather = self.consistency.gather
        options = self.consistency.options
        # If the base is CLIP's loss, the rank terms' pass gives it too, as the first of three terms.
        has_rank_terms = bool(cross or in_)
        is_fused = has_rank_terms and not base_inputs and is_streamed_clip(self.base, gather)
        self.consistency.check(inputs, teacher, one_space=is_fused, base_inputs=base_inputs)
        with gather_once():
            entries = {}
            if not is_fused:
                entries = base_entries(self.base, *inputs, teacher=teacher, **base_inputs)
            weights = 1.0 if is_fused else 0.0, cross, in_  # of CLIP's loss and of the rank terms
            contrastive, cross_modal, in_modal = self.consistency.weighted_terms(
                inputs, options, weights, tuple(teacher.values())
            )
        if is_fused:
            cast("ClipLoss", self.base).warn_of_bias(logit_bias)
            entries["contrastive_loss"] = contrastive
        own = {"cross_modal_loss": cross_modal, "in_modal_loss": in_modal}
        return combined(entries, own, output_dict)

    def logged_entries(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Values to log beside the entries of a call.

        - ``rank_lambda``: the schedule's λ.
        - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight. While a
          term's weight is 0 it is not computed, and its value is None.

        Args:
            entries: Entries of a call with ``output_dict``, the base's and the loss's own.
        """
        device = next(iter(entries.values())).device
        logged: dict[str, Tensor | None] = {
            "rank_lambda": torch.full((), self.schedule_value or 0.0, device=device)
        }
        for name, weight in self.rank_weights.items():
            if getattr(self.consistency, name):
                logged[f"{name}_raw"] = entries[f"{name}_loss"].detach() / weight if weight else None
        return logged

    def extra_repr(self) -> str:
        """The schedule and its factors."""
        schedule = getattr(self.schedule, "__name__", repr(self.schedule))
        names_of_factors = ("lambda_cross", "lambda_in", "normalizer")
        factors = [f"{name}={getattr(self, name):g}" for name in names_of_factors]
        return ", ".join([f"schedule={schedule}", *factors])

    def _evaluate_schedule(self, position: int, end: int, *, goes_by_epochs: bool) -> None:
        """Set λ to the schedule's at a position, an epoch or a step, of ``end``."""
        self._schedule_value = check_weight("schedule's value", self.schedule(position, end))
        self._missing_call = None
        self._goes_by_epochs = goes_by_epochs
        self._training_has_ended = False
