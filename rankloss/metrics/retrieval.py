r"""Metrics of retrieval: the rank of the best partner of every query, recall, median rank.

Similarities are products of unit-norm rows, computed in blocks of queries; no matrix of all of them is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from rankloss.batch import first_equal
from rankloss.checks import INTEGERS, check_device, check_id, check_matrix, check_several, warn_of_norms
from rankloss.options import check_count
from rankloss.precision import product, widest_dtype

Ids: TypeAlias = Tensor | Sequence[int] | Sequence[str]
"""The id of each picture or text: integers ``[N]``, or a sequence of integers or of texts."""

_BLOCK = 2**21  # elements of a block of similarities; the memory of larger ones is mapped anew each time


def recall(
    image_features: Tensor,
    text_features: Tensor,
    k: int | Sequence[int] = (1, 5, 10),
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
) -> dict[str, Tensor]:
    r"""R@k, the share of queries that find a partner among their k best answers, and the median rank.

        R@k = mean_q [rank_q ≤ k],   rank_q = 1 + #{a no partner of q : s(q, a) ≥ max_{p a partner} s(q, p)}

    An answer that ties with the best partner ranks before it, so a model that maps everything to one point
    finds nothing. Memory is O(N) beside the features: 100,000 pictures × 100,000 texts fit.

    Without ids image row i and text row i are partners. With ids, an image and a text of one id are: any
    number of captions of a picture, and of pictures of a product. Then pictures are also compared with
    pictures, and texts with texts. There a query is no answer to itself, and one without another of its id
    is left out; without any such query, and for k beyond the number of answers, there is no entry.

    Args:
        image_features: ``[N, D]``, unit-norm.
        text_features: ``[M, D]``, unit-norm; M = N without ids.
        k: one number of answers, or several, also in an array.
        image_ids: ``[N]``, integers or texts.
        text_ids: ``[M]``, of the same kind.

    Returns:
        ``image_to_text_R@1``, …, ``image_to_text_median_rank``, the same of ``text_to_image``, and with ids
        of ``image_to_image`` and ``text_to_text``. Shares are in [0, 1]. The median rank is rounded down, as
        in open_clip's evaluation.

    Raises:
        TypeError: for features that are not tensors.
        ValueError: for features with NaN or infinity or of two widths, ids that do not fit the features, an
            image or a text without a partner, or k beyond the number of images or texts.

    Example:
        >>> v = torch.eye(4)[[0, 0, 1]]  # two photographs of a product, and one of another
        >>> t = torch.eye(4)[[0, 2]]
        >>> values = recall(v, t, k=(1, 2), image_ids=["shoe", "shoe", "hat"], text_ids=["shoe", "hat"])
        >>> {name: round(value.item(), 2) for name, value in values.items() if "R@1" in name}
        {'image_to_text_R@1': 0.67, 'text_to_image_R@1': 0.5, 'image_to_image_R@1': 1.0}
    """
    ks = _counts(k)
    ranks = partner_ranks(image_features, text_features, image_ids=image_ids, text_ids=text_ids)
    n_answers = {  # to a query of each direction
        "image_to_text": len(text_features),
        "text_to_image": len(image_features),
        "image_to_image": len(image_features) - 1,
        "text_to_text": len(text_features) - 1,
    }
    for direction, gallery in (("image_to_text", "texts"), ("text_to_image", "images")):
        if max(ks, default=0) > n_answers[direction]:
            raise ValueError(
                f"k must be at most the number of {gallery}, {n_answers[direction]}; got {max(ks)}"
            )
    values = {}
    for direction, ranks_or_nan in ranks.items():
        ranks_of_queries = ranks_or_nan[~ranks_or_nan.isnan()]  # of those with a partner
        for count in ks:
            if count <= n_answers[direction]:
                is_found = ranks_of_queries <= count
                values[f"{direction}_R@{count}"] = is_found.to(ranks_of_queries.dtype).mean()
        values[f"{direction}_median_rank"] = _median(ranks_of_queries).floor()
    return values


def _median(x: Tensor) -> Tensor:
    """The middle value, of an even number the mean of the middle two, where torch's takes the lower one."""
    ordered = x.sort().values
    n = len(x)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _counts(k: object) -> list[int]:
    """The numbers of answers, of one number, a sequence, or an array of torch or NumPy."""
    if isinstance(k, Tensor) and k.is_meta:
        raise ValueError("k must have values; got a tensor on the meta device")
    numbers = k.tolist() if hasattr(k, "tolist") else k
    if not isinstance(numbers, Iterable):
        numbers = [numbers]
    return [check_count("k", number) for number in numbers]


@torch.no_grad()
def partner_ranks(
    image_features: Tensor,
    text_features: Tensor,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
) -> dict[str, Tensor]:
    """The rank of the best partner of every query, from 1, as :func:`recall` counts it.

    For intervals and comparisons over queries.

    Args:
        image_features: as in :func:`recall`.
        text_features: as in :func:`recall`.
        image_ids: as in :func:`recall`.
        text_ids: as in :func:`recall`.

    Returns:
        ``image_to_text``, ``[N]``, and ``text_to_image``, ``[M]``. With ids also ``image_to_image``, ``[N]``,
        and ``text_to_text``, ``[M]``, with NaN for a query without another of its id; there is no entry where
        no query has another.

    Raises:
        TypeError, ValueError: as :func:`recall`.

    Example:
        >>> v, t = torch.eye(3), torch.eye(3)[[0, 2, 2]]
        >>> partner_ranks(v, t)["image_to_text"].tolist()
        [1.0, 3.0, 2.0]
    """
    _check_pair(image_features, text_features, has_ids=image_ids is not None or text_ids is not None)
    dtype = widest_dtype(image_features.device)
    v, t = image_features.detach().to(dtype), text_features.detach().to(dtype)
    if image_ids is None and text_ids is None:
        row_numbers = torch.arange(len(v), device=v.device)  # as ids: row i is the partner of row i
        return {
            "image_to_text": _ranks(v, t, row_numbers, row_numbers),
            "text_to_image": _ranks(t, v, row_numbers, row_numbers),
        }
    if image_ids is None or text_ids is None:
        given = "image_ids" if text_ids is None else "text_ids"
        raise ValueError(f"image_ids and text_ids go together; got {given} alone")
    of_images, of_texts = id_numbers(image_ids, text_ids, v, t)
    check_partners("image", image_ids, of_images, "text", of_texts)
    check_partners("text", text_ids, of_texts, "image", of_images)
    ranks = {
        "image_to_text": _ranks(v, t, of_images, of_texts),
        "text_to_image": _ranks(t, v, of_texts, of_images),
    }
    for direction, features, ids in (("image_to_image", v, of_images), ("text_to_text", t, of_texts)):
        has_partners = len(ids.unique()) < len(ids)
        if has_partners:
            ranks[direction] = _ranks(features, features, ids, ids, is_one_set=True)
    return ranks


def _ranks(
    queries: Tensor, answers: Tensor, query_ids: Tensor, answer_ids: Tensor, *, is_one_set: bool = False
) -> Tensor:
    """The rank of the best partner of each query; NaN without one.

    Args:
        queries: ``[N, D]``.
        answers: ``[M, D]``.
        query_ids: ``[N]``.
        answer_ids: ``[M]``.
        is_one_set: True if query i is answer i, which is left out.
    """
    ranks = torch.empty(len(queries), dtype=queries.dtype, device=queries.device)
    # A product of equal rows is rounded by their place: all take that of the first, and are tied exactly.
    first = first_equal(answers)
    queries_at_once = max(1, _BLOCK // len(answers))
    for rows in torch.arange(len(queries), device=queries.device).split(queries_at_once):
        scores = product(queries[rows], answers.T)
        if first is not None:
            scores = scores[:, first]
        is_partner = query_ids[rows, None] == answer_ids
        is_other = ~is_partner
        if is_one_set:  # the query itself is neither a partner nor another answer
            is_partner[torch.arange(len(rows), device=rows.device), rows] = False
        best = scores.masked_fill(~is_partner, -math.inf).amax(-1, keepdim=True)
        before = ((scores >= best) & is_other).sum(-1).to(ranks.dtype)
        ranks[rows] = torch.where(is_partner.any(-1), 1 + before, math.nan)
    return ranks


def _check_pair(image_features: Tensor, text_features: Tensor, *, has_ids: bool) -> None:
    """Raise an error that names the argument unless images and texts can be compared."""
    both = {"image_features": image_features, "text_features": text_features}
    for name, features in both.items():
        check_matrix(name, features)
        if len(features) == 0:
            raise ValueError(f"{name} must have at least one row; got shape {tuple(features.shape)}")
        if features.is_meta:
            raise ValueError(f"{name} must have values to be ranked; got a tensor on the meta device")
        row_is_finite = features.isfinite().all(-1)
        if not bool(row_is_finite.all()):
            row = int((~row_is_finite).nonzero()[0])
            raise ValueError(f"{name} must be finite; row {row} has NaN or infinity")
    check_device("text_features", text_features, image_features)
    shapes = f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"image_features and text_features must have one width; {shapes}")
    if not has_ids and len(image_features) != len(text_features):
        raise ValueError(
            f"image_features and text_features must have one row per pair without image_ids and text_ids; "
            f"{shapes}"
        )
    for name, features in both.items():
        warn_of_norms(name, features)


def id_numbers(image_ids: Ids, text_ids: Ids, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as integers on the features' device, equal where the ids are.

    Raises:
        ValueError: for ids that are no integers or texts, or not one for each row.
    """
    code_of: dict[int | str, int] = {}
    codes = []
    for name, ids, features in (("image_ids", image_ids, v), ("text_ids", text_ids, t)):
        values = _as_list(name, ids)
        if len(values) != len(features):
            raise ValueError(f"{name} must be {len(features)} ids, one for every row; got {len(values)}")
        numbers = [code_of.setdefault(value, len(code_of)) for value in values]
        codes.append(torch.tensor(numbers, device=features.device))
    return codes[0], codes[1]


def _as_list(name: str, ids: Ids) -> list[int | str]:
    """Ids as a list, or an error that names the argument and the first wrong row."""
    check_several(name, ids)
    if isinstance(ids, Tensor) and (ids.dtype not in INTEGERS or ids.dim() != 1):
        raise ValueError(f"{name} must be integers [N]; got {ids.dtype} {[*ids.shape]}")
    # Arrays of torch and NumPy, and columns of pandas.
    values = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    for row, value in enumerate(values):
        check_id(name, value, row)
    return values


def check_partners(kind: str, ids: Ids, numbers: Tensor, other_kind: str, other_numbers: Tensor) -> None:
    """Raise a ValueError that names the first item without a partner of the other kind.

    Args:
        kind: ``"image"`` or ``"text"``.
        ids: The items' ids as they were given, for the error.
        numbers: The same ids as numbers, of :func:`id_numbers`.
        other_kind: The other one.
        other_numbers: The numbers of its items' ids.
    """
    lone_rows = (~torch.isin(numbers, other_numbers)).nonzero().flatten().tolist()
    if lone_rows:
        first_id = _as_list(f"{kind}_ids", ids)[lone_rows[0]]
        raise ValueError(
            f"{kind}_ids: {len(lone_rows)} of {len(numbers)} {kind}s have no {other_kind} of their id, the "
            f"first is row {lone_rows[0]} with id {first_id!r}"
        )
