"""What is logged of rankloss's own losses beside their terms: λ, raw terms, agreement.

Each function or object here is an ``evaluate`` of :class:`rankloss_trainers.driven_loss.DrivenLoss`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rankloss
from rankloss_trainers.charts import AgreementCharts
from rankloss_trainers.clock import Call

_RANK_TERMS = ("cross_modal", "in_modal")
_AGREEMENT_ANCHORS = 256


@dataclass
class RankClipLog:
    """The terms of RankCLIP, and what is logged beside them.

    - ``rank_lambda``: the schedule's λ.
    - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight. While λ is 0 they
      are computed without a gradient. A term that the whole run leaves out has none.
    - ``cross_modal_tau``, ``in_modal_tau``: with ``agreement_every``, Kendall's τ of the image's ranking
      with its text's (:func:`rankloss.metrics.rank_agreement`), over the batch of all processes, from at
      most 256 of its rows. Between two measurements they keep the last value: a gap, or a NaN, would spoil
      a trainer's averages, and the processes must log the same names at every step. The first step that a
      process takes is therefore measured, wherever a resumed run begins.

    All of it uses one gathering.

    Attributes:
        agreement_every: Measure the batch's rank agreement at every so many optimizer steps, counted from the
            start of an epoch, or of the run where the trainer announces each step, and at the first step that
            the process takes; None never does.
        charts: Draws the rankings of the batch that is measured, when a chart is due.
    """

    agreement_every: int | None = None
    charts: AgreementCharts | None = None
    _agreement: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _measured: int | None = field(default=None, init=False, repr=False)  # the step that it is of

    def next_measured(self, step: int) -> int:
        """The first step from ``step`` on that is measured, counted from 0.

        It is a multiple of ``agreement_every``; or ``step`` itself, where none was measured since the last
        multiple, because the loss was not called for it.
        """
        every = self.agreement_every or 1
        if self._measured is None or step // every != self._measured // every:
            return step
        return step + -step % every

    def __call__(self, criterion: rankloss.RankClipLoss, call: Call, **inputs: Any) -> Mapping[str, Tensor]:
        """Call the loss."""
        image_features: Tensor = inputs["image_features"]
        weights = _weights(criterion)
        measures = (
            self.agreement_every is not None and call.first and self.next_measured(call.step) == call.step
        )
        gathered = None
        if weights or measures:
            gathered = criterion.consistency.gather(image_features, inputs["text_features"])
        inputs = {**inputs, "gathered": gathered, "output_dict": True}
        entries: dict[str, Tensor] = dict(criterion(**inputs))
        entries["rank_lambda"] = torch.full((), criterion.schedule_value, device=image_features.device)
        if any(weights.values()):
            raw = {name: entries[f"{name}_loss"].detach() / weight for name, weight in weights.items()}
            entries.update({f"{name}_raw": value for name, value in raw.items()})
        elif weights:
            terms = _untrained_terms(criterion.consistency, inputs)
            entries.update({f"{name}_raw": terms[f"{name}_loss"] for name in weights})
            for name in weights:
                # They look like the terms that later take their place: a compiled trainer sees no change.
                zero = torch.zeros_like(entries[f"{name}_loss"], requires_grad=torch.is_grad_enabled())
                entries[f"{name}_loss"] = zero
        if measures and gathered is not None:
            self._agreement, self._measured = _agreement(*gathered), call.step
            if self.charts is not None:
                self.charts.draw(*gathered)
        return {**entries, **self._agreement}


def _weights(criterion: rankloss.RankClipLoss) -> dict[str, float]:
    """What each rank term is multiplied by at present; without those that the run leaves out."""
    scales = {"cross_modal": criterion.lambda_cross, "in_modal": criterion.lambda_in}
    return {name: weight for name, weight in criterion.rank_weights.items() if scales[name]}


@torch.no_grad()
def _untrained_terms(consistency: rankloss.RankConsistency, inputs: dict[str, Any]) -> dict[str, Tensor]:
    taken = inspect.signature(consistency.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in taken}  # the rest is the base's
    device = inputs["image_features"].device
    # Random ties must not move the generator by which the run's data are shuffled.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        terms: dict[str, Tensor] = consistency(**inputs)
    return terms


@torch.no_grad()
def _agreement(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    agreement = rankloss.metrics.rank_agreement(images, texts, max_anchors=_AGREEMENT_ANCHORS)
    return {f"{name}_tau": agreement[f"{name}_tau"].float() for name in _RANK_TERMS}
