"""The two rank terms as a module."""

from __future__ import annotations

import logging
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from rankloss.consistency import weighted_terms
from rankloss.distributed import Gather, Gathered
from rankloss.embeddings import Embeddings, arithmetic_dtype, check_features
from rankloss.losses.weights import check_weight
from rankloss.options import (
    Discount,
    FixedReference,
    ListsOption,
    Method,
    RankOptions,
    Reduction,
    Ties,
    Worth,
)
from rankloss.plans import Plan

__all__ = ["RankConsistency"]

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
        diagonal: whether an anchor's own pair, in the in-modal term the anchor itself, is an item of its
            lists. It is in the paper; the contrastive loss ranks it first in any case.
        fixed_reference: ``"text"``: the texts' rankings are a reference and follow nothing, cross = C(S | R)
            and in = C(I | X). ``"image"``: the other way round. None: both directions, as above.
        method: how lists are ranked. ``"sort"``: by their exact order. ``"bin"``: by evenly spaced bins of
            the reference (:func:`rankloss.bins.quantize`), faster; the items of a bin are tied.
        bins: the number of bins.
        chunk_size: rows multiplied out at a time; None chooses from the sizes and the device.
        memory_budget: bytes that matrices of the whole batch may take to save products, see :meth:`plan`;
            None is 64 MiB on a CPU and 1 GiB elsewhere.
        local_loss: compute only this process's rows, as in open_clip's ClipLoss.
        gather_with_grad: let gradients through the gathering of features, as in open_clip's ClipLoss.
        rank: this process's rank.
        world_size: number of processes; with more than one, features are gathered from all.
        group: the process group that the batch is spread over, where it is not the default one; ``rank`` and
            ``world_size`` are this process's rank in it and its size.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``; ``logit_scale``: a number or a tensor of one
        element; the result is a scalar in nats. ``output_dict=True`` gives the two weighted terms,
        ``{"cross_modal_loss": …, "in_modal_loss": …}``, which add up to it.

    Raises:
        ValueError: here for an unknown or impossible option; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least two rows in the whole batch, or a scale that
            is not positive (a scale on an accelerator is not checked, since reading it would make every step
            wait).

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
        diagonal: bool = True,
        fixed_reference: FixedReference | None = None,
        method: Method = "sort",
        bins: int = 2048,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.cross_modal = check_weight("cross_modal", cross_modal)
        self.in_modal = check_weight("in_modal", in_modal)
        self.options = RankOptions(
            lists=lists,
            worth=worth,
            ties=ties,
            discount=discount,
            top_k=top_k,
            reduction=reduction,
            diagonal=diagonal,
            fixed_reference=fixed_reference,
            method=method,
            bins=bins,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
        )
        if lists == "batch" and local_loss:
            raise ValueError("lists='batch' is one list of the whole batch and cannot have local_loss=True")
        self.gather = Gather(local_loss, gather_with_grad, rank, world_size, group)
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
        gathered: Gathered | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = ...,
        *,
        output_dict: Literal[True],
        gathered: Gathered | None = ...,
    ) -> dict[str, Tensor]: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = 1.0,
        *,
        output_dict: bool = False,
        gathered: Gathered | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum of the two terms, or with ``output_dict`` the weighted terms themselves.

        ``gathered`` is ``self.gather(image_features, text_features)``, from a caller that has it already: so
        one gathering serves several losses.
        """
        _, cross, in_ = self.weighted_terms(
            image_features,
            text_features,
            logit_scale,
            torch.tensor([1.0, self.cross_modal, self.in_modal], dtype=torch.float64),
            cross_modal=self.cross_modal != 0,
            in_modal=self.in_modal != 0,
            gathered=gathered,
        )
        return {"cross_modal_loss": cross, "in_modal_loss": in_} if output_dict else cross + in_

    def weighted_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        weights: Tensor,
        *,
        contrastive: bool = False,
        cross_modal: bool = True,
        in_modal: bool = True,
        gathered: Gathered | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CLIP's cross-entropy and the two rank terms times ``weights``, from one gathering and one pass.

        A term that is not wanted is a zero that costs nothing. ``gathered`` is as in :meth:`forward`. See
        :func:`rankloss.consistency.weighted_terms`.
        """
        check_features(image_features, text_features, min_pairs=self.gather.min_pairs)
        if not contrastive and not cross_modal and not in_modal:
            zero = image_features.new_zeros((), dtype=arithmetic_dtype(image_features))
            return zero, zero, zero
        images, texts = self.gather(image_features, text_features) if gathered is None else gathered
        local = self.gather.anchors_are_local
        embeddings = Embeddings.of(
            images,
            texts,
            logit_scale,
            image_anchors=image_features if local else None,
            text_anchors=text_features if local else None,
        )
        return weighted_terms(
            embeddings,
            self.options,
            weights,
            contrastive=contrastive,
            cross_modal=cross_modal,
            in_modal=in_modal,
            first_row=self.gather.first_row(len(image_features)),
        )

    def plan(
        self, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Plan | None:
        """How a global batch of n pairs is computed; None for ``lists="batch"``, which takes whole matrices.

        Example:
            >>> RankConsistency().plan(1024).name, RankConsistency(memory_budget=0).plan(1024).name
            ('shared', 'rows')
        """
        if self.options.lists == "batch":
            return None
        anchors = n // self.gather.world_size if self.gather.anchors_are_local else n
        dtype = torch.promote_types(dtype, torch.float32)
        return self.options.plan(anchors, n, torch.device(device), dtype)

    def extra_repr(self) -> str:
        """The weights and every option that is not at its default."""
        shown = [f"cross_modal={self.cross_modal:g}", f"in_modal={self.in_modal:g}"]
        shown += [f"{name}={value!r}" for name, value in self.options.changed.items()]
        return ", ".join(shown)
