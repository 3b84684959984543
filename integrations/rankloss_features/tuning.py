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
"""The fewest groups of pairs of which a setting is searched: a tenth of fewer ranks settings by chance."""

MOST_HELD_OUT = 1000
"""The most groups that are held out: with so many, the standard error of a recall is below two points."""

_GROUPS_FOR_ONE_HELD_OUT = 10  # so that a tenth of all groups is held out
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


def held_out(groups: NDArray[Any], seed: int = 0, share: int = _GROUPS_FOR_ONE_HELD_OUT) -> NDArray[np.bool_]:
    """Choose groups of rows at random, and hold out all rows of them.

    A tenth of the groups is held out, at least one and at most :data:`MOST_HELD_OUT`. The choice depends on
    the values of the groups, and not on the order of the rows.

    Args:
        groups: ``[N]``, the group of each row: rows of equal values are held out together, or not at all.
        seed: The seed of the choice.
        share: The number of groups of which one is held out: 10 for a tenth.

    Returns:
        ``[N]``, True for the held-out rows.

    Raises:
        ValueError: There is one group, so that one side would be empty.

    Example:
        >>> held_out(np.array([7, 7, 3]), share=2).tolist() in ([True, True, False], [False, False, True])
        True
    """
    distinct_groups = np.unique(groups)  # sorted, so that the order of the rows does not matter
    if len(distinct_groups) < 2:
        raise ValueError(f"ids must differ, so that pairs can be held out; all {len(groups)} are one")
    count = min(MOST_HELD_OUT, max(1, len(distinct_groups) // share))
    chosen_groups = np.random.default_rng(seed).choice(distinct_groups, count, replace=False)
    return np.isin(groups, chosen_groups)


def tuned(
    take: Take,
    pictures: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    grid: Grid | None = None,
    seed: int = 0,
) -> Tuned:
    """Search the setting that ranks held-out groups best, and fit all pairs with it.

    The rows are read once, in blocks; memory holds the sums of the features, those of their square roots, and
    the held-out rows. With fewer groups than :data:`FEWEST_TO_SEARCH` nothing is searched, and the default
    setting is fitted.

    Args:
        take: From the numbers of some rows to their features, ``[n, D]`` of images and ``[n, D']`` of texts.
        pictures: ``[N]``: rows of one value have one picture, which is ranked once.
        groups: ``[N]``: rows of one value belong together: they are held out together, and their images and
            texts are partners in the recall. None: the pictures are the groups.
        grid: The settings to try; None: those of a :class:`rankloss_features.cca.Grid` by default.
        seed: The seed of the choice of the held-out groups.

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
        return _fit_of_default_setting(take, len(groups), number_of_groups)
    is_held_out = held_out(groups, seed)

    # The sums of the pairs that are not held out, for the settings without a root and for those with it.
    sums_of_learned = {root: PairSums(root=root) for root in (False, True)}
    for rows in _blocks(np.flatnonzero(~is_held_out)):
        images, texts = _checked_features(take, rows)
        for sums in sums_of_learned.values():
            sums.add(images, texts)

    # Each setting is ranked by the held-out pairs: each picture once, every text.
    held_out_rows = np.flatnonzero(is_held_out)
    images, texts = _checked_features(take, held_out_rows)
    _, first_of_picture = np.unique(pictures[held_out_rows], return_index=True)
    first_of_picture.sort()  # from the order of the pictures' values to that of the rows
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


def _checked_features(take: Take, rows: Numbers) -> tuple[Tensor, Tensor]:
    """The features of some rows, of images and of texts.

    Raises:
        ValueError: A row has NaN, infinity or zeros alone; the error names it by its number among all rows.
    """
    images, texts = take(rows)
    numbers = rows.tolist()
    check_rows("image_features", images, numbers)
    check_rows("text_features", texts, numbers)
    return images, texts


def _fit_of_default_setting(take: Take, rows: int, groups: int) -> Tuned:
    """The fit of all pairs with the default setting, of at most as many dimensions as the narrower features.

    Args:
        take: As for :func:`tuned`.
        rows: The number of pairs.
        groups: The number of groups, for the log.
    """
    sums = PairSums()
    for block in _blocks(np.arange(rows)):
        sums.add(*_checked_features(take, block))
    bases = Eigenbases(sums)
    setting = Setting(dimensions=min(Setting.dimensions, bases.most_dimensions))
    _logger.info("%d groups of pairs are too few to search a setting: %s", groups, setting)
    cca = bases.fit(setting)
    is_held_out = np.zeros(rows, bool)  # none is
    return Tuned(cca, of_learned=cca, is_held_out=is_held_out, trials=[], cut=0)


def _blocks(rows: Numbers) -> Iterator[Numbers]:
    """The numbers of rows, in blocks that are read together."""
    for first in range(0, len(rows), _BLOCK):
        yield rows[first : first + _BLOCK]
