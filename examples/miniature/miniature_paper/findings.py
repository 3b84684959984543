"""Findings that the data support, in words, generated from the verdicts alone."""

from collections.abc import Iterator, Sequence
from statistics import median

from examples_common.statistics import ALPHA, BETTER, NOT_SIGNIFICANT, TOO_FEW_SEEDS, WORSE, verdict
from examples_common.wording import seeds_text

from .tables import Cell, Exhibit, QuotedCell
from .wording import fill

_UNCORRECTED = f"p < {ALPHA:.2g} uncorrected"
SUMMARY_HEAD = ("models × seeds", "tests", "better", "worse", _UNCORRECTED, "expected by chance")


class Tally:
    """Outcomes of comparisons."""

    def __init__(self, comparisons: Sequence[Cell]) -> None:
        self.all = comparisons
        self.above, self.below, self.undecided, self.untested = (
            [cell for cell in comparisons if verdict(cell.difference) == said]
            for said in (BETTER, WORSE, NOT_SIGNIFICANT, TOO_FEW_SEEDS)
        )
        self.established = self.above + self.below
        self.tested = [cell for cell in comparisons if cell not in self.untested]
        # Significant before the correction.
        self.nominal = [cell for cell in self.tested if cell.difference.nominal]
        # The expected number of these if nothing differed; dependence between the tests does not change it.
        self.expected = ALPHA * len(self.tested)
        # The median half width of the intervals that decide nothing, in points.
        widths = (c.difference.half_width for c in self.undecided if c.measure.percent)
        self.width = median(known) if (known := [width for width in widths if width]) else None

    def claims(self) -> Iterator[tuple[str, int, list[Cell]]]:
        """Yield every model's established differences of one sign, the largest first.

        Beside them are what they say, and how many of its differences were tested.
        """
        for pair in dict.fromkeys((c.subject, c.reference) for c in self.established):
            tested = sum((c.subject, c.reference) == pair for c in self.tested)
            for cells, percent_word, word in ((self.above, BETTER, "higher"), (self.below, WORSE, "lower")):
                own = [c for c in cells if (c.subject, c.reference) == pair]
                own.sort(key=lambda c: -abs(c.difference.mean))
                if own:
                    yield percent_word if own[0].measure.percent else word, tested, own


def text(exhibit: Exhibit) -> str:
    """Summarise an exhibit in Markdown: what was measured, what follows, and the paper's numbers."""
    return fill(
        "findings.md",
        exhibit=exhibit,
        missing=[f"{name} ({seeds_text(have, want)})" for name, have, want in exhibit.seeds if have < want],
        counts=[want for *_, want in exhibit.seeds if want],
        unplanned=[name for name, _, want in exhibit.seeds if not want],
        tally=Tally(exhibit.comparisons),
        above=_above_its_clip(exhibit),
    )


def summary(exhibit: Exhibit) -> list[str]:
    """Return an exhibit's row below :data:`SUMMARY_HEAD`; dashes where nothing is tested."""
    found = Tally(exhibit.comparisons)
    counts = [f"{len(part)}" for part in (found.tested, found.above, found.below, found.nominal)]
    shown = [*counts, f"{found.expected:.1f}"] if found.tested else ["–"] * 5
    return [seeds_text(*exhibit.counts), *shown]


def _above_its_clip(exhibit: Exhibit) -> dict[str, list[float]]:
    """Return the paper's own differences, by model."""
    found: dict[str, list[float]] = {}
    for row in (row for row in exhibit.rows if row.quoted):
        for (group, label), cell in zip(exhibit.columns, row.cells, strict=True):
            if isinstance(cell, QuotedCell) and cell.difference is not None and exhibit.key != "figure6":
                name = f"{label} ({group})" if exhibit.key == "table4" else label
                found.setdefault(name, []).append(cell.difference)
    return found
