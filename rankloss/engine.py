r"""Losses of lists in linear memory: a loop over chunks of rows, and the values and gradient of a block.

A list of scores x = s·c, with its own pair in column k and its items ranked by a reference y, has up to two
values,

    CE = log Σ_q e^{x_q} − x_k,   C(x | y) = (1/M) · Σ_p (log C_p − x_p),   C_p = Σ_{q : y_q ≤ y_p} e^{x_q},

where p runs over the counted items and M is their number (1 with ``reduction="sum"``). With
U_q = Σ_{p : y_p ≥ y_q} 1 / C_p the gradient of α·CE + β·C(x | y) is

    ∂/∂x_q = e^{x_q}·(α / Σ e^x + (β/M)·U_q) − α·[q = k] − (β/M)·[q counts].

Under ``model="top_one"`` C(x | y) = Σ_q p_q·(log Σ e^x − x_q) with p = softmax(y); its part of the gradient
is β·(e^{x_q} / Σ e^x − p_q). On a CPU sums are in float64, which suffices for scores of up to ±680 nats; on
other devices they are sums of logarithms, of scores relative to the own pair's. Features are expected to be
unit-norm, and a model's scale is at most 100.

With G the gradient by the scores s·C of a matrix, C = Q·Kᵀ (anchors Q, items K),

    ∂Q = s·G·K,   ∂K = s·Gᵀ·Q,   ∂s = Σ G∘C = Σ (G·K)∘Q = Σ (Gᵀ·Q)∘K.

In one process every entry of G has a mirror image, the gradient by the product of the same two features: for
S_ij that by R_ji, for I_ij that by I_ji. Up to a limit the gradients of earlier rows are kept until both are
known, and their sum takes the products of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from rankloss import dense
from rankloss.batch import RANK_TERMS, Batch, Inputs, Matrix, other_items
from rankloss.options import RankOptions
from rankloss.precision import full_precision, nan_unless_finite
from rankloss.ranking import LogSums, rank

# Limits in matrix entries: of a matrix whose gradient is kept until its mirror image is known, of a chunk of
# rows, and of a slice of lists that fits a core's cache. Below the fewest rows or lists, overhead exceeds the
# work.
_KEPT, _FEWEST_ROWS = 2**24, 128
_CHUNK, _CHUNK_ELSEWHERE = {"cpu": 2**20}, 2**24
_LISTS, _LISTS_ELSEWHERE, _FEWEST_LISTS = {"cpu": 2**17}, 2**23, 16


# --- any streamed loss ------------------------------------------------------------------------------------


class StreamedTerms(Protocol):
    """Terms computed together with their gradients; unwanted terms are zero."""

    @property
    def wanted(self) -> Sequence[bool]:
        """True for each term to compute."""

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> Streamed:
        """The terms times ``weights``, and the gradients of their sum by the inputs."""

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """The same terms as differentiable operations on whole matrices."""


Streamed: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor | None]]


def apply(terms: StreamedTerms, weights: Tensor, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The terms times ``weights``, differentiable by the inputs.

    The inputs and the gradients of the terms' sum are kept for the backward pass; under ``torch.no_grad()``,
    or if no input requires a gradient, only values are computed. If the terms have different upstream values,
    the pass is run once more. A backward pass with ``create_graph=True`` differentiates the definition, in
    quadratic memory.
    """
    if not torch.is_grad_enabled():  # otherwise autograd asks for the gradients of inputs that have a graph
        inputs = [None if x is None else x.detach() for x in inputs]
    return tuple(_Streamed.apply(terms, weights, *inputs))  # type: ignore[no-untyped-call]


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, terms: StreamedTerms, weights: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.terms, ctx.weights = terms, weights
        image = inputs[0]
        assert image is not None
        with full_precision(image.device):
            values, gradients = terms.stream(inputs, weights, any(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *gradients)
        return tuple(value.to(image.dtype) for value in values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: each access unpacks them, which triggers hooks and checkpoints
        inputs, gradients = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        by = ctx.needs_input_grad[2:]
        factor = _common([g for g, is_wanted in zip(upstream, ctx.terms.wanted, strict=True) if is_wanted])
        with full_precision(inputs[0].device):
            if torch.is_grad_enabled():
                return None, None, *_by_definition(ctx.terms, ctx.weights, inputs, by, upstream)
            if factor is None:
                each = [ctx.weights.new_zeros(()) if g is None else g for g in upstream]
                weights = ctx.weights * torch.stack(each)
                _, gradients = ctx.terms.stream(inputs, weights, with_gradient=True)
                factor = inputs[0].new_ones(())
            by_inputs = zip(gradients, by, strict=True)
            return None, None, *(None if x is None or not w else factor * x for x, w in by_inputs)


def _common(upstream: Sequence[Tensor | None]) -> Tensor | None:
    """The upstream value shared by all terms; None if they differ, or a comparison would wait."""
    first = upstream[0]
    for g in upstream:
        if first is None or g is None:
            return None
        if g.data_ptr() != first.data_ptr() and not (g.is_cpu and torch.equal(g, first)):
            return None
    return first


def _by_definition(
    terms: StreamedTerms,
    weights: Tensor,
    inputs: Sequence[Tensor | None],
    by: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that are differentiable again."""
    # Use aliases: one input may depend on another, as gathered features on the local ones, and the outer
    # graph adds the derivative along that path.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    values = zip(terms.definition(aliases, weights), upstream, strict=True)
    outputs = [(x, g) for x, g in values if x.requires_grad and g is not None]
    wanted = [x for x, w in zip(aliases, by, strict=True) if x is not None and w]
    gradients = iter([torch.zeros_like(x) for x in wanted])
    if outputs:
        terms_used, grads = zip(*outputs, strict=True)
        by_wanted = torch.autograd.grad(terms_used, wanted, grads, create_graph=True, materialize_grads=True)
        gradients = iter(by_wanted)
    return [next(gradients) if w and x is not None else None for x, w in zip(inputs, by, strict=True)]


EvaluateLists: TypeAlias = Callable[[Tensor, Tensor | None, int], Sequence[Tensor | None]]
"""Loss of a block of lists: two values ``[matrices, n]`` and the gradient by the scores ``[matrices, n, N]``.

The arguments are cosines ``[matrices, n, N]``, a teacher's cosines or None, and the column of the first
list's own pair. If a chunk is evaluated in slices, the gradient overwrites the cosines.
"""


def accumulate(
    evaluate_lists: EvaluateLists,
    matrices: Sequence[Matrix],
    references: Sequence[Matrix],
    sums: dict[str, Tensor] | None,
    first_row: int,
    chunk_size: int | None = None,
    *,
    in_slices: bool = True,
) -> list[Any]:
    """Add up the values of all rows of the matrices, and add their gradients to ``sums``.

    Args:
        evaluate_lists: the loss of a block of lists.
        matrices: one, or the two of a term.
        references: a teacher's matrices, one for each, or none.
        sums: the gradients by the factors of the matrices, by name, initially zeros; None if no gradient is
            wanted. They lack the factor s unless the gradient of ``evaluate_lists`` is by the cosines.
        first_row: the column of the first anchor's own pair.
        chunk_size: rows computed at a time; None chooses from the sizes and the device.
        in_slices: evaluate the lists of a chunk in slices that fit a core's cache; otherwise all at once.

    Returns:
        Both values of a list, summed over the rows: ``[matrices]`` each; None if there is none.
    """
    n, n_items, device = len(matrices[0].anchors), len(matrices[0].items), matrices[0].items.device
    chunk = chunk_size or max(_FEWEST_ROWS, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // n_items)
    lists = max(_FEWEST_LISTS, _LISTS.get(device.type, _LISTS_ELSEWHERE) // n_items // len(matrices))
    lists = lists if in_slices else n
    values: list[Sequence[Tensor | None]] = []
    keeps = chunk >= n or (chunk_size is None and n_items**2 <= _KEPT)
    earlier: Kept = [] if keeps and _mirrors(matrices) else None
    for first in range(0, n, chunk):
        rows = slice(first, first + chunk)
        block = matrices[0].items.new_empty(len(matrices), len(matrices[0].anchors[rows]), n_items)
        for k, matrix in enumerate(matrices):  # the gradient may overwrite the cosines
            torch.mm(matrix.anchors[rows], matrix.items.T, out=block[k])
        taught = torch.stack([x.anchors[rows] @ x.items.T for x in references]) if references else None
        for start in range(0, block.shape[1], lists):
            part = slice(start, start + lists)
            reference = None if taught is None else taught[:, part]
            *chunk_values, gradient = evaluate_lists(block[:, part], reference, first_row + first + start)
            values.append(chunk_values)
            if gradient is not None and not in_slices:
                block = gradient
        if sums is not None:
            _add_gradients(matrices, rows, block, sums, earlier)
    return [None if x[0] is None else torch.cat(x, -1).sum(-1) for x in zip(*values, strict=True)]


# --- gradients by features --------------------------------------------------------------------------------


Kept: TypeAlias = list[tuple[int, list[Tensor]]] | None


def _add_gradients(
    matrices: Sequence[Matrix], rows: slice, by_scores: Tensor, sums: dict[str, Tensor], earlier: Kept
) -> None:
    """Add the gradients of given rows of every matrix.

    Args:
        matrices: one, or the two of a term.
        rows: the rows.
        by_scores: the gradient by the scores, ``[matrices, n, N]``; it is overwritten.
        sums: the gradients by the factors of the matrices, by name, without the factor s.
        earlier: of each earlier chunk its first row, and for each matrix the mirror images of the gradients
            from this column on; this chunk's are added. None keeps none.
    """
    first, n = rows.start, by_scores.shape[1]
    before, end = (None, None) if earlier is None else (first, first + n)
    if earlier is not None:
        images = [by_scores[k, :, first:].T for k in _mirrors(matrices)]
        earlier.append((first, [x.clone(memory_format=torch.contiguous_format) for x in images]))
    for k, (matrix, g) in enumerate(zip(matrices, by_scores, strict=True)):
        for start, images in earlier or ():
            image = images[k][first - start :][:n]
            g[:, start : start + image.shape[1]].add_(image)  # += would copy the sum onto itself
        anchors, items = matrix.factors
        sums[anchors][rows].addmm_(g[:, :end], matrix.items[:end])
        sums[items][:before].addmm_(g[:, :before].T, matrix.anchors[rows])


def _mirrors(matrices: Sequence[Matrix]) -> list[int]:
    """For each matrix the place of the one that is its transpose; empty if one has none."""
    names = [x.factors for x in matrices]
    mirrors = [names.index(x[::-1]) for x in names if x[::-1] in names]
    return mirrors if len(mirrors) == len(names) else []


# --- a block of row lists ---------------------------------------------------------------------------------


class Block(NamedTuple):
    """The same rows of several matrices, and all that their values depend on.

    Attributes:
        cosines: c, ``[matrices, n, N]``.
        scale: s, ``[]``.
        alpha: weight of each matrix's cross-entropies, ``[matrices]``; None leaves them out.
        beta: weight of each matrix's C(x | y), ``[matrices]``; None leaves them out.
        reference: the cosines that rank the lists, ``[matrices, n, N]``; None if each of two matrices ranks
            the other.
        first_equal: for each reference matrix ``[N]``, the first item equal to item j; its cosine is used for
            all of them, so that equal items are tied. None if no two items are equal.
        first_row: the column of the first row's own pair; later rows' follow in order.
    """

    cosines: Tensor
    scale: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    reference: Tensor | None
    first_equal: tuple[Tensor | None, ...]
    first_row: int


class Evaluated(NamedTuple):
    """Values and gradient of a block.

    Attributes:
        cross_entropy: CE, ``[matrices, n]``; None without alpha.
        nll: C(x | y), ``[matrices, n]``; None without beta.
        gradient: of Σ α·CE + β·C by s·c, ``[matrices, n, N]``; None if not wanted.
    """

    cross_entropy: Tensor | None
    nll: Tensor | None
    gradient: Tensor | None


def evaluate(block: Block, options: RankOptions, *, with_gradient: bool) -> Evaluated:
    """Values of a block of lists; if wanted, the gradient overwrites the cosines.

    Sums are in float64 where the weights are. Otherwise they are sums of logarithms, of scores relative to
    the own pair's.
    """
    if block.beta is not None and not options.diagonal:
        return _without_own(block, options, with_gradient)
    own = block.cosines.diagonal(block.first_row, 1, 2)[..., None].clone()  # the gradient overwrites it
    is_ranked = block.beta is not None and options.model == "plackett_luce"
    nll, cross_entropy = (_plackett_luce if is_ranked else _softmax)(block, options, own, with_gradient)
    gradient = block.cosines if with_gradient else None
    if block.alpha is None:
        return Evaluated(None, nll, gradient)
    if gradient is not None:
        gradient.diagonal(block.first_row, 1, 2).sub_(block.alpha[:, None])
    return Evaluated(cross_entropy.squeeze(-1), nll, gradient)


def _plackett_luce(
    block: Block, options: RankOptions, origin: Tensor, with_gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """C(x | y) and log Σ e^x − s·origin; the gradient, except for α·[q = k], overwrites the cosines."""
    alpha, beta = (None if w is None else w.view(-1, 1, 1) for w in (block.alpha, block.beta))
    assert beta is not None
    in_float64 = beta.dtype == torch.float64
    ranking = rank(_reference(block), options, by_numpy=in_float64 and beta.is_cpu)
    c = block.cosines if ranking.order is None else block.cosines.gather(-1, ranking.order)
    divisor = ranking.items if options.reduction == "mean" else 1
    share = beta / divisor
    if in_float64:
        scale = block.scale.double().view(1)  # one dimension, so that a product with it is float64
        x = c * scale
        scores = (x if ranking.counted is None else x * ranking.counted).sum(-1, keepdim=True)
        C = ranking.denominators(x.exp_())
        log_sum = C[..., -1:].log() - origin * scale
        nll = ranking.weigh(C.log()).sum(-1, keepdim=True).sub_(scores)
        if with_gradient:
            of_all = None if alpha is None else alpha / C[..., -1:]
            by_slot = ranking.weigh(torch.div(share, C, out=C))
            if of_all is not None:
                by_slot[..., -1:] += of_all  # every item's sum runs over the last slot
            slope = ranking.read_items(by_slot.flip(-1).cumsum_(-1).flip(-1))
            share = share if ranking.counted is None else share * ranking.counted
            torch.addcmul(-share, x, slope, out=c)
    else:
        # Subtract first: a difference of close cosines is exact, where a product's rounding would matter.
        sums = LogSums(ranking, (c - origin).mul_(block.scale))
        nll, log_sum = sums.nll(), sums.log_sum
        if with_gradient:
            sums.gradient(share, alpha, out=c)
    if with_gradient and ranking.order is not None:
        block.cosines.scatter_(-1, ranking.order, c)
    return nll.div_(divisor).squeeze(-1), log_sum


def _softmax(
    block: Block, options: RankOptions, origin: Tensor, with_gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """As :func:`_plackett_luce`, with C(x | y) of ``top_one``, or None without beta."""
    alpha, beta = (None if w is None else w.view(-1, 1, 1) for w in (block.alpha, block.beta))
    in_float64 = torch.float64 in (x.dtype for x in (alpha, beta) if x is not None)
    scale = block.scale.double().view(1) if in_float64 else block.scale
    x = block.cosines * scale if in_float64 else (block.cosines - origin).mul_(scale)
    log_sum = x.logsumexp(-1, keepdim=True)
    x -= log_sum
    zero = log_sum.new_zeros(())
    nll, slope, share = None, zero if alpha is None else alpha, zero
    if beta is not None:
        p = dense.top_one_probabilities(_reference(block), scale, options)
        nll, slope, share = -(p * x).sum(-1), slope + beta, beta * p
    if with_gradient:
        torch.addcmul(-share, x.exp_(), slope, out=block.cosines)
    return nll, log_sum - origin * scale if in_float64 else log_sum


def _reference(block: Block) -> Tensor:
    """``[matrices, n, N]``, equal items tied exactly despite rounding of their cosines."""
    if block.reference is not None and all(equal is None for equal in block.first_equal):
        return block.reference
    references = block.cosines.unbind()[::-1] if block.reference is None else block.reference
    reference = torch.empty_like(block.cosines)
    for y, equal, out in zip(references, block.first_equal, reference, strict=True):
        out.copy_(y) if equal is None else torch.index_select(y, -1, equal, out=out)
    return reference


def _without_own(block: Block, options: RankOptions, with_gradient: bool) -> Evaluated:
    """With ``diagonal=False``: cross-entropy of all items, lists of all items except the own pair."""
    n, n_items = block.cosines.shape[1:]
    own = torch.arange(block.first_row, block.first_row + n, device=block.cosines.device)
    others = other_items(own, n_items).expand(len(block.cosines), -1, -1)
    cosines, reference = (m.gather(-1, others) for m in (block.cosines, _reference(block)))
    lists = block._replace(
        cosines=cosines, alpha=None, reference=reference, first_equal=(None,) * len(reference)
    )
    evaluator = _plackett_luce if options.model == "plackett_luce" else _softmax
    nll, _ = evaluator(lists, options, cosines[..., :1].clone(), with_gradient)
    cross_entropy = None
    if block.alpha is not None:
        cross_entropy = evaluate(
            block._replace(beta=None), options, with_gradient=with_gradient
        ).cross_entropy
    elif with_gradient:
        block.cosines.zero_()
    gradient = block.cosines.scatter_add_(-1, others, cosines) if with_gradient else None
    return Evaluated(cross_entropy, nll, gradient)


# --- the terms of a batch ---------------------------------------------------------------------------------


class RowLists(NamedTuple):
    """CLIP's cross-entropy, the cross-modal and the in-modal term of a batch of row lists."""

    batch: Batch
    options: RankOptions
    wanted: Sequence[bool]
    evaluate: Callable[..., Evaluated] = evaluate

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> Streamed:
        """The three terms, zero if not wanted, and the gradients of their sum."""
        batch = replace(self.batch, inputs=Inputs(*inputs))
        scale = batch.inputs.scale
        weights = nan_unless_finite(weights, *batch.features)
        values = [weights.new_zeros(()) for _ in self.wanted]
        features = {name: x for name, x in batch.inputs._asdict().items() if x is not None}
        sums = {name: torch.zeros_like(x) for name, x in features.items()} if with_gradient else None
        share = self.options.anchor_weight(batch.anchors, batch.items)
        for place, term in enumerate(RANK_TERMS, 1):
            alpha = beta = None
            if self.wanted[0] and term == "cross_modal":
                alpha = torch.stack([weights[0] / (2 * batch.anchors)] * 2)
            if self.wanted[place]:
                beta = torch.stack([weights[place] * (share * x) for x in self.options.directions])
            if alpha is None and beta is None:
                continue
            references = batch.references(term) if beta is not None else ()
            ties = tuple(batch.first_equal[x.factors[1]] for x in references)
            evaluator = evaluate if beta is None else self.evaluate
            # The gradient is by the cosines, so that no sum needs the factor s.
            by_alpha, by_beta = (None if x is None else x * scale for x in (alpha, beta))

            def evaluate_lists(cosines: Tensor, reference: Tensor | None, first_row: int) -> Evaluated:
                block = Block(cosines, scale, by_alpha, by_beta, reference, ties, first_row)  # noqa: B023
                return evaluator(block, self.options, with_gradient=with_gradient)  # noqa: B023

            cross_entropy, nll = accumulate(
                evaluate_lists,
                batch.matrices(term),
                () if batch.teacher is None else references,
                sums,
                batch.first_row,
                self.options.chunk_size,
                in_slices=evaluator is evaluate,
            )
            if alpha is not None:
                values[0] = torch.dot(alpha, cross_entropy)
            if beta is not None:
                values[place] = torch.dot(beta, nll)
        if sums is None:
            return values, [None] * len(inputs)
        # ∂s = Σ (G·K)∘Q, from the sums by the anchors; if the anchors are the items, each matrix is in the
        # sums twice.
        is_local = "image_anchors" in features
        anchors = ("image_anchors", "text_anchors") if is_local else ("image", "text")
        by_anchors = [(sums[name] * features[name]).sum() for name in anchors]
        sums["scale"] = torch.stack(by_anchors).sum() / ((1 if is_local else 2) * scale)
        return values, [sums.get(name) for name in Inputs._fields]

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """The same by :mod:`rankloss.dense`."""
        batch = replace(self.batch, inputs=Inputs(*inputs))
        return dense.terms(batch, self.options, nan_unless_finite(weights, *batch.features), self.wanted)


def weighted_terms(
    batch: Batch, options: RankOptions, weights: Sequence[float], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight.

    An anchor's rank term is the mean of its lists' NLL over the two directions. ``reduction="mean"`` divides
    each list by its Σ_p μ_p and averages the anchors. ``"sum"`` is N times the average of the anchors' sums:
    the plain sum if every item is an anchor. If a process has only a share of the anchors, this keeps the
    balance between terms. The cross-entropy is always the mean over the anchors.

    Args:
        batch: the features.
        options: of the rank terms.
        weights: of the three terms.
        wanted: True for each term to compute; the others are zero. Only row lists of worth ``exp`` can
            include the cross-entropy.

    Returns:
        Three scalars in the batch's dtype, ``[n]`` with ``reduction="none"``.
    """
    inputs = batch.inputs
    factors = torch.tensor(weights, dtype=batch.sum_dtype, device="cpu")
    factors = factors.to(inputs.image.device, non_blocking=True)
    lists = RowLists(batch, options, wanted)
    if options.kernel != "torch":
        module = options.kernel_module(inputs.image, batch.anchors)
        batch = replace(batch, find_equal=module.first_equal)
        lists = lists._replace(batch=batch, evaluate=module.evaluate)
    return tuple(lists.definition(inputs, factors) if options.is_dense else apply(lists, factors, inputs))
