"""Pairs to train on with their ordered ids, and measures of other pictures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from liststudy import emojis
from liststudy.task import Measured
from photostudy.features import Cache, Encoders, Side, standardised
from photostudy.folder import Photographs
from photostudy.heads import Heads
from photostudy.measure import BOTH_WAYS
from photostudy.measure import measure as measure_photographs
from torch import Tensor
from torch.nn.functional import normalize

LISTED = 10  # ids of a list


def search(captions: Tensor, listed: int = LISTED) -> Tensor:
    """Return every pair's list of ids, ``[N, listed]``, best first, as a search engine over captions does.

    Listed are the other pairs whose captions, ``[N, S, D]``, have the mean with the largest cosine.
    """
    mean = normalize(normalize(captions, dim=-1).mean(1), dim=-1)
    return (mean @ mean.T).fill_diagonal_(-torch.inf).topk(listed).indices


@dataclasses.dataclass(frozen=True)
class Part:
    """A division of a task's data."""

    pairs: Side  # to train on
    orders: Tensor  # [N, K]: ids of other pairs, best first
    measure: Callable[[Heads], Measured]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set's divisions: one to choose settings on, and the test."""

    parts: dict[str, Part]  # "choice", "test"
    data: str  # fingerprint of all that the divisions hold
    items: dict[str, int]  # sizes


def of_photographs(photographs: Photographs, cache: Cache, train_pictures: int) -> Task:
    """Return the task of Flickr8k, whose features are there: settings are chosen on the dev split."""
    names = photographs.used(train_pictures)
    sides = standardised({side: cache.side(of) for side, of in names.items()})
    orders = search(sides["train"].sentences)

    def part(side: str) -> Part:
        judgements = photographs.judgements if side == "test" else None

        def measure(model: Heads) -> Measured:
            found = measure_photographs(model, sides[side], names[side], judgements)
            return {"R@10": found["retrieval"][BOTH_WAYS], **found.get("people", {})}

        return Part(sides["train"], orders, measure)

    blocks = [path.stem for of in names.values() for path in cache.blocks(of)]
    content = "\n".join([*blocks, *map(str, photographs.judgements)])
    return Task(
        {"choice": part("dev"), "test": part("test")},
        hashlib.sha256(content.encode()).hexdigest()[:16],
        {side: len(of) for side, of in names.items()},
    )


def of_emojis(folder: Path, encoders: Encoders, limit: int | None = None) -> Task:
    """Return the task of all emojis, or of the first so many, with the divisions of the lists' example."""
    graded = emojis.task(folder, encoders, limit)
    parts = {"choice": graded.choice, "test": graded.tests[0]}
    return Task(
        {side: Part(of.pairs, search(of.pairs.sentences), of.measure) for side, of in parts.items()},
        graded.data,
        graded.items,
    )
