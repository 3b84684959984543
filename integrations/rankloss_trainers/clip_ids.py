"""The loss ``clip-ids``: pairs that belong together by an id in the data, and its log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather, GatherOption
from rankloss.options import check_choice
from rankloss_trainers.pair_ids import count_partners

_logger = logging.getLogger("rankloss_trainers")
_WATCHED_BATCHES = 100  # the first of a run, which says so once where none of them has a partner


def clip_ids(
    base: Any,
    *,
    same_id: Literal["ignore", "share"] = "ignore",
    gather: GatherOption = None,
    **options: Any,
) -> nn.Module:
    """The trainer's own loss, in which pairs of one id are no negatives of each other.

    Args:
        base: CLIP's or SigLIP's loss, which is replaced by the one with ids. Its smoothing stays, unless
            another is given.
        same_id: Leave pairs of one id out of each other's denominators (ignore), or let them share the
            target (share).
        gather: The gathering.
        **options: The others of :class:`rankloss.ClipLoss`.

    Raises:
        ValueError: The base has a ``same_id``, or is SigLIP's with label smoothing; or for another
            ``same_id``.
    """
    if same_id_of_base := getattr(base, "same_id", None):
        raise ValueError(
            f"clip-ids has a same_id of its own, and would replace the base's; got {same_id_of_base!r}"
        )
    check_choice("same_id", same_id, ("ignore", "share"))
    options["same_id"] = same_id
    options.setdefault("label_smoothing", getattr(base, "label_smoothing", 0.0))
    if type(base).__name__ == rankloss.ClipLoss.__name__:  # open_clip's has the same name
        return rankloss.ClipLoss(gather=gather, **options)
    if smoothing := options.pop("label_smoothing"):  # the base is SigLIP's, which has none
        raise ValueError(f"label_smoothing is for CLIP's loss; got {smoothing!r} with SigLIP's")
    return rankloss.SigLipLoss(gather=gather, **options)


class PartnersLog:
    """The share of a batch's pairs that have a partner of their id in it, of all processes.

    After the first hundred batches without any partner the log says so once: ids change nothing then.
    """

    def __init__(self) -> None:
        self._with_partner: Tensor | int = 0  # pairs of the watched batches
        self._batches = 0

    def __call__(
        self,
        criterion: nn.Module,
        entries: Mapping[str, Tensor],  # noqa: ARG002
        step: int,  # noqa: ARG002
        inputs: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The entry ``pairs_with_partner``, a share from 0 to 1; of the inputs it takes ``pair_ids``."""
        losses_of_ids = (loss for loss in criterion.modules() if getattr(loss, "same_id", None) is not None)
        gather: Gather = next(losses_of_ids).gather  # type: ignore[assignment]
        ids = gather.items(inputs["pair_ids"])  # of all processes
        with_partner = count_partners(ids)
        self._batches += 1
        if self._batches <= _WATCHED_BATCHES:
            self._with_partner = self._with_partner + with_partner
        rank, _world_size = gather.place
        # The count is read, for which a device has to be waited for, once in a run.
        if self._batches == _WATCHED_BATCHES and not bool(self._with_partner) and rank == 0:
            text = "No pair had a partner of the same id in the first %d batches: clip-ids changes nothing"
            _logger.warning(text, _WATCHED_BATCHES)
        return {"pairs_with_partner": with_partner / len(ids)}
