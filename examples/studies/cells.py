"""Tests of one arm against another on several cells, data sets with a training each, corrected together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .report import difference_text, ends_text, mark, mean_text, p_text
from .statistics import Arms, Difference, Measure, Pair, correct, verdict
from .students.measure import PRIMARY, hits_of_pictures

HEAD = ("cell", "arm", "minus", "R@10", "n", "p", "", "seeds and pictures")
BY_TIES = 0.5  # points of R@10, by which hits may differ from it


@dataclasses.dataclass(frozen=True)
class Tested:
    """The records of a cell's test side that are there, by arm and seed."""

    cell: str
    arms: Arms

    def difference(self, pair: Pair) -> Difference | None:
        """Return the paired difference of two arms, None unless both have a record of the same seed."""
        return self.arms.difference(pair, PRIMARY) if set(pair) <= self.arms.records.keys() else None


def family(
    every: Sequence[Tested], pairs: Sequence[Pair], among: Sequence[Pair] = ()
) -> dict[tuple[str, Pair], Difference]:
    """Return the differences of pairs of arms by cell, corrected together.

    Args:
        every: The cells.
        pairs: Of arms.
        among: A larger family; if all pairs belong to it, they are corrected with all of it.
    """
    together = among if set(pairs) <= set(among) else pairs
    found = {(of.cell, pair): of.difference(pair) for pair in together for of in every}
    tested = correct({key: difference for key, difference in found.items() if difference is not None})
    return {key: difference for key, difference in tested.items() if key[1] in pairs}


def rows(every: Sequence[Tested], pairs: Sequence[Pair], among: Sequence[Pair] = ()) -> list[list[str]]:
    """Return the rows of a table of :func:`family`."""
    arms_of = {of.cell: of.arms for of in every}
    return [
        [
            name,
            *(f"`{arm}`" for arm in pair),
            difference_text(of),
            str(of.n),
            p_text(of.adjusted),
            mark(of),
            ends_text(over_pictures(arms_of[name], pair, of.mean)),
        ]
        for (name, pair), of in family(every, pairs, among).items()
    ]


def over_pictures(arms: Arms, pair: Pair, difference: float) -> tuple[float, float] | None:
    """Return the interval over seeds and pictures of a difference in R@10, None with few seeds or many ties.

    A tie is a hit in the pictures' hits, but not in R@10. Where captions of words that are all unknown tie,
    an interval of hits is one of another measure.
    """
    hits = arms.difference(pair, lambda record: float(hits_of_pictures(record).mean()))
    if hits is None or abs(hits.mean - difference) > BY_TIES:
        return None
    return arms.over_pictures(pair, hits_of_pictures)


def title(pair: Pair) -> str:
    """Return a pair as text.

    Example:
        >>> title(("spread", "clip"))
        '`spread` minus `clip`'
    """
    return " minus ".join(f"`{arm}`" for arm in pair)


def verdict_sentence(every: Sequence[Tested], pair: Pair, among: Sequence[Pair] = ()) -> str:
    """Return in words on which cells a difference is above 0, below it, neither, or of too few seeds."""
    cells_of: dict[str, list[str]] = {}
    for (name, _), difference in family(every, [pair], among).items():
        cells_of.setdefault(verdict(difference, above="above 0", below="below 0"), []).append(name)
    where = "; ".join(f"{said} on {', '.join(names)}" for said, names in cells_of.items())
    return f"{title(pair)}: {where or 'no record yet'}."


def mean_of(arms: Arms, arm: str, measure: Measure) -> str:
    """Return an arm's mean of a measure, a dash unless all of its records have it."""
    records = arms.records[arm].values()
    group, *names = measure.path
    is_there = all(set(names) <= record["metrics"].get(group, {}).keys() for record in records)
    return mean_text(arms.estimate(arm, measure), measure.digits) if is_there else "–"


def mean_rows(every: Sequence[Tested], measures: Sequence[Measure]) -> list[list[str]]:
    """Return the rows of a table with the means of every arm, by cell."""
    return [
        [of.cell, f"`{arm}`", *(mean_of(of.arms, arm, measure) for measure in measures)]
        for of in every
        for arm in of.arms.records
    ]


def primary_values(
    every: Sequence[Tested], tests: Mapping[str, Pair], among: Sequence[Pair] = ()
) -> dict[str, Any]:
    """Return a report's values of its primary tests, by their letters.

    Each is a family of its own, but a pair of the larger family ``among`` is corrected with all of it.
    """
    return {
        "tests_head": HEAD,
        "verdicts": [verdict_sentence(every, pair, among) for pair in tests.values()],
        "primary": [
            (f"({letter}) {title(pair)}", rows(every, [pair], among)) for letter, pair in tests.items()
        ],
    }
