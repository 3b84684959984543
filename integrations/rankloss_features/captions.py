"""A text encoder made of the captions themselves: TF-IDF, by default reduced by latent semantic analysis.

No model and no download: captions that share rare words have similar rows.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MOST_CAPTIONS = 1_000_000  # that are fitted on
MOST_TOKENS = 100_000  # that are counted
DIMENSIONS = 256
_SHARE_OF = 20_000  # captions of which the shared tokens are looked at
_CHARACTERS = (1, 3)  # the shortest and the longest n-gram


class CaptionVectors:
    """Captions to unit-norm rows, after a fit on the captions of a data set.

    A caption's TF-IDF vector x has the coordinate ``(1 + log c)·log((1 + n) / (1 + m))`` of a token that
    occurs c times in it and in m of the n fitted captions. Tokens of one caption only (m = 1) are left out.
    The row is ``x / ‖x‖``, or ``U·x / ‖U·x‖`` with the leading right singular vectors U of the fitted unit
    TF-IDF rows (LSA).

    A caption without a counted token has a pseudo-random row, drawn from a hash of the caption: it is similar
    to equal captions only.

    Args:
        vectorizer: A fitted ``sklearn.feature_extraction.text.TfidfVectorizer``.
        projection: U, ``[dimensions, tokens]``; None for TF-IDF itself.
        characters: Whether the tokens are character n-grams.

    Example:
        >>> captions = ["red apple", "green apple", "red car", "green car"]
        >>> vectors = CaptionVectors.fit(captions, dimensions=None)
        >>> vectors.width, vectors.tokens
        (4, ['apple', 'car', 'green', 'red'])
        >>> rows = vectors.transform(["a red apple", "one red car"])  # share one of two words of equal weight
        >>> round(float(rows[0] @ rows[1]), 3)
        0.5
    """

    def __init__(
        self, vectorizer: Any, projection: npt.NDArray[np.float64] | None, *, characters: bool
    ) -> None:
        self._vectorizer, self._projection, self.characters = vectorizer, projection, characters

    @classmethod
    def fit(
        cls, captions: Iterable[str], *, dimensions: int | None = DIMENSIONS, characters: bool = False,
        most_captions: int = MOST_CAPTIONS, most_tokens: int = MOST_TOKENS,
    ) -> CaptionVectors:  # fmt: skip
        """Fit on captions, which are read once; equal captions in equal order give equal rows.

        Args:
            captions: Captions, one or more a pair. Of more than ``most_captions`` a uniform sample is used.
            dimensions: Of LSA, at most: as many as there are tokens and captions where those are fewer. None
                for TF-IDF itself, whose rows have one coordinate per token.
            characters: Count n-grams of 1 to 3 characters within words, for languages without spaces.
            most_captions: A bound of the memory.
            most_tokens: The most frequent tokens that are counted.

        Raises:
            ValueError: If all captions are equal, none has a word, or no token occurs in two captions but
                not in all.
            ImportError: If scikit-learn is not installed.
        """
        from sklearn.decomposition import TruncatedSVD

        if dimensions is not None and dimensions < 1:
            raise ValueError(f"dimensions: must be at least 1 or None, got {dimensions}")
        used = sample(captions, most_captions)
        vectorizer = _vectorizer(characters, min_df=2, max_features=most_tokens)
        _check(used, vectorizer.build_analyzer())
        try:
            vectorizer.fit(used)
        except ValueError as error:
            raise ValueError(_no_token(used)) from error
        vectorizer.idf_ = vectorizer.idf_ - 1  # scikit-learn adds 1, so that a token of all captions counts
        if not vectorizer.idf_.any():
            raise ValueError(_no_token(used))
        if dimensions is None:
            return cls(vectorizer, None, characters=characters)
        dimensions = min(dimensions, len(used), len(vectorizer.idf_))
        svd = TruncatedSVD(dimensions, random_state=0).fit(vectorizer.transform(used))
        return cls(vectorizer, svd.components_, characters=characters)

    @property
    def tokens(self) -> list[str]:
        """The counted tokens, in the order of TF-IDF's coordinates."""
        return [str(token) for token in self._vectorizer.get_feature_names_out()]

    @property
    def width(self) -> int:
        """The number of coordinates of a row."""
        return len(self._vectorizer.idf_ if self._projection is None else self._projection)

    def count(self, captions: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return how many different counted tokens each caption has, ``[N]``."""
        counts: npt.NDArray[np.int64] = np.diff(self._vectorizer.transform(captions).indptr).astype(np.int64)
        return counts

    def share(self, captions: Sequence[str], batch: int = 250) -> float:
        """Return the fraction of captions that share a counted token with another of their batch.

        Args:
            captions: Captions, of which batches are drawn at random, of 20,000 at most.
            batch: Captions of a batch; a last one that is smaller is left out.
        """
        drawn = random.Random(0).sample(captions, min(len(captions), _SHARE_OF))
        drawn = drawn[: max(len(drawn) // batch * batch, min(len(drawn), batch))]
        sharing = 0
        for first in range(0, len(drawn), batch):
            sparse = self._vectorizer.transform(drawn[first : first + batch])
            sparse.eliminate_zeros()  # of tokens that all captions have
            is_shared = np.bincount(sparse.indices)[sparse.indices] > 1
            rows = np.repeat(np.arange(sparse.shape[0]), np.diff(sparse.indptr))
            sharing += len(np.unique(rows[is_shared]))
        return sharing / len(drawn)

    def transform(self, captions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit-norm rows, ``[N, width]``."""
        sparse = self._vectorizer.transform(captions)
        rows: npt.NDArray[np.float64] = (
            sparse.toarray() if self._projection is None else sparse @ self._projection.T
        )
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        for row in np.flatnonzero(norms <= 1e-9).tolist():
            rows[row] = np.random.default_rng(
                zlib.crc32(captions[row].encode(errors="surrogatepass"))
            ).normal(size=self.width)
            norms[row] = np.linalg.norm(rows[row])
        unit: npt.NDArray[np.float32] = (rows / norms).astype(np.float32)
        return unit

    def save(self, file: str | PathLike[str] | BinaryIO) -> None:
        """Write everything that :meth:`transform` depends on into one ``.npz``, without pickles."""
        if isinstance(file, (str, PathLike)):  # to which NumPy would add .npz
            with open(file, "wb") as opened:
                return self.save(opened)
        about = np.array(json.dumps({"characters": self.characters, "tokens": self.tokens}))
        projection = np.zeros((0, 0)) if self._projection is None else self._projection
        np.savez(file, about=about, weights=self._vectorizer.idf_, projection=projection)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CaptionVectors:
        """Read what :meth:`save` wrote; the rows are equal bit for bit."""
        with np.load(path, allow_pickle=False) as file:
            about, weights, projection = json.loads(str(file["about"])), file["weights"], file["projection"]
        vectorizer = _vectorizer(about["characters"], vocabulary=about["tokens"])
        vectorizer.idf_ = weights
        return cls(vectorizer, projection if projection.size else None, characters=about["characters"])


def sample(captions: Iterable[str], most: int) -> list[str]:
    """Return all captions, or a uniform sample of ``most``, the same at every call (a reservoir).

    Example:
        >>> sample(["a", "b"], 3), len(sample(map(str, range(1000)), 3))
        (['a', 'b'], 3)
    """
    drawing, found = random.Random(0), list[str]()
    for number, caption in enumerate(captions):
        if number < most:
            found.append(caption)
        elif (place := drawing.randrange(number + 1)) < most:
            found[place] = caption
    return found


def _vectorizer(characters: bool, **more: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    tokens: dict[str, Any] = (
        {"analyzer": "char_wb", "ngram_range": _CHARACTERS} if characters else {"token_pattern": r"\w+"}
    )
    return TfidfVectorizer(sublinear_tf=True, **tokens, **more)


def _check(captions: Sequence[str], tokens_of: Callable[[str], list[str]]) -> None:
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions: must be strings; caption {number} is {caption!r}")
    if len(captions) < 2:
        raise ValueError(f"captions: at least two are needed, got {list(captions)!r}")
    if all(caption == captions[0] for caption in captions):
        raise ValueError(f"captions: all {len(captions)} are equal, {captions[0]!r}: they teach nothing")
    if not any(map(tokens_of, captions)):
        raise ValueError(f"captions: none of {len(captions)} has a word; the first is {captions[0]!r}")


def _no_token(captions: Sequence[str]) -> str:
    return (
        f"captions: no token occurs in two captions but not in all, in {len(captions)} captions; "
        f"the first is {captions[0]!r}. Languages without spaces need characters=True, the encoder "
        "captions:characters"
    )
