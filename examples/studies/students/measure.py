"""Retrieval, agreement with people, and the geometry of the common space."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from openmoji_demo.metrics import named_recall
from scipy.stats import kendalltau
from torch import Tensor

from rankloss.metrics import modality_gap, rank_agreement
from studies.data.features import Side
from studies.data.flickr8k import Judgement
from studies.records import Record
from studies.statistics import Measure

Metrics = dict[str, dict[str, Any]]
ANCHORS = 200  # rows whose rankings are compared
BOTH_WAYS = "R@10, mean of both"

PRIMARY = Measure("R@10, both", ("retrieval", BOTH_WAYS))
CORRELATION = Measure("τ_c, experts", ("people", "experts τ_c"))
_WAYS = ("image_to_text", "text_to_image")


class Model(Protocol):
    """A model with a common space of unit-norm features."""

    log_scale: Tensor

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return features, ``[N, D]``."""

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return features, ``[N, S, D]``."""


def packed_hits(scores: Tensor, right: Tensor, k: int = 10) -> str:
    """Return a bit for each row, in hexadecimal: 1 if fewer than k columns are above the best right one.

    Equal captions tie, and :func:`rankloss.metrics.recall` would count their ties against the row; the
    records have the bits of this rule, in which a tie is a hit.

    Example:
        >>> packed_hits(torch.eye(9), torch.eye(9, dtype=torch.bool), k=1)
        'ff80'
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return np.packbits(((scores > best).sum(dim=1) < k).numpy()).tobytes().hex()


def hits_of_pictures(record: Mapping[str, Any]) -> np.ndarray:
    """Return R@10 of each picture, in percent: the mean of its own hit and of its captions' mean hit."""
    hits = record["metrics"]["hits"]
    n = hits["pictures"]
    bits = {way: np.unpackbits(np.frombuffer(bytes.fromhex(hits[way]), np.uint8)) for way in _WAYS}
    each = len(bits["text_to_image"]) // n  # captions of a picture
    captions = bits["text_to_image"][: n * each].reshape(n, each).mean(1)
    return 50 * (bits["image_to_text"][:n] + captions)


def correlation_with_experts(
    scores: Mapping[tuple[str, tuple[str, int]], float], judgements: Sequence[Judgement]
) -> dict[str, float]:
    """Return Kendall's τ_c and τ_b of the scores and the experts' grades, in percent.

    Every expert's grade is an observation of its own, and a picture's own sentences are left out, as
    CLIPScore (EMNLP 2021) does it.

    Args:
        scores: The similarity of a picture and a sentence, by the picture's name and the sentence's key.
        judgements: The experts' grades.
    """
    others = [one for one in judgements if one.picture != one.sentence[0]]
    similarities = [scores[one.picture, one.sentence] for one in others for _ in one.grades]
    grades = [grade for one in others for grade in one.grades]
    found = {v: kendalltau(similarities, grades, variant=v).statistic for v in ("c", "b")}
    return {f"experts τ_{v}": 100 * float(value) for v, value in found.items()}


@torch.inference_mode()
def measure(
    model: Model, side: Side, names: Sequence[str], judgements: Sequence[Judgement] | None = None
) -> Metrics:
    """Return all scores of a model on a side; those of people where there are judgements of its pictures.

    Recalls, τ_c and τ_b are in percent. Agreement and gap are those of each picture with its first sentence.

    Raises:
        ValueError: If features are not finite.
    """
    v = model.pictures(side.pictures)
    t = model.sentences(side.sentences)
    each = t.flatten(0, 1)
    picture_of = torch.arange(len(v)).repeat_interleave(t.shape[1])
    similarity = v @ each.T
    own = picture_of == torch.arange(len(v)).unsqueeze(1)
    retrieval = {name: score for name, (score, _) in named_recall(v, each, picture_of).items()}
    retrieval[BOTH_WAYS] = (retrieval["image_to_text R@10"] + retrieval["text_to_image R@10"]) / 2
    first = t[:, 0]
    agreement = {name: value.item() for name, value in rank_agreement(v, first, max_anchors=ANCHORS).items()}
    geometry = {
        **{name: agreement[name] for name in ("cross_modal_tau", "in_modal_tau")},
        "modality_gap": modality_gap(v, first).item(),
        "logit_scale": model.log_scale.exp().item(),
    }
    ways = zip(_WAYS, ((similarity, own), (similarity.T, own.T)), strict=True)
    hits = {"pictures": len(v), **{way: packed_hits(*of) for way, of in ways}}
    found = {"retrieval": retrieval, "geometry": geometry, "hits": hits}
    if judgements is not None:
        row = {name: number for number, name in enumerate(names)}
        scores = {
            (one.picture, one.sentence): float(v[row[one.picture]] @ t[row[one.sentence[0]], one.sentence[1]])
            for one in judgements
        }
        found["people"] = correlation_with_experts(scores, judgements)
    return found


def recorded(train: Callable[[], Model], measured: Callable[[Model], Metrics]) -> Record:
    """Train and measure; return the metrics, and the seconds of a core that both took."""
    began = time.process_time()
    model = train()
    trained = time.process_time()
    metrics = measured(model)
    seconds = {"training": trained - began, "measuring": time.process_time() - trained}
    return {
        "metrics": metrics,
        "processor_seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
