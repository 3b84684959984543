"""Two heads trained by CLIP's loss, with or without the batch's ordered ids, in batches drawn in two ways."""

from __future__ import annotations

import dataclasses
import math

import torch
from examples_common.optimization import parameter_groups
from photostudy import heads, losses
from photostudy.features import Side
from photostudy.heads import Heads
from torch import Tensor

import rankloss

from .task import Part


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that determines a training, beside its data."""

    arm: str
    seed: int
    side: str  # "choice" or "test"
    epochs: int
    batch_size: int
    lr: float = 1e-3
    label_smoothing: float = 0.2
    weight: float = 0.0  # of the orders' terms
    in_modal: bool = False  # pictures rank pictures, and captions captions, too
    neighbours: int = 0  # listed ids that follow a seed into its batch; 0 draws random batches


class OrdersLoss(torch.nn.Module):
    """In-batch ranking by ordered ids.

    Every picture ranks the batch's captions, and every caption its pictures: its own pair above all, then
    the listed pairs of the batch in their order, all others below and uncounted. The value is the mean of
    both directions. With ``in_modal`` that of pictures ranking pictures and captions ranking captions is
    added.
    """

    def __init__(self, *, in_modal: bool) -> None:
        super().__init__()
        self.in_modal = in_modal
        # The listed pairs are a list's candidates; its negatives are the rest of the batch.
        self.lists = rankloss.RankedLists(in_batch_negatives=True)

    def forward(self, v: Tensor, t: Tensor, places: Tensor, scale: Tensor) -> Tensor:
        """Return the loss of unit-norm features, ``[N, D]`` each.

        ``places``, ``[N, K]``, has each listed pair's row in the batch, −1 where it is not there.
        """
        rows = torch.arange(len(v))
        index = torch.cat([rows[:, None], places], dim=1)
        grades = torch.arange(index.shape[1], 0, -1).expand(index.shape)
        ways = [(v, t), (t, v), *([(v, v), (t, t)] if self.in_modal else [])]
        return sum(
            self.lists(
                queries,
                candidates,
                grades,
                scale,
                candidate_index=index,
                candidate_ids=rows,
                mask=index >= 0,
            )
            for queries, candidates in ways
        ) / 2  # fmt: skip


def with_neighbours(permutation: Tensor, orders: Tensor, neighbours: int) -> Tensor:
    """Return the permutation with listed ids drawn forward.

    Each seed is followed by the best of its listed ids that are not drawn yet, so many at most.
    """
    lists, drawn = orders.tolist(), dict[int, None]()
    for seed in permutation.tolist():
        if seed not in drawn:
            drawn[seed] = None
            drawn.update(dict.fromkeys([one for one in lists[seed] if one not in drawn][:neighbours]))
    return torch.tensor(list(drawn))


def train(setting: Setting, part: Part) -> tuple[Heads, float]:
    """Train two heads, and return them in evaluation mode; and the share of listed ids in the list's batch.

    A seed gives every arm the same initial weights and permutations. Without orders and neighbours the
    training is that of :func:`photostudy.heads.train`.
    """
    pairs, orders = part.pairs, part.orders
    steps = len(pairs.pictures) // setting.batch_size
    torch.manual_seed(setting.seed)
    drawing = torch.Generator().manual_seed(setting.seed)
    start = heads.Setting("clip", setting.seed, setting.side)
    model = Heads(pairs, start).train()
    contrast = losses.build("clip", label_smoothing=setting.label_smoothing)
    ranking = OrdersLoss(in_modal=setting.in_modal)
    groups = parameter_groups(model.parameters(), start.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=setting.lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs * steps)
    place = torch.full((len(orders),), -1)
    together = 0
    for _ in range(setting.epochs):
        order = torch.randperm(len(orders), generator=drawing)
        if setting.neighbours:
            order = with_neighbours(order, orders, setting.neighbours)
        for rows in order.split(setting.batch_size)[:steps]:
            place.fill_(-1)[rows] = torch.arange(len(rows))
            places = place[orders[rows]]
            together += int((places >= 0).sum())
            v, t = _features(model, pairs, rows, drawing)
            scale = model.log_scale.exp()
            value = contrast(v, t, logit_scale=scale)
            if setting.weight:
                value = value + setting.weight * ranking(v, t, places, scale)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            decay.step()
            with torch.no_grad():
                model.log_scale.clamp_(0.0, math.log(start.scale_ceiling))
    listed = setting.epochs * steps * setting.batch_size * orders.shape[1]
    return model.eval(), together / listed


def _features(model: Heads, pairs: Side, rows: Tensor, drawing: torch.Generator) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(pairs.sentences.shape[1], rows.shape, generator=drawing)
    return model.pictures(pairs.pictures[rows]), model.sentences(pairs.sentences[rows, drawn])
