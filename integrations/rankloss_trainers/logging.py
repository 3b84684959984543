"""Values to log beside the terms of a loss: λ and raw terms of RankCLIP, rank agreement, TF32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather

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


def rank_clip_entries(criterion: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Entries to log beside the terms of RankCLIP, empty without it.

    - ``rank_lambda``: the schedule's λ.
    - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight. While a term's
      weight is 0 it is not computed, and its entry is None.

    Args:
        criterion: The whole loss.
        entries: Its entries of one call.
    """
    loss = next((x for x in criterion.modules() if isinstance(x, rankloss.RankClipLoss)), None)
    if loss is None:
        return {}
    raw = {
        f"{name}_raw": entries[f"{name}_loss"].detach() / weight if weight else None
        for name, weight in loss.rank_weights.items()
        if getattr(loss.consistency, name)
    }
    device, schedule = next(iter(entries.values())).device, loss.schedule_value or 0.0
    return {"rank_lambda": torch.full((), schedule, device=device), **raw}


class Agreement:
    """The rank agreement of the batch of all processes, from at most 256 of its rows: Kendall's τ.

    ``cross_modal_tau`` and ``in_modal_tau`` compare an image's ranking with its text's
    (:func:`rankloss.metrics.rank_agreement`). Between two measurements they keep the last value: a gap, or a
    NaN, would spoil a trainer's averages, and the processes must log the same names at every step. The first
    step that a process takes is therefore measured, wherever a resumed run begins.

    Args:
        every: Measure at every so many optimizer steps, and at the first step that the process takes; where
            the loss is not called for such a step, at the next one. None never does.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._values: dict[str, Tensor] = {}
        self._measured: int | None = None  # the last multiple

    def __call__(self, gather: Gather, inputs: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """The entries of one call with these inputs of the loss."""
        if self._measures(step):
            # With gradients, as the loss has gathered them.
            both = gather(inputs["image_features"], inputs["text_features"])
            with torch.no_grad():
                tau = rankloss.metrics.rank_agreement(*both, max_anchors=_AGREEMENT_ANCHORS)
            self._values = {name: tau[name].float() for name in ("cross_modal_tau", "in_modal_tau")}
        return self._values

    def _measures(self, step: int) -> bool:
        if self.every is None:
            return False
        multiple, since = divmod(step, self.every)
        last, self._measured = self._measured, multiple
        return since == 0 or multiple != last
