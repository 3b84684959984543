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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from rankloss import dense
from rankloss.batch import RANK_TERMS, Batch, Inputs, Matrix, Term, other_items
from rankloss.options import RankOptions
from rankloss.precision import full_precision, nan_unless_finite
from rankloss.ranking import LogSums, WorthSums, rank

# Limits in matrix entries: of a matrix whose gradient is kept until its mirror image is known, of a chunk of
# rows, and of a slice of lists that fits a core's cache.
_KEPT = 2**24
_CHUNK = {"cpu": 2**20}
_CHUNK_ELSEWHERE = 2**24
_LISTS = {"cpu": 2**17}
_LISTS_ELSEWHERE = 2**23
# Below these numbers overhead exceeds the work.
_FEWEST_ROWS = 128
_FEWEST_LISTS = 16
_OWN_ANCHORS = ("image_anchors", "text_anchors")


# --- any streamed loss ------------------------------------------------------------------------------------


class StreamedTerms(Protocol):
    """Terms computed together with their gradients; unwanted terms are zero."""

    @property
    def wanted(self) -> Sequence[bool]:
        """True for each term to compute."""

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> Streamed:
        """The terms times ``weights``, and the gradients of their sum, by :func:`streamed`."""

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """The same terms as differentiable operations on whole matrices."""


class Streamed(NamedTuple):
    """Terms with the gradients of their sum.

    Attributes:
        values: the terms, scalars.
        gradients: by each of the inputs, those by features without ``factor``; None where there is none.
        factor: a scalar; None without gradients. The backward pass multiplies the features' gradients by it
            and by its own upstream value at once, since each product with a scalar moves all of them.
    """

    values: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    factor: Tensor | None


def apply(terms: StreamedTerms, weights: Tensor, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The terms times ``weights``, differentiable by the inputs.

    The inputs and the gradients of the terms' sum are kept for the backward pass; under ``torch.no_grad()``,
    or if no input requires a gradient, only values are computed. If the terms have different upstream values,
    the gradients of their sum do not serve, and the pass is run once more. A backward pass with
    ``create_graph=True`` differentiates the definition, in quadratic memory.
    """
    if not torch.is_grad_enabled():  # otherwise autograd asks for the gradients of inputs that have a graph
        inputs = [None if x is None else x.detach() for x in inputs]
    return tuple(_Streamed.apply(terms, weights, *inputs))  # type: ignore[no-untyped-call]


class _Streamed(torch.autograd.Function):
    """:func:`apply` as an autograd function; the first of the inputs are the images' features."""

    @staticmethod
    def forward(
        ctx: Any, terms: StreamedTerms, weights: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.terms = terms
        ctx.weights = weights
        image = inputs[0]
        assert image is not None
        with full_precision(image.device):
            values, gradients, factor = terms.stream(inputs, weights, any(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)  # so that a term that is not used has the upstream value None
        ctx.save_for_backward(*inputs, *gradients, factor)
        return tuple(value.to(image.dtype) for value in values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: each access unpacks them, which triggers hooks and checkpoints
        n_inputs = len(saved) // 2  # as many inputs as gradients, and the factor
        inputs, gradients, factor = saved[:n_inputs], saved[n_inputs:-1], saved[-1]
        # The terms and the weights, which come before the inputs, get no gradients.
        _, _, *are_asked_for = ctx.needs_input_grad
        with full_precision(inputs[0].device):
            if torch.is_grad_enabled():  # with create_graph=True: the gradients are to be differentiated
                return None, None, *_by_definition(ctx.terms, ctx.weights, inputs, are_asked_for, upstream)
            wanted = ctx.terms.wanted
            of_wanted_terms = [g for g, is_wanted in zip(upstream, wanted, strict=True) if is_wanted]
            shared_upstream = _shared_upstream(of_wanted_terms)
            if shared_upstream is None:  # stream again, the terms weighted by their upstream values
                zero = ctx.weights.new_zeros(())
                weights = ctx.weights * torch.stack([zero if g is None else g for g in upstream])
                _, gradients, factor = ctx.terms.stream(inputs, weights, with_gradient=True)
                shared_upstream = inputs[0].new_ones(())
            return None, None, *_times_upstream(gradients, are_asked_for, shared_upstream, factor)


def _times_upstream(
    gradients: Sequence[Tensor | None], are_asked_for: Sequence[bool], upstream: Tensor, factor: Tensor
) -> list[Tensor | None]:
    """The gradients that are asked for, times an upstream value; those by features lack ``factor``, too."""
    for_features = upstream * factor
    by_inputs: list[Tensor | None] = []
    for gradient, is_asked_for in zip(gradients, are_asked_for, strict=True):
        if gradient is None or not is_asked_for:
            by_inputs.append(None)
        else:
            is_by_features = gradient.dim() == 2  # the others are by numbers, such as the scale
            by_inputs.append((for_features if is_by_features else upstream) * gradient)
    return by_inputs


def _shared_upstream(upstream: Sequence[Tensor | None]) -> Tensor | None:
    """The upstream value shared by all terms; None if they differ, or comparing would wait for a device."""
    first = upstream[0]
    for g in upstream:
        if first is None or g is None:
            return None
        is_same_tensor = g.data_ptr() == first.data_ptr()  # as where the terms are added up
        if not is_same_tensor and not (g.is_cpu and torch.equal(g, first)):
            return None
    return first


def _by_definition(
    terms: StreamedTerms,
    weights: Tensor,
    inputs: Sequence[Tensor | None],
    are_asked_for: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by each of the inputs, None where not asked for, that are differentiable again."""
    # Use aliases: one input may depend on another, as gathered features on the local ones, and the outer
    # graph adds the derivative along that path.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    outputs = []
    upstream_of_outputs = []
    for value, g in zip(terms.definition(aliases, weights), upstream, strict=True):
        if value.requires_grad and g is not None:
            outputs.append(value)
            upstream_of_outputs.append(g)
    asked_inputs = {place: x for place, x in enumerate(aliases) if x is not None and are_asked_for[place]}
    if not outputs:  # no term depends on an input, or none has an upstream value
        gradients: Sequence[Tensor] = [torch.zeros_like(x) for x in asked_inputs.values()]
    else:
        gradients = torch.autograd.grad(
            outputs,
            list(asked_inputs.values()),
            upstream_of_outputs,
            create_graph=True,
            materialize_grads=True,
        )
    gradient_at = dict(zip(asked_inputs, gradients, strict=True))
    return [gradient_at.get(place) for place in range(len(inputs))]


# --- a loop over rows -------------------------------------------------------------------------------------


EvaluateLists: TypeAlias = Callable[[Tensor, Tensor | None, int], Sequence[Tensor | None]]
"""Loss of a block of lists: two values ``[matrices, n]`` and the gradient by the scores ``[matrices, n, N]``.

The arguments are cosines ``[matrices, n, N]``, a teacher's cosines or None, and the column of the first
list's own pair. If a chunk is evaluated in slices, the gradient overwrites the cosines.
"""


class Loop(NamedTuple):
    """A loop over the rows of one matrix, or of the two of a term.

    Attributes:
        evaluate: the loss of a block of lists.
        matrices: the matrices, of one shape.
        first_row: the column of the first anchor's own pair.
        references: a teacher's matrices, one for each, or none.
        chunk_size: rows computed at a time; None chooses from the sizes and the device.
        in_slices: evaluate the lists of a chunk in slices that fit a core's cache; otherwise all at once.
    """

    evaluate: EvaluateLists
    matrices: Sequence[Matrix]
    first_row: int
    references: Sequence[Matrix] = ()
    chunk_size: int | None = None
    in_slices: bool = True

    @property
    def rows_at_once(self) -> int:
        """The number of rows computed at a time."""
        items = self.matrices[0].items
        entries = _CHUNK.get(items.device.type, _CHUNK_ELSEWHERE)
        return self.chunk_size or max(_FEWEST_ROWS, entries // len(items))

    @property
    def lists_at_once(self) -> int:
        """The number of lists of each matrix that are evaluated at a time."""
        items = self.matrices[0].items
        if not self.in_slices:
            return self.rows_at_once
        entries = _LISTS.get(items.device.type, _LISTS_ELSEWHERE)
        return max(_FEWEST_LISTS, entries // len(items) // len(self.matrices))

    @property
    def keeps_gradients(self) -> bool:
        """True if gradients are kept until their mirror images are known.

        Only matrices that are each other's transposes have mirror images. Kept gradients take up to a whole
        matrix: they are kept if it has at most ``_KEPT`` entries, and no ``chunk_size`` asks for less memory,
        or if all rows are one chunk in any case.
        """
        n_anchors = len(self.matrices[0].anchors)
        n_items = len(self.matrices[0].items)
        are_all_at_once = self.rows_at_once >= n_anchors
        is_small = self.chunk_size is None and n_anchors * n_items <= _KEPT
        have_mirror_images = bool(_mirrors(self.matrices))
        return have_mirror_images and (are_all_at_once or is_small)


def streamed(
    loops: Sequence[Loop],
    inputs: Mapping[str, Tensor | None],
    with_gradient: bool,
    share: Tensor | None = None,
) -> tuple[list[list[Any]], dict[str, Tensor], Tensor | None]:
    """Values of loops over rows, and the gradients by the features and by the scale of their matrices.

    Args:
        loops: the loops; the gradient of each is by the scores s·C.
        inputs: the features by the names of the matrices' factors, and ``scale``.
        with_gradient: False skips the gradients.
        share: a factor of all gradients that the loops leave out.

    Returns:
        For each loop both values of a list, summed over the rows: ``[matrices]`` each, None if there is none;
        the gradients by name, none if they are not wanted; and the factor that those by features lack, see
        :class:`Streamed`.
    """
    features = {name: x for name, x in inputs.items() if x is not None and x.dim() == 2}
    sums = {name: torch.zeros_like(x) for name, x in features.items()} if with_gradient else None
    values = [accumulate(loop, sums) for loop in loops]
    if sums is None:
        return values, {}, None
    scale = inputs["scale"]
    assert scale is not None
    by_scale = _by_scale(features, sums)
    if share is None:
        return values, {**sums, "scale": by_scale}, scale
    return values, {**sums, "scale": (share * by_scale).to(scale.dtype)}, share * scale


def _by_scale(features: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> Tensor:
    """∂s = Σ G∘C over all matrices, from the sums G·K of the anchors and Gᵀ·Q of the items.

    A matrix's Σ G∘C is Σ (G·K)∘Q and also Σ (Gᵀ·Q)∘K. If anchors are this process's alone, they have names
    and sums of their own, and fewer rows than the items: the first form serves. Otherwise the same features
    are anchors and items, and the products with their sums contain both forms.
    """
    own_anchors = [name for name in _OWN_ANCHORS if name in features]
    products = [(sums[name] * features[name]).sum() for name in own_anchors or features]
    total = torch.stack(products).sum()
    return total if own_anchors else total / 2


def accumulate(loop: Loop, sums: dict[str, Tensor] | None) -> list[Any]:
    """Add up the values of all rows of the matrices, and add their gradients to ``sums``.

    Args:
        loop: the loop.
        sums: the gradients by the factors of the matrices, by name, without the factor s; initially zeros.
            None if no gradient is wanted.

    Returns:
        Both values of a list, summed over the rows: ``[matrices]`` each; None if there is none.
    """
    n_anchors = len(loop.matrices[0].anchors)
    mirrored: Mirrored = [] if loop.keeps_gradients else None
    values: list[Sequence[Tensor | None]] = []  # of every slice of lists, the first and the second value
    for first in range(0, n_anchors, loop.rows_at_once):
        rows = slice(first, min(first + loop.rows_at_once, n_anchors))
        chunk_values, by_scores = _evaluate_chunk(loop, rows)
        values += chunk_values
        if sums is not None:
            _add_gradients(loop.matrices, rows, by_scores, sums, mirrored)
    sums_over_rows = []
    for of_slices in zip(*values, strict=True):  # first values, then second values
        is_computed = of_slices[0] is not None
        sums_over_rows.append(torch.cat(of_slices, -1).sum(-1) if is_computed else None)
    return sums_over_rows


def _evaluate_chunk(loop: Loop, rows: slice) -> tuple[list[Sequence[Tensor | None]], Tensor]:
    """The values of every slice of a chunk of rows, and the gradient by the scores, ``[matrices, n, N]``.

    Where the loop wants no gradient, the second tensor has no meaning.
    """
    n = rows.stop - rows.start
    items = loop.matrices[0].items
    cosines = items.new_empty(len(loop.matrices), n, len(items))
    for k, matrix in enumerate(loop.matrices):
        torch.mm(matrix.anchors[rows], matrix.items.T, out=cosines[k])
    references = None
    if loop.references:
        references = torch.stack([matrix.anchors[rows] @ matrix.items.T for matrix in loop.references])
    values: list[Sequence[Tensor | None]] = []
    # In slices, ``evaluate`` writes the gradient over the cosines. Otherwise all lists of the chunk are one
    # slice, whose gradient is a tensor of its own.
    by_scores = cosines
    for start in range(0, n, loop.lists_at_once):
        lists = slice(start, start + loop.lists_at_once)
        reference = None if references is None else references[:, lists]
        first_row = loop.first_row + rows.start + start
        *values_of_slice, gradient = loop.evaluate(cosines[:, lists], reference, first_row)
        values.append(values_of_slice)
        if gradient is not None and not loop.in_slices:
            by_scores = gradient
    return values, by_scores


# --- gradients by features --------------------------------------------------------------------------------


Mirrored: TypeAlias = list[tuple[int, list[Tensor]]] | None
"""Of each chunk its first row, and for each matrix the mirror images of the gradients that wait."""


def _add_gradients(
    matrices: Sequence[Matrix], rows: slice, by_scores: Tensor, sums: dict[str, Tensor], mirrored: Mirrored
) -> None:
    """Add the gradients of given rows of every matrix.

    Two transposed matrices multiply the same features. With G their gradients and G' that of the transpose,
    H = G + G'ᵀ is formed first, if gradients are kept, and each of its entries is multiplied once. A chunk
    multiplies its rows of H up to its last column; the columns behind wait for their mirror images. So rows
    0 and 1 of four, a first chunk, are multiplied with the items 0 and 1, rows 2 and 3 with all four, and
    the items 0 and 1 with the latter.

    Args:
        matrices: one, or the two of a term.
        rows: the rows.
        by_scores: the gradient by the scores, ``[matrices, n, N]``; it is overwritten.
        sums: the gradients by the factors of the matrices, by name, without the factor s.
        mirrored: of each earlier chunk its first row, and for each matrix the mirror images of the gradients
            from the column of that row on; this chunk's are appended. None keeps none.
    """
    columns_of_rows = columns_of_items = slice(None)
    if mirrored is not None:  # the later columns' gradients wait for their mirror images
        columns_of_rows = slice(rows.stop)
        columns_of_items = slice(rows.start)
        # Matrix k's mirror images are in the gradient of its transpose, transposed.
        images = [by_scores[transpose, :, rows.start :].T for transpose in _mirrors(matrices)]
        copies = [image.clone(memory_format=torch.contiguous_format) for image in images]
        mirrored.append((rows.start, copies))
    for k, (matrix, gradient) in enumerate(zip(matrices, by_scores, strict=True)):
        # This chunk is one of them: its own columns have their mirror images in it.
        for first_row, images in mirrored or ():
            place = rows.start - first_row  # of this chunk's first row in the image, whose row 0 is first_row
            image = images[k][place : place + len(gradient)]
            columns = slice(first_row, first_row + image.shape[1])  # the rows of that chunk
            gradient[:, columns].add_(image)  # += would copy the sum onto itself
        anchors, items = matrix.factors
        sums[anchors][rows].addmm_(gradient[:, columns_of_rows], matrix.items[columns_of_rows])
        sums[items][columns_of_items].addmm_(gradient[:, columns_of_items].T, matrix.anchors[rows])


def _mirrors(matrices: Sequence[Matrix]) -> list[int]:
    """For each matrix the place of the one that is its transpose; empty if one has none."""
    factors = [matrix.factors for matrix in matrices]
    factors_of_transposed = [(items, anchors) for anchors, items in factors]
    if any(pair not in factors for pair in factors_of_transposed):
        return []
    return [factors.index(pair) for pair in factors_of_transposed]


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
    """The cross-entropies (weight α) and C(x | y) (weight β) of a block of lists, and their gradient.

    If wanted, the gradient overwrites the cosines. Sums are in float64 where the weights are. Otherwise they
    are sums of logarithms, of scores relative to the own pair's.
    """
    if block.beta is not None and not options.diagonal:
        return _without_own_pairs(block, options, with_gradient)
    # [matrices, n, 1]; always a copy, which keeps its values when the gradient overwrites the cosines.
    own_cosines = block.cosines.diagonal(block.first_row, 1, 2)[..., None].clone()
    # Only C(x | y) of Plackett-Luce needs a ranking; a softmax serves top-one, and the cross-entropy alone.
    is_ranked = block.beta is not None and options.model == "plackett_luce"
    evaluate_model = _plackett_luce if is_ranked else _softmax
    # Relative to the own pair's score x_k, log Σ e^x is the cross-entropy, log Σ e^x − x_k.
    nll, cross_entropy = evaluate_model(block, options, own_cosines, with_gradient)
    gradient = block.cosines if with_gradient else None
    if block.alpha is None:  # no cross-entropy is wanted
        return Evaluated(None, nll, gradient)
    if gradient is not None:  # the models leave out −α·[q = k]
        gradient.diagonal(block.first_row, 1, 2).sub_(block.alpha[:, None])
    return Evaluated(cross_entropy.squeeze(-1), nll, gradient)


def _plackett_luce(
    block: Block, options: RankOptions, origin: Tensor, with_gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """C(x | y), ``[matrices, n]``, and log Σ e^x − s·origin, ``[matrices, n, 1]``.

    If wanted, the gradient of β·C(x | y) + α·log Σ e^x by the scores overwrites the cosines. ``origin``
    is a cosine of each list, ``[matrices, n, 1]``.
    """
    alpha = _by_list(block.alpha)
    beta = _by_list(block.beta)
    assert beta is not None
    in_float64 = beta.dtype == torch.float64
    ranking = rank(_reference(block), options, by_numpy=in_float64 and beta.is_cpu)
    cosines = block.cosines if ranking.order is None else block.cosines.gather(-1, ranking.order)
    sums: WorthSums | LogSums
    if in_float64:
        scale = block.scale.double().view(1)  # one dimension, so that a product with it is float64
        sums = WorthSums(ranking, cosines * scale)
        log_sum = sums.log_sum - origin * scale
    else:
        # Subtract first: a difference of close cosines is exact, where a product's rounding would matter.
        sums = LogSums(ranking, (cosines - origin).mul_(block.scale))
        log_sum = sums.log_sum
    divisor = ranking.items if options.reduction == "mean" else 1
    nll = sums.nll().div_(divisor)
    if with_gradient:
        sums.gradient(beta / divisor, alpha, out=cosines)
        if ranking.order is not None:
            block.cosines.scatter_(-1, ranking.order, cosines)
    return nll.squeeze(-1), log_sum


def _softmax(
    block: Block, options: RankOptions, origin: Tensor, with_gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """C(x | y) of ``top_one``, or None without beta, and log Σ e^x − s·origin.

    Shapes, ``origin`` and the gradient are those of :func:`_plackett_luce`.
    """
    alpha = _by_list(block.alpha)
    beta = _by_list(block.beta)
    in_float64 = any(weight is not None and weight.dtype == torch.float64 for weight in (alpha, beta))
    if in_float64:
        scale = block.scale.double().view(1)
        scores = block.cosines * scale
        log_sum = scores.logsumexp(-1, keepdim=True)
        relative_log_sum = log_sum - origin * scale
    else:
        scale = block.scale
        scores = (block.cosines - origin).mul_(scale)
        log_sum = relative_log_sum = scores.logsumexp(-1, keepdim=True)
    log_softmax = scores.sub_(log_sum)
    zero = log_sum.new_zeros(())
    nll = None
    # The gradient is slope·softmax − target, of both values together.
    slope = zero if alpha is None else alpha
    target = zero
    if beta is not None:
        p = dense.top_one_probabilities(_reference(block), scale, options)
        nll = -(p * log_softmax).sum(-1)
        slope = slope + beta
        target = beta * p
    if with_gradient:
        torch.addcmul(-target, log_softmax.exp_(), slope, out=block.cosines)
    return nll, relative_log_sum


def _by_list(weights: Tensor | None) -> Tensor | None:
    """The weights of matrices, to be multiplied with lists ``[matrices, n, N]``."""
    return None if weights is None else weights.view(-1, 1, 1)


def _reference(block: Block) -> Tensor:
    """``[matrices, n, N]``, equal items tied exactly despite rounding of their cosines."""
    if block.reference is not None and all(equal is None for equal in block.first_equal):
        return block.reference
    if block.reference is None:  # each of two matrices ranks the other
        references: Sequence[Tensor] = block.cosines.unbind()[::-1]
    else:
        references = block.reference.unbind()
    tied = torch.empty_like(block.cosines)
    for reference, equal, out in zip(references, block.first_equal, tied, strict=True):
        if equal is None:
            out.copy_(reference)
        else:
            torch.index_select(reference, -1, equal, out=out)
    return tied


def _without_own_pairs(block: Block, options: RankOptions, with_gradient: bool) -> Evaluated:
    """As :func:`evaluate`, with ``diagonal=False``: C(x | y) leaves out each row's own pair.

    The cross-entropy is still over all items.
    """
    n_matrices, n, n_items = block.cosines.shape
    own_columns = torch.arange(block.first_row, block.first_row + n, device=block.cosines.device)
    others = other_items(own_columns, n_items).expand(n_matrices, -1, -1)
    cosines = block.cosines.gather(-1, others)
    reference = _reference(block).gather(-1, others)
    already_tied = (None,) * len(reference)
    lists = block._replace(cosines=cosines, alpha=None, reference=reference, first_equal=already_tied)
    evaluate_model = _plackett_luce if options.model == "plackett_luce" else _softmax
    origin = cosines[..., :1].clone()  # any item's serves, in place of the own pair's
    nll, _ = evaluate_model(lists, options, origin, with_gradient)  # ``cosines`` now holds C's gradient
    # The block's cosines become the gradient by all items: the cross-entropy's, or zeros without alpha.
    cross_entropy = None
    if block.alpha is not None:
        all_items = block._replace(beta=None)
        cross_entropy = evaluate(all_items, options, with_gradient=with_gradient).cross_entropy
    elif with_gradient:
        block.cosines.zero_()
    gradient = block.cosines.scatter_add_(-1, others, cosines) if with_gradient else None
    return Evaluated(cross_entropy, nll, gradient)


# --- the terms of a batch ---------------------------------------------------------------------------------


_PLACES = {term: place for place, term in enumerate(RANK_TERMS, 1)}
"""The places of the rank terms in the three terms, of which the first is CLIP's cross-entropy."""


class RowLists(NamedTuple):
    """CLIP's cross-entropy, the cross-modal and the in-modal term of a batch of row lists.

    Attributes:
        batch: the features.
        options: of the rank terms.
        wanted: True for each of the three terms to compute.
        evaluate: of a block of ranked lists: :func:`evaluate`, or a kernel's function of its arguments.
    """

    batch: Batch
    options: RankOptions
    wanted: Sequence[bool]
    evaluate: Callable[..., Evaluated] = evaluate

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> Streamed:
        """The three terms, zero if not wanted, and the gradients of their sum."""
        batch = replace(self.batch, inputs=Inputs(*inputs))
        weights = nan_unless_finite(weights, *batch.features)
        by_term = {term: self._matrix_weights(term, weights) for term in RANK_TERMS}
        terms = [term for term in RANK_TERMS if any(weight is not None for weight in by_term[term])]
        loops = [self._loop(batch, term, *by_term[term], with_gradient) for term in terms]
        sums, gradients, factor = streamed(loops, batch.inputs._asdict(), with_gradient)
        values = [weights.new_zeros(()) for _ in self.wanted]
        for term, (cross_entropy, nll) in zip(terms, sums, strict=True):  # sums over the rows, by matrix
            alpha, beta = by_term[term]
            if alpha is not None:
                values[0] = torch.dot(alpha, cross_entropy)
            if beta is not None:
                values[_PLACES[term]] = torch.dot(beta, nll)
        return Streamed(values, [gradients.get(name) for name in Inputs._fields], factor)

    def _matrix_weights(self, term: Term, weights: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """α and β of a term's two matrices, ``[2]`` each: the weights of a list's cross-entropy and NLL.

        None where the matrices have no such value: the in-modal ones have no cross-entropy.
        """
        alpha = beta = None
        if self.wanted[0] and term == "cross_modal":  # the mean over the anchors and the two directions
            alpha = torch.stack([weights[0] / (2 * self.batch.anchors)] * 2)
        if self.wanted[_PLACES[term]]:
            share = self.options.anchor_weight(self.batch.anchors, self.batch.items)
            weight = weights[_PLACES[term]]
            beta = torch.stack([weight * (share * direction) for direction in self.options.directions])
        return alpha, beta

    def _loop(
        self, batch: Batch, term: Term, alpha: Tensor | None, beta: Tensor | None, with_gradient: bool
    ) -> Loop:
        """The loop over the rows of a term's matrices."""
        is_ranked = beta is not None  # otherwise the cross-entropy alone is wanted
        references = batch.references(term) if is_ranked else ()
        first_equal = tuple(batch.first_equal[matrix.item_factor] for matrix in references)
        evaluate_block = self.evaluate if is_ranked else evaluate  # a kernel is for ranked lists

        def evaluate_lists(cosines: Tensor, reference: Tensor | None, first_row: int) -> Evaluated:
            block = Block(cosines, batch.inputs.scale, alpha, beta, reference, first_equal, first_row)
            return evaluate_block(block, self.options, with_gradient=with_gradient)

        return Loop(
            evaluate_lists,
            batch.matrices(term),
            batch.first_row,
            # Without a teacher the matrices rank each other, and need no products beside their own.
            references=() if batch.teacher is None else references,
            chunk_size=self.options.chunk_size,
            in_slices=evaluate_block is evaluate,  # a kernel takes a whole chunk
        )

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """The same by :mod:`rankloss.dense`."""
        batch = replace(self.batch, inputs=Inputs(*inputs))
        return dense.terms(batch, self.options, nan_unless_finite(weights, *batch.features), self.wanted)


def weighted_terms(
    batch: Batch, options: RankOptions, weights: Sequence[float], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """CLIP's cross-entropy, the cross-modal and the in-modal term, each times its weight.

    An anchor's rank term is the mean of its lists' NLL over the directions. ``reduction="mean"`` divides
    each list by its number of counted items and averages the anchors. ``"sum"`` is N times the average of the
    anchors' sums: the plain sum if every item is an anchor. If a process has only a share of the anchors,
    this keeps the balance between terms. The cross-entropy is always the mean over the anchors.

    Args:
        batch: the features.
        options: of the rank terms.
        weights: of the three terms.
        wanted: True for each term to compute; the others are zero.

    Returns:
        Three scalars in the batch's dtype, ``[n]`` with ``reduction="none"``.

    Raises:
        ValueError: if the options' kernel is missing or does not support the case.
    """
    inputs = batch.inputs
    weights_on_cpu = torch.tensor(weights, dtype=batch.sum_dtype, device="cpu")
    term_weights = weights_on_cpu.to(inputs.image.device, non_blocking=True)
    lists = RowLists(batch, options, wanted)
    if options.kernel != "torch":
        features = inputs.image
        module = options.kernel_module(features.device, features.dtype, batch.anchors, len(features))
        batch = replace(batch, find_equal=module.first_equal)
        lists = lists._replace(batch=batch, evaluate=module.evaluate)
    if options.reduction == "none":
        return tuple(lists.definition(inputs, term_weights))
    return apply(lists, term_weights, inputs)
