"""Sums over the pairs of two lists of scores, without a tensor of all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import precision

_PAIRS_AT_ONCE = {"cpu": 2**17, "accelerator": 2**24}
_LONG_LIST = 16  # candidates from which cells can be faster than pairs
_MOST_POINTS = 2048  # rows of a table
_PAIRS_OF_ENTRY = 8  # pairs that cost as much as an entry of the table
_NODES = {torch.float32: 7, torch.float64: 14}  # polynomials of a cell


def softplus(z: Tensor) -> Tensor:
    """``log(1 + e^z)``, which is −log σ(−z)."""
    return F.softplus(z, threshold=40.0)  # beyond it z itself, to the last bit of float64


def pair_sums(
    x: Tensor,
    y: Tensor,
    better: Tensor | None = None,
    worse: Tensor | None = None,
    by_difference: bool = False,
) -> Tensor:
    """``Σ_q w_pq·log(1 + e^{y_q − x_p})`` for x ``[n, P]`` and y ``[n, Q]``: ``[n, P]``.

    A block of pairs is computed at a time, which stays in a processor's cache; the derivative of the gradient
    holds all pairs at once.

    Args:
        x: ``[n, P]``.
        y: ``[n, Q]``.
        better: ``[n, P]``, a number of each item of x; None for the weight 1 of all pairs.
        worse: ``[n, Q]``, a number of each item of y, with ``better``. w_pq is 0 unless better_p > worse_q.
        by_difference: w_pq is better_p − worse_q; False for the smaller of it and 1, which is 1 for integers.
    """
    sums: Tensor = _PairSums.apply(x, y, better, worse, by_difference)  # type: ignore[no-untyped-call]
    return sums


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, better: Tensor | None, worse: Tensor | None, by_difference: bool
    ) -> Tensor:
        ctx.save_for_backward(x, y, better, worse)
        ctx.by_difference = by_difference
        sums = torch.empty_like(x)
        for rows, columns in _blocks(x, y):
            terms = softplus(y[rows, None] - x[rows, columns, None])
            sums[rows, columns] = _weighted(terms, better, worse, by_difference, rows, columns).sum(-1)
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, better, worse = ctx.saved_tensors
        (g,) = upstream
        if torch.is_grad_enabled():
            by_x, by_y = _pair_gradients(x, y, g, better, worse, ctx.by_difference)
            return by_x, by_y, None, None, None
        by_x = torch.empty_like(x)
        by_y = torch.zeros_like(y)
        with precision.full_precision(x.device):
            for rows, columns in _blocks(x, y):
                slopes = (y[rows, None] - x[rows, columns, None]).sigmoid_()
                slopes = _weighted(slopes, better, worse, ctx.by_difference, rows, columns)
                by_x[rows, columns] = -g[rows, columns] * slopes.sum(-1)
                by_y[rows] += (g[rows, None, columns] @ slopes).squeeze(1)
        return by_x, by_y, None, None, None


def _pair_gradients(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    better: Tensor | None = None,
    worse: Tensor | None = None,
    by_difference: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`pair_sums`, which can be differentiated again."""
    slopes = (y[:, None] - x[:, :, None]).sigmoid()
    slopes = g[:, :, None] * _weighted(slopes, better, worse, by_difference)
    return -slopes.sum(-1), slopes.sum(1)


def _weighted(
    terms: Tensor,
    better: Tensor | None,
    worse: Tensor | None,
    by_difference: bool,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """The terms of a block of pairs times their weights, see :func:`pair_sums`."""
    if better is None or worse is None:
        return terms
    differences = better[rows, columns, None] - worse[rows, None]
    largest_weight = None if by_difference else 1.0
    return terms * differences.clamp(0.0, largest_weight)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of lists and columns of x whose pairs with all y are of a block's size."""
    n, width = x.shape
    pairs_at_once = _PAIRS_AT_ONCE["cpu" if x.is_cpu else "accelerator"]
    pairs_of_item = max(1, y.shape[1])
    columns = min(width, max(1, pairs_at_once // pairs_of_item))
    rows = max(1, pairs_at_once // (columns * pairs_of_item))
    for first_row in range(0, n, rows):
        for first_column in range(0, width, columns):
            yield slice(first_row, first_row + rows), slice(first_column, first_column + columns)


# --- by cells of the scores ---------------------------------------------------------------------------------


def rest_sums(x: Tensor, rest: Tensor) -> Tensor:
    """``Σ_q log(1 + e^{rest_q − x_p})``: ``[n, K]``, of long lists on a CPU by cells of the scores."""
    is_long = x.shape[1] >= _LONG_LIST
    can_choose_by_values = x.is_cpu and precision.can_be_read(x)  # an accelerator's host would wait for them
    if not (is_long and can_choose_by_values):
        return pair_sums(x, rest)
    scores = x.detach()
    rest_scores = rest.detach()
    is_outside = rest_scores == -math.inf  # of the list
    least_of_rest = rest_scores.masked_fill(is_outside, math.inf).amin(-1, keepdim=True)
    low = torch.minimum(scores.amin(-1, keepdim=True), least_of_rest)
    high = torch.maximum(scores.amax(-1, keepdim=True), rest_scores.amax(-1, keepdim=True))
    cells = float((high - low).amax()) + 1  # of one nat each
    points = _NODES[rest.dtype] * cells
    # A table of points² numbers shall cost less than the pairs.
    pairs = x.numel() * rest.shape[1]
    most_points = min(_MOST_POINTS, math.sqrt(pairs / _PAIRS_OF_ENTRY))
    if not points <= most_points:  # also for a span of NaN, which compares as False
        return pair_sums(x, rest)
    sums: Tensor = _CellSums.apply(x, rest, low, int(cells))  # type: ignore[no-untyped-call]
    return sums


class _CellSums(torch.autograd.Function):
    """``Σ_q log(1 + e^{y_q − x_p})`` for x ``[n, K]`` and y ``[n, M]``, by polynomials in cells of one nat.

    log(1 + e^{y − x}) and its derivative are analytic in x and in y within π of the real axis. So the
    coefficients of Chebyshev's polynomials in a cell fall by a factor of 12 with every degree, relative to
    the value there. Scores enter by the sums of these polynomials over the items of a cell.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, low: Tensor, cells: int) -> Tensor:
        nodes = _NODES[y.dtype]
        table = _chebyshev_table(softplus, cells, nodes)
        sums = torch.empty_like(x)
        moments = table.new_empty(len(x), len(table))
        for rows, _ in _blocks(low, y):  # rows alone: low has one column
            # Moments of y times the table are the coefficients of the sum over y, as polynomials in x.
            moments[rows] = _moments(y[rows], torch.ones_like(y[rows]), low[rows], cells, nodes)
            sums[rows] = _interpolated(x[rows], moments[rows] @ table, low[rows], cells)
        ctx.save_for_backward(x, y, low, moments)
        ctx.cells = cells
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, low, moments = ctx.saved_tensors
        (g,) = upstream
        if torch.is_grad_enabled():
            by_x, by_y = _pair_gradients(x, y, g)
            return by_x, by_y, None, None
        cells = ctx.cells
        nodes = _NODES[y.dtype]
        by_x = torch.empty_like(x)
        by_y = torch.empty_like(y)
        with precision.full_precision(x.device):
            table = _chebyshev_table(torch.sigmoid, cells, nodes)  # the derivative of softplus
            for rows, _ in _blocks(low, y):
                slopes = _interpolated(x[rows], moments[rows] @ table, low[rows], cells)
                by_x[rows] = -g[rows] * slopes
                # By y the sum is over x, weighted by g: the same with x and y exchanged.
                moments_of_x = _moments(x[rows], g[rows], low[rows], cells, nodes)
                by_y[rows] = _interpolated(y[rows], moments_of_x @ table.T, low[rows], cells)
        return by_x, by_y, None, None


def _chebyshev_table(kernel: Callable[[Tensor], Tensor], cells: int, nodes: int) -> Tensor:
    """Coefficients of ``kernel(y − x)`` by y's cell and degree in rows, by x's in columns, in float64.

    The block of two cells depends on their distance alone. With 3 cells the distances −2 … 2 have the blocks
    0 … 4, and the rows of y's cell 1 take the blocks 3, 2, 1 for x's cells 0, 1, 2.
    """
    degrees = torch.arange(nodes, dtype=torch.float64)
    angles = math.pi * (degrees + 0.5) / nodes
    points = angles.cos() / 2  # of a cell, around its middle
    to_coefficients = (degrees[:, None] * angles).cos() * (2 / nodes)
    to_coefficients[0] /= 2
    distances = torch.arange(1 - cells, cells, dtype=torch.float64)
    differences = distances[:, None, None] + points[:, None] - points  # [distance, point of y, point of x]
    blocks = to_coefficients @ kernel(differences) @ to_coefficients.T  # [distance, degree of y, degree of x]
    cell = torch.arange(cells)
    block_of_cells = cell[:, None] - cell + cells - 1
    by_cells = blocks[block_of_cells]  # [cell of y, cell of x, degree of y, degree of x]
    return by_cells.transpose(1, 2).reshape(cells * nodes, -1)


def _moments(y: Tensor, weights: Tensor, low: Tensor, cells: int, nodes: int) -> Tensor:
    """Sums of weighted Chebyshev polynomials over the items of each cell, ``[n, cells·nodes]``.

    An item at −∞ is none. The sums are of y's dtype, and float64 for the product with the table.
    """
    weights = weights.where(y > -math.inf, 0.0)
    cell, polynomials = _chebyshev(y, low, cells, nodes)
    by_degree = []
    for polynomial in polynomials:
        sums_of_cells = y.new_zeros(len(y), cells)
        by_degree.append(sums_of_cells.scatter_add_(-1, cell, weights * polynomial))
    return torch.stack(by_degree, -1).flatten(1).double()


def _interpolated(x: Tensor, coefficients: Tensor, low: Tensor, cells: int) -> Tensor:
    """The sums of polynomials at x, 0 at −∞; ``coefficients`` is ``[n, cells·nodes]``."""
    by_degree = coefficients.to(x.dtype).unflatten(1, (cells, -1)).unbind(-1)
    cell, polynomials = _chebyshev(x, low, cells, len(by_degree))
    sums = torch.zeros_like(x)
    for of_cells, polynomial in zip(by_degree, polynomials, strict=True):
        sums.addcmul_(of_cells.gather(1, cell), polynomial)
    return sums.masked_fill_(x == -math.inf, 0.0)


def _chebyshev(y: Tensor, low: Tensor, cells: int, nodes: int) -> tuple[Tensor, Iterator[Tensor]]:
    """The cell of each score, and the Chebyshev polynomials of its place in it, by degree."""
    nats_above_low = y.clamp_min(low).double() - low
    cell = nats_above_low.long().clamp_max_(cells - 1)
    place = nats_above_low.sub_(cell)  # in the cell, from 0 to 1
    t = place.mul_(2).sub_(1).to(y.dtype)  # from −1 to 1, where the polynomials are defined
    return cell, _polynomials(t, nodes)


def _polynomials(t: Tensor, count: int) -> Iterator[Tensor]:
    """Chebyshev's polynomials T₀, T₁, … at t, so many."""
    before, last = t, torch.ones_like(t)  # T₋₁ = T₁, T₀ = 1
    for _ in range(count):
        yield last
        before, last = last, (2 * t).mul_(last).sub_(before)  # T₊₁ = 2·t·T − T₋₁
