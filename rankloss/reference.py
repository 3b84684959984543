r"""The formulas, slow and literal: the oracle of the tests, and variants of the rank terms.

No code is shared with the rest of the package. Every function follows its formula symbol by symbol, with one
exception: a log-sum-exp subtracts its largest term.

:func:`plackett_luce`, :func:`cross_modal` and :func:`in_modal` have options that the losses do not: the
formula as printed in the paper, ``cross_modal(…, lists="batch", worth="identity", reduction="sum")``, and the
published code, ``ties="random"``. Of tensors they are tensors in their dtype, float32 at least, and
differentiable any number of times; of NumPy's arrays they are NumPy's in float64. A list of N items takes
N × N numbers, so a term takes N³, and with ``lists="batch"`` N⁴.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = [
    "clip",
    "cross_modal",
    "in_modal",
    "lambda_loss",
    "lambda_weights",
    "plackett_luce",
    "plackett_luce_nll",
    "recall",
    "siglip",
    "spread",
]

Array = NDArray[np.float64]
Lists = Literal["row", "batch"]
Worth = Literal["exp", "shifted", "identity"]
Ties = Literal["shared", "random"]
Discount = Literal["log"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "lists": ("row", "batch"),
    "model": ("plackett_luce", "top_one"),
    "worth": ("exp", "shifted", "identity"),
    "ties": ("shared", "random"),
    "discount": (None, "log"),
    "reduction": ("mean", "sum", "none"),
    "fixed_reference": (None, "image", "text"),
}


# --- the rank terms ---------------------------------------------------------------------------------------


def plackett_luce(
    scores: Tensor | ArrayLike,
    reference: Tensor | ArrayLike,
    *,
    worth: Worth = "exp",
    ties: Ties = "shared",
    discount: Discount | None = None,
    top_k: int | None = None,
) -> Any:
    """``Σ_p μ_p · [log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p)]`` of every list.

    Args:
        scores: ``[..., N]``, the x of the formula.
        reference: ``[..., N]``, the y of the formula, which gives the order alone and gets no gradient.
        worth: w(x): ``"exp"`` for eˣ; of cosines also ``"shifted"`` for (1 + x)/2 and ``"identity"`` for x.
        ties: ``"shared"`` as in the formula; ``"random"``: tied items are shuffled, as in the published code,
            by one shuffle for all lists of the call, from torch's default generator.
        discount: None for μ = 1; ``"log"`` for μ_p = 1 / log(1 + rank of p), where the best rank is 1 and
            items tied by the formula share their best rank.
        top_k: only the terms of ranks ≤ k count; their denominators still run over the whole tail.

    Returns:
        ``[...]``, in nats. NaN in a list gives NaN.

    Raises:
        ValueError: for shapes that differ or have no items, a value that an option does not take, or on a CPU
            a score whose worth is not positive; the value is NaN on other devices, where reading would wait.

    Example:
        >>> nll = plackett_luce([0.0, 0.0, 0.0], [3.0, 1.0, 2.0])  # log 3!
        >>> round(float(np.exp(nll)))
        6
    """
    _check_options(worth=worth, ties=ties, discount=discount, top_k=top_k)
    x, y = _floats(scores), _tensor(reference).detach()
    if x.shape != y.shape or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            "scores and reference must have one shape [..., N] with N >= 1; "
            f"got scores {tuple(x.shape)} and reference {tuple(y.shape)}"
        )
    n = x.shape[-1]
    summands, _ = _summands(x.reshape(-1, n), y.reshape(-1, n), worth, ties, discount, top_k)
    return _like(summands.sum(-1).reshape(x.shape[:-1]), scores, reference)


plackett_luce_nll = plackett_luce
"""The same by the name of :func:`rankloss.plackett_luce_nll`."""


def cross_modal(
    image_features: Tensor | ArrayLike,
    text_features: Tensor | ArrayLike,
    logit_scale: Tensor | float = 1.0,
    *,
    reference_image_features: Tensor | ArrayLike | None = None,
    reference_text_features: Tensor | ArrayLike | None = None,
    **options: Any,
) -> Any:
    """``½[C(S | R) + C(R | S)]`` with S = s·V·Tᵀ, R = Sᵀ; with a teacher ``½[C(S | S') + C(R | R')]``.

    C(S | R) is the mean or sum over the lists in S of their negative log-likelihood (or of the model's loss),
    with the order that R gives. The factor ½ averages the two directions.

    Args:
        image_features: ``[N, D]``.
        text_features: ``[N, D]``.
        logit_scale: the multiplier s.
        reference_image_features: ``[N, D']``, a teacher's features.
        reference_text_features: ``[N, D']``, also a teacher's.
        **options: ``lists="row"``: N lists of N, one of each anchor; ``"batch"``: one list of all N² pairs.
            ``worth``, ``ties``, ``discount`` and ``top_k`` as :func:`plackett_luce`; of ``worth="shifted"``
            and ``"identity"`` the scores are cosines, without s. ``model``, ``reference_scale``,
            ``reduction``, ``diagonal`` and ``fixed_reference`` as :class:`rankloss.RankOptions`;
            ``reduction="mean"`` divides each list by its Σ_p μ_p.

    Raises:
        ValueError: for features of different shapes, a value that an option does not take, a teacher of one
            modality, or as :func:`plackett_luce`.

    Example:
        >>> round(float(cross_modal(np.eye(3), np.eye(3), 10.0)), 4)
        0.4621
        >>> v = torch.eye(3, requires_grad=True)
        >>> cross_modal(v, 0.9 * torch.eye(3) + 0.1, lists="batch", worth="identity").requires_grad
        True
    """
    teacher = _given_features(reference_image_features, reference_text_features)
    _refuse_fixed_reference_beside(teacher, options)
    S = _cosines(image_features, text_features)  # _term applies s
    if len(teacher) == 1:
        raise ValueError("reference_image_features and reference_text_features go together; got one")
    reference = _cosines(*teacher) if teacher else S.T
    value = _term((S, S.T), (reference, reference.T), logit_scale, **options)
    return _like(value, image_features, text_features, logit_scale)


def in_modal(
    image_features: Tensor | ArrayLike,
    text_features: Tensor | ArrayLike,
    logit_scale: Tensor | float = 1.0,
    *,
    reference_image_features: Tensor | ArrayLike | None = None,
    reference_text_features: Tensor | ArrayLike | None = None,
    **options: Any,
) -> Any:
    """``½[C(I | X) + C(X | I)]`` with I = s·V·Vᵀ, X = s·T·Tᵀ; with a teacher ``½[C(I | I') + C(X | X')]``.

    With a teacher of one modality, X' also ranks I, or I' also ranks X. Arguments and errors as
    :func:`cross_modal`.

    Example:
        >>> round(float(in_modal(np.eye(3), np.eye(3), 10.0)), 4)
        0.4621
    """
    teacher = _given_features(reference_image_features, reference_text_features)
    _refuse_fixed_reference_beside(teacher, options)
    if teacher:  # of one modality, its only features rank both matrices
        ranking_images, ranking_texts = teacher[0], teacher[-1]
    else:  # each modality ranks the other
        ranking_images, ranking_texts = text_features, image_features
    # In one list of all pairs the unit vectors' cosines with themselves are tied, in a model that ranks.
    has_structural_ties = options.get("lists") == "batch" and options.get("model") != "top_one"
    cosines_to_rank_by = _cosines_tied_where_equal if has_structural_ties else _cosines_within
    matrices = _cosines_within(image_features), _cosines_within(text_features)
    references = cosines_to_rank_by(ranking_images), cosines_to_rank_by(ranking_texts)
    value = _term(matrices, references, logit_scale, **options)
    return _like(value, image_features, text_features, logit_scale)


def _given_features(image: Any, text: Any) -> list[Any]:
    """The given features of a teacher: of both modalities, of one, or none."""
    return [features for features in (image, text) if features is not None]


def _refuse_fixed_reference_beside(teacher: list[Any], options: dict[str, Any]) -> None:
    """Raise a ValueError for a teacher and ``fixed_reference``, which both say what to rank by."""
    if teacher and options.get("fixed_reference") is not None:
        raise ValueError(f"fixed_reference={options['fixed_reference']!r} does not apply beside a teacher")


def _term(
    matrices: tuple[Tensor, Tensor],
    references: tuple[Tensor, Tensor],
    s: Tensor | float,
    *,
    lists: Lists = "row",
    model: str = "plackett_luce",
    reference_scale: float | None = None,
    worth: Worth = "exp",
    ties: Ties = "shared",
    discount: Discount | None = None,
    top_k: int | None = None,
    reduction: str = "mean",
    diagonal: bool = True,
    fixed_reference: str | None = None,
) -> Tensor:
    """A term of two matrices of cosines, S and R or I and X before the scale s, each ranked by its reference.

    ``reduction="mean"`` divides each list by its Σ_p μ_p, which is 1 under ``model="top_one"``.
    """
    _check_options(
        lists=lists,
        model=model,
        worth=worth,
        ties=ties,
        discount=discount,
        top_k=top_k,
        reduction=reduction,
        fixed_reference=fixed_reference,
    )
    row_counts = [len(matrix) for matrix in (*matrices, *references)]
    n = row_counts[0]
    if any(count != n for count in row_counts):
        raise ValueError(f"features must have one row per pair; got {', '.join(map(str, row_counts))}")
    if model == "top_one" and (worth, ties, discount, top_k) != ("exp", "shared", None, None):
        raise ValueError("model='top_one' takes no worth, ties, discount and top_k")
    s = s.reshape(()) if isinstance(s, Tensor) else float(s)
    directions = {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[fixed_reference]
    by_anchor = matrices[0].new_zeros(n)
    mean_of_lists = matrices[0].new_zeros(())
    for share, cosines, reference in zip(directions, matrices, references, strict=True):
        if share == 0:
            continue
        scores = s * cosines if worth == "exp" else cosines  # the other worths are of cosines
        x = _lists(scores, lists, diagonal)
        y = _lists(reference.detach(), lists, diagonal)
        if model == "top_one":
            scale_of_reference = s if reference_scale is None else reference_scale
            summands, mu = _top_one_summands(x, y * scale_of_reference)
        else:
            summands, mu = _summands(x, y, worth, ties, discount, top_k)
        mean_of_lists = mean_of_lists + share * (summands.sum(-1) / mu.sum(-1)).mean()
        by_anchor = by_anchor + share * summands.view(n, -1).sum(-1)
    if reduction == "mean":
        return mean_of_lists
    return by_anchor.sum() if reduction == "sum" else by_anchor


def _lists(matrix: Tensor, lists: Lists, diagonal: bool) -> Tensor:
    """``[lists, items]``: the rows of a matrix, or all of it as one list; with or without its diagonal."""
    if not diagonal:
        row = torch.arange(len(matrix), device=matrix.device)
        place = row[:-1]
        column = place + (place >= row[:, None])  # places from the diagonal on are one column further
        matrix = matrix.gather(1, column)
    return matrix.reshape(1, -1) if lists == "batch" else matrix


def _summands(
    x: Tensor, y: Tensor, worth: Worth, ties: Ties, discount: Discount | None, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """The summand of every item of lists ``[lists, N]``, and its μ, one list after the other."""
    shuffled = None
    if ties == "random":  # the place of every item in a shuffle, by which tied items are ordered
        shuffled = torch.randperm(x.shape[1], device=x.device).argsort()
    if len(x) == 0:
        return x, x
    summands = []
    mu = []
    for scores, reference in zip(x, y, strict=True):
        of_list, mu_of_list = _summands_of_list(scores, reference, worth, shuffled, discount, top_k)
        summands.append(of_list)
        mu.append(mu_of_list)
    return torch.stack(summands), torch.stack(mu)


def _summands_of_list(
    x: Tensor, y: Tensor, worth: Worth, shuffled: Tensor | None, discount: Discount | None, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """As :func:`_summands`, of one list; its tied items are ordered by ``shuffled``, or shared for None."""
    log_w = _log_worth(x, worth)
    is_in_tail = y <= y[:, None]  # [p, q]: q is in the denominator of p
    if shuffled is not None:  # of items tied with p those up to its place in the shuffle
        is_in_tail = (y < y[:, None]) | ((y == y[:, None]) & (shuffled <= shuffled[:, None]))
    rank = 1 + len(y) - is_in_tail.sum(-1)
    mu = torch.ones_like(log_w) if discount is None else 1 / torch.log(1 + rank.to(log_w.dtype))
    if top_k is not None:
        mu = mu.where(rank <= top_k, 0.0)
    log_denominators = log_w.where(is_in_tail, -math.inf).logsumexp(-1)
    summands = mu * (log_denominators - log_w)
    if y.is_floating_point():  # NaN has no place in an order; a factor, so that the gradient is NaN, too
        summands = summands * torch.where(y.isnan().any(), math.nan, 1.0).to(log_w.dtype)
    return summands, mu.detach()


def _top_one_summands(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``p_q·(log Σ e^x − x_q)`` of every item of lists ``[lists, N]``, and p = softmax(y)."""
    p = y.detach().softmax(-1)
    return p * (x.logsumexp(-1, keepdim=True) - x), p


def _log_worth(x: Tensor, worth: Worth) -> Tensor:
    """The log w(x); NaN, or on a CPU an error, if w(x) is not positive."""
    if worth == "exp":
        return x
    floor = {"shifted": -1.0, "identity": 0.0}[worth]
    values = x.detach()
    # NaN and infinity are no error: they show in the value.
    if values.is_cpu and bool(values.min() <= floor) and bool(values.isfinite().all()):
        raise ValueError(
            f"worth={worth!r} needs scores above {floor:g}, where their logarithm exists; "
            f"the smallest is {values.min().item():g}"
        )
    x = x.masked_fill(values <= floor, math.nan)
    return torch.log((1 + x) / 2) if worth == "shifted" else torch.log(x)


def _cosines_tied_where_equal(features: Any) -> Tensor:
    """Cosines within a modality as the reference of a batch list: one tie of all unit vectors with equals.

    The squares of unit vectors' norms are 1 but for rounding, so they all take the largest of them. Vectors
    whose norm is within 1 % of 1 count as unit vectors; the others keep the square of their norm.
    """
    rows = _floats(features).detach()
    squares = (rows * rows).sum(-1)
    is_unit = (squares.sqrt() - 1).abs() <= 0.01
    largest_of_units = squares.where(is_unit, 0.0).max()
    with_itself = torch.where(is_unit, largest_of_units, squares)
    is_equal = (rows[:, None] == rows).all(-1)
    return torch.where(is_equal, with_itself[:, None], _cosines_within(features))


def _cosines_within(features: Any) -> Tensor:
    """The cosines of features with themselves, ``[N, N]``."""
    return _cosines(features, features)


def _cosines(a: Any, b: Any) -> Tensor:
    """Dot products, each summed in one order, so that equal rows give equal products in any position."""
    rows, columns = _floats(a), _floats(b)
    if rows.dim() != 2 or columns.dim() != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(
            "features must be matrices of one width; "
            f"got shapes {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    return torch.stack([(row * columns).sum(-1) for row in rows])


def _floats(x: Any) -> Tensor:
    """Scores or features: a floating tensor in its dtype, float32 at least; all others in float64."""
    if not isinstance(x, Tensor):
        return _tensor(np.asarray(x, np.float64))
    least = torch.float32 if x.is_floating_point() else torch.float64  # float32 rounds integers
    return x.to(torch.promote_types(x.dtype, least))


def _tensor(x: Any) -> Tensor:
    """A tensor, or an array as one; its integers keep their dtype, since float64 has not all of them."""
    if isinstance(x, Tensor):
        return x
    array = np.array(x, order="C")
    return torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)


def _like(value: Tensor, *inputs: Any) -> Any:
    """A value as a tensor if any of the inputs is one, else as NumPy's array or, of no dimension, scalar."""
    if any(isinstance(x, Tensor) for x in inputs):
        return value
    return value.numpy()[()]  # an empty index turns an array of no dimension into a scalar


def _check_options(*, top_k: int | None, **chosen: Any) -> None:
    """Raise a ValueError for an option, given by its name, that is none of its choices."""
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            choices = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"{name} must be one of {choices}; got {value!r}")
    is_count = isinstance(top_k, Integral) and not isinstance(top_k, bool) and top_k >= 1
    if top_k is not None and not is_count:
        raise ValueError(f"top_k must be an integer of at least 1; got {top_k!r}")


# --- losses of pairs --------------------------------------------------------------------------------------


def clip(
    image_features: ArrayLike,
    text_features: ArrayLike,
    logit_scale: float = 1.0,
    *,
    pair_ids: ArrayLike | None = None,
    same_id: str | None = None,
    label_smoothing: float = 0.0,
) -> float:
    """CLIP's symmetric InfoNCE, ``½[CE(S) + CE(Sᵀ)]``, with ids and smoothing as :class:`rankloss.ClipLoss`.

    Example:
        >>> round(float(clip(np.eye(2), np.eye(2))), 4)  # log(1 + 1/e)
        0.3133
    """
    S = logit_scale * _cosines_of_arrays(image_features, text_features)
    n = len(S)
    is_same = _is_same_id(n, pair_ids, same_id)
    is_own = np.eye(n, dtype=bool)
    # Texts of the same id as an image's are all right for it, or ignored but for its own.
    is_counted = is_own | ~is_same if same_id == "ignore" else np.ones((n, n), bool)
    is_right = is_own if same_id == "ignore" else is_same
    losses = []
    for logits in (S, S.T):
        for row in range(n):
            counted_logits = logits[row][is_counted[row]]
            right_mean = _mean(logits[row][is_right[row]])
            target = (1 - label_smoothing) * right_mean + label_smoothing * _mean(counted_logits)
            losses.append(_log_sum_exp(counted_logits) - target)
    return math.fsum(losses) / (2 * n)


def siglip(
    image_features: ArrayLike,
    text_features: ArrayLike,
    logit_scale: float = 1.0,
    logit_bias: float = 0.0,
    *,
    pair_ids: ArrayLike | None = None,
    same_id: str | None = None,
) -> float:
    """SigLIP's loss, ``−(1/N)·Σ_ij log σ(z_ij·(s·v_i·t_j + b))``, z_ij = 1 if i = j, else −1.

    Ids as in :class:`rankloss.SigLipLoss`.

    Example:
        >>> round(siglip(np.eye(2), np.eye(2)), 4)  # log(1 + 1/e) + log 2
        1.0064
    """
    logits = logit_scale * _cosines_of_arrays(image_features, text_features) + logit_bias
    n = len(logits)
    is_same = _is_same_id(n, pair_ids, same_id)
    # Where pairs of one id are ignored, those that remain are the own pairs, which are right for each other.
    is_counted = np.eye(n, dtype=bool) | ~is_same if same_id == "ignore" else np.ones((n, n), bool)
    terms = np.logaddexp(0, np.where(is_same, -logits, logits))  # −log σ(x) = log(1 + e^−x)
    return math.fsum(terms[is_counted]) / n


def spread(image_features: ArrayLike, text_features: ArrayLike, logit_scale: float = 1.0) -> float:
    """``½[σ(V) + σ(T)]``, the term of :class:`rankloss.SpreadLoss` before its weight.

    ``σ(X) = (1/N) Σ_i √(Var_{j≠i}(s·x_i·x_j) + 1e-9·s²)``, the population variance over the N − 1 others.

    Example:
        >>> turned = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])  # cosines 0, 0.6 and 0.8
        >>> round(float(spread(turned, turned)), 4)  # (0.3 + 0.4 + 0.1) / 3
        0.2667
    """
    deviations = []
    for features in (image_features, text_features):
        similarities = logit_scale * _cosines_of_arrays(features, features)
        for i, row in enumerate(similarities):
            variance = np.delete(row, i).var()
            deviations.append(math.sqrt(variance + 1e-9 * logit_scale**2))
    return math.fsum(deviations) / len(deviations)


def _is_same_id(n: int, pair_ids: ArrayLike | None, same_id: str | None) -> NDArray[np.bool_]:
    """``[N, N]``, True for pairs of one id; without ids every pair has its own."""
    if (pair_ids is None) != (same_id is None) or same_id not in (None, "ignore", "share"):
        raise ValueError(f"pair_ids and same_id='ignore' or 'share' go together; got same_id={same_id!r}")
    ids = np.arange(n) if pair_ids is None else np.asarray(pair_ids)
    is_same: NDArray[np.bool_] = ids[:, None] == ids
    return is_same


def lambda_loss(scores: ArrayLike, grades: ArrayLike, *, gain: str = "linear", mu: float = 10.0) -> float:
    """``Σ_{p, q : g_p > g_q} w_pq·log(1 + e^{x_q − x_p})`` of one list, with :func:`lambda_weights`.

    Example:
        >>> round(lambda_loss([0.0, 0.0], [1.0, 0.0], mu=0.0), 4)  # items of equal scores share their rank
        0.0
    """
    x = np.asarray(scores, np.float64)
    weights = lambda_weights(scores, grades, gain=gain, mu=mu)
    terms = weights * np.logaddexp(0, x[None, :] - x[:, None])
    return math.fsum(terms.ravel())


def lambda_weights(scores: ArrayLike, grades: ArrayLike, *, gain: str = "linear", mu: float = 10.0) -> Array:
    """NDCG-Loss2++'s weights ``w_pq = (ρ_pq + μ·δ_pq)·(G_p − G_q)`` of one list's pairs, 0 unless g_p > g_q.

    With ranks r by score, D(r) = log₂(1 + r) and d = |r_p − r_q|, ρ_pq = |1/D(r_p) − 1/D(r_q)| and δ_pq =
    1/D(d) − 1/D(d + 1). G is g, or 2^g − 1 with ``gain="exponential"``, divided by the ideal DCG. Items of
    equal scores share their mean rank, and for them d is 1.

    Example:
        >>> lambda_weights([2.0, 1.0], [1.0, 0.0], mu=0.0).round(4).tolist()  # 1 − 1/log₂ 3
        [[0.0, 0.3691], [0.0, 0.0]]
    """
    g = np.asarray(grades, np.float64)
    gains = {"linear": g, "exponential": 2.0**g - 1}[gain]
    best_first = sorted(gains, reverse=True)
    ideal_dcg = math.fsum(value / _D(rank) for rank, value in enumerate(best_first, 1))
    r = _mean_ranks(scores)
    n = len(g)
    weights = np.zeros((n, n))
    for p in range(n):
        for q in range(n):
            if g[p] > g[q]:
                rho = abs(1 / _D(r[p]) - 1 / _D(r[q]))
                d = max(1.0, abs(r[p] - r[q]))
                delta = 1 / _D(d) - 1 / _D(d + 1)
                weights[p, q] = (rho + mu * delta) * (gains[p] - gains[q]) / ideal_dcg
    return weights


def _D(rank: float) -> float:
    """``log₂(1 + rank)``, by which DCG divides a gain."""
    return math.log2(1 + rank)


def _mean_ranks(scores: ArrayLike) -> list[float]:
    """The rank of every item by its score, the best rank being 1; items of equal scores share their mean."""
    x = np.asarray(scores, np.float64)
    best_first = np.sort(x)[::-1]
    ranks = []
    for score in x:
        ranks_of_equals = 1 + np.flatnonzero(best_first == score)
        ranks.append(float(np.mean(ranks_of_equals)))
    return ranks


def recall(
    image_features: ArrayLike,
    text_features: ArrayLike,
    k: Sequence[int] = (1, 5, 10),
    *,
    image_ids: Sequence[Any] | None = None,
    text_ids: Sequence[Any] | None = None,
) -> dict[str, float]:
    """R@k and the median rank of every direction, as :func:`rankloss.metrics.recall`.

    Example:
        >>> recall(np.eye(3), np.eye(3)[[0, 2, 2]], k=[1])["image_to_text_R@1"] * 3
        1.0
    """
    features = {"image": image_features, "text": text_features}
    directions = [("image", "text"), ("text", "image")]
    if image_ids is None or text_ids is None:  # image i and text i are partners
        rows = range(len(np.asarray(image_features)))
        ids: dict[str, Sequence[Any]] = {"image": rows, "text": rows}
    else:
        ids = {"image": image_ids, "text": text_ids}
        directions += [("image", "image"), ("text", "text")]
    values = {}
    for query, answer in directions:
        has_itself = query == answer
        cosines = _cosines_of_arrays(features[query], features[answer])
        ranks = _partner_ranks(cosines, ids[query], ids[answer], has_itself)
        if not ranks:  # no query has a partner
            continue
        answers = len(ids[answer]) - 1 if has_itself else len(ids[answer])
        for count in k:
            if count <= answers:
                is_among_best = [rank <= count for rank in ranks]
                values[f"{query}_to_{answer}_R@{count}"] = sum(is_among_best) / len(ranks)
        values[f"{query}_to_{answer}_median_rank"] = float(np.floor(np.median(ranks)))
    return values


def _partner_ranks(
    cosines: Array, query_ids: Sequence[Any], answer_ids: Sequence[Any], has_itself: bool
) -> list[int]:
    """The rank of the best partner of each query that has one; others with its score rank before it."""
    ranks = []
    for query, scores in enumerate(cosines):
        partners: list[float] = []
        others: list[float] = []
        for answer, score in enumerate(scores):
            if has_itself and answer == query:
                continue
            if answer_ids[answer] == query_ids[query]:
                partners.append(score)
            else:
                others.append(score)
        if partners:
            before = [score for score in others if score >= max(partners)]
            ranks.append(1 + len(before))
    return ranks


def _cosines_of_arrays(a: ArrayLike, b: ArrayLike) -> Array:
    cosines: Array = _cosines(np.asarray(a, np.float64), np.asarray(b, np.float64)).numpy()
    return cosines


def _log_sum_exp(x: Array) -> float:
    largest = float(np.max(x))
    return largest + math.log(math.fsum(np.exp(x - largest)))


def _mean(x: Array) -> float:
    return math.fsum(x) / len(x)
