"""Reports: text of numbers, tables, and templates of Markdown that are filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from openmoji_demo import page

from . import statistics
from .plan import Best
from .statistics import ALPHA, CONFIDENCE, MIN_SEEDS, MIN_SEEDS_OVER_PICTURES, Difference, Estimate, verdict

MARKS = {
    "above": "▲",
    "below": "▼",
    "above before": "△",
    "below before": "▽",
    statistics.NOT_SIGNIFICANT: "≈",
    statistics.TOO_FEW_SEEDS: "·",
}
INTERVALS = (
    "An interval over seeds is given these settings and these pictures: another tuning may choose other "
    "settings, and other pictures give other numbers. **Seeds and pictures**: the interval in which the test "
    f"pictures are drawn, too, from {MIN_SEEDS_OVER_PICTURES} seeds on, as fewer make it too narrow; "
    "only where it is above 0 a gain is a statement about such data. Of photographs there is one split."
)
_CONSTANTS = {
    "alpha": ALPHA,
    "confidence": f"{100 * CONFIDENCE:.0f} %",
    "min_seeds": MIN_SEEDS,
    "intervals": INTERVALS,
}


def write(path: Path, template: Path, **values: Any) -> Path:
    """Write a report, whose template is filled in, and return its path."""
    text = page.fill(template, {}, marks=MARKS, **_CONSTANTS, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- numbers ---


def mean_text(estimate: Estimate, digits: int = 2) -> str:
    """Mean, half of the interval, seeds.

    Example:
        >>> mean_text(Estimate(-12.34, 0.5, 3)), mean_text(Estimate(12.34, None, 1))
        ('−12.34 ± 0.50 (3)', '12.34 ± – (1)')
    """
    mean = f"{estimate.mean:.{digits}f}".replace("-", "−")
    return f"{mean} ± {_half(estimate, digits)} ({estimate.n})"


def difference_text(difference: Difference | None, digits: int = 2) -> str:
    """Mean difference with sign, and half of its interval; a dash without a difference."""
    return "–" if difference is None else f"{signed(difference.mean, digits)} ± {_half(difference, digits)}"


def _half(estimate: Estimate, digits: int) -> str:
    """Half of an interval, a dash for one seed."""
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
    """Return the sign of a verdict: filled if significant after the correction, open if only before it.

    Others are of a difference that is not significant, and of too few seeds; empty without a difference.
    """
    if difference is None:
        return ""
    said = verdict(difference, above="above", below="below")
    if said == statistics.NOT_SIGNIFICANT and difference.nominal:
        said = "above before" if difference.mean > 0 else "below before"
    return MARKS[said]


# --- cells of tables ---


def ends_text(interval: tuple[float, float] | None) -> str:
    """Return the ends of an interval, a dash for none.

    Example:
        >>> ends_text((-0.5, 1.25)), ends_text(None)
        ('−0.50 to +1.25', '–')
    """
    return "–" if interval is None else " to ".join(map(signed, interval))


def test_cells(difference: Difference) -> list[str]:
    """Return a corrected difference, its p, and its mark."""
    return [difference_text(difference), p_text(difference.adjusted), mark(difference)]


def tries_row(best: Best, text: Callable[[Any], str]) -> list[str]:
    """Return an arm, its chosen setting, and all tries with their scores."""
    tries = (f"{text(one)}: {score:.2f}" for one, score in best.tries.items())
    return [f"`{best.arm}`", text(best.chosen), "; ".join(tries)]


def conditions_texts(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the different conditions that records were made under."""
    return sorted({", ".join(f"{k} {v}" for k, v in record["conditions"].items()) for record in records})
