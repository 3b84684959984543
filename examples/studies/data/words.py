"""Rows of captions, made of their words: TF-IDF, whole or reduced by latent semantic analysis."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

_MOST_TOKENS = 100_000


class WordVectors:
    """Captions to unit-norm rows, after a fit on the captions of a data set.

    A caption's TF-IDF vector x has the coordinate ``(1 + log c)·log((1 + n) / (1 + m))`` of a word that
    occurs c times in it and in m of the n fitted captions. Words of one caption only (m = 1) are left out.
    The row is ``x / ‖x‖``, or ``U·x / ‖U·x‖`` with the leading right singular vectors U of the fitted unit
    TF-IDF rows (LSA).

    A caption without a counted word has a pseudo-random row, drawn from a hash of the caption: it is similar
    to equal captions only.

    Args:
        captions: Those that are fitted on.
        dimensions: Of LSA, at most. None: TF-IDF itself.

    Raises:
        ValueError: If no word occurs in two captions but not in all.

    Example:
        >>> vectors = WordVectors(["red apple", "green apple", "red car", "green car"], dimensions=None)
        >>> vectors.tokens
        ['apple', 'car', 'green', 'red']
        >>> rows = vectors.transform(["a red apple", "one red car"])  # share one of two words of equal weight
        >>> round(float(rows[0] @ rows[1]), 3)
        0.5
    """

    def __init__(self, captions: Sequence[str], dimensions: int | None) -> None:
        self._vectorizer = TfidfVectorizer(
            sublinear_tf=True, token_pattern=r"\w+", min_df=2, max_features=_MOST_TOKENS
        )
        problem = (
            f"captions: no word is in two of {len(captions)}, but not in all; the first is {captions[0]!r}"
        )
        try:
            self._vectorizer.fit(captions)
        except ValueError as error:
            raise ValueError(problem) from error
        self._vectorizer.idf_ = self._vectorizer.idf_ - 1  # scikit-learn adds 1, so that a word of all counts
        if not self._vectorizer.idf_.any():
            raise ValueError(problem)
        self._projection: npt.NDArray[np.float64] | None = None
        if dimensions is not None:
            fewest = min(dimensions, len(captions), len(self._vectorizer.idf_))
            svd = TruncatedSVD(fewest, random_state=0).fit(self._vectorizer.transform(captions))
            self._projection = svd.components_

    @property
    def tokens(self) -> list[str]:
        """The counted words, in the order of TF-IDF's coordinates."""
        return [str(token) for token in self._vectorizer.get_feature_names_out()]

    def transform(self, captions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit-norm rows, ``[N, dimensions]``."""
        sparse = self._vectorizer.transform(captions)
        rows: npt.NDArray[np.float64] = (
            sparse.toarray() if self._projection is None else sparse @ self._projection.T
        )
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        for row in np.flatnonzero(norms <= 1e-9).tolist():
            drawing = np.random.default_rng(zlib.crc32(captions[row].encode(errors="surrogatepass")))
            rows[row] = drawing.normal(size=rows.shape[1])
            norms[row] = np.linalg.norm(rows[row])
        unit: npt.NDArray[np.float32] = (rows / norms).astype(np.float32)
        return unit
