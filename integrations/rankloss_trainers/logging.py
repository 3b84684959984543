"""Logged values of rankloss's own losses beside their terms: λ, raw terms, agreement.

A :class:`RankClipLog` is a ``log`` of :class:`rankloss_trainers.named.NamedLoss`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rankloss
from rankloss.losses import TEACHER
from rankloss.options import check_count

_AGREEMENT_ANCHORS = 256
_INPUTS = (
    *("image_features", "text_features", "logit_scale"),
    *TEACHER,
)

_logger = logging.getLogger("rankloss_trainers")


def chance(options: rankloss.RankOptions, pairs: int) -> float | None:
    """The raw rank terms of equal scores, in nats per counted item; None where ties or weights decide it.

    A list of N items has ln N! / N, and with ``top_k`` ln(N! / (N − k)!) / k. The model ``"top_one"`` has
    ln N.

    Args:
        options: Those of the rank terms.
        pairs: The pairs of the whole batch.

    Example:
        >>> round(chance(rankloss.RankOptions(), 128), 2)
        3.88
    """
    items = pairs - (not options.diagonal)
    if options.lists == "batch" or options.method == "bin" or options.discount is not None or items < 1:
        return None
    if options.model == "top_one":
        return math.log(items)
    counted = items if options.top_k is None else min(options.top_k, items)
    return (math.lgamma(items + 1) - math.lgamma(items - counted + 1)) / counted


@dataclass
class RankClipLog:
    """Entries to log beside the terms of RankCLIP.

    - ``rank_lambda``: the schedule's λ.
    - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight, also while λ is
      0, where they are computed for the log alone: processes, and compiled callers, need the same entries.
      Equal scores give :func:`chance`, which the first call writes into the log.
    - ``cross_modal_tau``, ``in_modal_tau``: with ``agreement_every``, Kendall's τ of the image's ranking
      with its text's (:func:`rankloss.metrics.rank_agreement`), over the batch of all processes, from at
      most 256 of its rows. Between two measurements they keep the last value: a gap, or a NaN, would spoil
      a trainer's averages, and the processes must log the same names at every step. The first step that a
      process takes is therefore measured, wherever a resumed run begins.

    Attributes:
        agreement_every: Measure the batch's rank agreement at every so many optimizer steps, and at the first
            step that the process takes; where the loss is not called for such a step, at the next one. None
            never does.
    """

    agreement_every: int | None = None
    _agreement: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _measured: int | None = field(default=None, init=False, repr=False)  # the last multiple
    _has_logged: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.agreement_every is not None:
            check_count("agreement_every", self.agreement_every)

    def __call__(
        self,
        criterion: nn.Module,
        entries: Mapping[str, Tensor],
        step: int,
        inputs: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The entries of one call, of which ``entries`` are those of the whole loss, ``criterion``."""
        images, texts = inputs["image_features"], inputs["text_features"]
        rank_clip = next(x for x in criterion.modules() if isinstance(x, rankloss.RankClipLoss))
        ranked = rank_clip.consistency
        weights = {name: x for name, x in rank_clip.rank_weights.items() if getattr(ranked, name)}
        terms: Mapping[str, Tensor] = entries
        if not any(weights.values()):
            given = {name: inputs[name] for name in _INPUTS if name in inputs}
            terms, weights = ranked(**given, output_dict=True), dict.fromkeys(weights, 1.0)
        self._log_chance(ranked, len(images))
        raw = {f"{name}_raw": terms[f"{name}_loss"].detach() / x for name, x in weights.items()}
        if self._measures(step):
            both = ranked.gather(images, texts)  # with gradients, as the loss has gathered them already
            with torch.no_grad():
                tau = rankloss.metrics.rank_agreement(*both, max_anchors=_AGREEMENT_ANCHORS)
            self._agreement = {name: tau[name].float() for name in ("cross_modal_tau", "in_modal_tau")}
        schedule = torch.full((), rank_clip.schedule_value, device=images.device)
        return {"rank_lambda": schedule, **raw, **self._agreement}

    def _log_chance(self, ranked: rankloss.RankConsistency, pairs: int) -> None:
        rank, world_size = ranked.gather.place
        value = chance(ranked.options, pairs * world_size)
        if not self._has_logged and rank == 0 and value is not None:
            text = "Raw rank terms of chance: %.3f nats per item, ln N!/N of lists of equal scores"
            _logger.info(text, value)
        self._has_logged = True

    def _measures(self, step: int) -> bool:
        if self.agreement_every is None:
            return False
        multiple, since = divmod(step, self.agreement_every)
        last, self._measured = self._measured, multiple
        return since == 0 or multiple != last
