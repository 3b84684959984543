"""Retrieval and classification scores, in percent, and what guessing would give."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import hypergeom
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

RETRIEVAL_KS = (1, 5, 10)
CLASS_KS = (1, 3, 5)

Recall = dict[str, dict[int, float]]  # by direction and cut-off, in percent
Scored = dict[str, tuple[float, float]]  # by the score's name, the score and what guessing would give

_BLOCK = 2**24  # elements of a block of the similarity matrix


def recall(similarity: Tensor, image_of: Tensor | None = None, *, ks: Sequence[int] = RETRIEVAL_KS) -> Recall:
    """Return R@k both ways, given how well every image fits every caption.

    An image counts once, by the best of its captions; every caption is a query. Answers that tie with the
    best right one share its places: a query counts by the chance that a random order of the tied ones puts a
    right one in the first k. Scores that are often equal, such as a nearest-neighbour vote, therefore gain
    nothing from the order of the answers. The trained models are evaluated by :mod:`rankloss.metrics`, which
    counts every tie against the query; the studies' recorded numbers have the rule here.

    ``similarity`` is ``[I, C]``, and ``image_of``, ``[C]``, the image of every caption; by default caption i
    belongs to image i.

    Raises:
        ValueError: For an ``image_of`` that does not fit, an image without a caption, NaN or infinity.

    Example:
        >>> recall(torch.tensor([[0.9, 0.1], [0.8, 0.5]]), ks=(1, 2))
        {'image_to_text': {1: 50.0, 2: 100.0}, 'text_to_image': {1: 100.0, 2: 100.0}}
    """
    images, captions = similarity.shape
    return _recall(
        lambda rows: similarity[rows],
        lambda columns: similarity.T[columns],
        (images, captions),
        image_of,
        ks,
    )


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_of: Tensor | None = None,
    *,
    ks: Sequence[int] = RETRIEVAL_KS,
) -> Recall:
    """Return :func:`recall` of unit-norm features, ``[I, D]`` and ``[C, D]``, by blocks of their products.

    Raises:
        ValueError: As :func:`recall`.
    """
    return _recall(
        lambda images: image_features[images] @ text_features.T,
        lambda texts: text_features[texts] @ image_features.T,
        (len(image_features), len(text_features)),
        image_of,
        ks,
    )


def _recall(
    of_images: Callable[[slice], Tensor],
    of_texts: Callable[[slice], Tensor],
    shape: tuple[int, int],
    image_of: Tensor | None,
    ks: Sequence[int],
) -> Recall:
    """Return :func:`recall` of scores that are computed block by block.

    ``of_images`` returns the scores of some images with all captions, ``of_texts`` those of some captions
    with all images; ``shape`` is ``(I, C)``.
    """
    images, captions = shape
    image_of = torch.arange(images) if image_of is None else image_of
    if image_of.shape != (captions,) or not ((image_of >= 0) & (image_of < images)).all():
        raise ValueError(f"image_of: expected {captions} numbers of images below {images}")
    own = torch.arange(images, device=image_of.device)
    recalls = {}
    # The image of each query, and of each answer: they fit if these are the same.
    for way, scores, image_of_query, image_of_answer in (
        ("image_to_text", of_images, own, image_of),
        ("text_to_image", of_texts, image_of, own),
    ):
        size = max(1, _BLOCK // max(1, len(image_of_answer)))
        hits = []
        for start in range(0, len(image_of_query), size):
            rows = slice(start, start + size)
            is_right = image_of_query[rows].unsqueeze(1) == image_of_answer
            hits.append(_hits(scores(rows), is_right, ks))
        percent = 100 * torch.cat(hits).mean(dim=0)
        recalls[way] = dict(zip(ks, percent.tolist(), strict=True))
    return recalls


def _hits(scores: Tensor, right: Tensor, ks: Sequence[int]) -> Tensor:
    """Return for every row and cut-off the chance that a right column is among the first k.

    Raises:
        ValueError: For NaN or infinity, or a row without a right column.
    """
    if not scores.isfinite().all():
        raise ValueError("similarity: holds NaN or infinity (did training diverge?)")
    right = right.to(scores.device)
    if not right.any(dim=1).all():
        query = int((~right.any(dim=1)).nonzero()[0])
        raise ValueError(f"query {query}: has no right answer among the columns")
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    above = (scores > best).sum(dim=1, keepdim=True)
    ties = scores == best
    tied = ties.sum(dim=1, keepdim=True).cpu().numpy()
    right_tied = (ties & right).sum(dim=1, keepdim=True).cpu().numpy()
    # The tied columns share what remains of the first k places, drawn without replacement.
    places = (torch.tensor(ks) - above.cpu()).numpy().clip(0, tied)
    return torch.from_numpy(1 - hypergeom.pmf(0, tied, right_tied, places))


def accuracy_at_k(scores: Tensor, labels: Tensor, ks: Sequence[int] = CLASS_KS) -> dict[int, float]:
    """Return top-k accuracy over all items; a k beyond the number of classes counts as all of them.

    Raises:
        ValueError: For NaN or infinity.

    Example:
        >>> accuracy_at_k(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]), torch.tensor([0, 1]), (1, 3))
        {1: 50.0, 3: 100.0}
    """
    if not scores.isfinite().all():
        raise ValueError("scores: hold NaN or infinity (did training diverge?)")
    options = {"num_classes": scores.shape[1], "average": "micro"}
    top = {k: multiclass_accuracy(scores, labels, top_k=min(k, scores.shape[1]), **options) for k in ks}
    return {k: 100 * value.item() for k, value in top.items()}


def chance(n: int, ks: Sequence[int]) -> dict[int, float]:
    """Return what guessing among ``n`` equally likely answers scores at each cut-off."""
    return {k: 100 * min(k / n, 1.0) for k in ks}


def retrieval_chance(images: int, image_of: Tensor, ks: Sequence[int] = RETRIEVAL_KS) -> Recall:
    """Return what a random order scores at :func:`recall`."""
    captions = len(image_of)
    captions_of_image = torch.bincount(image_of, minlength=images).unsqueeze(1).numpy()
    places = np.minimum(ks, captions)
    has_none = hypergeom.pmf(0, captions, captions_of_image, places)  # the chance of no own caption there
    percent = 100 * (1 - has_none).mean(axis=0)
    to_text = dict(zip(ks, percent.tolist(), strict=True))
    return {"image_to_text": to_text, "text_to_image": chance(images, ks)}


def named_recall(image_features: Tensor, text_features: Tensor, image_of: Tensor) -> Scored:
    """Return :func:`retrieval` and its chance by names such as ``image_to_text R@5``."""
    recalls = retrieval(image_features, text_features, image_of)
    chances = retrieval_chance(len(image_features), image_of)
    scored = {}
    for way, of_way in recalls.items():
        for k, value in of_way.items():
            scored[f"{way} R@{k}"] = (value, chances[way][k])
    return scored


def standard_error(percent: float, n: int) -> float:
    """Return the binomial standard error of a percentage that was counted over ``n`` items."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / n)
