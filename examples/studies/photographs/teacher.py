"""The teacher: an ensemble of wider heads, trained once, and the lists that a user may have of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from studies.distillation import principal_components
from studies.training import kept

from . import heads
from .features import CACHE, Side
from .frozen import Frozen
from .heads import Heads, Setting

TIMES = 2  # the width of the students' heads
KEPT = 1024  # principal components
LISTED, HARD = 10, 20  # ids of either way; sentences of a reranker
_ROWS = 500  # pictures whose similarities are held at once


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Unit-norm features in the coordinates of their principal components, and lists of the train side."""

    sides: Mapping[str, Side]
    ids: Tensor  # [N, 20] of pictures: those of a picture's ten best captions, and of its captions' ten best
    grades: Tensor  # [N, 20]: 10 for a best id, 1 for a tenth; an id of both ways has its better one once
    hard: Tensor  # [N, 20], numbers of sentences, five of each picture: a weak model's best wrong ones
    hard_scores: Tensor  # [N, 20], the teacher's cosines of these
    span: tuple[float, float]  # the smallest and the largest cosine of a picture and a sentence


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """The trainings of a teacher."""

    base: Mapping[str, Any]  # changes of a setting
    seeds: Sequence[int]
    weak_seed: int  # of the model by which sentences are hard

    def name(self, data: str) -> str:
        """Return a hash of all that the teacher depends on."""
        return _hash(self.base, self.seeds, self.weak_seed, TIMES, KEPT, LISTED, HARD, data)

    def of(self, data: Frozen) -> Teacher:
        """Return the teacher, whose heads are trained if their files are not there."""
        folder = data.photographs.folder / CACHE

        def head(seed: int, times: int) -> Heads:
            setting = Setting("clip", seed, "train", **self.base)
            path = folder / f"head-{_hash(dataclasses.asdict(setting), times, data.fingerprint)}.pt"
            state = kept(path, lambda: heads.train(setting, data.sides["train"], times=times).state_dict())
            found = Heads(data.sides["train"], setting, times=times)
            found.load_state_dict(state)
            return found.eval()

        def made() -> dict[str, Any]:
            wide = [head(seed, TIMES) for seed in self.seeds]
            sides = reduced({name: seen_by(wide, side) for name, side in data.sides.items()}, KEPT)
            weak = seen_by([head(self.weak_seed, 1)], data.sides["train"])
            return dataclasses.asdict(Teacher(sides, **lists(sides["train"], weak)))

        found = kept(folder / f"teacher-{self.name(data.fingerprint)}.pt", made)
        return Teacher(**{**found, "sides": {name: Side(**of) for name, of in found["sides"].items()}})


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()[:16]


@torch.inference_mode()
def seen_by(models: Sequence[Heads], side: Side) -> Side:
    """Return the models' unit-norm features beside each other, with unit norm."""

    def beside(of: Callable[[Heads], Tensor]) -> Tensor:
        return torch.cat([of(one) for one in models], -1) / len(models) ** 0.5

    return Side(
        beside(lambda one: one.pictures(side.pictures)), beside(lambda one: one.sentences(side.sentences))
    )


def reduced(sides: Mapping[str, Side], width: int) -> dict[str, Side]:
    """Return unit-norm features on the first principal components of the train side.

    Every sentence and its picture count once, and both share the components. A narrower teacher keeps its
    width.
    """
    train = sides["train"]
    pictures = train.pictures * train.sentences.shape[1] ** 0.5
    width = min(width, pictures.shape[1])
    both = (x.numpy() for x in (pictures, train.sentences.flatten(0, 1)))
    components = torch.from_numpy(principal_components(*both, width)).float()
    return {
        name: Side(*(normalize(x @ components, dim=-1) for x in (side.pictures, side.sentences)))
        for name, side in sides.items()
    }


def lists(teacher: Side, weak: Side) -> dict[str, Any]:
    """Return the lists of :class:`Teacher`, from the train side's features."""
    n, each = teacher.sentences.shape[:2]
    of_ids, hard, ends = teacher.pictures.new_empty(n, n), [], []
    for rows in torch.arange(n).split(_ROWS):
        own = torch.arange(n) == rows[:, None]
        scores = teacher.pictures[rows] @ teacher.sentences.flatten(0, 1).T
        ends += [scores.min(), scores.max()]
        of_ids[rows] = scores.unflatten(1, (n, each)).amax(2).masked_fill(own, -torch.inf)
        seen = (weak.pictures[rows] @ weak.sentences.flatten(0, 1).T).unflatten(1, (n, each))
        hard.append(seen.masked_fill(own[:, :, None], -torch.inf).flatten(1).topk(HARD).indices)
    chosen = torch.cat(hard)
    hard_scores = torch.einsum("nd,nkd->nk", teacher.pictures, teacher.sentences.flatten(0, 1)[chosen])
    ids, grades = merged(of_ids.topk(LISTED).indices, of_ids.T.topk(LISTED).indices)
    span = min(ends).item(), max(ends).item()
    return {"ids": ids, "grades": grades, "hard": chosen, "hard_scores": hard_scores, "span": span}


def merged(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two lists of ids, best first, as one, ``[N, 2K]``, with its grades.

    An id of both has its better grade once; its other place holds −1.

    Example:
        >>> merged(torch.tensor([[5, 7]]), torch.tensor([[7, 8]]))
        (tensor([[ 5, -1,  7,  8]]), tensor([[2, 1, 2, 1]]))
    """
    grades = torch.arange(first.shape[1], 0, -1).expand_as(first)
    same = first[:, :, None] == second[:, None, :]
    ahead = grades[:, :, None] >= grades[:, None, :]
    first = first.masked_fill((same & ~ahead).any(2), -1)
    second = second.masked_fill((same & ahead).any(1), -1)
    return torch.cat([first, second], 1), torch.cat([grades, grades], 1)
