r"""The formulas in NumPy float64, slow and literal: the oracle of the tests.

No code is shared with the rest of the package. Every function follows its formula symbol by symbol, with one
exception: a log-sum-exp subtracts its largest term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "clip",
    "cross_modal",
    "in_modal",
    "lambda_loss",
    "lambda_weights",
    "plackett_luce_nll",
    "recall",
    "siglip",
    "spread",
]

Array = NDArray[np.float64]


def plackett_luce_nll(
    scores: ArrayLike,
    reference: ArrayLike,
    *,
    worth: str = "exp",
    discount: str | None = None,
    top_k: int | None = None,
) -> Array:
    """``Σ_p μ_p · [log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p)]`` of every list, ties shared.

    Arguments and errors as in :func:`rankloss.plackett_luce_nll`; the result has the shape of the leading
    dimensions.

    Example:
        >>> nll = plackett_luce_nll([0.0, 0.0, 0.0], [3.0, 1.0, 2.0])  # log 3!
        >>> round(float(np.exp(nll)))
        6
    """
    x = np.asarray(scores, np.float64)
    y = np.asarray(reference)
    if y.dtype.kind == "f":  # integers keep theirs: float64 has not all of them
        y = y.astype(np.float64)
    if x.shape != y.shape or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            "scores and reference must have one shape [..., N] with N >= 1; "
            f"got scores {x.shape} and reference {y.shape}"
        )
    values = []
    for a, b in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1]), strict=True):
        has_nan = np.isnan(a).any() or np.isnan(b).any()
        values.append(math.nan if has_nan else sum(_terms(a, b, worth, discount, top_k)[0]))
    return np.array(values).reshape(x.shape[:-1])


def cross_modal(
    image_features: ArrayLike,
    text_features: ArrayLike,
    logit_scale: float = 1.0,
    *,
    reference_image_features: ArrayLike | None = None,
    reference_text_features: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """``½[C(S | R) + C(R | S)]`` with S = s·V·Tᵀ, R = Sᵀ; with a teacher ``½[C(S | S') + C(R | R')]``.

    Options as in :func:`rankloss.functional.cross_modal`.

    Example:
        >>> round(float(cross_modal(np.eye(3), np.eye(3), 10.0)), 4)
        0.4621
    """
    S = _cosines(image_features, text_features)
    teacher = _teacher_features(reference_image_features, reference_text_features, options)
    if len(teacher) == 1:
        raise ValueError("reference_image_features and reference_text_features go together; got one")
    y = _cosines(*teacher) if teacher else S.T
    return _term((S, S.T), (y, y.T), logit_scale, **options)


def in_modal(
    image_features: ArrayLike,
    text_features: ArrayLike,
    logit_scale: float = 1.0,
    *,
    reference_image_features: ArrayLike | None = None,
    reference_text_features: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """``½[C(I | X) + C(X | I)]`` with I = s·V·Vᵀ, X = s·T·Tᵀ; with a teacher ``½[C(I | I') + C(X | X')]``.

    With a teacher of one modality, X' also ranks I, or I' also ranks X. Options as in
    :func:`rankloss.functional.in_modal`.

    Example:
        >>> round(float(in_modal(np.eye(3), np.eye(3), 10.0)), 4)
        0.4621
    """
    ranked_by = _teacher_features(reference_image_features, reference_text_features, options)
    ranked_by = ranked_by or [text_features, image_features]
    ranks_pairs = options.get("lists") == "batch" and options.get("model", "plackett_luce") != "top_one"
    ranking = _exact_where_equal if ranks_pairs else _cosines
    matrices = _cosines(image_features, image_features), _cosines(text_features, text_features)
    references = ranking(ranked_by[0], ranked_by[0]), ranking(ranked_by[-1], ranked_by[-1])
    return _term(matrices, references, logit_scale, **options)


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
    s = logit_scale * _cosines(image_features, text_features)
    n = len(s)
    same = _same(n, pair_ids, same_id)
    own = np.eye(n, dtype=bool)
    counted = own | ~same if same_id == "ignore" else np.ones((n, n), bool)
    right = own if same_id == "ignore" else same
    values = []
    for m in (s, s.T):
        for row, is_counted, is_right in zip(m, counted, right, strict=True):
            right_mean, mean = (math.fsum(row[x]) / int(x.sum()) for x in (is_right, is_counted))
            target = (1 - label_smoothing) * right_mean + label_smoothing * mean
            values.append(_log_sum_exp(row[is_counted]) - target)
    return math.fsum(values) / (2 * n)


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
    logits = logit_scale * _cosines(image_features, text_features) + logit_bias
    n = len(logits)
    same = _same(n, pair_ids, same_id)
    own = np.eye(n, dtype=bool)
    counted = own | ~same if same_id == "ignore" else np.ones((n, n), bool)
    return math.fsum(np.logaddexp(0, np.where(same, -logits, logits))[counted]) / n


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
        similarities = logit_scale * _cosines(features, features)
        for i, row in enumerate(similarities):
            variance = np.delete(row, i).var()
            deviations.append(math.sqrt(variance + 1e-9 * logit_scale**2))
    return math.fsum(deviations) / len(deviations)


def _same(n: int, pair_ids: ArrayLike | None, same_id: str | None) -> NDArray[np.bool_]:
    """``[N, N]``, True for pairs of one id; without ids every pair has its own."""
    if (pair_ids is None) != (same_id is None) or same_id not in (None, "ignore", "share"):
        raise ValueError(f"pair_ids and same_id='ignore' or 'share' go together; got same_id={same_id!r}")
    ids = np.arange(n) if pair_ids is None else np.asarray(pair_ids)
    same: NDArray[np.bool_] = ids[:, None] == ids
    return same


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
    x = np.asarray(scores, np.float64)
    g = np.asarray(grades, np.float64)
    gains = {"linear": g, "exponential": 2.0**g - 1}[gain]
    best_first = sorted(gains, reverse=True)
    ideal = math.fsum(value / math.log2(1 + rank) for rank, value in enumerate(best_first, 1))
    ordered = np.sort(x)[::-1]
    ranks_of_equals = [1 + np.flatnonzero(ordered == score) for score in x]
    ranks = [float(np.mean(of_item)) for of_item in ranks_of_equals]
    weights = np.zeros((len(x), len(x)))
    better, worse = np.nonzero(g[:, None] > g[None, :])
    for p, q in zip(better, worse, strict=True):
        distance = max(1.0, abs(ranks[p] - ranks[q]))
        rho = abs(1 / math.log2(1 + ranks[p]) - 1 / math.log2(1 + ranks[q]))
        delta = 1 / math.log2(1 + distance) - 1 / math.log2(2 + distance)
        weights[p, q] = (rho + mu * delta) * (gains[p] - gains[q]) / ideal
    return weights


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
    has_ids = image_ids is not None and text_ids is not None
    own: Sequence[Any] = range(len(np.asarray(image_features)))
    ids = {"image": image_ids or own, "text": text_ids or own}
    directions = [("image", "text"), ("text", "image")]
    if has_ids:
        directions += [("image", "image"), ("text", "text")]
    values = {}
    for query, answer in directions:
        has_itself = query == answer
        cosines = _cosines(features[query], features[answer])
        ranks = _partner_ranks(cosines, ids[query], ids[answer], has_itself)
        if not ranks:
            continue
        answers = len(ids[answer]) - 1 if has_itself else len(ids[answer])
        for count in k:
            if count <= answers:
                values[f"{query}_to_{answer}_R@{count}"] = sum(r <= count for r in ranks) / len(ranks)
        values[f"{query}_to_{answer}_median_rank"] = float(np.floor(np.median(ranks)))
    return values


def _partner_ranks(
    cosines: Array, query_ids: Sequence[Any], answer_ids: Sequence[Any], has_itself: bool
) -> list[int]:
    """The rank of the best partner of each query that has one; others with its score rank before it."""
    ranks = []
    for query, scores in enumerate(cosines):
        answers = [answer for answer in range(len(scores)) if not has_itself or answer != query]
        partners = [scores[a] for a in answers if answer_ids[a] == query_ids[query]]
        others = [scores[a] for a in answers if answer_ids[a] != query_ids[query]]
        if partners:
            best = max(partners)
            ranks.append(1 + sum(int(score >= best) for score in others))
    return ranks


def _teacher_features(
    image: ArrayLike | None, text: ArrayLike | None, options: dict[str, Any]
) -> list[ArrayLike]:
    """The given features of a teacher."""
    teacher = [features for features in (image, text) if features is not None]
    if teacher and options.get("fixed_reference") is not None:
        raise ValueError(f"fixed_reference={options['fixed_reference']!r} does not apply beside a teacher")
    return teacher


def _term(
    matrices: tuple[Array, Array],
    references: tuple[Array, Array],
    s: float,
    *,
    lists: str = "row",
    model: str = "plackett_luce",
    reference_scale: float | None = None,
    worth: str = "exp",
    discount: str | None = None,
    top_k: int | None = None,
    reduction: str = "mean",
    diagonal: bool = True,
    fixed_reference: str | None = None,
) -> Any:
    """A term of two matrices of cosines, each ranked by its reference.

    ``reduction="mean"`` divides each list by its Σ_p μ_p, which is 1 under ``model="top_one"``.
    """
    n = len(matrices[0])
    factor = s if worth == "exp" else 1.0
    is_top_one = {"plackett_luce": False, "top_one": True}[model]
    kept = np.ones((n, n), bool) if diagonal else ~np.eye(n, dtype=bool)
    by_anchor = np.zeros(n)
    mean = 0.0
    directions = {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[fixed_reference]
    for share, cosines, y in zip(directions, matrices, references, strict=True):
        if share == 0:
            continue
        x = factor * cosines
        terms = np.zeros((n, n))
        # The entries of every list: of a row, or of the whole matrix.
        entries_of: dict[str, list[Any]] = {"row": [*enumerate(kept)], "batch": [kept]}
        of_lists = entries_of[lists]
        for entries in of_lists:
            if is_top_one:
                y_scale = s if reference_scale is None else reference_scale
                terms[entries], mu = _top_one_terms(x[entries], y_scale * y[entries])
            else:
                terms[entries], mu = _terms(x[entries], y[entries], worth, discount, top_k)
            mean += share * math.fsum(terms[entries]) / math.fsum(mu) / len(of_lists)
        by_anchor += share * terms.sum(axis=1)
    return {"none": by_anchor, "sum": by_anchor.sum(), "mean": mean}[reduction]


def _terms(
    x: Array, y: Array, worth: str, discount: str | None, top_k: int | None
) -> tuple[list[float], list[float]]:
    """The summand of every item of one list, and its μ."""
    log_w = _log_worth(x, worth)
    terms = []
    weights = []
    for p in range(len(x)):
        rank = 1 + int(np.sum(y > y[p]))
        mu = {None: 1.0, "log": 1 / math.log(1 + rank)}[discount]
        if top_k is not None and rank > top_k:
            mu = 0.0
        terms.append(mu * (_log_sum_exp(log_w[y <= y[p]]) - float(log_w[p])))
        weights.append(mu)
    return terms, weights


def _top_one_terms(x: Array, y: Array) -> tuple[list[float], list[float]]:
    """``p_q·(log Σ e^x − x_q)`` of every item of one list, and p = softmax(y)."""
    p = [math.exp(float(b) - _log_sum_exp(y)) for b in y]
    return [q * (_log_sum_exp(x) - float(a)) for q, a in zip(p, x, strict=True)], p


def _log_worth(x: Array, worth: str) -> Array:
    floor = {"exp": -math.inf, "shifted": -1.0, "identity": 0.0}[worth]
    if x.min() <= floor and np.isfinite(x).all():
        raise ValueError(
            f"worth={worth!r} needs scores above {floor:g}, where their logarithm exists; "
            f"the smallest is {x.min():g}"
        )
    if worth == "shifted":
        return np.log((1 + x) / 2)
    return x if worth == "exp" else np.log(x)


def _log_sum_exp(x: Array) -> float:
    largest = float(np.max(x))
    return largest + math.log(math.fsum(np.exp(x - largest)))


def _cosines(a: ArrayLike, b: ArrayLike) -> Array:
    """Dot products, each rounded once, so that equal rows give equal products in any position."""
    rows, columns = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.array([[math.fsum(row * column) for column in columns] for row in rows])


def _exact_where_equal(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosines as the reference of a batch list: all products of unit vectors with their equals are one tie.

    Vectors whose norm is within 1 % of 1 count as unit vectors; the others keep the square of their norm.
    """
    rows = np.asarray(a, np.float64)
    squares = np.array([math.fsum(row * row) for row in rows])
    is_unit = abs(np.sqrt(squares) - 1) <= 0.01
    largest_of_units = squares[is_unit].max(initial=0.0)
    with_itself = np.where(is_unit, largest_of_units, squares)
    is_equal = (rows[:, None] == rows[None]).all(-1)
    return np.where(is_equal, with_itself[:, None], _cosines(a, b))
