"""Heads trained by CLIP's loss, then by a loss of graded lists, with or without a frozen model's scores."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rankloss import RankedLists
from studies.lists.task import Part
from studies.lists.train import CLIP, PAIRS, SMOOTHING
from studies.photographs import losses
from studies.photographs.heads import Heads

REFERENCE, BESIDE = " − reference", f" beside {CLIP}"
_CEILING = 100.0

Term = Callable[[Heads, Part, Tensor], Tensor]  # of a model, a part and the numbers of its lists


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data and the plan's budget."""

    arm: str  # CLIP, or a loss of lists, + REFERENCE, + BESIDE
    seed: int
    side: str  # "choice" or "test"
    lr: float
    worth: float = 1.0  # multiplies scores, those of the reference too
    weight: float = 1.0  # of the lists' term beside CLIP's


def changed(model: str, grades: Tensor) -> Tensor:
    """Return the grades as a model takes them: for Plackett–Luce those of 0 are unranked."""
    return grades.masked_fill(grades == 0, -math.inf) if model == "plackett_luce" else grades


def train(
    setting: Setting, part: Part, started: Heads, term: Term | None, *, epochs: int, size: int
) -> Heads:
    """Train heads further, and return them in evaluation mode.

    A seed gives every arm the same batches of lists and of pairs. Every arm makes as many steps.

    Args:
        setting: All that determines the training, beside the other arguments.
        part: The lists and pairs.
        started: The heads that every arm of a seed starts from.
        term: Of lists; None: CLIP's loss alone.
        epochs: Of the lists.
        size: Lists of a batch.
    """
    torch.manual_seed(setting.seed)
    of_lists, of_pairs = (torch.Generator().manual_seed(setting.seed) for _ in range(2))
    model = copy.deepcopy(started).train()
    has_clip = term is None or setting.arm.endswith(BESIDE)
    contrast = losses.build(CLIP, label_smoothing=SMOOTHING) if has_clip else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.0, fused=True)
    steps = len(part.lists.pictures) // size
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(part.lists.pictures), generator=of_lists)
        for rows in order.split(size)[:steps]:
            value = torch.zeros(())
            if term is not None:
                value = setting.weight * term(model, part, rows)
            if contrast is not None:
                drawn = torch.randperm(len(part.pairs.pictures), generator=of_pairs)[:PAIRS]
                which = torch.randint(part.pairs.sentences.shape[1], drawn.shape, generator=of_pairs)
                v = model.pictures(part.pairs.pictures[drawn])
                t = model.sentences(part.pairs.sentences[drawn, which])
                value = value + contrast(v, t, logit_scale=model.log_scale.exp())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            decay.step()
            with torch.no_grad():
                model.log_scale.clamp_(0.0, math.log(_CEILING))
    return model.eval()


def of_lists(setting: Setting, loss: RankedLists, started: Heads) -> Term:
    """Return the term of an arm's lists; its reference is the start, without dropout."""
    model, _, _ = setting.arm.partition(" ")
    has_reference = REFERENCE in setting.arm

    def term(heads: Heads, part: Part, rows: Tensor) -> Tensor:
        lists = part.lists[rows]
        needed, index = lists.index.unique(return_inverse=True)
        given = {"candidate_index": index, "mask": lists.mask}
        if has_reference:
            with torch.no_grad():
                v, t = started.pictures(lists.pictures), started.sentences(part.candidates[needed])
                scores = (started.log_scale.exp() * v @ t.T).gather(1, index)
            given["reference_scores"] = setting.worth * scores
        v, t = heads.pictures(lists.pictures), heads.sentences(part.candidates[needed])
        scale = setting.worth * heads.log_scale.exp()
        value: Tensor = loss(v, t, changed(model, lists.grades), scale, **given)
        return value

    return term
