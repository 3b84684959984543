"""Recall of an evaluation by transformers' Trainer, over all batches and processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from rankloss.metrics import recall

_KS = (1, 5, 10)


class Retrieval:
    """The embeddings of an evaluation's pairs.

    Args:
        dataloader: The evaluation's. Of a stream several processes repeat the last pairs, and nothing is
            measured.
        processes: The number of processes.
    """

    def __init__(self, dataloader: Any, processes: int) -> None:
        self._is_exact = processes == 1 or has_length(getattr(dataloader, "dataset", None))
        self._batches: list[tuple[Tensor, ...]] = []

    def add(
        self,
        accelerator: Any,
        image_features: Tensor,
        text_features: Tensor,
        pair_ids: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Add the pairs of a batch, of all processes and each once; every process calls this."""
        if self._is_exact:
            columns = [image_features, text_features]
            if pair_ids is not None:
                columns.append(pair_ids.to(image_features.device))
            gathered = accelerator.gather_for_metrics(tuple(x.detach().contiguous() for x in columns))
            self._batches.append(tuple(x.cpu() for x in gathered))

    def measure(self) -> dict[str, float]:
        """:func:`rankloss.metrics.recall` of all pairs, for k up to their number; NaN if the features are.

        And ``mean_R@1``, the mean of the images' R@1 and the texts'.
        """
        if not self._batches:
            return {}
        v, t, *ids = (torch.cat(column) for column in zip(*self._batches, strict=True))
        self._batches.clear()
        is_finite = bool(v.isfinite().all() and t.isfinite().all())
        if not is_finite:  # the training has diverged, as its loss says
            v, t = torch.ones_like(v) / v.shape[1] ** 0.5, torch.ones_like(t) / t.shape[1] ** 0.5
        by_ids = {"image_ids": ids[0], "text_ids": ids[0]} if ids else {}
        values = recall(v.float(), t.float(), [k for k in _KS if k <= len(v)], **by_ids)
        values["mean_R@1"] = (values["image_to_text_R@1"] + values["text_to_image_R@1"]) / 2
        return {name: value.item() if is_finite else math.nan for name, value in values.items()}
