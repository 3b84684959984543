"""What the data support, in words, and what they do not: generated from the verdicts, and never more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median

from . import statistics
from .statistics import ALPHA, MIN_SEEDS
from .tables import Comparison, Exhibit, QuotedCell, difference_text, seeds_text, signed

_NAMED = 4  # differences that are spelled out; more are counted
SUMMARY_HEAD = (
    "models × seeds",
    "tests",
    "better",
    "worse",
    f"p < {ALPHA:.2g} uncorrected",
    "expected by chance",
)


@dataclasses.dataclass(frozen=True)
class Tally:
    """How comparisons came out."""

    tested: tuple[Comparison, ...]  # with enough seeds
    untested: tuple[Comparison, ...]
    above: tuple[Comparison, ...]  # established positive differences
    below: tuple[Comparison, ...]  # established negative differences
    undecided: tuple[Comparison, ...]  # not told apart
    nominal: tuple[Comparison, ...]  # would pass as the only test there is, established or not

    @property
    def established(self) -> tuple[Comparison, ...]:
        """Both kinds of established differences."""
        return self.above + self.below

    @property
    def expected(self) -> float:
        """How many would pass alone, on average, if nothing differed, however they depend on each other."""
        return ALPHA * len(self.tested)


def tally(comparisons: Sequence[Comparison]) -> Tally:
    """Sort comparisons by their verdicts."""
    said = [(c, statistics.verdict(c.difference, above="above", below="below")) for c in comparisons]

    def those(*words: str) -> tuple[Comparison, ...]:
        return tuple(c for c, word in said if word in words)

    return Tally(
        tested=those("above", "below", statistics.NOT_TOLD_APART),
        untested=those(statistics.TOO_FEW_SEEDS),
        above=those("above"),
        below=those("below"),
        undecided=those(statistics.NOT_TOLD_APART),
        nominal=tuple(c for c in comparisons if c.difference is not None and c.difference.nominal),
    )


def paragraphs(exhibit: Exhibit) -> list[str]:
    """Return what there is of an exhibit, what follows from it, and what the paper has."""
    if exhibit.empty:
        planned = any(planned for _, _, planned in exhibit.seeds)
        state = "None of these models has been trained yet." if planned else "This is not part of the plan."
        return [state, of_paper(exhibit)]
    if exhibit.key == "figure7":
        return [_pictures(exhibit), of_paper(exhibit)]
    return [f"{_seeds(exhibit)} {_items(exhibit)}".strip(), verdicts(exhibit), of_paper(exhibit)]


def summary(exhibit: Exhibit) -> list[str]:
    """Return an exhibit's row below :data:`SUMMARY_HEAD`; dashes where nothing is tested."""
    found = tally(exhibit.comparisons)
    trained = sum(trained for _, trained, _ in exhibit.seeds)
    planned = sum(planned for _, _, planned in exhibit.seeds)
    counts = [f"{len(part)}" for part in (found.tested, found.above, found.below, found.nominal)]
    shown = [*counts, f"{found.expected:.1f}"] if found.tested else ["–"] * 5
    return [seeds_text(trained, planned), *shown]


def _seeds(exhibit: Exhibit) -> str:
    sentences = []
    planned = [(name, have, want) for name, have, want in exhibit.seeds if want]
    missing = [f"{name} ({seeds_text(have, want)})" for name, have, want in planned if have < want]
    if missing:
        sentences.append(f"Seeds are missing: {_some(missing)}.")
    else:
        counts = [want for _, _, want in planned]
        span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        sentences.append(f"Every model has its {span} planned seed{'s' if max(counts) > 1 else ''}.")
    others = [name for name, _, want in exhibit.seeds if not want]
    if others:
        sentences.append(f"Not part of the plan: {_some(others)}.")
    return " ".join(sentences)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more models" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def _items(exhibit: Exhibit) -> str:
    if not exhibit.items:
        return ""
    least, most = min(exhibit.items), max(exhibit.items)
    span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"Each number is over {span} held-out items, the same ones for every seed."


def verdicts(exhibit: Exhibit) -> str:
    """Say which differences are established, which are not, and how small they could be."""
    found = tally(exhibit.comparisons)
    references = " and ".join(dict.fromkeys(c.reference for c in exhibit.comparisons))
    head = f"{len(exhibit.comparisons)} paired comparisons with {references}"
    if not found.tested:
        return f"{head}, none with the {MIN_SEEDS} seeds that a test needs here: nothing follows."
    sentences = [f"{head}{f', {len(found.untested)} of them with too few seeds' if found.untested else ''}."]
    corrected = f"after Holm's correction for {len(found.tested)} tests at {100 * ALPHA:.0f} %"
    if found.established:
        sentences.append(f"Established {corrected}: {len(found.established)}. {_established(found)}")
    else:
        sentences.append(f"Established {corrected}: none.")
    sentences.append(
        f"With p < {ALPHA:g} before the correction: {len(found.nominal) or 'none'}; if nothing differed, "
        f"{found.expected:.1f} would be expected."
    )
    if found.undecided:
        sentences.append(f"Not told apart: {len(found.undecided)}, which does not mean equal{_width(found)}.")
    return " ".join(sentences)


def _established(found: Tally) -> str:
    said = []
    for pair in dict.fromkeys((c.subject, c.reference) for c in found.established):
        tested = sum((c.subject, c.reference) == pair for c in found.tested)
        for group, of_scores, of_others in (
            (found.above, statistics.BETTER, "higher"),
            (found.below, statistics.WORSE, "lower"),
        ):
            own = [c for c in group if (c.subject, c.reference) == pair]
            if own:
                word = of_scores if own[0].percent else of_others
                said.append(f"{pair[0]} is {word} than {pair[1]} in {len(own)} of {tested}: {_named(own)}.")
    return " ".join(said)


def _named(comparisons: Sequence[Comparison]) -> str:
    by_size = sorted(comparisons, key=lambda c: -abs(c.difference.mean))
    named = [
        f"{c.measure} ({difference_text(c.difference, 2 if c.percent else 3)}, n = {c.difference.n}, "
        f"p {p_text(c.difference.p)}, corrected {p_text(c.difference.adjusted)})"
        for c in by_size[:_NAMED]
    ]
    rest = len(comparisons) - len(named)
    return "; ".join(named) + (f"; and {rest} smaller" if rest else "")


def _width(found: Tally) -> str:
    widths = [c.difference.half_width for c in found.undecided if c.percent and c.difference.half_width]
    if not widths:
        return ""
    return f" (half of their intervals reach {median(widths):.2f} points or more to either side)"


def _pictures(exhibit: Exhibit) -> str:
    there = sum(trained for _, trained, _ in exhibit.seeds)
    return (
        f"One seed of {there} of {len(exhibit.seeds)} models. The pictures are the first held-out ones in "
        "their random order, none picked by eye, and the same for every model. A map shows how far the "
        "cosine of picture and text falls when a window of the picture is covered. These are examples: "
        "nothing is counted, and nothing follows about the losses."
    )


def of_paper(exhibit: Exhibit) -> str:
    """Say what the paper's own numbers are, and how they come out by themselves."""
    quoted = exhibit.quoted
    sentences = [f"The paper's {quoted.source}{f' ({quoted.setting})' if quoted.setting else ''}."]
    above: dict[str, list[float]] = {}
    quoted_rows = [row for section in exhibit.sections if section.quoted for row in section.rows]
    for row in quoted_rows:
        for column, cell in zip(exhibit.columns, row.cells, strict=True):
            if isinstance(cell, QuotedCell) and cell.difference is not None:
                name = f"{column.label} ({column.group})" if exhibit.key == "table4" else column.label
                above.setdefault(name, []).append(cell.difference)
    if above and exhibit.key != "figure6":
        counts = [
            f"{name} in {sum(d > 0 for d in differences)} of {len(differences)} "
            f"({signed(min(differences))} to {signed(max(differences))} points)"
            for name, differences in above.items()
        ]
        sentences.append(
            f"Above its CLIP: {', '.join(counts)}; one number each, without intervals in what we read. Its "
            "data, models and budget are not ours: levels cannot be compared."
        )
    if quoted.note:
        sentences.append(quoted.note)
    return " ".join(sentences)


def p_text(p: float | None) -> str:
    """Show a p-value.

    Example:
        >>> p_text(0.0312), p_text(0.00004), p_text(0.25), p_text(None)
        ('0.031', '<0.001', '0.25', '–')
    """
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
