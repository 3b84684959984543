"""Scores guessing and raw pixels, the baselines of every trained model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from clip_evaluation import metrics, pixel_knn

from .draw import THUMBNAIL
from .labels import Labelled
from .records import Record
from .split import SHIFTS

ALIKE_LIMITS = (8, 16)
Row = dict[str, Any]


def retrieval(
    records: Sequence[Record], thumbnails: np.ndarray, ranges: dict[str, tuple[int, int]]
) -> list[Row]:
    """Score guessing and raw pixels on the retrieval of held-out concepts, in trained sets and shifts.

    ``alike`` is the share of the pictures whose nearest training picture is closer than each limit.
    """
    start, stop = ranges["train"]
    texts = [record.caption for record in records[start:stop]]
    blocks = [b for b in ("validation", "test", *(f"{shift}/test" for shift in SHIFTS)) if b in ranges]
    rows = []
    for block in blocks:
        items = [record for record in records[slice(*ranges[block])] if record.retrieval]
        queries = thumbnails[[record.index for record in items]]
        distances, neighbours = pixel_knn.nearest(thumbnails[start:stop], queries)
        rms = distances[:, 0] / np.sqrt(THUMBNAIL * THUMBNAIL * 3)
        captions = [caption for record in items for caption in record.captions]
        image_of = torch.tensor([i for i, record in enumerate(items) for _ in record.captions])
        scores = pixel_knn.caption_scores(neighbours, texts, captions)
        rows.append(
            Row(
                block=block,
                images=len(items),
                captions=len(captions),
                chance=metrics.retrieval_chance(len(items), image_of),
                knn=metrics.recall(scores, image_of),
                alike={limit: 100 * float((rms < limit).mean()) for limit in ALIKE_LIMITS},
            )
        )
    return rows


def classification(labelled: Sequence[Labelled], thumbnails: np.ndarray) -> list[Row]:
    """Score guessing and raw pixels on the held-out concepts of the labelled sets.

    ``majority`` is top-1 of the class that is most frequent in training.
    """
    rows = []
    for one in labelled:
        train, test = (np.array(one.label[side]) for side in ("train", "test"))
        votes = pixel_knn.class_scores(
            thumbnails[one.index["train"]], train, thumbnails[one.index["test"]], np.arange(len(one.classes))
        )
        most = Counter(train.tolist()).most_common(1)[0][0]
        rows.append(
            Row(
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
