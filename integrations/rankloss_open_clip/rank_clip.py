"""RankCLIP's loss as the trainer calls it: the raw terms, λ and the agreement in its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import rankloss
from rankloss_open_clip.loss import Call, TrainerLoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_RANK_TERMS = ("cross_modal", "in_modal")
_AGREEMENT_ANCHORS = 256


class RankClipTrainerLoss(TrainerLoss):
    """RankCLIP's loss as open_clip's trainer calls it.

    Args:
        criterion: The loss.
        unit: ``"epoch"`` or ``"step"``, what the schedule goes by.
        sums_every_value: See :class:`TrainerLoss`.
        agreement_every: Measure the batch's rank agreement at every so many optimizer steps, the first of an
            epoch among them; None never does.
    """

    criterion: rankloss.RankClipLoss

    def __init__(
        self,
        criterion: rankloss.RankClipLoss,
        *,
        unit: str,
        sums_every_value: bool = True,
        agreement_every: int | None = None,
    ) -> None:
        super().__init__(criterion, unit=unit, sums_every_value=sums_every_value)
        self.agreement_every = agreement_every
        self._agreement: dict[str, Tensor] = {}

    def entries(
        self,
        call: Call,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        **base_inputs: Any,
    ) -> Mapping[str, Tensor]:
        """The terms, and what is logged beside them.

        - ``rank_lambda``: the schedule's λ.
        - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight. While λ is 0
          they are computed without a gradient. A term that is left out of the whole run has none.
        - ``cross_modal_tau``, ``in_modal_tau``: with ``agreement_every``, Kendall's τ of the image's ranking
          with its text's (:func:`rankloss.metrics.rank_agreement`), over the batch of all processes, from at
          most 256 of its rows. Between two measurements they keep the value of the last: a gap, or a NaN,
          would spoil the averages that the trainer keeps, and would differ from step to step in what the
          processes exchange.

        All of it is of one gathering.
        """
        weights = self._weights()
        measures = call.first and self.agreement_every is not None and call.step % self.agreement_every == 0
        gathered = None
        if weights or measures:
            gathered = self.criterion.consistency.gather(image_features, text_features)
        inputs: dict[str, Any] = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "gathered": gathered,
        }
        entries = dict(super().entries(call, **inputs, **base_inputs))
        entries["rank_lambda"] = torch.full((), self.criterion.schedule_value, device=image_features.device)
        if any(weights.values()):
            entries.update({f"{name}_raw": entries[f"{name}_loss"] / w for name, w in weights.items()})
        elif weights:
            raw = self._untrained_terms(**inputs)
            entries.update({f"{name}_raw": raw[f"{name}_loss"] for name in weights})
            for name in weights:
                # The zeros look like the terms whose place they hold: a compiled trainer sees no change.
                zero = torch.zeros_like(entries[f"{name}_loss"], requires_grad=torch.is_grad_enabled())
                entries[f"{name}_loss"] = zero
        if measures and gathered is not None:
            self._agreement = self._measure_agreement(*gathered)
        return {**entries, **self._agreement}

    def _weights(self) -> dict[str, float]:
        """What each rank term is multiplied by at present; without those that the run leaves out."""
        scales = {"cross_modal": self.criterion.lambda_cross, "in_modal": self.criterion.lambda_in}
        return {name: weight for name, weight in self.criterion.rank_weights.items() if scales[name]}

    @torch.no_grad()
    def _untrained_terms(self, **inputs: Any) -> dict[str, Tensor]:
        device = inputs["image_features"].device
        # Random ties must not move the generator by which the run's data are shuffled.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            terms: dict[str, Tensor] = self.criterion.consistency(**inputs, output_dict=True)
        return terms

    @torch.no_grad()
    def _measure_agreement(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        agreement = rankloss.metrics.rank_agreement(images, texts, max_anchors=_AGREEMENT_ANCHORS)
        return {f"{name}_tau": agreement[f"{name}_tau"].float() for name in _RANK_TERMS}
