r"""The losses as modules. Every one takes ``(image_features, text_features, logit_scale)``, in that order.

``logit_scale`` is the multiplier s itself, as CLIP models return it, not its logarithm. Features are expected
to be unit-norm, as models return them; nothing here normalises.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import schedules
from rankloss.consistency import ConsistencyOptions, ListsOption, Reduction, rank_term
from rankloss.distributed import Gather
from rankloss.embeddings import Embeddings, check_features
from rankloss.plackett_luce import Discount, ListOptions, Ties, Worth
from rankloss.schedules import Schedule

__all__ = ["ClipLoss", "RankClipLoss", "RankConsistency"]

_log = logging.getLogger(__name__)


class RankConsistency(nn.Module):
    r"""RankCLIP's two rank terms: ``cross_modal · cross + in_modal · in``.

    With V, T the image and text features, S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ,

        cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)],

    where C puts together the Plackett–Luce NLL of the matrix's lists (:func:`rankloss.plackett_luce_nll`):
    one list a row, or one of all pairs. The second matrix gives the order only and receives no gradient.

    Row lists are computed a chunk of rows at a time, value and gradient together, so memory grows with N and
    not with N². Similarities, order and sums are float32 at least, under autocast too.

    Args:
        cross_modal: weight of the cross-modal term; 0 leaves it out of the computation.
        in_modal: weight of the in-modal term, likewise.
        lists: ``"row"``: N lists of N, one an anchor. ``"batch"``: one list of all N² pairs, the formula as
            printed in the paper; its memory is quadratic.
        worth: ``"exp"``: eˣ of the scaled similarity. ``"shifted"``: (1 + cosine)/2. ``"identity"``: the
            cosine itself, a ValueError where one is ≤ 0. The last two do not depend on ``logit_scale``.
        ties: ``"shared"`` or ``"random"``, see :func:`rankloss.plackett_luce_nll`.
        discount: None or ``"log"``, likewise.
        top_k: None or the number of best-ranked positions that count, likewise.
        reduction: ``"mean"``: nats per item, averaged over the lists. ``"sum"``: the plain sum of the lists.
            ``"none"``: a value per anchor, ``[N]``, that adds up to ``"sum"``.
        chunk_size: rows computed at a time; None chooses from the sizes and the device.
        local_loss: compute only this process's rows, as in open_clip's ClipLoss.
        gather_with_grad: let gradients through the gathering of features, as in open_clip's ClipLoss.
        rank: this process's rank.
        world_size: number of processes; with more than one, features are gathered from all.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``; ``logit_scale``: a number or a tensor of one
        element; the result is a scalar in nats. ``output_dict=True`` gives the two weighted terms,
        ``{"cross_modal_loss": …, "in_modal_loss": …}``, which add up to it.

    Raises:
        ValueError: here for an unknown or impossible option; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least two rows, or a scale that is not positive
            (a scale on an accelerator is not checked, since reading it would make every step wait).

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025.

    Example:
        >>> import rankloss
        >>> criterion = rankloss.RankConsistency()
        >>> image_features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> text_features = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> loss = criterion(image_features, text_features, logit_scale=10.0)
        >>> round(loss.item(), 3)
        0.812
    """

    def __init__(
        self,
        *,
        cross_modal: float = 1.0,
        in_modal: float = 1.0,
        lists: ListsOption = "row",
        worth: Worth = "exp",
        ties: Ties = "shared",
        discount: Discount | None = None,
        top_k: int | None = None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.cross_modal = _weight("cross_modal", cross_modal)
        self.in_modal = _weight("in_modal", in_modal)
        self.options = ConsistencyOptions(
            lists, reduction, chunk_size, ListOptions(worth, ties, discount, top_k)
        )
        if lists == "batch" and local_loss:
            raise ValueError("lists='batch' is one list of the whole batch and cannot have local_loss=True")
        self.gather = Gather(local_loss, gather_with_grad, rank, world_size)
        if self.gather.anchors_are_local and not gather_with_grad and rank == 0:
            _log.warning(
                "local_loss without gather_with_grad: the rank terms' gradient does not point where that of "
                "the whole batch does; set both"
            )

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = ...,
        *,
        output_dict: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = ...,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = 1.0,
        *,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum of the two terms, or with ``output_dict`` the weighted terms themselves."""
        cross, in_ = self.terms(
            image_features,
            text_features,
            logit_scale,
            cross_modal=self.cross_modal != 0,
            in_modal=self.in_modal != 0,
        )
        cross, in_ = self.cross_modal * cross, self.in_modal * in_
        return {"cross_modal_loss": cross, "in_modal_loss": in_} if output_dict else cross + in_

    def terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = 1.0,
        *,
        cross_modal: bool = True,
        in_modal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The two terms without their weights; one that is not asked for is a zero that costs nothing."""
        check_features(image_features, text_features)
        if not cross_modal and not in_modal:
            zero = image_features.new_zeros(
                (), dtype=torch.promote_types(image_features.dtype, torch.float32)
            )
            return zero, zero
        images, texts = self.gather(image_features, text_features)
        local = self.gather.anchors_are_local
        embeddings = Embeddings.of(
            images,
            texts,
            logit_scale,
            image_anchors=image_features if local else None,
            text_anchors=text_features if local else None,
        )
        zero = embeddings.image.new_zeros(())
        return (
            rank_term("cross_modal", embeddings, self.options) if cross_modal else zero,
            rank_term("in_modal", embeddings, self.options) if in_modal else zero,
        )

    def extra_repr(self) -> str:
        """The weights and every option that is not at its default."""
        shown = [f"cross_modal={self.cross_modal:g}", f"in_modal={self.in_modal:g}"]
        for options, default in (
            (self.options, ConsistencyOptions()),
            (self.options.likelihood, ListOptions()),
        ):
            for name in options.__dataclass_fields__:
                value = getattr(options, name)
                if name != "likelihood" and value != getattr(default, name):
                    shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class ClipLoss(nn.Module):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, the target of row i being i.

    Args:
        local_loss: compute only this process's rows, as in open_clip's ClipLoss.
        gather_with_grad: let gradients through the gathering of features, as in open_clip's ClipLoss.
        rank: this process's rank.
        world_size: number of processes; with more than one, features are gathered from all.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``; the result is a scalar in nats, or with
        ``output_dict=True`` ``{"contrastive_loss": …}``. A ``logit_bias`` is added to all logits, to no
        effect.

    Raises:
        ValueError: for features that are not two floating-point matrices of one shape with at least two rows.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
        fig. 3.

    Example:
        >>> v = torch.eye(2)
        >>> round(ClipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
    """

    def __init__(
        self,
        *,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.gather = Gather(local_loss, gather_with_grad, rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` a dict of it."""
        check_features(image_features, text_features)
        images, texts = self.gather(image_features, text_features)
        first = 0  # this process's first row among the columns
        if self.gather.anchors_are_local:
            logits = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
            first = self.gather.rank * len(image_features)
        else:
            per_image = logit_scale * images @ texts.T
            logits = per_image, per_image.T
        target = first + torch.arange(len(logits[0]), device=image_features.device)
        if logit_bias is not None:
            logits = logits[0] + logit_bias, logits[1] + logit_bias
        loss = (F.cross_entropy(logits[0], target) + F.cross_entropy(logits[1], target)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


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
            base = ClipLoss(**asdict(self.consistency.gather))
        self.base = base
        self.schedule = schedules.by_name(schedule) if isinstance(schedule, str) else schedule
        self.lambda_cross = _weight("lambda_cross", lambda_cross)
        self.lambda_in = _weight("lambda_in", lambda_in)
        self.normalizer = _weight("normalizer", normalizer)
        self._missing: str | None = "set_epoch(epoch, epochs) or set_progress(step, total_steps)"
        # A tensor, so that a compiled forward reads a new λ without being compiled again; not a buffer, so
        # that .to(bfloat16) does not round it and no checkpoint holds it.
        self._schedule_value = torch.zeros((), dtype=torch.float64)
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
        return self._schedule_value.item()

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
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands; ``base_inputs`` go to the base alone."""
        self._check_progress()
        if logit_bias is not None:  # not every loss takes one
            base_inputs["logit_bias"] = logit_bias
        base = self.base(
            image_features=image_features,  # by name: not every loss has them in this order
            text_features=text_features,
            logit_scale=logit_scale,
            output_dict=True,
            **base_inputs,
        )
        entries = dict(base) if isinstance(base, Mapping) else {"contrastive_loss": base}
        cross, in_ = self.consistency.terms(
            image_features,
            text_features,
            logit_scale,
            cross_modal=self.lambda_cross != 0 and not self._is_zero,
            in_modal=self.lambda_in != 0 and not self._is_zero,
        )
        weight = self._schedule_value.to(cross.dtype) * self.normalizer
        entries["cross_modal_loss"] = weight * self.lambda_cross * cross
        entries["in_modal_loss"] = weight * self.lambda_in * in_
        return entries if output_dict else sum(entries.values(), cross.new_zeros(()))

    def _set(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"schedule must give finite values >= 0; got {value!r}")
        self._schedule_value.fill_(value)
        self._is_zero = value * self.normalizer == 0
        self._missing = None

    def _check_progress(self) -> None:
        if self._missing is not None:
            raise RuntimeError(f"RankClipLoss does not know where training stands: call {self._missing}")


def _weight(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return value
