"""Logged values of RankCLIP beside its terms: λ, raw terms, agreement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rankloss

_AGREEMENT_ANCHORS = 256


def remark_on_products(device: torch.device) -> str | None:
    """A remark for the log where a GPU computes float32 products in TF32; None elsewhere.

    open_clip's trainer allows TF32, also on cards without it.
    """
    if device.type != "cuda" or not _allows_tf32() or not _has_tf32(device):
        return None
    return (
        "float32 products are computed in TF32, which changes places of neighbouring items in a list and the "
        "gradient by about 0.1 %; torch.backends.cuda.matmul.allow_tf32 = False ranks exactly"
    )


def _allows_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # of releases that have another setting, once that was used
        return bool(matmul.fp32_precision == "tf32")


def _has_tf32(device: torch.device) -> bool:
    """As ``torch.cuda.is_tf32_supported``, which asks the current device."""
    if torch.version.hip:
        return bool(torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95")))
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class RankClipLog:
    """Entries to log beside the terms of RankCLIP: the ``log`` of a named loss.

    - ``rank_lambda``: the schedule's λ.
    - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight. While a term's
      weight is 0 it is not computed, and its entry is None.
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

    def __call__(
        self,
        criterion: nn.Module,
        entries: Mapping[str, Tensor],
        step: int,
        inputs: Mapping[str, Any],
    ) -> dict[str, Tensor | None]:
        """The entries of one call, of which ``entries`` are those of the whole loss, ``criterion``."""
        images, texts = inputs["image_features"], inputs["text_features"]
        rank_clip = next(x for x in criterion.modules() if isinstance(x, rankloss.RankClipLoss))
        raw = {
            f"{name}_raw": entries[f"{name}_loss"].detach() / weight if weight else None
            for name, weight in rank_clip.rank_weights.items()
            if getattr(rank_clip.consistency, name)
        }
        if self._measures(step):
            both = rank_clip.consistency.gather(
                images, texts
            )  # with gradients, as the loss has gathered them
            with torch.no_grad():
                tau = rankloss.metrics.rank_agreement(*both, max_anchors=_AGREEMENT_ANCHORS)
            self._agreement = {name: tau[name].float() for name in ("cross_modal_tau", "in_modal_tau")}
        schedule = torch.full((), rank_clip.schedule_value, device=images.device)
        return {"rank_lambda": schedule, **raw, **self._agreement}

    def _measures(self, step: int) -> bool:
        if self.agreement_every is None:
            return False
        multiple, since = divmod(step, self.agreement_every)
        last, self._measured = self._measured, multiple
        return since == 0 or multiple != last
