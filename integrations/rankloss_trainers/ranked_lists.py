"""The loss ``ranked-lists`` of the catalogue: graded candidates of each query, beside a loss of pairs."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather
from rankloss.losses import Base, base_entries, check_weight, combined
from rankloss.losses.ranked_lists import ListModel, PairWeight
from rankloss_trainers.candidates import Candidates
from rankloss_trainers.named import NamedLoss, option

OF_PAIRS: dict[str, Any] = {"base_loss": "exclude", "own_caption": "apart", "max_candidates": None}
"""The options about the pair that open_clip's trainer has beside each list; their values without pairs."""


class RankedListsTerm(nn.Module):
    r"""``L_base(pairs) + weight·L_lists(lists)``: :class:`rankloss.RankedLists` beside a loss of pairs.

    Args:
        lists: The loss of the lists.
        base: The loss of the batch's pairs; None for none.
        weight: The weight of the lists.

    Shapes:
        As :class:`rankloss.RankedLists`; further inputs are of the base. The result is a scalar, or with
        ``output_dict=True`` the base's entries and ``{"ranked_lists_loss": …}``.

    Raises:
        ValueError: for a weight that is negative or not finite; in ``forward`` without a base for inputs that
            only a base would use, and as the two losses.

    Example:
        >>> import torch
        >>> v, candidates = torch.eye(2), torch.eye(2).expand(2, 2, 2)
        >>> lists = dict(query_features=v, candidate_features=candidates, grades=torch.eye(2))
        >>> term = RankedListsTerm(rankloss.RankedLists(), weight=2.0)
        >>> round(term(1.0, **lists).item(), 4)  # 2·[log(e + 1) − 1]
        0.6265
    """

    def __init__(self, lists: rankloss.RankedLists, base: Base | None = None, *, weight: float = 1.0) -> None:
        super().__init__()
        self.base, self.lists = base, lists
        self.weight = check_weight("weight", weight)

    def forward(
        self,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        query_features: Tensor,
        candidate_features: Tensor,
        grades: Tensor,
        candidate_index: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        mask: Tensor | None = None,
        **pairs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands; ``pairs`` are the base's inputs."""
        if self.base is not None:
            entries = base_entries(self.base, logit_scale=logit_scale, logit_bias=logit_bias, **pairs)
        else:
            unused = pairs.keys() - {"image_features", "text_features"}
            if unused:
                raise ValueError(f"the lists alone (base_loss 'exclude') have no use for {', '.join(unused)}")
            entries = {}
            if logit_bias is not None:  # changes no list, but is a parameter of which DDP expects a gradient
                logit_scale = logit_scale + 0.0 * logit_bias
        loss = self.lists(
            query_features,
            candidate_features,
            grades,
            logit_scale,
            candidate_index=candidate_index,
            candidate_ids=candidate_ids,
            mask=mask,
        )
        return combined(entries, {"ranked_lists_loss": self.weight * loss}, output_dict)


# --- as it is named ---------------------------------------------------------------------------------------


class RankedListsBesidePairs(NamedLoss):
    """The trainer's own plus the likelihood of lists of graded candidates, which come with the data."""

    model: ListModel = option(
        "plackett_luce",
        "likelihood of a list: of its order (ListMLE), of its softmax (ListNet), of all its pairs, or of its "
        "pairs by their part in NDCG (LambdaLoss)",
    )
    top_k: int | None = option(
        None, "of model plackett_luce, count only the best ranks of each list", none="all"
    )
    pair_weight: PairWeight | None = option(
        None, "of model pairwise, multiply each pair's term by the difference of its grades"
    )
    in_batch_negatives: bool = option(False, "put the other queries' candidates below each list, ungraded")
    chunk_size: int | None = option(
        None, "queries computed at a time: less memory, same result", none="from the sizes"
    )
    weight: float = option(1.0, "weight of the lists beside the trainer's own loss", at_least=0)
    base_loss: Literal["include", "exclude"] = option(
        "include", "include or exclude the trainer's own loss, of the pairs of a picture and its caption"
    )
    own_caption: Literal["apart", "top"] = option(
        "apart",
        "the place of a picture's own caption in its list: apart from it, or at the top, above all graded "
        "candidates; to grade it, name it among the candidates",
        for_trainer=True,
    )
    max_candidates: int | None = option(
        None,
        "places of a list, which a webdataset has to be told; a longer list is an error",
        none="the longest list of a CSV file",
        metavar="K",
        for_trainer=True,
        at_least=1,
    )

    def refuse(self, gather: Gather) -> str | None:  # noqa: ARG002
        by_value = self.model in ("top_one", "lambda") or self.pair_weight is not None
        if self.own_caption == "top" and by_value:
            return "own_caption: top is an order and no grade; it needs a model that goes by the order alone"
        return None

    def build(self, base: Any, gather: Gather) -> RankedListsTerm:
        names = ("model", "top_k", "pair_weight", "in_batch_negatives", "chunk_size")
        lists = rankloss.RankedLists(**{name: getattr(self, name) for name in names}, gather=gather)
        return RankedListsTerm(lists, base if self.base_loss == "include" else None, weight=self.weight)

    def companions(self) -> list[Candidates]:
        return [Candidates(self.own_caption == "top", self.max_candidates)]
