"""The closed form, as the library has it: searched on a dev side, fitted on the train side."""

from __future__ import annotations

import functools
from typing import Any, Protocol

from torch import Tensor

from rankloss_features.cca import CanonicalCorrelation, Grid, PairSums, search
from studies.data.features import Side


class HasEncoded(Protocol):
    """Data whose sides are there as an encoder sees them."""

    def encoded(self, side: str) -> Side:
        """Return the unit-norm features of a side."""


class Closed:
    """The closed form as a model of the encoders' features.

    Args:
        cca: Its projections.
    """

    def __init__(self, cca: CanonicalCorrelation) -> None:
        self.cca = cca

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, K]``."""
        return self.cca.images(pictures)

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, K]``."""
        return self.cca.texts(sentences.flatten(0, 1)).unflatten(0, sentences.shape[:2])


@functools.cache
def searched(data: HasEncoded, most: int | None = None) -> tuple[Closed, dict[str, Any]]:
    """Return the closed form with the setting that is best on the dev side, and this setting with its R@10.

    Args:
        data: The data set.
        most: Dimensions; None: those of the library's grid.
    """
    train, dev = data.encoded("train"), data.encoded("dev")
    sums = [PairSums.of(train.pictures, train.sentences, root=root) for root in (False, True)]
    widths = tuple(width for width in Grid().dimensions if most is None or width <= most)
    best = search(sums, dev.pictures, dev.sentences, grid=Grid(dimensions=widths))[0]
    chosen = best.setting.as_options()
    return fitted(train, chosen), {**chosen, "dev": 100 * best.recall}


def fitted(train: Side, chosen: dict[str, Any]) -> Closed:
    """Return the closed form of a train side, with a setting; its R@10 is passed over."""
    options = {name: value for name, value in chosen.items() if name != "dev"}
    return Closed(CanonicalCorrelation.fit(train.pictures, train.sentences, **options))
