"""Scores guessing and raw pixels, the baselines of every trained model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from clip_evaluation import metrics, pixel_knn

from .draw import THUMBNAIL
from .labels import Labelled
from .records import Record
from .split import SHIFTS

ALIKE_LIMITS = (8, 16)


@dataclasses.dataclass(frozen=True)
class RetrievalRow:
    """Retrieval on one block."""

    block: str
    images: int  # number of pictures, one per concept
    captions: int  # number of captions
    chance: dict[str, dict[int, float]]  # R@k of guessing, both ways
    knn: dict[str, dict[int, float]]  # R@k of the nearest training pictures' words
    alike: dict[int, float]  # share of the pictures whose nearest training picture is closer than each limit


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """Classification on one labelled set."""

    name: str
    shift: str  # its shift, or nothing
    classes: int  # number of classes
    items: dict[str, int]  # number of pictures on each side
    chance: dict[int, float]  # top-k accuracy of guessing
    majority: float  # top-1 accuracy of the class that is most frequent in training
    knn: dict[int, float]  # top-k accuracy of the nearest training pictures' votes


def retrieval(
    records: Sequence[Record], thumbnails: np.ndarray, ranges: dict[str, tuple[int, int]]
) -> list[RetrievalRow]:
    """Score guessing and raw pixels on the retrieval of held-out concepts, in trained sets and shifts."""
    start, stop = ranges["train"]
    texts = [record.caption for record in records[start:stop]]
    blocks = [b for b in ("validation", "test", *(f"{shift}/test" for shift in SHIFTS)) if b in ranges]
    chosen = {b: [r for r in records[slice(*ranges[b])] if r.retrieval] for b in blocks}
    queries = np.array([r.index for b in blocks for r in chosen[b]])
    distances, neighbours = pixel_knn.nearest(thumbnails[start:stop], thumbnails[queries])
    rms = distances[:, 0] / np.sqrt(THUMBNAIL * THUMBNAIL * 3)
    rows, at = [], 0
    for block in blocks:
        items = chosen[block]
        part = slice(at, at + len(items))
        at += len(items)
        captions = [caption for record in items for caption in record.captions]
        image_of = torch.tensor([i for i, record in enumerate(items) for _ in record.captions])
        scores = pixel_knn.caption_scores(neighbours[part], texts, captions)
        right = image_of == torch.arange(len(items)).unsqueeze(1)
        rows.append(
            RetrievalRow(
                block=block,
                images=len(items),
                captions=len(captions),
                chance=metrics.retrieval_chance(len(items), image_of),
                knn={
                    "image_to_text": metrics.recall_at_k(scores, right=right),
                    "text_to_image": metrics.recall_at_k(scores.T, right=right.T),
                },
                alike={limit: 100 * float((rms[part] < limit).mean()) for limit in ALIKE_LIMITS},
            )
        )
    return rows


def classification(labelled: Sequence[Labelled], thumbnails: np.ndarray) -> list[ClassRow]:
    """Score guessing and raw pixels on the held-out concepts of the labelled sets."""
    rows = []
    for one in labelled:
        train, test = (np.array(one.label[side]) for side in ("train", "test"))
        votes = pixel_knn.class_scores(
            thumbnails[one.index["train"]], train, thumbnails[one.index["test"]], np.arange(len(one.classes))
        )
        most = Counter(train.tolist()).most_common(1)[0][0]
        rows.append(
            ClassRow(
                name=one.name,
                shift=one.shift,
                classes=len(one.classes),
                items={side: len(index) for side, index in one.index.items()},
                chance=metrics.chance(len(one.classes), metrics.CLASS_KS),
                majority=100 * float((test == most).mean()),
                knn=metrics.accuracy_at_k(votes, torch.from_numpy(test)),
            )
        )
    return rows
