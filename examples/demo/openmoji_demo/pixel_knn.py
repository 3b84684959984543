"""An untrained baseline: captions and classes of the training pictures nearest in pixel space."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 5


def nearest(images: np.ndarray, queries: np.ndarray, k: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and positions, ``[Q, k]``, of the k pictures nearest to each query, pixel by pixel.

    Where there are fewer than k pictures, all of them are returned.
    """
    index = NearestNeighbors(n_neighbors=min(k, len(images)), algorithm="brute").fit(_flat(images))
    distances, neighbours = index.kneighbors(_flat(queries))
    return distances, neighbours


def caption_scores(
    neighbours: np.ndarray, captions: Sequence[str], candidates: Sequence[str]
) -> torch.Tensor:
    """Return how well each candidate fits each query: TF-IDF cosine with the captions of its neighbours.

    ``neighbours`` are positions among the training captions, ``[Q, k]``.
    """
    # Inverse document frequency: sharing a rare word says more than sharing a common one.
    vectorizer = TfidfVectorizer(binary=True)
    words = vectorizer.fit_transform(captions)
    columns = vectorizer.transform(candidates).T.tocsc()
    scores = sum(words[column] @ columns for column in neighbours.T)
    # Rounded, so that the order of summation does not break ties.
    return torch.from_numpy(np.asarray(scores.todense()).round(9))


def class_scores(
    images: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    queries: np.ndarray,
    classes: Sequence[str] | np.ndarray,
) -> torch.Tensor:
    """Return the neighbours' votes for each class; ties go to the class with the nearest picture."""
    labels = np.asarray(labels)
    _, neighbours = nearest(images, queries)
    columns = []
    for name in classes:
        votes = (labels[neighbours] == name).sum(axis=1)
        members = images[labels == name]
        if len(members):
            distances, _ = nearest(members, queries, 1)
            bonus = 1 / (2 + distances[:, 0])  # below a vote, and the larger the nearer
        else:
            bonus = 0.0
        columns.append(votes + bonus)
    return torch.from_numpy(np.stack(columns, axis=1))


def _flat(images: np.ndarray) -> np.ndarray:
    """Return each picture as a row of whole numbers in float64.

    Their distances are exact, whatever the order of summation.
    """
    return np.asarray(images, dtype=np.float64).reshape(len(images), -1)
