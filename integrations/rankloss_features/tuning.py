"""The setting of a canonical correlation analysis, chosen on pairs that are held out of those to fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankloss_features.cca import (
    CanonicalCorrelation,
    Eigenbases,
    Grid,
    PairSums,
    Setting,
    Trial,
    check_rows,
    search,
)

Numbers: TypeAlias = NDArray[np.int64]
Take: TypeAlias = Callable[[Numbers], tuple[Tensor, Tensor]]
"""From the numbers of some rows to the features of their images and texts."""

FEWEST_TO_SEARCH = 100
"""Groups of pairs, below which the tenth that is held out tells settings apart by chance alone."""

MOST_HELD_OUT = 1000  # groups: the standard error of a recall is then below two points
_HELD_OUT = 10  # of so many groups one
_BLOCK = 4096  # rows that are read together
_logger = logging.getLogger("rankloss_features")


class Tuned(NamedTuple):
    """A fit whose setting was chosen on held-out pairs.

    Attributes:
        cca: The fit of all pairs.
        of_learned: The fit of those pairs alone that were not held out.
        is_held_out: ``[N]``, True for the held-out pairs.
        trials: The settings, the best first; none where there were too few pairs to hold some out.
        cut: The number of groups that were held out.
    """

    cca: CanonicalCorrelation
    of_learned: CanonicalCorrelation
    is_held_out: NDArray[np.bool_]
    trials: list[Trial]
    cut: int


def held_out(groups: NDArray[Any], seed: int = 0, share: int = _HELD_OUT) -> NDArray[np.bool_]:
    """Hold out all rows of some groups: of ten one, at least one, at most :data:`MOST_HELD_OUT`.

    The choice depends on the values of the groups, and not on their order.

    Args:
        groups: ``[N]``: rows of one value are on one side.
        seed: Of the choice.
        share: One of so many groups is held out.

    Returns:
        ``[N]``, True for the held-out rows.

    Raises:
        ValueError: There is one group, so that one side would be empty.

    Example:
        >>> held_out(np.array([7, 7, 3]), share=2).tolist() in ([True, True, False], [False, False, True])
        True
    """
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"ids must differ, so that pairs can be held out; all {len(groups)} are one")
    count = min(MOST_HELD_OUT, max(1, len(names) // share))
    chosen = np.random.default_rng(seed).choice(names, count, replace=False)
    return np.isin(groups, chosen)


def tuned(
    take: Take,
    pictures: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    grid: Grid | None = None,
    seed: int = 0,
) -> Tuned:
    """Search a setting on held-out groups, and fit all pairs with it.

    The rows are read once, in blocks; memory holds the sums, of either root, and the held-out rows. With
    fewer groups than :data:`FEWEST_TO_SEARCH` nothing is searched, and the default setting is fitted.

    Args:
        take: From the numbers of some rows to their features, ``[n, D]`` of images and ``[n, D']`` of texts.
        pictures: ``[N]``: rows of one value have one picture, which is ranked once.
        groups: ``[N]``: rows of one value belong together, on one side and as partners. None: the pictures.
        grid: The settings; None: those of a :class:`rankloss_features.cca.Grid` by default.
        seed: Of the choice of the held-out groups.

    Raises:
        ValueError: As :meth:`rankloss_features.cca.CanonicalCorrelation.fit`; or pictures and groups differ
            in length.
    """
    groups = pictures if groups is None else groups
    if len(pictures) != len(groups):
        raise ValueError(
            f"pictures and groups must have one value for each row; got {len(pictures)} and {len(groups)}"
        )
    number_of_groups = len(np.unique(groups))
    if number_of_groups < FEWEST_TO_SEARCH:
        return _default(take, len(groups), number_of_groups)
    is_held_out = held_out(groups, seed)
    sums_of_learned = {root: PairSums(root=root) for root in (False, True)}
    for rows in _blocks(np.flatnonzero(~is_held_out)):
        images, texts = _taken(take, rows)
        for sums in sums_of_learned.values():
            sums.add(images, texts)
    held_out_rows = np.flatnonzero(is_held_out)
    images, texts = _taken(take, held_out_rows)
    _, first_of_picture = np.unique(pictures[held_out_rows], return_index=True)
    first_of_picture.sort()
    held_out_groups, group_numbers = np.unique(groups[held_out_rows], return_inverse=True)
    ids = torch.from_numpy(group_numbers)
    trials = search(
        list(sums_of_learned.values()),
        images[first_of_picture],
        texts,
        image_ids=ids[first_of_picture],
        text_ids=ids,
        grid=grid or Grid(),
        k=min(10, len(first_of_picture)),
    )
    setting, recall = trials[0]
    _logger.info("the best of %d settings, held-out R@10 %.1f %%: %s", len(trials), 100 * recall, setting)
    learned = sums_of_learned[setting.root]
    all_pairs = learned.merged(PairSums.of(images, texts, root=setting.root))
    return Tuned(
        cca=Eigenbases(all_pairs).fit(setting),
        of_learned=Eigenbases(learned).fit(setting),
        is_held_out=is_held_out,
        trials=trials,
        cut=len(held_out_groups),
    )


def _taken(take: Take, rows: Numbers) -> tuple[Tensor, Tensor]:
    """The features of some rows; one that is not finite is named by its number."""
    images, texts = take(rows)
    numbers = rows.tolist()
    check_rows("image_features", images, numbers)
    check_rows("text_features", texts, numbers)
    return images, texts


def _default(take: Take, rows: int, groups: int) -> Tuned:
    """The fit of all pairs with the default setting, or as many dimensions as the narrower features have.

    Args:
        take: As for :func:`tuned`.
        rows: The number of pairs.
        groups: The number of groups, for the log.
    """
    sums = PairSums()
    for block in _blocks(np.arange(rows)):
        sums.add(*_taken(take, block))
    bases = Eigenbases(sums)
    setting = Setting(dimensions=min(Setting.dimensions, bases.most_dimensions))
    _logger.info("%d groups of pairs are too few to search a setting: %s", groups, setting)
    cca = bases.fit(setting)
    return Tuned(cca, of_learned=cca, is_held_out=np.zeros(rows, bool), trials=[], cut=0)


def _blocks(rows: Numbers) -> Iterator[Numbers]:
    """The numbers of rows, in blocks that are read together."""
    for first in range(0, len(rows), _BLOCK):
        yield rows[first : first + _BLOCK]
