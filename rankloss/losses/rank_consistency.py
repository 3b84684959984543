"""The two rank terms as a module."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from rankloss.checks import check_references
from rankloss.distributed import GatherOption
from rankloss.losses.composition import TEACHER
from rankloss.losses.gathering import GatheringLoss
from rankloss.options import RankOptions, check_weight
from rankloss.precision import outside_graphs

_log = logging.getLogger(__name__)


class RankConsistency(GatheringLoss):
    r"""RankCLIP's two rank terms: ``cross_modal · cross + in_modal · in``.

    With V, T the image and text features, S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ,

        cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)],

    where C averages the Plackett–Luce NLL of the matrix's rows (:func:`rankloss.plackett_luce_nll`). The
    second matrix only gives the order and receives no gradient. With a teacher's features V', T' of the same
    pairs each matrix is ranked by the teacher's matrix, S' = V'·T'ᵀ and so on,

        cross = ½[C(S | S') + C(R | R')],   in = ½[C(I | I') + C(X | X')].

    With the teacher's features of one modality alone, its matrix Y' ranks both images and texts: the in-modal
    term is ½[C(I | Y') + C(X | Y')], and the cross-modal term must have the weight 0.

    Lists are computed in chunks of rows, value and gradient together, so memory grows linearly with N, except
    with ``reduction="none"``. :mod:`rankloss.reference` has the formula as printed, one list of all pairs,
    and the published code. Similarities, order and sums are float32 at least, under autocast too; products
    are TF32's where torch allows them (docs/performance.md).

    Args:
        cross_modal: weight of the cross-modal term, a number; 0 leaves it out of the computation.
        in_modal: weight of the in-modal term, a number; 0 leaves it out of the computation.
        gather: gathering of other processes' features. None: exact, from the default process group, if one of
            several processes is initialised. False: none. Otherwise a :class:`rankloss.Gather`.
        **options: the lists, their ranking, reduction and computation: the fields of
            :class:`rankloss.RankOptions`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; the two may differ in D if the
        cross-modal term has the weight 0. ``logit_scale``: the multiplier s itself, not its logarithm, a
        number or a tensor of one element. The result is a scalar in nats, float32 at least.
        ``output_dict=True`` gives the two weighted terms, ``{"cross_modal_loss": …, "in_modal_loss": …}``;
        their sum is the loss. ``reference_image_features`` and ``reference_text_features``: ``[N, D']``,
        unit-norm, of any floating-point dtype; the two may differ in D' if the cross-modal term has the
        weight 0.

    Raises:
        ValueError: for an invalid value of an option; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least two rows in the whole batch, a scale that is
            not positive (not checked on an accelerator, where reading it would wait), a teacher's features of
            another shape or, with a weighted cross-modal term, of one modality alone, or a teacher together
            with ``fixed_reference``.
        TypeError: for an option that does not exist, or that :mod:`rankloss.reference` alone has.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025.

    Example:
        >>> import rankloss, torch
        >>> criterion = rankloss.RankConsistency()
        >>> image_features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> text_features = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> loss = criterion(image_features, text_features, logit_scale=10.0)
        >>> round(loss.item(), 3)
        0.812
    """

    ranks_items = True
    """The terms depend on the order of items, which rounded products change."""

    def __init__(
        self,
        *,
        cross_modal: float = 1.0,
        in_modal: float = 1.0,
        gather: GatherOption = None,
        **options: Any,
    ) -> None:
        super().__init__(gather)
        self.cross_modal = check_weight("cross_modal", cross_modal)
        self.in_modal = check_weight("in_modal", in_modal)
        self.options = RankOptions(**options)
        if self.gather.anchors_are_local and not self.gather.gather_with_grad and self.gather.place.rank == 0:
            _log.warning(
                "local_loss without gather_with_grad: the gradient of the rank terms differs from that "
                "of the whole batch; set both flags"
            )

    @property
    def needs_common_space(self) -> str:
        """The option by which a teacher's images are compared with its texts; empty if it is 0."""
        return "cross_modal" if self.cross_modal else ""

    def check_device(self, device: torch.device, pairs: int) -> None:
        """Raise a ValueError if the kernel does not serve float32 batches of so many pairs on a device."""
        if self.options.kernel != "torch":
            self.options.kernel_module(device, torch.float32, pairs, pairs)

    @outside_graphs
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = 1.0,
        *,
        output_dict: bool = False,
        reference_image_features: Tensor | None = None,
        reference_text_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum of the two terms, or with ``output_dict`` the weighted terms themselves.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            output_dict: return the terms by name instead of their sum.
            reference_image_features: ``[N, D']``, a teacher's features, which rank the lists. They carry no
                gradient.
            reference_text_features: ``[N, D']``, also a teacher's.
        """
        teacher = dict(zip(TEACHER, (reference_image_features, reference_text_features), strict=True))
        inputs = image_features, text_features, logit_scale, None
        self.check(inputs, teacher)
        weights = 0.0, self.cross_modal, self.in_modal  # of CLIP's loss, which is no term here, and of both
        _, cross, in_ = self.weighted_terms(inputs, self.options, weights, tuple(teacher.values()))
        return {"cross_modal_loss": cross, "in_modal_loss": in_} if output_dict else cross + in_

    def check(
        self,
        inputs: tuple[Any, ...],
        teacher: dict[str, Tensor | None],
        *,
        one_space: bool = False,
        base_inputs: Collection[str] = (),
    ) -> None:
        """Check the inputs, and a teacher's features against the options and the terms.

        Args:
            inputs: the arguments of :meth:`check_inputs`.
            teacher: a teacher's features by name.
            one_space: True if images are compared with texts, apart from the terms.
            base_inputs: see :meth:`check_inputs`.
        """
        has_cross_modal_term = self.cross_modal != 0
        compares_modalities = one_space or has_cross_modal_term
        references: dict[str, Any] = dict(teacher)
        self.check_inputs(*inputs, base_inputs=base_inputs, one_space=compares_modalities, **references)
        check_references(self.options, cross_modal=has_cross_modal_term, **teacher)

    def extra_repr(self) -> str:
        """The weights, and the options with other values than their defaults."""
        shown = [f"cross_modal={self.cross_modal:g}", f"in_modal={self.in_modal:g}"]
        shown += [f"{name}={value!r}" for name, value in self.options.changed.items()]
        return ", ".join(shown)
