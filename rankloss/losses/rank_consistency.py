"""The two rank terms as a module."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankloss.checks import can_be_read, look_at_scale
from rankloss.distributed import Gather, Gathered, GatherOption
from rankloss.functional import check_references
from rankloss.losses.gathering import GatheringLoss
from rankloss.options import OPTION_NAMES, RankOptions, check_count, check_names, check_weight
from rankloss.plans import Plan, make_plan

_log = logging.getLogger(__name__)


class FixedWeights:
    """A module with weights that are read while it is built: setting one later raises an error."""

    _fixed: ClassVar[frozenset[str]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            raise AttributeError(
                f"{name} cannot be changed once {type(self).__name__} is built; build another"
            )
        super().__setattr__(name, value)


class RankConsistency(FixedWeights, GatheringLoss):
    r"""RankCLIP's two rank terms: ``cross_modal · cross + in_modal · in``.

    With V, T the image and text features, S = s·V·Tᵀ, R = Sᵀ, I = s·V·Vᵀ, X = s·T·Tᵀ,

        cross = ½[C(S | R) + C(R | S)],   in = ½[C(I | X) + C(X | I)],

    where C averages the Plackett–Luce NLL of the matrix's lists (:func:`rankloss.plackett_luce_nll`): one
    list per row, or one of all pairs. The second matrix gives the order only and receives no gradient. With a
    teacher's features V', T' of the same pairs each matrix is ranked by the teacher's, S' = V'·T'ᵀ and so on,

        cross = ½[C(S | S') + C(R | R')],   in = ½[C(I | I') + C(X | X')].

    With the features of one modality alone, its matrix Y' ranks the images and the texts,
    in = ½[C(I | Y') + C(X | Y')], and the cross-modal term has to have the weight 0.

    Row lists are computed in chunks of rows, value and gradient together, so memory grows linearly with N;
    :class:`rankloss.RankOptions` says which options are not. Similarities, order and sums are float32 at
    least, under autocast too.

    Args:
        cross_modal: weight of the cross-modal term, a number; 0 leaves it out of the computation. It cannot
            be changed later.
        in_modal: weight of the in-modal term, likewise.
        gather: how features of other processes are gathered. None: from the default process group, if one of
            more than one process is initialised, exactly. False: not at all. Else a :class:`rankloss.Gather`.
        **options: which lists, how they are ranked and put together, and how they are computed: the fields of
            :class:`rankloss.RankOptions`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; the two may differ in D where the
        cross-modal term has the weight 0. ``logit_scale``: the multiplier s itself, not its logarithm, a
        number or a tensor of one element. The result is a scalar in nats, float32 at least.
        ``output_dict=True`` gives the two weighted terms, ``{"cross_modal_loss": …, "in_modal_loss": …}``,
        which add up to it.
        ``reference_image_features`` and ``reference_text_features``: ``[N, D']``, unit-norm, of any
        floating-point dtype; the two may differ in D' where the cross-modal term has the weight 0.

    Raises:
        ValueError: for a value that an option cannot have; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least two rows in the whole batch, a scale that is
            not positive (not checked on an accelerator, where reading it would wait), a teacher's features of
            another shape, those of one modality alone while the cross-modal term has a weight, or any beside
            ``fixed_reference``.
        TypeError: for an option that does not exist.

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

    _fixed = frozenset({"cross_modal", "in_modal"})

    def __init__(
        self,
        *,
        cross_modal: float = 1.0,
        in_modal: float = 1.0,
        gather: GatherOption = None,
        **options: Any,
    ) -> None:
        check_names(type(self), options, OPTION_NAMES)
        rank_options = RankOptions(**options)
        if rank_options.lists == "batch":
            if isinstance(gather, Gather) and gather.local_loss:
                raise ValueError(
                    "lists='batch' is one list of the whole batch and cannot have local_loss=True; "
                    f"got gather={gather!r}"
                )
            gather = Gather(local_loss=False) if gather is None else gather
        super().__init__(gather)
        self.cross_modal = check_weight("cross_modal", cross_modal)
        self.in_modal = check_weight("in_modal", in_modal)
        self._needs_one_space = self.cross_modal != 0
        self.options = rank_options
        if self.gather.local_loss and not self.gather.gather_with_grad:
            rank, world_size = self.gather.place
            if world_size > 1 and rank == 0:
                _log.warning(
                    "local_loss without gather_with_grad: the gradient of the rank terms differs from that "
                    "of the whole batch; set both flags"
                )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float = 1.0,
        *,
        output_dict: bool = False,
        gathered: Gathered | None = None,
        reference_image_features: Tensor | None = None,
        reference_text_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The weighted sum of the two terms, or with ``output_dict`` the weighted terms themselves.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            output_dict: return the terms by name instead of their sum.
            gathered: ``self.gather(image_features, text_features)``, from a caller that has it already, so
                that one gathering serves several losses.
            reference_image_features: ``[N, D']``, a teacher's, whose rankings the lists are compared with.
                They carry no gradient.
            reference_text_features: ``[N, D']``, likewise.
        """
        teacher = {
            "reference_image_features": reference_image_features,
            "reference_text_features": reference_text_features,
        }
        self.check_inputs(image_features, text_features, logit_scale, **teacher)
        _, cross, in_ = self.weighted_terms(
            (image_features, text_features, logit_scale),
            self.options,
            torch.tensor([1.0, self.cross_modal, self.in_modal], dtype=torch.float64, device="cpu"),
            (False, self.cross_modal != 0, self.in_modal != 0),
            gathered,
            tuple(teacher.values()),
        )
        return {"cross_modal_loss": cross, "in_modal_loss": in_} if output_dict else cross + in_

    def check_inputs(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        **references: Tensor | None,
    ) -> None:
        """As any loss does, and whether a teacher's features fit the options and the terms."""
        super().check_inputs(image_features, text_features, logit_scale, **references)
        check_references(self.options, cross_modal=self.cross_modal != 0, **references)
        scale, teacher = self.options.reference_scale, [x for x in references.values() if x is not None]
        if scale is not None and "reference_scale" not in self._looked_at and can_be_read(teacher[0]):
            look_at_scale("reference_scale", scale, teacher[0])
            self._looked_at |= {"reference_scale"}

    def plan(self, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Plan:
        """How a global batch of n pairs is computed.

        Raises:
            ValueError: unless n is an integer of at least 2.

        Example:
            >>> RankConsistency().plan(1024).name, RankConsistency(lists="batch").plan(1024).name
            ('rows', 'dense')
        """
        n = check_count("n", n, at_least=2)
        anchors = n // self.gather.place[1] if self.gather.anchors_are_local else n
        dtype = torch.promote_types(dtype, torch.float32)
        return make_plan(self.options, anchors, n, torch.device(device), dtype)

    def extra_repr(self) -> str:
        """The weights and every option that is not at its default."""
        shown = [f"cross_modal={self.cross_modal:g}", f"in_modal={self.in_modal:g}"]
        shown += [f"{name}={value!r}" for name, value in self.options.changed.items()]
        return ", ".join(shown)
