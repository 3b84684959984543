"""The losses written a third time: dense float64 torch, literal, for gradients of any order from autograd.

:mod:`rankloss.reference` is the oracle of values; this is the oracle of gradients, and is itself held against
the reference. It shares no code with the library. An order is decided on dot products that are each rounded
once (``math.fsum``), so that equal rows tie exactly wherever they stand.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import reference

__all__ = ["alip", "clip", "cyclic", "exact_products", "nll", "rank_terms", "ranked_lists", "siglip", "term"]


def exact_products(a: Tensor, b: Tensor) -> Tensor:
    """``A·Bᵀ`` in float64, each entry rounded once; it carries no gradient."""
    rows, columns = (x.detach().double().tolist() for x in (a, b))
    products = [[math.fsum(x * y for x, y in zip(r, c, strict=True)) for c in columns] for r in rows]
    return torch.tensor(products, dtype=torch.float64, device="cpu")


def nll_terms(
    x: Tensor, y: Tensor, *, worth: str = "exp", discount: str | None = None, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The summands ``μ_p·[log Σ_{q : y_q ≤ y_p} w(x_q) − log w(x_p)]`` of lists ``[..., N]``, and their μ."""
    log_w = {"exp": x, "shifted": ((1 + x) / 2).log() if worth == "shifted" else x}.get(worth)
    log_w = x.log() if log_w is None else log_w
    below = y[..., None, :] <= y[..., :, None]
    log_denominator = log_w[..., None, :].masked_fill(~below, -math.inf).logsumexp(-1)
    rank = 1 + (y[..., None, :] > y[..., :, None]).sum(-1)
    mu = torch.ones_like(x) if discount is None else 1 / (1 + rank.to(x)).log()
    if top_k is not None:
        mu = torch.where(rank <= top_k, mu, 0.0)
    return torch.where(mu > 0, mu * (log_denominator - log_w), 0.0), mu


def top_one_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The summands ``p_q·(log Σ e^x − x_q)`` of lists ``[..., N]``, and their p = softmax(y)."""
    p = y.exp() / y.exp().sum(-1, keepdim=True)
    return p * (x.exp().sum(-1, keepdim=True).log() - x), p


def nll(scores: Tensor, reference: Tensor, **likelihood: Any) -> Tensor:
    """:func:`rankloss.plackett_luce_nll`, ties shared."""
    return nll_terms(scores, reference.detach(), **likelihood)[0].sum(-1)


def term(
    which: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    lists: str = "row",
    reduction: str = "mean",
    diagonal: bool = True,
    fixed_reference: str | None = None,
    bins: int | None = None,
    worth: str = "exp",
    model: str = "plackett_luce",
    reference_scale: float | None = None,
    reference_image_features: Tensor | None = None,
    reference_text_features: Tensor | None = None,
    **likelihood: Any,
) -> Tensor:
    """``½[C(S | R) + C(R | S)]`` or ``½[C(I | X) + C(X | I)]``; with ``bins``, lists ranked by bin.

    With a teacher ``½[C(S | S') + C(R | R')]`` or ``½[C(I | I') + C(X | X')]``.
    """
    v, t, n = image_features, text_features, len(image_features)
    if which == "cross_modal":
        a, b = v @ t.T, t @ v.T
    else:
        a, b = v @ v.T, t @ t.T
    has_equal_diagonal = lists == "batch" and model == "plackett_luce"
    teacher = [x for x in (reference_image_features, reference_text_features) if x is not None]
    if teacher:
        of_a, of_b = _orders(which, teacher[0], teacher[-1], has_equal_diagonal)
    else:
        of_b, of_a = _orders(which, v, t, has_equal_diagonal)
    kept = torch.ones(n, n, dtype=torch.bool, device="cpu") if diagonal else ~torch.eye(n, dtype=torch.bool)
    shares = {None: (0.5, 0.5), "text": (1.0, 0.0), "image": (0.0, 1.0)}[fixed_reference]
    shape = (-1,) if lists == "batch" else (n, -1)
    by_anchor, mean = (
        torch.zeros(n, dtype=a.dtype, device="cpu"),
        torch.zeros((), dtype=a.dtype, device="cpu"),
    )
    for share, x, y in ((shares[0], a, of_a), (shares[1], b, of_b)):
        scores = (logit_scale * x if worth == "exp" else x)[kept].view(shape)
        y = y[kept].view(shape)
        if bins is not None:
            y = _quantized(y, bins)
        if model == "top_one":
            y = y * (float(logit_scale.detach()) if reference_scale is None else reference_scale)
            terms, mu = top_one_terms(scores, y)
        else:
            terms, mu = nll_terms(scores, y, worth=worth, **likelihood)
        by_anchor = by_anchor + share * terms.view(n, -1).sum(-1)
        mean = mean + share * (terms.sum(-1) / mu.sum(-1)).mean()
    return {"none": by_anchor, "sum": by_anchor.sum(), "mean": mean}[reduction]


def rank_terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    cross_modal: float = 1.0,
    in_modal: float = 1.0,
    **options: Any,
) -> Tensor:
    """:class:`rankloss.RankConsistency`."""
    inputs = (image_features, text_features, logit_scale)
    return cross_modal * term("cross_modal", *inputs, **options) + in_modal * term(
        "in_modal", *inputs, **options
    )


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **of_ids: Any) -> Tensor:
    """:class:`rankloss.ClipLoss`."""
    logits = logit_scale * image_features @ text_features.T
    return (row_losses(logits, **of_ids) + row_losses(logits.T, **of_ids)).mean() / 2


def row_losses(
    logits: Tensor, first_row: int = 0, pair_ids: Tensor | None = None, same_id: str | None = None
) -> Tensor:
    """CLIP's loss of rows of logits, one direction; row i's own pair is in column ``first_row + i``."""
    own, same = _own_and_same(logits, first_row, pair_ids)
    if same_id == "ignore":
        return logits.masked_fill(same & ~own, -math.inf).logsumexp(1) - logits[own]
    return logits.logsumexp(1) - (logits * same).sum(1) / same.sum(1)


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    first_row: int = 0,
    pair_ids: Tensor | None = None,
    same_id: str | None = None,
) -> Tensor:
    """:class:`rankloss.SigLipLoss`; the own text of image i is ``first_row + i``."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    own, same = _own_and_same(logits, first_row, pair_ids)
    terms = torch.logaddexp(torch.zeros_like(logits), torch.where(same, -logits, logits))
    return (terms[own | ~same] if same_id == "ignore" else terms).sum() / len(logits)


def _own_and_same(logits: Tensor, first_row: int, pair_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """True at each row's own pair, and at the pairs of its id."""
    rows, columns = range(first_row, first_row + len(logits)), range(logits.shape[1])
    own = torch.tensor([[i == j for j in columns] for i in rows], device="cpu")
    if pair_ids is None:
        return own, own
    ids = pair_ids.tolist()
    return own, torch.tensor([[ids[i] == ids[j] for j in columns] for i in rows], device="cpu")


def cyclic(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """CyCLIP's two terms without weights."""
    v, t = image_features, text_features
    cross, within = v @ t.T - t @ v.T, v @ v.T - t @ t.T
    return cross.square().sum() / len(v), within.square().sum() / len(v)


def alip(
    image_features: Tensor,
    text_features: Tensor,
    caption_features: Tensor,
    logit_scale: Tensor,
    *,
    histories: Any = (1.0, 1.0, 1.0),
    gamma_sample: float = 2.0,
    gamma_pair: float = 2.0,
    momentum: float = 0.99,
) -> dict[str, Tensor]:
    """One step of ALIP: the histories H, Hʳ, Hᶜ after it, the weights, and the two parts of the loss."""
    v, t, c = image_features, text_features, caption_features
    cosines = torch.stack([(t * c).sum(-1), (t * v).sum(-1), (c * v).sum(-1)]).detach()
    after = momentum * torch.as_tensor(histories, dtype=torch.float64) + (1 - momentum) * cosines.mean(-1)
    sample, raw, synthetic = cosines - after[:, None]
    fits = sample >= 0  # g ≥ 1
    w_s = torch.where(fits, 1.0, (gamma_sample * sample).exp())
    w_r, w_c = (torch.where(fits, 1.0, (gamma_pair * x).exp()) for x in (raw, synthetic))
    return {
        "histories": after,
        "weights": torch.stack([w_s, w_r, w_c]),
        "text": (_pair_nll(v, t, logit_scale) * w_s * w_r).mean(),
        "caption": (_pair_nll(v, c, logit_scale) * w_s * w_c).mean(),
    }


def _pair_nll(v: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """``½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]`` of every pair k."""
    own = torch.arange(len(v), device="cpu")
    logits = scale * v @ u.T
    return sum(F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)) / 2  # type: ignore[return-value]


def _orders(which: str, v: Tensor, t: Tensor, has_equal_diagonal: bool) -> tuple[Tensor, Tensor]:
    """S and R, or I and X, as references."""
    if which == "cross_modal":
        return exact_products(v, t), exact_products(t, v)
    orders = exact_products(v, v), exact_products(t, t)
    if has_equal_diagonal:
        return _with_equal_diagonal(orders[0], v), _with_equal_diagonal(orders[1], t)
    return orders


def _with_equal_diagonal(products: Tensor, features: Tensor) -> Tensor:
    """One value over the whole batch for unit-norm rows (to 1 %) with themselves and their equals."""
    equal = (features[:, None] == features[None]).all(-1)
    is_unit = (products.diagonal().sqrt() - 1).abs() <= 0.01
    return torch.where(
        equal & is_unit, products.diagonal()[is_unit].max() if is_unit.any() else 1.0, products
    )


def _quantized(y: Tensor, bins: int) -> Tensor:
    """The bin of every item: the best have the last one, the range of the others is divided evenly."""
    bins_of_lists = []
    for of_list in y.reshape(-1, y.shape[-1]):
        others = of_list[of_list < of_list.max()]
        if len(others) == 0:
            bins_of_lists.append(torch.zeros_like(of_list, dtype=torch.long))
            continue
        width = ((others.max() - others.min()) / (bins - 1)).clamp_min(torch.finfo(y.dtype).tiny)
        place = ((of_list - others.min()) / width).clamp(max=bins - 2).long()
        bins_of_lists.append(place.where(of_list < of_list.max(), torch.tensor(bins - 1)))
    return torch.stack(bins_of_lists).view(y.shape)


def ranked_lists(
    query_features: Any,
    items: Any,
    index: Any,
    grades: Any,
    logit_scale: Any,
    mask: Any = None,
    *,
    model: str = "plackett_luce",
    top_k: int | None = None,
    pair_weight: str | None = None,
    gain: str = "linear",
    in_batch_negatives: bool = False,
    reduction: str = "mean",
    frozen: Any = None,
) -> Any:
    """:class:`rankloss.RankedLists`, item by item.

    ``items`` are ``[M, D]``, ``index`` has the rows of each list's candidates; ``frozen`` has the reference's
    scores of all queries and items.
    """
    is_item = grades == grades if mask is None else mask
    rows = [[int(i) for i in places[kept]] for places, kept in zip(index, is_item, strict=True)]
    values, terms = [], []
    for n, own in enumerate(rows):
        g = [float(y) for y in grades[n][is_item[n]]]
        others = []
        if in_batch_negatives:
            listed = sorted({j for row in rows for j in row})
            others = [j for j in listed if not any((items[j] == items[i]).all() for i in own)]
        g += [-math.inf] * len(others)
        x = [logit_scale * (query_features[n] * items[j]).sum() for j in [*own, *others]]
        if frozen is not None:
            x = [score - float(frozen[n, j]) for score, j in zip(x, [*own, *others], strict=True)]
        if model == "lambda":
            weights = reference.lambda_weights([score.item() for score in x], g, gain=gain)
            pairs = np.argwhere(weights)
            value, count = sum(weights[p, q] * _log_sum([0 * x[p], x[q] - x[p]]) for p, q in pairs), 1
        else:
            value, count = _list_value(x, g, model, top_k, pair_weight)
        ranked = len(set(g)) > 1
        values.append(value if ranked else 0 * x[0])
        terms.append(count if ranked else 0)
    if reduction == "mean":
        kept = [value / count for value, count in zip(values, terms, strict=True) if count]
        return sum(kept) / len(kept) if kept else 0 * sum(values)
    return sum(values) if reduction == "sum" else torch.stack(values)


def _log_sum(x: list[Any]) -> Any:
    return torch.stack(x).logsumexp(0)


def _list_value(
    x: list[Any], g: list[float], model: str, top_k: int | None, pair_weight: str | None
) -> tuple[Any, int]:
    """The value of one list and the number of its terms."""

    graded = [p for p in range(len(g)) if g[p] > -math.inf]
    value, count = 0 * x[0], 0
    if model == "top_one":
        total = sum(math.exp(g[p] - max(g)) for p in graded)
        for p in graded:
            value = value + math.exp(g[p] - max(g)) / total * (_log_sum(x) - x[p])
        return value, 1
    for p in graded:
        worse = [q for q in range(len(g)) if g[q] < g[p]]
        if model == "pairwise":
            for q in worse:
                weight = g[p] - g[q] if pair_weight else 1.0
                value, count = value + weight * _log_sum([0 * x[p], x[q] - x[p]]), count + 1
        elif top_k is None or 1 + sum(y > g[p] for y in g) <= top_k:
            below = [x[q] for q in range(len(g)) if g[q] <= g[p]]
            value, count = value + _log_sum(below) - x[p], count + (len(below) > 1)
    return value, count
