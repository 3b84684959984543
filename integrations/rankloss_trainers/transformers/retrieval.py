"""Recall of an evaluation by transformers' Trainer, over all batches and processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from rankloss import InputWarning
from rankloss.metrics import recall
from rankloss_trainers.pair_ids import has_padding, hash_rows, hash_tokens

_KS = (1, 5, 10)
_IN_MODAL = ("image_to_image", "text_to_text")


class Retrieval:
    """The embeddings of an evaluation's pairs.

    As in ``rankloss evaluate``, a picture that stands in several rows is one, with several captions, and a
    caption of such rows is one. A picture is its pixels, a caption its tokens.

    Args:
        dataloader: The evaluation's. Of a stream several processes repeat the last pairs, and nothing is
            measured.
        processes: The number of processes.
    """

    def __init__(self, dataloader: Any, processes: int) -> None:
        dataset = getattr(dataloader, "dataset", None)
        self._has_each_pair_once = processes == 1 or has_length(dataset)
        self._batches: list[dict[str, Tensor]] = []

    def add(
        self,
        accelerator: Any,
        image_features: Tensor,
        text_features: Tensor,
        *,
        inputs: Mapping[str, Any],
        processor: Any,
        pair_ids: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Add the pairs of a batch, of all processes and each once; every process calls this.

        Args:
            accelerator: The Trainer's.
            image_features: ``[n, D]``.
            text_features: ``[n, D]``.
            inputs: The model's.
            processor: The tokenizer, or a processor that holds it; None if there is none.
            pair_ids: ``[n]``, or None.
        """
        if not self._has_each_pair_once:
            return
        columns = {"images": image_features, "texts": text_features, **_identities(inputs, processor)}
        if pair_ids is not None:
            columns["ids"] = pair_ids
        device = image_features.device
        own_columns = tuple(column.detach().to(device).contiguous() for column in columns.values())
        gathered = accelerator.gather_for_metrics(own_columns)
        self._batches.append({name: column.cpu() for name, column in zip(columns, gathered, strict=True)})

    def measure(self) -> dict[str, float]:
        """:func:`rankloss.metrics.recall` of all pairs, for k up to the distinct pictures and captions.

        And ``mean_R@1``, the mean of the images' R@1 and the texts'. All are NaN if a feature is not finite;
        nothing is measured where no pair was added. The pairs are forgotten.
        """
        if not self._batches:
            return {}
        names = self._batches[0].keys()
        columns = {name: torch.cat([batch[name] for batch in self._batches]) for name in names}
        self._batches.clear()
        image_features, text_features = columns["images"].float(), columns["texts"].float()
        is_finite = bool(image_features.isfinite().all() and text_features.isfinite().all())
        if not is_finite:
            # The training has diverged, as its loss says. Stand-ins give the names of the values.
            image_features, text_features = _unit_rows_like(image_features), _unit_rows_like(text_features)

        has_ids = "ids" in columns
        rows = torch.arange(len(image_features))  # where nothing tells equal ones, each row is another
        pictures, captions = columns.get("pictures", rows), columns.get("captions", rows)
        groups = columns.get("ids", pictures)  # pairs of one group are partners
        images, texts = _first_of(pictures, groups), _first_of(captions, groups)
        if "captions" in columns and not has_ids:
            _warn_of_repeated(len(texts) - len(captions.unique()))

        ks = [k for k in _KS if k <= min(len(images), len(texts))]
        values = recall(
            image_features[images],
            text_features[texts],
            ks,
            image_ids=groups[images],
            text_ids=groups[texts],
        )
        values["mean_R@1"] = (values["image_to_text_R@1"] + values["text_to_image_R@1"]) / 2
        if not has_ids:  # a picture has no other picture for a partner
            values = {name: value for name, value in values.items() if not name.startswith(_IN_MODAL)}
        return {name: value.item() if is_finite else math.nan for name, value in values.items()}


def _identities(inputs: Mapping[str, Any], processor: Any) -> dict[str, Tensor]:
    """Hashes of a batch's pictures, and of its captions, where the model's inputs have them."""
    hashes = {}
    if isinstance(inputs.get("pixel_values"), Tensor):
        hashes["pictures"] = hash_rows(inputs["pixel_values"])
    if has_padding(inputs, processor):
        hashes["captions"] = hash_tokens(inputs, processor)
    return hashes


def _unit_rows_like(features: Tensor) -> Tensor:
    """Equal rows of norm 1, in the shape of features."""
    norm = math.sqrt(features.shape[1])  # of a row of ones
    return torch.ones_like(features) / norm


def _first_of(items: Tensor, groups: Tensor) -> Tensor:
    """The first row of each item in each group, ascending."""
    rows = torch.arange(len(items))
    in_groups = torch.stack([items, groups], dim=1)
    distinct, number_of_row = in_groups.unique(dim=0, return_inverse=True)
    beyond_all_rows = torch.full((len(distinct),), len(items))
    first = beyond_all_rows.scatter_reduce(0, number_of_row, rows, "amin")
    return first.sort().values


def _warn_of_repeated(count: int) -> None:
    """Warn of captions that stand beside several pictures."""
    if count:
        warnings.warn(  # Python shows the same text once
            f"{count} captions of the evaluation repeat that of another picture, and count as wrong answers "
            "there; with loss='clip-ids' and its key pairs of one id are partners",
            InputWarning,
            stacklevel=2,
        )
