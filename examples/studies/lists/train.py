"""Two heads trained by CLIP's loss, and then by a loss of graded lists, alone or beside CLIP's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from studies.photographs import heads, losses
from studies.photographs.features import Side
from studies.photographs.heads import Heads
from studies.training import Descent

from . import losses as listwise
from .task import Part

CLIP = "clip"
SMOOTHING = 0.1  # of CLIP's loss, at the start and beside lists
PAIRS = 250  # of a batch of CLIP's loss

Term = Callable[[Heads, Tensor, Tensor], Tensor]


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
    """Train heads further, and return them in evaluation mode."""
    name, beside, _ = setting.arm.partition(f" beside {CLIP}")
    ranked = None if name == CLIP else listwise.build(name, setting.option)
    smoothing = SMOOTHING if ranked is not None else float(setting.option)
    contrast = losses.build(CLIP, label_smoothing=smoothing) if beside or ranked is None else None

    def term(model: Heads, rows: Tensor, scale: Tensor) -> Tensor:
        v, t, grades, places = listed(model, part, rows)
        value: Tensor = setting.weight * ranked(v, t, grades, scale, **places)
        return value

    return further(
        setting, part, started, ranked and term, contrast, epochs=setting.epochs, size=setting.lists,
        learned=[] if ranked is None else [ranked],
    )  # fmt: skip


def listed(model: Heads, part: Part, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return features of some lists' pictures and candidates, the grades, and the candidates' places."""
    lists = part.lists[rows]
    needed, index = lists.index.unique(return_inverse=True)
    v, t = model.pictures(lists.pictures), model.sentences(part.candidates[needed])
    return v, t, lists.grades, {"candidate_index": index, "mask": lists.mask}


def further(
    setting: Any, part: Part, started: Heads, term: Term | None, contrast: nn.Module | None, *, epochs: int,
    size: int, learned: Iterable[nn.Module] = (),
) -> Heads:  # fmt: skip
    """Train heads further, and return them in evaluation mode.

    A seed gives every arm the same batches of lists and of pairs. Every arm makes as many steps.

    Args:
        setting: With a seed and a learning rate.
        part: The lists and pairs.
        started: The heads that every arm of a seed starts from.
        term: Of lists, from the heads, the lists' numbers and the scale; None: none.
        contrast: CLIP's loss; None: none.
        epochs: Of the lists.
        size: Lists of a batch.
        learned: What is trained beside the heads.
    """
    torch.manual_seed(setting.seed)
    of_lists, of_pairs = (torch.Generator().manual_seed(setting.seed) for _ in range(2))
    model = copy.deepcopy(started).train()
    each = len(part.lists.pictures) // size
    sizes = {"lr": setting.lr, "weight_decay": 0.0, "steps": epochs * each}
    descent = Descent(model.log_scale, [model, *learned], **sizes)
    for _ in range(epochs):
        order = torch.randperm(len(part.lists.pictures), generator=of_lists)
        for rows in order.split(size)[:each]:
            scale = model.log_scale.exp()
            value = torch.zeros(()) if term is None else term(model, rows, scale)
            if contrast is not None:
                drawn = torch.randperm(len(part.pairs.pictures), generator=of_pairs)[:PAIRS]
                which = torch.randint(part.pairs.sentences.shape[1], drawn.shape, generator=of_pairs)
                v = model.pictures(part.pairs.pictures[drawn])
                t = model.sentences(part.pairs.sentences[drawn, which])
                value = value + contrast(v, t, logit_scale=scale)
            descent.step(value)
    return model.eval()
