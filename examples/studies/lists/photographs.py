"""Flickr8k's crowd grades as lists of sentences for a picture; the experts' grades as the test."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Sequence

import torch
from openmoji_demo.metrics import retrieval

from rankloss.metrics import ndcg
from studies.photographs.features import Cache, Side, standardised
from studies.photographs.folder import TEXTS, FolderError, Photographs
from studies.photographs.heads import Heads
from studies.photographs.measure import correlation_with_experts

from .task import Lists, Measured, Part, Task

CROWD = "CrowdFlowerAnnotations.txt"
MAX_DAMAGED = 100  # lines
FOLDS = 5
LONGEST = 40  # sentences of a list to train on
_CHOICE = 1 / 5  # of the graded pictures
_LINE = re.compile(rb"([\w.-]+\.jpg)\t([\w.-]+\.jpg)#([0-4])\t([\d.]+)\t(\d+)\t(\d+)")


@dataclasses.dataclass(frozen=True)
class Crowd:
    """The crowd's grades: the share of those who say that a sentence describes a picture."""

    lists: dict[str, list[tuple[tuple[str, int], float]]]  # by picture: sentences' keys, with their grades
    damaged: int  # lines that were left out


def read_crowd(photographs: Photographs) -> Crowd:
    """Read the crowd's grades.

    A line that is damaged is left out and counted: copies with some bytes overwritten are about.

    Raises:
        FolderError: If the file is missing or more than 100 lines are damaged.
    """
    path = photographs.folder / TEXTS / CROWD
    if not path.is_file():
        raise FolderError(path, "no such file")
    test = set(photographs.splits["test"])
    crowd = Crowd({}, 0)
    damaged = 0
    for line in path.read_bytes().rstrip().split(b"\n"):
        found = _LINE.fullmatch(line.rstrip())
        picture, name, number, share, yes, no = (x.decode() for x in found.groups()) if found else [""] * 6
        votes = int(yes or 0) + int(no or 0)
        if not {picture, name} <= test or not votes or abs(int(yes) / votes - float(share)) > 0.01:
            damaged += 1
            continue
        crowd.lists.setdefault(picture, []).append(((name, int(number)), int(yes) / votes))
    if damaged > MAX_DAMAGED:
        raise FolderError(path, f"{damaged:,} lines are damaged")
    return dataclasses.replace(crowd, damaged=damaged)


def folds(names: Sequence[str]) -> list[list[str]]:
    """Return the pictures on which settings are chosen, and then those of the five folds."""
    shuffled = random.Random("folds").sample(sorted(names), len(names))
    choice = round(_CHOICE * len(names))
    return [shuffled[:choice], *(shuffled[choice + i :: FOLDS] for i in range(FOLDS))]


def shortened(graded: Sequence[tuple[int, float]], longest: int) -> list[tuple[int, float]]:
    """Return a list with as many candidates of grade 0, drawn, as leave it no longer than that."""
    above = [one for one in graded if one[1] > 0]
    zeros = [one for one in graded if one[1] == 0]
    drawn = random.Random(str(graded)).sample(zeros, min(len(zeros), max(0, longest - len(above))))
    return above + drawn


def task(photographs: Photographs, cache: Cache, train_pictures: int) -> Task:
    """Return the task, whose features are there."""
    names = photographs.used(train_pictures)
    sides = standardised({side: cache.side(of) for side, of in names.items()})
    crowd = read_crowd(photographs)
    parts = folds(names["test"])
    test, row = sides["test"], {name: number for number, name in enumerate(names["test"])}
    keys = {one.sentence for one in photographs.judgements} | {
        key for of in crowd.lists.values() for key, _ in of
    }
    candidate = {key: number for number, key in enumerate(sorted(keys))}
    candidates = torch.stack([test.sentences[row[name], number] for name, number in candidate])

    def lists_of(pictures: Sequence[str], longest: int | None = None) -> Lists:
        of = [name for name in pictures if name in crowd.lists]
        lists = [[(candidate[key], grade) for key, grade in crowd.lists[name]] for name in of]
        if longest is not None:
            lists = [shortened(one, longest) for one in lists]
        return Lists.of(test.pictures[[row[name] for name in of]], lists)

    def part(held_out: int) -> Part:
        others = [name for i, of in enumerate(parts) for name in of if i != held_out]
        held = {name: number for number, name in enumerate(parts[held_out])}
        features = test.pictures[[row[name] for name in held]]
        judged = [one for one in photographs.judgements if one.picture in held]
        listed = [number for name, number in held.items() if name in crowd.lists]
        graded = lists_of(parts[held_out])

        @torch.inference_mode()
        def measure(model: Heads) -> Measured:
            similarity = model.pictures(features) @ model.sentences(candidates).T
            scores = {
                (one.picture, one.sentence): similarity[held[one.picture], candidate[one.sentence]].item()
                for one in judged
            }
            of_lists = similarity[listed].gather(1, graded.index)
            return {
                **correlation_with_experts(scores, judged),
                "crowd nDCG@10": 100 * ndcg(of_lists, graded.grades, k=10, mask=graded.mask).nanmean().item(),
                "R@10": recall_of(model, sides["dev"]),
            }

        return Part(sides["train"], candidates, lists_of(others, LONGEST), measure)

    blocks = [path.stem for of in names.values() for path in cache.blocks(of)]
    content = "\n".join([*blocks, *map(str, photographs.judgements), *map(str, crowd.lists.items())])
    return Task(
        part(0),
        tuple(part(1 + fold) for fold in range(FOLDS)),
        hashlib.sha256(content.encode()).hexdigest()[:16],
        {
            "lists": len(crowd.lists),
            "grades": sum(map(len, crowd.lists.values())),
            "damaged lines": crowd.damaged,
            "judgements": len(photographs.judgements),
        },
    )


def recall_of(model: Heads, side: Side) -> float:
    """Return R@10 of pictures and their first sentences, the mean of both directions."""
    v, t = model.pictures(side.pictures), model.sentences(side.sentences[:, 0])
    return sum(of[10] for of in retrieval(v, t, ks=(10,)).values()) / 2
