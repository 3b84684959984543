"""Emojis' captions graded by a rule: a picture's own, then those of its sub-group, then related ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from openmoji_demo.data import (
    Emoji,
    draw,
    held_out_caption,
    load_emojis,
    read_svg,
    split_by_concept,
    train_captions,
)

from rankloss.metrics import kendall_tau, ndcg
from studies.photographs.features import Encoders, Side, save, standardised
from studies.photographs.heads import Heads

from .photographs import recall_of
from .task import Lists, Measured, Part, Task

OWN, SUBGROUP, RELATED, OTHER = 3, 2, 1, 0
DRAWN = {SUBGROUP: 8, RELATED: 8, OTHER: 15}  # candidates of a list to train on, beside its own


def grade(query: Emoji, candidate: Emoji) -> int:
    """Return the rule's grade.

    3 for the emoji itself; 2 in its sub-group of Unicode; 1 in its group, or with a common keyword; else 0.
    """
    if query.hexcode == candidate.hexcode:
        return OWN
    if query.subgroup == candidate.subgroup:
        return SUBGROUP
    return (
        RELATED if query.group == candidate.group or not set(query.tags).isdisjoint(candidate.tags) else OTHER
    )


def listed(query: Emoji, emojis: Sequence[Emoji]) -> list[tuple[Emoji, int]]:
    """Return a list to train on: the emoji's own caption, and others drawn by their grades."""
    rng = random.Random(f"list/{query.hexcode}")
    grades = [(one, grade(query, one)) for one in emojis]
    found = [pair for pair in grades if pair[1] == OWN]
    for level, count in DRAWN.items():
        of = [pair for pair in grades if pair[1] == level]
        found += rng.sample(of, min(count, len(of)))
    return found


def features(folder: Path, emojis: Sequence[Emoji], encoders: Encoders) -> dict[str, np.ndarray]:
    """Return features of drawings, of captions to train on and to search by; a folder keeps them."""
    texts = {
        "captions": [text for one in emojis for text in train_captions(one)],
        "searched": [held_out_caption(one) for one in emojis],
    }
    drawings = [read_svg(one.hexcode) for one in emojis]
    content = "\n".join([encoders.name, *drawings, *texts["captions"], *texts["searched"]])
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        found = {name: encoders.sentences(of) for name, of in texts.items()}
        found["pictures"] = encoders.pictures([draw(svg) for svg in drawings])
        save(path, **found)
    with np.load(path) as kept:
        return {**kept, "data": np.array(path.stem)}


def task(folder: Path, encoders: Encoders, limit: int | None = None) -> Task:
    """Return the task of all emojis, or of the first so many; missing features are computed."""
    emojis = load_emojis()[:limit]
    found = features(folder, emojis, encoders)
    pictures, captions, searched = (
        torch.from_numpy(found[name]).float() for name in ("pictures", "captions", "searched")
    )
    captions = captions.unflatten(0, (len(emojis), -1))
    row = {one: number for number, one in enumerate(emojis)}

    def side(of: Sequence[Emoji]) -> Side:
        rows = [row[one] for one in of]
        return Side(pictures[rows], captions[rows])

    def part(train: Sequence[Emoji], test: Sequence[Emoji]) -> Part:
        sides = standardised({"train": side(train), "test": side(test)})
        lists = [[(row[other], level / OWN) for other, level in listed(one, train)] for one in train]
        grades = torch.tensor([[grade(one, other) / OWN for other in test] for one in test])
        names = Side(sides["test"].pictures, searched[[row[one] for one in test]].unsqueeze(1))

        @torch.inference_mode()
        def measure(model: Heads) -> Measured:
            scores = model.pictures(names.pictures) @ model.sentences(names.sentences[:, 0]).T
            return {
                "nDCG@10": 100 * ndcg(scores, grades, k=10).mean().item(),
                "τ_b": 100 * kendall_tau(scores, grades).mean().item(),
                "R@10": recall_of(model, names),
            }

        return Part(sides["train"], searched, Lists.of(sides["train"].pictures, lists), measure)

    test = split_by_concept(emojis)
    choice = split_by_concept(test.train, 1)
    return Task(
        part(choice.train, choice.test),
        (part(test.train, test.test),),
        str(found["data"]),
        {"train": len(test.train), "test": len(test.test), "choice": len(choice.test)},
    )
