"""RankCLIP's terms, ranked by lists of ids that come with the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankloss
from rankloss import graded
from rankloss.distributed import gather_once
from rankloss.losses import Base, base_entries, combined
from rankloss.precision import arithmetic_dtype, nan_unless_finite, outside_graphs, product
from rankloss_trainers.orders.folder import ARGUMENTS

_TAKEN = {"top_k", "chunk_size", "memory_budget"}  # of the rank options, the latter two by the base


class OrderedRankClipLoss(rankloss.RankClipLoss):
    r"""RankCLIP's loss with the lists of a search engine, a reranker or a person as rankings.

    Picture i of the batch has a list ℓ(i) of other pictures with grades. The item of pair i in either
    modality ranks those of the batch: its own pair first, then the listed ones by their grades, equal grades
    tied; all others stand below and are not counted. With S, R, I and X as in :class:`rankloss.RankClipLoss`
    and C(· | ℓ) the mean over the lists of their Plackett–Luce NLL per counted item,

        cross = ½[C(S | ℓ) + C(R | ℓ)],   in = ½[C(I | ℓ) + C(X | ℓ)],

    the own pair being left out of ``in``, where a list without a listed item in the batch counts nothing.
    The N·n scores of a term's matrix are held at once.

    Args:
        base: As of :class:`rankloss.RankClipLoss`.
        **options: Likewise ``schedule``, ``lambda_cross``, ``lambda_in``, ``normalizer``, ``top_k`` and
            ``gather``.

    Shapes:
        As :class:`rankloss.RankClipLoss`, and ``order_pictures``, ``[N]``, integers, the number of each row's
        picture; ``order_listed``, ``[N, K]``, those of its list, negative where there is none;
        ``order_grades``, ``[N, K]``. :meth:`rankloss_trainers.orders.Orders.take` has them.

    Raises:
        ValueError: for an option that the lists have no use for; and as :class:`rankloss.RankClipLoss`.

    Example:
        >>> v = torch.eye(3)
        >>> loss = OrderedRankClipLoss(schedule="constant", lambda_in=0.0)
        >>> lists = {"order_pictures": torch.arange(3), "order_grades": torch.ones(3, 1)}
        >>> lists["order_listed"] = torch.tensor([[1], [2], [-1]])
        >>> sorted(loss(v, v, 10.0, output_dict=True, **lists))
        ['contrastive_loss', 'cross_modal_loss', 'in_modal_loss']
    """

    def __init__(self, base: Base | None = None, **options: Any) -> None:
        super().__init__(base, **options)
        others = sorted(self.consistency.options.changed.keys() - _TAKEN)
        if others:
            raise ValueError(f"{others[0]} has no effect on lists of ids; got {options[others[0]]!r}")

    @outside_graphs
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        order_pictures: Tensor | None = None,
        order_listed: Tensor | None = None,
        order_grades: Tensor | None = None,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands; ``base_inputs`` are the base's."""
        inputs = image_features, text_features, logit_scale, logit_bias
        weights, gather = self.rank_weights, self.consistency.gather
        self.consistency.check_inputs(*inputs, one_space=bool(weights["cross_modal"]))
        n, dtype, found = len(image_features), arithmetic_dtype(image_features, text_features), {}
        pictures, listed, grades = _checked_lists(n, order_pictures, order_listed, order_grades)
        with gather_once():
            entries = base_entries(self.base, *inputs, **base_inputs)
            both = anchors = [x.to(dtype) for x in gather(image_features, text_features)]
            everyone = gather.items(pictures, are_anchors=False)
            own = torch.arange(len(everyone), device=everyone.device)[:, None]
            if gather.anchors_are_local:
                anchors = [image_features.to(dtype), text_features.to(dtype)]
                own = own[gather.first_row(n) :][:n]
            else:
                listed, grades = gather.items(listed), gather.items(grades)
            lists = own, *_places(everyone, listed), grades
            for name, items in (("cross_modal", both[::-1]), ("in_modal", both)):
                total = both[0].new_zeros(())
                for queries, others in zip(anchors, items, strict=True) if weights[name] else ():
                    scores = product((queries * logit_scale).to(dtype), others.T)
                    values, terms = self._of_lists(scores, *lists, with_own=name == "cross_modal")
                    total = total + self._mean(values, terms) / 2
                total = nan_unless_finite(total, image_features, text_features).to(dtype)
                found[f"{name}_loss"] = weights[name] * total
        return combined(entries, found, output_dict)

    def _of_lists(
        self, scores: Tensor, own: Tensor, place: Tensor, is_there: Tensor, grades: Tensor, *, with_own: bool
    ) -> tuple[Tensor, Tensor]:
        """The value of each list, and the number of its counted items."""
        grades = grades.to(torch.float32 if scores.device.type == "mps" else torch.float64)
        is_rest = torch.ones_like(scores, dtype=torch.bool).scatter(1, own, False)
        # Places that hold nothing repeat the own one, and have the grade of padding.
        place, grades = place.where(is_there, own), grades.masked_fill(~is_there, torch.inf)
        is_rest = is_rest.scatter(1, place, False)
        if with_own:
            # Only the order counts: above all, also above −∞ and numbers to which 1 adds nothing.
            best = 2 * grades.masked_fill(~is_there, 0.0).amax(1, keepdim=True).clamp_min(0.0) + 1
            place, grades = torch.cat([own, place], 1), torch.cat([best, grades], 1)
        x, rest = scores.gather(1, place).to(grades.dtype), scores.masked_fill(~is_rest, -torch.inf)
        return graded.plackett_luce(x, grades, rest, top_k=self.consistency.options.top_k)

    def _mean(self, values: Tensor, terms: Tensor) -> Tensor:
        """The mean over the lists that count, those of all processes."""
        gather, count = self.consistency.gather, (terms > 0).sum()
        total = (values / terms.clamp_min(1)).sum()
        if gather.anchors_are_local:
            count, total = gather.items(count[None]).sum(), total * gather.place[1]
        return total / count.clamp_min(1)


def log_orders(criterion: nn.Module, _: Any, __: int, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Entries to log beside the terms: λ, and the fraction of the listed pictures that are in the batch."""
    loss = next(x for x in criterion.modules() if isinstance(x, OrderedRankClipLoss))
    listed = inputs["order_listed"]
    everyone = loss.consistency.gather.items(inputs["order_pictures"], are_anchors=False)
    is_listed, is_there = listed >= 0, _places(everyone, listed)[1]
    return {
        "rank_lambda": torch.full((), loss.schedule_value, device=listed.device),
        "listed_in_batch": (is_there & is_listed).sum() / is_listed.sum().clamp_min(1),
    }


def _checked_lists(n: int, *lists: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three arguments.

    Raises:
        ValueError: One is missing, or of another shape.
    """
    pictures, listed, grades = lists
    if pictures is None or listed is None or grades is None:
        raise ValueError(
            f"ranking by orders needs {', '.join(ARGUMENTS)} of each pair; "
            "rankloss_trainers.orders.bind adds them to a dataset"
        )
    if pictures.shape != (n,) or listed.shape[:-1] != (n,) or grades.shape != listed.shape:
        shapes = [tuple(x.shape) for x in (pictures, listed, grades)]
        raise ValueError(f"{', '.join(ARGUMENTS)} must be [N] = ({n},), [N, K] and [N, K]; got {shapes}")
    return pictures, listed, grades


def _places(everyone: Tensor, listed: Tensor) -> tuple[Tensor, Tensor]:
    """The column of each listed picture in the batch, the first of several, and whether it has one."""
    ordered, order = everyone.sort(stable=True)
    found = torch.searchsorted(ordered, listed).clamp_max(len(ordered) - 1)
    return order[found], ordered[found] == listed
