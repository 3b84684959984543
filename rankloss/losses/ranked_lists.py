"""Orders and grades as data: a list of candidates for every query."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import checks, graded, precision
from rankloss.batch import first_equal, first_occurrence
from rankloss.distributed import GatherOption
from rankloss.losses.gathering import GatheringLoss
from rankloss.losses.list_inputs import ListInputs, first_row
from rankloss.options import Reduction, check_choice, check_count

ListModel = Literal["plackett_luce", "top_one", "pairwise", "lambda"]
PairWeight = Literal["difference"]
Gain = Literal["linear", "exponential"]

_SCORES_AT_ONCE = 2**24  # 64 MiB in float32
_IGNORED = -100  # torch's losses ignore this target


class RankedLists(GatheringLoss):
    r"""Listwise loss of candidates with grades as data: from people, a reranker or a language model.

    Query n has K_n candidates with scores x_q = s·⟨query n, candidate q⟩ and grades g_q. A larger grade is
    better; equal grades are tied; candidates of grade −∞ rank below all graded ones and are not counted. The
    value of a list is, by ``model``,

        plackett_luce   Σ_p [log Σ_{q : g_q ≤ g_p} e^{x_q} − x_p]
        top_one         Σ_p softmax(g)_p · [log Σ_q e^{x_q} − x_p]
        pairwise        Σ_{p, q : g_p > g_q} −log σ(x_p − x_q)
        lambda          Σ_{p, q : g_p > g_q} −(ρ_pq + μ·δ_pq)·(G_p − G_q)·log σ(x_p − x_q)

    where p runs over the graded candidates: ListMLE with exact ties (:func:`rankloss.plackett_luce_nll`),
    ListNet's cross-entropy, Bradley–Terry's or RankNet's likelihood of all pairs, and NDCG-Loss2++ of the
    LambdaLoss framework. For two candidates with unequal grades the first and the third are equal. A list in
    which all grades are equal counts nothing.

    The weights of ``"lambda"`` have no gradient. With ranks r by the present scores, D(r) = log₂(1 + r) and
    the distance d = \|r_p − r_q\|,

        ρ_pq = |1/D(r_p) − 1/D(r_q)|,   δ_pq = 1/D(d) − 1/D(d + 1),   μ = 10,

    and G is the gain of a grade divided by the list's ideal DCG. Candidates of equal scores share their mean
    rank, and for them d is 1.

    With a reference, the scores x' of a frozen model, x_q is s·⟨query n, candidate q⟩ − x'_q in every model:
    the change of a score. With grades 1 and 0 the pairwise model is then DPO's loss, and Plackett–Luce its
    listwise form. The reference has no gradient.

    With ``in_batch_negatives`` other queries' candidates, of all processes, are items of grade −∞ in every
    list, except for the list's own candidates. Candidates with the same id in ``candidate_ids`` are one item,
    on all processes. Without ids, candidates bit-equal to one of the list's own are left out, and a candidate
    of several lists is one item if it is one row of ``[M, D]``, otherwise several. The candidate whose id is
    the query's in ``excluded_ids`` is left out, too, such as its own caption in another query's list. With
    K = 1 this is CLIP's cross-entropy of one direction; it is bit-equal in float64 if all scores are computed
    at once.

    Scores are in float32 at least, also under autocast; products are TF32's where torch allows them. Sums
    over a list's own candidates are in float64. On a device without it, such as MPS, they are in float32, and
    integers as grades are at most 2²⁴ there.
    With negatives the N·M scores are computed for some queries at a time, and again in the backward pass
    (:func:`torch.utils.checkpoint.checkpoint`), unless all fit at once: memory is linear in M. ``"pairwise"``
    then compares N·K·M pairs in the scores' dtype. On a CPU, for lists of 16 candidates or more, polynomials
    take the place of the pairs, exact to rounding, if the scores of a list span up to 292 nats (146 in
    float64) and the batch is large enough to gain by it: 512 queries of 32 candidates take 1.4 to 2.7 times
    Plackett–Luce's time, of 15 candidates up to 3.8 times. All pairs of 64 queries of 1,000 candidates take
    20 times. Compiled, the loss is one call between two graphs.

    Args:
        model: Likelihood of a list: of its order (ListMLE), of its softmax (ListNet), of all its pairs, or of
            its pairs by their part in NDCG (LambdaLoss).
        top_k: Number of best ranks of each list that count, of model plackett_luce; None counts all. Tied
            candidates share their best rank.
        pair_weight: Weight of a pair, of model pairwise: 1, or the difference of its grades. ``"difference"``
            multiplies each pair's term by g_p − g_q, which needs finite grades and no negatives.
        gain: Gain of a grade g, of model lambda: g itself, or 2^g − 1.
        in_batch_negatives: Include the other queries' candidates below each list, ungraded, or exclude them.
            Not for model lambda.
        reduction: Reduction of the lists' values. ``"mean"``: each list divided by the number of its terms,
            averaged over the lists that count. The terms of Plackett–Luce are the counted candidates whose
            denominator includes another item (all except an untied last one), those of ``"pairwise"`` the
            pairs; ``"top_one"`` and ``"lambda"``, whose weights are shares of the ideal DCG, have one term.
            ``"sum"``: the plain sum. ``"none"``: one value per query of this process; the values add up to
            ``"sum"``.
        chunk_size: Queries computed at a time: less memory, same result. None: enough for 2²⁴ scores.
        gather: Gathering of other processes' candidates, see :class:`rankloss.Gather`. All processes need
            tensors of the same shapes.

    Shapes:
        ``query_features``: ``[N, D]``; ``candidate_features``: ``[N, K, D]``, or ``[M, D]`` with
        ``candidate_index`` ``[N, K]``, integers in [0, M), so that a candidate of several lists is embedded
        once; ``grades``: ``[N, K]``; ``mask``: ``[N, K]``, False at padding, where features, index and grade
        are ignored; ``candidate_ids``: ``[N, K]`` or ``[M]``, integers; ``excluded_ids``: ``[N]``, integers.
        The reference is either
        ``reference_scores``, ``[N, K]``, or the frozen model's own ``reference_query_features``, ``[N, D']``,
        ``reference_candidate_features``, in the form of ``candidate_features``, and ``reference_scale``, the
        multiplier of their products; negatives need the latter. Features are unit-norm;
        ``logit_scale`` is the multiplier s itself. The result is a scalar in nats, ``[N]`` with
        ``reduction="none"``, or with ``output_dict=True`` ``{"ranked_lists_loss": …}``. NaN or infinity in a
        feature gives NaN.

    Raises:
        ValueError: for an option out of range or unsupported by the model; in ``forward`` for mismatched
            shapes, dtypes or devices, a list without candidates, a grade of NaN, +∞ or an integer beyond 2⁵³,
            a candidate twice in a list with two grades, by its index or its id, for ``"lambda"`` any grade
            that is negative, infinite or beyond 2⁵³, a reference that is not finite, is incomplete or is
            given twice, an index out of range, or with ``in_batch_negatives`` two equal queries, also of two
            processes, whose candidates would be each other's negatives. Values are read on a CPU at every
            call, on an accelerator at the first call; a grade of NaN or +∞, a rounded integer, and a
            reference that is not finite give NaN in later calls.
        TypeError: for an argument that is not a tensor.

    References:
        "Listwise Approach to Learning to Rank: Theory and Algorithm", ICML 2008 (ListMLE); "Learning to Rank:
        From Pairwise Approach to Listwise Approach", ICML 2007 (ListNet); "Learning to Rank Using Gradient
        Descent", ICML 2005 (RankNet); "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018;
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023 (DPO).

    Example:
        >>> query, candidates = torch.eye(3)[:1], torch.eye(3)[None]  # scores s, 0, 0
        >>> loss = RankedLists()(query, candidates, torch.tensor([[2.0, 1.0, 0.0]]), logit_scale=10.0)
        >>> round(loss.item(), 4)  # ½·[log(e¹⁰ + 2) − 10 + log 2]
        0.3466
    """

    min_pairs = 1  # a query has a list of its own

    def __init__(
        self,
        *,
        model: ListModel = "plackett_luce",
        top_k: int | None = None,
        pair_weight: PairWeight | None = None,
        gain: Gain = "linear",
        in_batch_negatives: bool = False,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        gather: GatherOption = None,
    ) -> None:
        super().__init__(gather)
        self.model = model
        self.top_k = top_k
        self.pair_weight = pair_weight
        self.gain = gain
        self.in_batch_negatives = in_batch_negatives
        self.reduction = reduction
        self.chunk_size = chunk_size
        self._check_options()

    def _check_options(self) -> None:
        """Raise a ValueError for a wrong option; options are attributes and may change between calls."""
        check_choice("model", self.model, get_args(ListModel))
        check_choice("pair_weight", self.pair_weight, (None, *get_args(PairWeight)))
        check_choice("gain", self.gain, get_args(Gain))
        check_choice("in_batch_negatives", self.in_batch_negatives, (True, False))
        check_choice("reduction", self.reduction, get_args(Reduction))
        for name in ("top_k", "chunk_size"):
            if (count := getattr(self, name)) is not None:
                check_count(name, count)
        model = self.model
        has_negatives = self.in_batch_negatives
        is_pairwise_alone = model == "pairwise" and not has_negatives
        needs = [
            (
                self.top_k is None or model == "plackett_luce",
                f"top_k={self.top_k!r} only applies to model='plackett_luce'",
            ),
            (
                self.pair_weight is None or is_pairwise_alone,
                f"pair_weight={self.pair_weight!r} needs model='pairwise' without in_batch_negatives",
            ),
            (
                self.gain == "linear" or model == "lambda",
                f"gain={self.gain!r} only applies to model='lambda'",
            ),
            (
                model != "lambda" or not has_negatives,
                "model='lambda' weighs pairs of lists that are graded in full, without in_batch_negatives",
            ),
        ]
        for is_met, need in needs:
            if not is_met:
                raise ValueError(f"{need}; got model={model!r}, in_batch_negatives={has_negatives!r}")

    @property
    def uses_grade_values(self) -> bool:
        """True if the loss depends on the values of the grades, and not on their order alone."""
        return self.model in ("top_one", "lambda") or self.pair_weight is not None

    def extra_repr(self) -> str:
        """The options."""
        names = ("model", "top_k", "pair_weight", "gain", "in_batch_negatives", "reduction", "chunk_size")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

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
        excluded_ids: Tensor | None = None,
        mask: Tensor | None = None,
        reference_scores: Tensor | None = None,
        reference_query_features: Tensor | None = None,
        reference_candidate_features: Tensor | None = None,
        reference_scale: Tensor | float | None = None,
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
            excluded_ids: ``[N]``, the id of a candidate that is no negative of the query; others are of no
                candidate.
            mask: ``[N, K]``, bool; False is padding.
            reference_scores: ``[N, K]``, the candidates' scores by a frozen model.
            reference_query_features: ``[N, D']``, the frozen model's.
            reference_candidate_features: ``[N, K, D']``, or ``[M, D']``, the frozen model's.
            reference_scale: the frozen model's multiplier.
            output_dict: return a dict.
        """
        self._check_options()
        loss = self._compute(
            ListInputs(
                query_features=query_features,
                candidate_features=candidate_features,
                logit_scale=logit_scale,
                grades=grades,
                candidate_index=candidate_index,
                mask=mask,
                candidate_ids=candidate_ids,
                excluded_ids=excluded_ids,
                reference_scores=reference_scores,
                reference_query_features=reference_query_features,
                reference_candidate_features=reference_candidate_features,
                reference_scale=reference_scale,
            )
        )
        return {"ranked_lists_loss": loss} if output_dict else loss

    def _compute(self, inputs: ListInputs) -> Tensor:
        """Check the inputs and compute their loss; it is NaN for wrong values that were not read."""
        self._check(inputs)
        padded = self._padded(inputs)
        gathered = self._gathered(padded)
        items, lists = self._items_and_lists(gathered)
        with precision.full_precision(items.is_listed.device):
            values, terms = self._values(items, lists)
        values = precision.nan_unless_finite(values, *lists.factors, *items.features)
        values = values * torch.where(padded.is_wrong, math.nan, 1.0)
        return self._reduced(values, terms).to(lists.queries.dtype)

    def _check(self, inputs: ListInputs) -> None:
        """Raise an error for wrong arguments, the same on all processes; values are read where it is free.

        At the first call values are read on an accelerator, too, and suspicious ones give a warning.
        """
        queries = inputs.query_features
        with self.gather.agreement(self, **inputs.tensors):
            inputs.check(self.in_batch_negatives)
            is_first = not self._checked_once and precision.can_be_read(queries)
            are_read = is_first or queries.is_cpu
            if are_read:
                self._check_values(inputs, is_first)
        if are_read and self.in_batch_negatives:  # it gathers, so only after the processes have agreed
            _refuse_equal_queries(self.gather.items(queries))
        if is_first:
            self._checked_once.add("inputs")  # one entry for all arguments: they are read together

    def _padded(self, inputs: ListInputs) -> _Padded:
        """The lists of this process in one form, with neutral values at padding."""
        is_item = inputs.is_item
        widest = precision.widest_dtype(inputs.grades.device)
        is_right, _ = self._valid_grades(inputs.grades)
        is_wrong = is_item & (~is_right | graded.is_rounded(inputs.grades, widest))
        grades = inputs.grades.detach().to(widest).masked_fill(~is_item, math.inf)
        offsets = inputs.reference_scores
        if offsets is not None:
            offsets = offsets.detach().to(widest).masked_fill(~is_item, 0.0)
            is_wrong = is_wrong | ~offsets.isfinite()

        items = inputs.candidate_features.flatten(0, -2)
        places = inputs.candidate_index
        if places is None:
            places = torch.arange(len(items), device=items.device).view(grades.shape)
        column_of_first_item = is_item.byte().argmax(-1, keepdim=True)
        first_item = places.gather(1, column_of_first_item)
        places = places.long().where(is_item, first_item)  # padding repeats a candidate of the list
        is_listed = torch.zeros(len(items), dtype=torch.uint8, device=items.device)
        is_listed = is_listed.index_fill(0, places.flatten(), 1)

        scale = inputs.logit_scale
        reference_queries, reference_items = inputs.scaled_reference()
        return _Padded(
            queries=inputs.query_features,
            scale=scale.reshape(()) if isinstance(scale, Tensor) else scale,
            reference_queries=reference_queries,
            places=places,
            grades=grades,
            offsets=offsets,
            is_wrong=is_wrong.any(),
            items=items,
            reference_items=reference_items,
            is_listed=is_listed,
            ids=None if inputs.candidate_ids is None else inputs.candidate_ids.flatten().long(),
            excluded_ids=None if inputs.excluded_ids is None else inputs.excluded_ids.long(),
            has_unlisted_items=inputs.mask is not None or inputs.candidate_index is not None,
        )

    def _gathered(self, lists: _Padded) -> _Padded:
        """The same with the candidates, and if needed the lists, of all processes."""
        gather = self.gather
        needs_all_items = self.in_batch_negatives or not self._has_own_lists
        if needs_all_items:
            (reference_items,) = gather.constants(lists.reference_items)
            rows_of_earlier_processes = gather.place.rank * len(lists.items)
            lists = lists._replace(
                places=lists.places + rows_of_earlier_processes,
                items=gather.items(lists.items, are_anchors=False),
                is_listed=gather.items(lists.is_listed),
                ids=None if lists.ids is None else gather.items(lists.ids),
                reference_items=reference_items,
            )
        if not self._has_own_lists:
            (offsets,) = gather.constants(lists.offsets)
            (reference_queries,) = gather.constants(lists.reference_queries)
            lists = lists._replace(
                queries=gather.items(lists.queries),
                places=gather.items(lists.places),
                grades=gather.items(lists.grades),
                offsets=offsets,
                reference_queries=reference_queries,
                excluded_ids=None if lists.excluded_ids is None else gather.items(lists.excluded_ids),
            )
        return lists

    def _items_and_lists(self, padded: _Padded) -> tuple[_Items, _Lists]:
        """Candidates and lists in the dtype of the arithmetic, with the candidates that are equal."""
        dtype = precision.arithmetic_dtype(padded.queries, padded.items)
        is_listed = padded.is_listed.bool()
        candidates = [padded.items.to(dtype)]
        if padded.reference_items is not None:
            candidates.append(padded.reference_items.to(dtype))
        if padded.has_unlisted_items:
            # Rows in no list may hold any values, and 0 · NaN is NaN.
            candidates = [features.masked_fill(~is_listed[:, None], 0.0) for features in candidates]
        equal = None
        if self.in_batch_negatives and padded.ids is not None:
            equal = graded.first_of_id(padded.ids, is_listed)
            is_first_of_id = equal == torch.arange(len(equal), device=equal.device)
            is_listed = is_listed & is_first_of_id
        elif self.in_batch_negatives:
            equal = first_equal(candidates[0])
        elif self.model == "lambda":  # whose weights depend on ties
            equal = first_equal(torch.cat(candidates, 1))
        items = _Items(candidates, is_listed, equal, padded.ids)
        reference_queries = padded.reference_queries
        lists = _Lists(
            padded.places,
            padded.grades,
            padded.offsets,
            queries=padded.queries.to(dtype) * padded.scale,
            reference_queries=None if reference_queries is None else reference_queries.to(dtype),
            excluded_ids=padded.excluded_ids,
        )
        return items, lists

    def _values(self, items: _Items, lists: _Lists) -> tuple[Tensor, Tensor]:
        """Values and numbers of terms of all lists; both are 0 for a list that does not count."""
        width = lists.places.shape[1]
        scores_of_list = len(items.is_listed) if self.in_batch_negatives else width
        if self.model == "lambda":  # of all pairs
            scores_of_list *= width
        chunks = lists.split(self.chunk_size or max(1, _SCORES_AT_ONCE // scores_of_list))
        evaluate_chunk = functools.partial(self._evaluate_chunk, items)
        if len(chunks) > 1 and torch.is_grad_enabled():
            # The backward pass computes each chunk's scores again, so that one chunk's are held at a time.
            # The import is not at the top: the lowest supported torch loads sympy with this module.
            from torch.utils.checkpoint import checkpoint

            evaluate_chunk = functools.partial(
                checkpoint, evaluate_chunk, use_reentrant=False, preserve_rng_state=False
            )
        values, terms = zip(*(evaluate_chunk(chunk) for chunk in chunks), strict=True)
        return torch.cat(values), torch.cat(terms)

    def _evaluate_chunk(self, items: _Items, lists: _Lists) -> tuple[Tensor, Tensor]:
        """Values and numbers of terms of some lists; both are 0 for a list that does not count."""
        dtype = lists.grades.dtype
        scores = self._scores(lists.queries, items.features[0], lists.places)
        if lists.reference_queries is not None:
            scores = scores - self._scores(lists.reference_queries, items.features[1], lists.places)
        if self.in_batch_negatives:
            values, terms, has_negatives = self._evaluate_among_negatives(scores, items, lists)
            is_ranked = graded.is_ranked(lists.grades, has_negatives)
        else:
            values, terms = self._evaluate_lists(scores.to(dtype), None, items, lists)
            is_ranked = graded.is_ranked(lists.grades, None)
        return values.to(dtype).where(is_ranked, 0.0), terms.where(is_ranked, 0)

    def _evaluate_among_negatives(
        self, scores: Tensor, items: _Items, lists: _Lists
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values and numbers of terms of lists with negatives, and True for a list that has any.

        ``scores`` are those of all items, ``[n, M]``.
        """
        places = lists.places
        own_scores = scores.gather(1, places)
        is_negative = graded.others(places, items.equal, items.is_listed)
        if lists.excluded_ids is not None:
            is_negative = is_negative & (items.ids != lists.excluded_ids[:, None])
        negatives = scores.masked_fill(~is_negative, -math.inf)
        has_one_candidate = places.shape[1] == 1
        if has_one_candidate and self.model != "pairwise":
            # Plackett–Luce and top-one are then CLIP's cross-entropy, to the last bit by its own operations.
            log_p = negatives.scatter(1, places, own_scores).log_softmax(-1)
            values = -log_p.gather(1, places).squeeze(-1)
            terms = torch.ones_like(places[:, 0])
        else:
            values, terms = self._evaluate_lists(own_scores.to(lists.grades.dtype), negatives, items, lists)
        return values, terms, is_negative.any(-1)

    def _scores(self, queries: Tensor, items: Tensor, places: Tensor) -> Tensor:
        """Products of queries with all items, ``[n, M]``; without negatives with their own, ``[n, K]``."""
        if self.in_batch_negatives:
            return precision.product(queries, items.T)
        of_lists = items.index_select(0, places.flatten()).view(*places.shape, -1)
        return precision.product(of_lists, queries[:, :, None]).squeeze(-1)

    def _evaluate_lists(
        self, scores: Tensor, rest: Tensor | None, items: _Items, lists: _Lists
    ) -> tuple[Tensor, Tensor]:
        """The model's values and numbers of terms, ``[n]`` each, of the lists' own scores ``[n, K]``.

        ``rest`` has the scores of the negatives, ``[n, M]`` with −∞ at other items; None without negatives.
        """
        grades = lists.grades
        offsets = lists.offsets
        x = scores if offsets is None else scores - offsets
        if self.model == "plackett_luce":
            return graded.plackett_luce(x, grades, rest, top_k=self.top_k)
        if self.model == "top_one":
            return graded.top_one(x, grades, rest)
        if self.model == "pairwise":
            return graded.pairwise(x, grades, rest, by_difference=self.pair_weight is not None)
        first_equal_items = lists.places if items.equal is None else items.equal[lists.places]
        ranked_by = graded.equal_scores(scores, first_equal_items)
        if offsets is not None:
            ranked_by = ranked_by - offsets
        return graded.lambda_loss(x, grades, ranked_by, gain=self.gain)

    @property
    def _has_own_lists(self) -> bool:
        """True if this process computes its own lists only; otherwise it computes those of all processes."""
        gives_values_of_own_queries = self.reduction == "none"
        return self.gather.anchors_are_local or gives_values_of_own_queries

    def _reduced(self, values: Tensor, terms: Tensor) -> Tensor:
        """The reduction over the lists of all processes, of values and numbers of terms ``[n]``.

        A process with its own lists alone gives their share of the value, times the number of processes:
        DDP's average over the processes then has the sum of the shares.
        """
        shares = self.gather.place.world_size if self.gather.anchors_are_local else 1
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum() * shares
        lists_that_count = (terms > 0).sum()
        # NaN of one process becomes NaN of all: this number is gathered, the values are not.
        lists_that_count = lists_that_count + 0 * values.detach().sum()
        if self.gather.anchors_are_local:
            lists_that_count = self.gather.items(lists_that_count[None]).sum()
        by_list = values / terms.clamp_min(1)
        # A sum, by nll_loss of one class, which adds as torch's cross_entropy does, to the last bit.
        target = torch.zeros_like(terms).masked_fill(terms == 0, _IGNORED)
        total = F.nll_loss(-by_list[:, None], target, ignore_index=_IGNORED, reduction="sum")
        return total / (lists_that_count.clamp_min(1) / shares)

    def _valid_grades(self, grades: Tensor) -> tuple[Tensor, str]:
        """True for grades that the model takes, and the condition in words."""
        if self.model == "lambda":
            is_right = (grades >= 0) & (grades <= graded.LARGEST_INTEGER)
            return is_right, "numbers from 0 to 2⁵³ for model='lambda'"
        if self.pair_weight is not None:
            return grades.abs() < math.inf, "finite for pair_weight='difference'"
        return grades < math.inf, "numbers or −infinity"

    @torch.no_grad()
    def _check_values(self, inputs: ListInputs, is_first: bool) -> None:
        """Raise an error for wrong values; warn of suspicious ones at the first call."""
        grades = inputs.grades
        inputs.refuse_wrong_places_and_references()
        is_right, range_of_grades = self._valid_grades(grades)
        inputs.refuse("grades", ~is_right, range_of_grades)
        dtype = precision.widest_dtype(grades.device)
        exact_integers = f"at most {graded.LARGEST_INTEGERS[dtype]}, to stay distinct in {dtype}"
        inputs.refuse("grades", graded.is_rounded(grades, dtype), exact_integers)
        inputs.refuse_two_grades_of_one_candidate()
        if is_first:
            candidates = inputs.listed(inputs.candidate_features)
            checks.warn_of_norms("query_features", inputs.query_features)
            checks.warn_of_norms("candidate_features", candidates)
            checks.warn_of_scale("logit_scale", inputs.logit_scale, inputs.query_features, candidates)


def _refuse_equal_queries(queries: Tensor) -> None:
    """Raise a ValueError, the same on all processes, if two of all queries are equal."""
    equal = first_occurrence(queries.to(precision.arithmetic_dtype(queries)))
    row = first_row(equal != torch.arange(len(equal), device=equal.device))
    if row is not None:
        raise ValueError(
            "query_features must not hold a query twice with in_batch_negatives: candidates of "
            f"one would be negatives of the other; row {row} equals row {int(equal[row])}"
        )


class _Padded(NamedTuple):
    """Lists in one form: candidates as rows, and neutral values at padding.

    Attributes:
        queries: ``[n, D]``.
        scale: the multiplier s.
        reference_queries: ``[n, D']``, the frozen model's queries, times its scale.
        places: ``[n, K]``, rows of the candidates; at padding the list's first.
        grades: ``[n, K]``, +∞ at padding.
        offsets: ``[n, K]``, reference scores, 0 at padding.
        is_wrong: ``[]``, True if a grade or a reference score of this process is wrong.
        items: ``[M, D]``, the candidates.
        reference_items: ``[M, D']``, the frozen model's.
        is_listed: ``[M]``, 1 for a candidate of any list; uint8, which all backends gather.
        ids: ``[M]``, equal for one candidate.
        excluded_ids: ``[n]``, the id of a candidate that is no negative.
        has_unlisted_items: True if candidates may be in no list.
    """

    queries: Tensor
    scale: Tensor | float
    reference_queries: Tensor | None
    places: Tensor
    grades: Tensor
    offsets: Tensor | None
    is_wrong: Tensor
    items: Tensor
    reference_items: Tensor | None
    is_listed: Tensor
    ids: Tensor | None
    excluded_ids: Tensor | None
    has_unlisted_items: bool


class _Items(NamedTuple):
    """The candidates of all lists.

    Attributes:
        features: ``[M, D]``, and ``[M, D']`` if a frozen model is the reference.
        is_listed: ``[M]``, True for a candidate of any list, once for equal ones.
        equal: ``[M]``, the first candidate equal to each; None if no two are, or without negatives.
        ids: ``[M]``, equal for one candidate; None without ids.
    """

    features: list[Tensor]
    is_listed: Tensor
    equal: Tensor | None
    ids: Tensor | None


class _Lists(NamedTuple):
    """Lists with places and grades of their candidates.

    Attributes:
        places: ``[n, K]``, rows of the candidates.
        grades: ``[n, K]``, +∞ at padding.
        offsets: ``[n, K]``, reference scores.
        queries: ``[n, D]``, times the scale.
        reference_queries: ``[n, D']``, the frozen model's queries, times its scale.
        excluded_ids: ``[n]``, the id of a candidate that is no negative.
    """

    places: Tensor
    grades: Tensor
    offsets: Tensor | None
    queries: Tensor
    reference_queries: Tensor | None = None
    excluded_ids: Tensor | None = None

    @property
    def factors(self) -> list[Tensor]:
        """The factors of the scores."""
        return [self.queries] if self.reference_queries is None else [self.queries, self.reference_queries]

    def split(self, rows: int) -> list[_Lists]:
        """Chunks of so many lists."""
        chunks_by_field: list[Iterable[Any]] = []
        for x in self:  # a field that is None is None in every chunk, however many the others have
            chunks_by_field.append(itertools.repeat(None) if x is None else x.split(rows))
        return [_Lists(*fields) for fields in zip(*chunks_by_field, strict=False)]
