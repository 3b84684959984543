"""Two heads trained by CLIP's loss, and then by a loss of graded lists, alone or beside CLIP's."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch

from studies.photographs import heads, losses
from studies.photographs.features import Side
from studies.photographs.heads import Heads

from . import losses as listwise
from .task import Part

CLIP = "clip"
SMOOTHING = 0.1  # of CLIP's loss, at the start and beside lists
PAIRS = 250  # of a batch of CLIP's loss


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str  # "clip", a name of losses.OPTIONS, or such a name + " beside clip"
    seed: int
    side: str  # "choice" or "test"
    option: str  # of losses.OPTIONS; of "clip" its label smoothing
    lr: float
    weight: float = 1.0  # of the lists' term beside CLIP's
    epochs: int = 3
    lists: int = 200  # of a batch
    start_epochs: int = 15


def start(pairs: Side, seed: int, epochs: int) -> Heads:
    """Return heads trained by CLIP's loss."""
    pictures = len(pairs.pictures)
    setting = heads.Setting(
        CLIP,
        seed,
        "train",
        epochs=epochs,
        label_smoothing=SMOOTHING,
        batch_size=min(2 * PAIRS, pictures // 8),
        train_pictures=pictures,
    )
    return heads.train(setting, pairs)


def train(setting: Setting, part: Part, started: Heads) -> Heads:
    """Train heads further, and return them in evaluation mode.

    A seed gives every arm the same batches of lists and of pairs. Every arm makes as many steps.
    """
    torch.manual_seed(setting.seed)
    of_lists, of_pairs = (torch.Generator().manual_seed(setting.seed) for _ in range(2))
    model = copy.deepcopy(started).train()
    name, beside, _ = setting.arm.partition(f" beside {CLIP}")
    ranked = None if name == CLIP else listwise.build(name, setting.option)
    smoothing = SMOOTHING if ranked is not None else float(setting.option)
    contrast = losses.build(CLIP, label_smoothing=smoothing) if beside or ranked is None else None
    parameters = [*model.parameters(), *(() if ranked is None else ranked.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=setting.lr, weight_decay=0.0, fused=True)
    steps = len(part.lists.pictures) // setting.lists
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs * steps)
    for _ in range(setting.epochs):
        order = torch.randperm(len(part.lists.pictures), generator=of_lists)
        for rows in order.split(setting.lists)[:steps]:
            value = torch.zeros(())
            scale = model.log_scale.exp()
            if ranked is not None:
                lists = part.lists[rows]
                needed, index = lists.index.unique(return_inverse=True)
                v = model.pictures(lists.pictures)
                t = model.sentences(part.candidates[needed])
                places = {"candidate_index": index, "mask": lists.mask}
                value = setting.weight * ranked(v, t, lists.grades, scale, **places)
            if contrast is not None:
                drawn = torch.randperm(len(part.pairs.pictures), generator=of_pairs)[:PAIRS]
                which = torch.randint(part.pairs.sentences.shape[1], drawn.shape, generator=of_pairs)
                v = model.pictures(part.pairs.pictures[drawn])
                t = model.sentences(part.pairs.sentences[drawn, which])
                value = value + contrast(v, t, logit_scale=scale)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            decay.step()
            with torch.no_grad():
                model.log_scale.clamp_(0.0, math.log(100.0))
    return model.eval()
