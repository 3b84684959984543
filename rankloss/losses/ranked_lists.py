"""Orders and grades as data: a list of candidates for every query."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankloss import checks, graded, precision
from rankloss.batch import first_equal, first_occurrence
from rankloss.distributed import GatherOption
from rankloss.losses.gathering import GatheringLoss
from rankloss.options import Reduction, check_choice, check_count

ListModel = Literal["plackett_luce", "top_one", "pairwise"]
PairWeight = Literal["difference"]

_SCORES_AT_ONCE = 2**24  # 64 MiB in float32
_IGNORED = -100  # torch's losses ignore this target
_INTEGERS = checks.INTEGERS
_REALS = _INTEGERS | {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class RankedLists(GatheringLoss):
    r"""Listwise loss of candidates with grades as data: from people, a reranker or a language model.

    Query n has K_n candidates with scores x_q = s·⟨query n, candidate q⟩ and grades g_q. A larger grade is
    better; equal grades are tied; candidates of grade −∞ rank below all graded ones and are not counted. The
    value of a list is, by ``model``,

        plackett_luce   Σ_p [log Σ_{q : g_q ≤ g_p} e^{x_q} − x_p]
        top_one         Σ_p softmax(g)_p · [log Σ_q e^{x_q} − x_p]
        pairwise        Σ_{p, q : g_p > g_q} −log σ(x_p − x_q)

    where p runs over the graded candidates: ListMLE with exact ties (:func:`rankloss.plackett_luce_nll`),
    ListNet's cross-entropy, and Bradley–Terry's or RankNet's likelihood of all pairs. For two candidates with
    unequal grades the first and the last are equal. A list in which all grades are equal counts nothing.

    With ``in_batch_negatives`` other queries' candidates, of all processes, are items of grade −∞ in every
    list, except for the list's own candidates. Candidates with the same id in ``candidate_ids`` are one item,
    on all processes. Without ids, candidates bit-equal to one of the list's own are left out, and a candidate
    of several lists is one item if it is one row of ``[M, D]``, otherwise several. With K = 1 this is CLIP's
    cross-entropy of one direction; it is bit-equal in float64 if all scores are computed at once.

    Scores are in float32 at least, sums over a list's own candidates in float64, also under autocast. With
    negatives the N·M scores are computed for some queries at a time, and again in the backward pass
    (:func:`torch.utils.checkpoint.checkpoint`), unless all fit at once: memory is linear in M. Compiled, the
    loss is one call between two graphs.

    Args:
        model: the likelihood.
        top_k: for Plackett–Luce, the number of ranks that count; tied candidates share their best rank. None
            for all.
        pair_weight: for ``"pairwise"``: None, or ``"difference"`` to multiply each pair's term by g_p − g_q,
            which needs finite grades and no negatives.
        in_batch_negatives: rank the other queries' candidates below a query's own.
        reduction: ``"mean"``: each list divided by the number of its terms, averaged over the lists that
            count. The terms of Plackett–Luce are the counted candidates whose denominator includes another
            item (all except an untied last one), those of ``"pairwise"`` the pairs; ``"top_one"`` has one
            term. ``"sum"``: the plain sum. ``"none"``: one value per query of this process; the values add up
            to ``"sum"``.
        chunk_size: queries computed at a time; None: enough for 2²⁴ scores.
        gather: gathering of other processes' candidates, see :class:`rankloss.Gather`. All processes need
            tensors of the same shapes.

    Shapes:
        ``query_features``: ``[N, D]``; ``candidate_features``: ``[N, K, D]``, or ``[M, D]`` with
        ``candidate_index`` ``[N, K]``, integers in [0, M), so that a candidate of several lists is embedded
        once; ``grades``: ``[N, K]``; ``mask``: ``[N, K]``, False at padding, where features, index and grade
        are ignored; ``candidate_ids``: ``[N, K]`` or ``[M]``, integers. Features are unit-norm;
        ``logit_scale`` is the multiplier s itself. The result is a scalar in nats, ``[N]`` with
        ``reduction="none"``, or with ``output_dict=True`` ``{"ranked_lists_loss": …}``. NaN or infinity in a
        feature gives NaN.

    Raises:
        ValueError: for an option out of range or unsupported by the model; in ``forward`` for mismatched
            shapes, dtypes or devices, a list without candidates, a grade of NaN, +∞ or an integer beyond 2⁵³,
            an index out of range, or with ``in_batch_negatives`` two equal queries, also of two processes,
            whose candidates would be each other's negatives. Values are read on a CPU at every call, on an
            accelerator at the first call; a grade of NaN or +∞ gives NaN in later calls.
        TypeError: for an argument that is not a tensor.

    References:
        "Listwise Approach to Learning to Rank: Theory and Algorithm", ICML 2008 (ListMLE); "Learning to Rank:
        From Pairwise Approach to Listwise Approach", ICML 2007 (ListNet); "Learning to Rank Using Gradient
        Descent", ICML 2005 (RankNet).

    Example:
        >>> query, candidates = torch.eye(3)[:1], torch.eye(3)[None]  # scores s, 0, 0
        >>> loss = RankedLists()(query, candidates, torch.tensor([[2.0, 1.0, 0.0]]), logit_scale=10.0)
        >>> round(loss.item(), 4)  # ½·[log(e¹⁰ + 2) − 10 + log 2]
        0.3466
    """

    def __init__(
        self,
        *,
        model: ListModel = "plackett_luce",
        top_k: int | None = None,
        pair_weight: PairWeight | None = None,
        in_batch_negatives: bool = False,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        gather: GatherOption = None,
    ) -> None:
        check_choice("model", model, get_args(ListModel))
        check_choice("pair_weight", pair_weight, (None, *get_args(PairWeight)))
        check_choice("in_batch_negatives", in_batch_negatives, (True, False))
        check_choice("reduction", reduction, get_args(Reduction))
        if top_k is not None and model != "plackett_luce":
            raise ValueError(f"top_k={top_k!r} only applies to model='plackett_luce'; got model={model!r}")
        if pair_weight is not None and (model != "pairwise" or in_batch_negatives):
            raise ValueError(
                f"pair_weight={pair_weight!r} needs model='pairwise' without in_batch_negatives; "
                f"got model={model!r}, in_batch_negatives={in_batch_negatives!r}"
            )
        super().__init__(gather)
        self.model, self.pair_weight, self.reduction = model, pair_weight, reduction
        self.in_batch_negatives = in_batch_negatives
        self.top_k = None if top_k is None else check_count("top_k", top_k)
        self.chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)
        models: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
            "plackett_luce": functools.partial(graded.plackett_luce, top_k=self.top_k),
            "top_one": graded.top_one,
            "pairwise": functools.partial(graded.pairwise, by_difference=pair_weight is not None),
        }
        self._model = models[model]

    def extra_repr(self) -> str:
        """The model, and the option of negatives."""
        return f"model={self.model!r}, in_batch_negatives={self.in_batch_negatives!r}"

    @precision.outside_graphs
    def forward(
        self,
        query_features: Tensor,
        candidate_features: Tensor,
        grades: Tensor,
        logit_scale: Tensor | float = 1.0,
        *,
        candidate_index: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` a dict of it.

        Args:
            query_features: ``[N, D]``.
            candidate_features: ``[N, K, D]``, or ``[M, D]``.
            grades: ``[N, K]``, of any real dtype; they receive no gradient.
            logit_scale: the multiplier s.
            candidate_index: ``[N, K]``, each query's candidates as rows of ``[M, D]``.
            candidate_ids: ``[N, K]`` or ``[M]``, equal for one candidate on all processes.
            mask: ``[N, K]``, bool; False is padding.
            output_dict: return a dict.
        """
        given = _Given(
            query_features, candidate_features, logit_scale, grades, candidate_index, mask, candidate_ids
        )
        loss = self._loss_of(given)
        return {"ranked_lists_loss": loss} if output_dict else loss

    def _loss_of(self, given: _Given) -> Tensor:
        tensors = given._asdict()
        del tensors["logit_scale"]  # may be a number
        with self.gather.agreement(self, **tensors):
            _check_shapes(given)
            checks.check_scale(given.logit_scale, given.query_features)
            is_first = not self._looked_at and precision.can_be_read(given.query_features)
            looks = is_first or given.query_features.is_cpu
            if looks:
                self._look_at_values(given, is_first)
        if looks and self.in_batch_negatives:
            _check_distinct(self.gather.items(given.query_features))
        if is_first:
            self._looked_at.add("all")

        queries, items, logit_scale, grades, index, _, ids = given
        is_item = given.is_item
        is_right = (~is_item | (grades < math.inf)).all()
        is_mps = grades.device.type == "mps"  # MPS has no float64
        grades = (
            grades.detach().to(torch.float32 if is_mps else torch.float64).masked_fill(~is_item, math.inf)
        )
        if index is None:
            items = items.flatten(0, 1)
            index = torch.arange(len(items), device=items.device).view(grades.shape)
        # Padding repeats a candidate of the list.
        index = index.long().where(is_item, index.gather(1, is_item.byte().argmax(-1, keepdim=True)))
        is_listed = torch.zeros(len(items), dtype=torch.uint8, device=items.device)
        is_listed = is_listed.index_fill(0, index.flatten(), 1)
        gather = self.gather
        if self.in_batch_negatives or not gather.anchors_are_local:
            index = index + gather.place[0] * len(items)
            items, is_listed = gather.items(items, are_anchors=False), gather.items(is_listed)
            ids = None if ids is None else gather.items(ids.flatten())
        if not gather.anchors_are_local:
            queries, index, grades = gather.items(queries), gather.items(index), gather.items(grades)

        dtype = precision.arithmetic_dtype(queries, items)
        items, is_listed = items.to(dtype), is_listed.bool()
        if given.mask is not None or given.candidate_index is not None:
            # Rows in no list may hold any values, and 0 · NaN is NaN.
            items = items.masked_fill(~is_listed[:, None], 0.0)
        equal = None
        if self.in_batch_negatives and ids is not None:
            equal = graded.first_of_id(ids.long().masked_fill(~is_listed, torch.iinfo(torch.int64).max))
            is_listed = is_listed & (equal == torch.arange(len(equal), device=equal.device))
        elif self.in_batch_negatives:
            equal = first_equal(items)
        scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale
        queries = queries.to(dtype) * scale
        with precision.full_precision(items.device):
            values, terms = self._values(queries, items, is_listed, equal, index, grades)
        values = precision.nan_unless_finite(values, queries, items) * torch.where(is_right, 1.0, math.nan)
        return self._reduced(values, terms).to(dtype)

    def _values(
        self,
        queries: Tensor,
        items: Tensor,
        is_listed: Tensor,
        equal: Tensor | None,
        index: Tensor,
        grades: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Values and numbers of terms of all lists; both are 0 for a list that does not count."""
        scores = len(items) if self.in_batch_negatives else index.shape[1]
        if self.model == "pairwise":
            scores *= index.shape[1]
        rows = self.chunk_size or max(1, _SCORES_AT_ONCE // scores)
        chunks = list(zip(queries.split(rows), index.split(rows), grades.split(rows), strict=True))
        of_chunk = functools.partial(self._of_chunk, items, is_listed, equal)
        if len(chunks) > 1 and torch.is_grad_enabled():
            of_chunk = functools.partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
        values, terms = zip(*(of_chunk(*chunk) for chunk in chunks), strict=True)
        return torch.cat(values), torch.cat(terms)

    def _of_chunk(
        self,
        items: Tensor,
        is_listed: Tensor,
        equal: Tensor | None,
        queries: Tensor,
        index: Tensor,
        grades: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rest = has_rest = None
        if self.in_batch_negatives:
            scores = precision.product(queries, items.T)
            is_rest = graded.others(index, equal, is_listed)
            rest, has_rest = scores.masked_fill(~is_rest, -math.inf), is_rest.any(-1)
            x = scores.gather(1, index)
        else:
            own = items.index_select(0, index.flatten()).view(*index.shape, -1)
            x = precision.product(own, queries[:, :, None]).squeeze(-1)
        if rest is not None and index.shape[1] == 1 and self.model != "pairwise":
            # Both models are the cross-entropy of one candidate; this way is bit-exact.
            values = -rest.scatter(1, index, x).log_softmax(-1).gather(1, index).squeeze(-1)
            terms = torch.ones_like(index[:, 0])
        else:
            values, terms = self._model(x.to(grades.dtype), grades, rest)
        counts = graded.is_ranked(grades, has_rest)
        return values.to(grades.dtype).where(counts, 0.0), terms.where(counts, 0)

    def _reduced(self, values: Tensor, terms: Tensor) -> Tensor:
        """The reduction over all processes; DDP averages their shares."""
        shares = self.gather.place[1] if self.gather.anchors_are_local else 1
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum() * shares
        lists = (terms > 0).sum() + 0 * values.detach().sum()  # NaN on one process is NaN on all
        if self.gather.anchors_are_local:
            lists = self.gather.items(lists[None]).sum()
        by_list = (values / terms.clamp_min(1))[:, None]
        target = torch.zeros_like(terms).masked_fill(terms == 0, _IGNORED)
        # As torch's cross_entropy sums, to the last bit.
        total = F.nll_loss(-by_list, target, ignore_index=_IGNORED, reduction="sum")
        return total / (lists.clamp_min(1) / shares)

    @torch.no_grad()
    def _look_at_values(self, given: _Given, is_first: bool) -> None:
        """Raise an error for wrong values; warn of suspicious ones at the first look."""
        queries, candidates, logit_scale, grades, index, *_ = given
        is_item = given.is_item
        if (row := _first(~is_item.any(-1))) is not None:
            raise ValueError(f"mask must leave a candidate in every list; row {row} has none")
        is_wrong = ~(grades.abs() < math.inf if self.pair_weight else grades < math.inf)
        needed = "finite for pair_weight='difference'" if self.pair_weight else "numbers or −infinity"
        _refuse("grades", grades, is_item & is_wrong, needed)
        if not grades.is_floating_point():
            is_wrong = grades.long().abs() > graded.LARGEST_INTEGER
            _refuse("grades", grades, is_item & is_wrong, "at most 2⁵³, to stay distinct in float64")
        if index is not None:
            is_wrong = (index < 0) | (index >= len(candidates))
            needed = f"at least 0 and less than {len(candidates)}"
            _refuse("candidate_index", index, is_item & is_wrong, needed)
        if is_first:
            checks.look_at_rows("query_features", queries)
            listed = candidates[is_item] if index is None else candidates[index[is_item].long()]
            checks.look_at_rows("candidate_features", listed)
            checks.look_at_scale("logit_scale", logit_scale, queries)


class _Given(NamedTuple):
    """The arguments of a call."""

    query_features: Tensor
    candidate_features: Tensor
    logit_scale: Tensor | float
    grades: Tensor
    candidate_index: Tensor | None
    mask: Tensor | None
    candidate_ids: Tensor | None

    @property
    def is_item(self) -> Tensor:
        return torch.ones_like(self.grades, dtype=torch.bool) if self.mask is None else self.mask


def _check_shapes(given: _Given) -> None:
    """Raise an error that names the argument unless types, shapes and devices fit."""
    queries, candidates, _, grades, index, mask, ids = given
    checks.check_matrix("query_features", queries)
    n, d = queries.shape
    of_lists = {
        "grades": (grades, _REALS),
        "candidate_index": (index, _INTEGERS),
        "mask": (mask, {torch.bool}),
    }
    for name, (x, dtypes) in of_lists.items():
        if x is None and name != "grades":
            continue
        checks.check_is_tensor(name, x)
        assert x is not None
        if x.dim() != 2 or len(x) != n or not x.numel() or x.shape != grades.shape:
            raise ValueError(
                f"{name} must have shape [N, K], with N = {n} queries and K at least 1 as in grades; "
                f"got {tuple(x.shape)}"
            )
        if x.dtype not in dtypes:
            raise ValueError(f"{name} must be of {' or '.join(sorted(map(str, dtypes)))}; got {x.dtype}")
        checks.check_device(name, x, queries, "query_features")
    checks.check_is_tensor("candidate_features", candidates)
    shape = candidates.shape
    if shape != (*(grades.shape if index is None else shape[:1]), d):
        raise ValueError(
            f"candidate_features must have shape [N, K, D] = {(*grades.shape, d)}, or [M, D] with "
            f"candidate_index; got {tuple(shape)}"
        )
    if ids is not None:
        checks.check_is_tensor("candidate_ids", ids)
        if ids.shape != shape[:-1] or ids.dtype not in _INTEGERS:
            needed = f"integers of shape {tuple(shape[:-1])}"
            raise ValueError(f"candidate_ids must be {needed}; got {ids.dtype} {tuple(ids.shape)}")
        checks.check_device("candidate_ids", ids, queries, "query_features")
    checks.check_matrix("candidate_features", candidates.flatten(0, -2))
    checks.check_device("candidate_features", candidates, queries, "query_features")


@torch.no_grad()
def _check_distinct(queries: Tensor) -> None:
    """Raise a ValueError, the same on all processes, if two of all queries are equal."""
    equal = first_occurrence(queries.to(precision.arithmetic_dtype(queries)))
    row = _first(equal != torch.arange(len(equal), device=equal.device))
    if row is not None:
        raise ValueError(
            "query_features must not hold a query twice with in_batch_negatives: candidates of "
            f"one would be negatives of the other; row {row} equals row {int(equal[row])}"
        )


def _refuse(name: str, values: Tensor, is_wrong: Tensor, needed: str) -> None:
    """Raise a ValueError that shows the first row with wrong values, if any."""
    if (row := _first(is_wrong)) is not None:
        raise ValueError(f"{name} must be {needed}; row {row} has {values[row][is_wrong[row]].tolist()}")


def _first(is_wrong: Tensor) -> int | None:
    """The first row that is True, or None."""
    rows = is_wrong.nonzero()
    return int(rows[0, 0]) if len(rows) else None
