"""Text of numbers, and the reports' templates, which use it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from . import page, statistics
from .records import Record
from .statistics import ALPHA, CONFIDENCE, MIN_SEEDS, Difference, Estimate, verdict

Setting = TypeVar("Setting")

MARKS = {
    "above": "▲",
    "below": "▼",
    "above before": "△",
    "below before": "▽",
    statistics.NOT_SIGNIFICANT: "≈",
    statistics.TOO_FEW_SEEDS: "·",
}
_CONSTANTS = {"alpha": ALPHA, "confidence": f"{100 * CONFIDENCE:.0f} %", "min_seeds": MIN_SEEDS}


def fill(template: Path, **values: Any) -> str:
    """Fill in a template of a report; see :func:`examples_common.page.fill`."""
    filters = {"signed": signed, "difference": difference_text, "p": p_text, "mark": mark, "verdict": verdict}
    return page.fill(template, filters, marks=MARKS, **_CONSTANTS, **values)


def write_report(path: Path, template: Path, **values: Any) -> Path:
    """Write a report, whose template is filled in, and return its path."""
    text = fill(template, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def too_early(seeds: int, *, missing: bool) -> list[str] | None:
    """Return the sentences of a report that concludes nothing; None where it concludes.

    Args:
        seeds: Their planned number.
        missing: A training is missing.
    """
    if seeds < MIN_SEEDS:
        return [f"Nothing is concluded from fewer than {MIN_SEEDS} seeds."]
    return [] if missing else None


def seeds_text(n: int, planned: int) -> str:
    """``5`` where all are there, else ``3 of 5``."""
    return f"{n}" if n == planned else f"{n} of {planned}"


def mean_text(estimate: Estimate | None, planned: int, digits: int = 2) -> str:
    """Mean, half of the interval, seeds; a dash for what is not there.

    Example:
        >>> mean_text(Estimate(-12.34, 0.5, 3), 5), mean_text(Estimate(12.34, None, 1), 1), mean_text(None, 5)
        ('−12.34 ± 0.50 (3 of 5)', '12.34 ± – (1)', '–')
    """
    if estimate is None:
        return "–"
    mean = f"{estimate.mean:.{digits}f}".replace("-", "−")
    return f"{mean} ± {_half(estimate, digits)} ({seeds_text(estimate.n, planned)})"


def difference_text(difference: Difference | None, digits: int = 2) -> str:
    """Mean difference with sign, and half of its interval."""
    return "–" if difference is None else f"{signed(difference.mean, digits)} ± {_half(difference, digits)}"


def marked(difference: Difference | None, digits: int = 2) -> str:
    """Return a difference, bold where it is significant after the correction."""
    text = difference_text(difference, digits)
    return f"**{text}**" if difference is not None and difference.established else text


def _half(estimate: Estimate, digits: int) -> str:
    return "–" if estimate.half_width is None else f"{estimate.half_width:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """Show a number with its sign, a true minus, and no sign for what rounds to nothing.

    Example:
        >>> signed(-0.126), signed(0.4, 1), signed(-0.001)
        ('−0.13', '+0.4', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def p_text(p: float | None) -> str:
    """Show a p-value.

    Example:
        >>> p_text(0.0312), p_text(0.00004), p_text(0.25), p_text(None)
        ('0.031', '<0.001', '0.25', '–')
    """
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def mark(difference: Difference | None) -> str:
    """Return the sign of a verdict: filled if significant after the correction, open if only before it."""
    if difference is None:
        return ""
    said = verdict(difference, above="above", below="below")
    if said == statistics.NOT_SIGNIFICANT and difference.nominal:
        said = "above before" if difference.mean > 0 else "below before"
    return MARKS[said]


def test_cells(difference: Difference | None) -> list[str]:
    """Return a corrected difference, its p, and its mark."""
    return [difference_text(difference), p_text(difference and difference.adjusted), mark(difference)]


def tries_row(
    arm: str, scores: Mapping[Setting, float | None], chosen: Setting | None, text: Callable[[Setting], str]
) -> list[str]:
    """Return an arm, its chosen setting, and all tries with their scores."""
    tries = (f"{text(one)}: {'–' if score is None else f'{score:.2f}'}" for one, score in scores.items())
    return [f"`{arm}`", "not finished" if chosen is None else text(chosen), "; ".join(tries) or "–"]


def conditions_texts(records: Iterable[Record]) -> list[str]:
    """Return the different conditions that records were made under."""
    return sorted({", ".join(f"{k} {v}" for k, v in record["conditions"].items()) for record in records})
