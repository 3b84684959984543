"""The loss ``ranked-lists`` of the catalogue: graded candidates of each query, beside a loss of pairs."""

from __future__ import annotations

import typing
from typing import Any

from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather
from rankloss.losses import Base, base_entries, check_weight, combined
from rankloss.losses.ranked_lists import ListModel
from rankloss_trainers.candidates import Candidates
from rankloss_trainers.catalog import LossEntry, Option, Options, error_of, weight

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


# --- the catalogue's entry --------------------------------------------------------------------------------

_MODEL = "likelihood of a list: of its order (ListMLE), of its softmax (ListNet), or of all its pairs"
_DIFFERENCE = "of model pairwise, multiply each pair's term by the difference of its grades"
_NEGATIVES = "put the other queries' candidates below each list, ungraded"
_CHUNK = "queries computed at a time: less memory, same result"
_BASE = "include or exclude the trainer's own loss, of the pairs of a picture and its caption"
_OWN = (
    "the place of a picture's own caption in its list: apart from it, or at the top, above all graded "
    "candidates; to grade it, name it among the candidates"
)
_MAX = "places of a list, which a webdataset has to be told; a longer list is an error"
_COUNT = {"type": int, "metavar": "N"}
_OF_LISTS = (
    Option("model", "plackett_luce", _MODEL, {"choices": typing.get_args(ListModel)}),
    Option("top-k", None, "of model plackett_luce, count only the best ranks of each list", _COUNT, "all"),
    Option("pair-weight", None, _DIFFERENCE, values={"none": None, "difference": "difference"}),
    Option("in-batch-negatives", False, _NEGATIVES, values={"include": True, "exclude": False}),
    Option("chunk-size", None, _CHUNK, _COUNT, "from the sizes"),
)
_OPTIONS = (
    *_OF_LISTS,
    Option(
        "weight", 1.0, "weight of the lists beside the trainer's own loss", {"type": weight, "metavar": "X"}
    ),
    Option("base-loss", "include", _BASE, {"choices": ("include", "exclude")}),
    Option("own-caption", "apart", _OWN, {"choices": ("apart", "top")}, for_trainer=True),
    Option(
        "max-candidates",
        None,
        _MAX,
        {"type": int, "metavar": "K"},
        "the longest list of a CSV file",
        for_trainer=True,
    ),
)


def _lists(options: Options, gather: Gather) -> rankloss.RankedLists:
    return rankloss.RankedLists(**{x.key: options[x.key] for x in _OF_LISTS}, gather=gather)


def _build(base: Any, options: Options, gather: Gather) -> RankedListsTerm:
    base = base if options["base_loss"] == "include" else None
    return RankedListsTerm(_lists(options, gather), base, weight=options["weight"])


def _refuse(options: Options, gather: Gather) -> str | None:
    by_value = options["model"] == "top_one" or options["pair_weight"] is not None
    if options["own_caption"] == "top" and by_value:
        return "own_caption: top is an order and no grade; it needs a model that goes by the order alone"
    if options["max_candidates"] is not None and options["max_candidates"] < 1:
        return f"max_candidates must be at least 1; got {options['max_candidates']}"
    return error_of(lambda: _lists(options, gather))


RANKED_LISTS = LossEntry(
    build=_build,
    help="the trainer's own plus the likelihood of lists of graded candidates, which come with the data",
    options=_OPTIONS,
    refuse=_refuse,
    companions=lambda options: [Candidates(options["own_caption"] == "top", options["max_candidates"])],
)
