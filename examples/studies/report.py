"""Reports: text of numbers, tables, pictures, and templates of Markdown that are filled in."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from openmoji_demo import page
from PIL import Image

from . import statistics
from .plan import Best
from .statistics import ALPHA, CONFIDENCE, MIN_SEEDS, Difference, Estimate, verdict

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
    """Fill in a template of a report; see :func:`openmoji_demo.page.fill`."""
    filters = {"signed": signed, "difference": difference_text, "p": p_text, "mark": mark, "verdict": verdict}
    filters |= {"interval": interval, "arms": named}
    return page.fill(template, filters, marks=MARKS, **_CONSTANTS, **values)


def write(path: Path, template: Path, **values: Any) -> Path:
    """Write a report, whose template is filled in, with its ``pictures`` beside it, and return its path."""
    text = fill(template, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in values.get("pictures", {}).items():
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(picture.png)
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
    """Mean difference with sign, and half of its interval."""
    return "–" if difference is None else f"{signed(difference.mean, digits)} ± {_half(difference, digits)}"


def marked(difference: Difference | None, digits: int = 2) -> str:
    """Return a difference, bold where it is significant after the correction."""
    text = difference_text(difference, digits)
    return f"**{text}**" if difference is not None and difference.established else text


def interval(d: Difference) -> str:
    """Return a difference with the ends of its interval and its p.

    Example:
        >>> interval(Difference(1.0, 0.5, 8, 0.001, 0.01))
        '+1.00 points (95 % interval +0.50 to +1.50, p 0.010 after the correction)'
    """
    ends = f"95 % interval {signed(d.low)} to {signed(d.high)}"
    return f"{signed(d.mean)} points ({ends}, p {p_text(d.adjusted)} after the correction)"


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


def named(arms: Iterable[str]) -> str:
    """Return names of arms as code, or "none"."""
    return ", ".join(f"`{arm}`" for arm in arms) or "none"


# --- cells of tables ---


def test_cells(difference: Difference) -> list[str]:
    """Return a corrected difference, its p, and its mark."""
    return [difference_text(difference), p_text(difference.adjusted), mark(difference)]


def test_row(pair: Sequence[str], d: Difference) -> list[str]:
    """Return the row of a test: both arms, the difference, both p, and the mark."""
    return [*(f"`{arm}`" for arm in pair), difference_text(d), p_text(d.p), p_text(d.adjusted), mark(d)]


def tries_row(best: Best, text: Callable[[Any], str]) -> list[str]:
    """Return an arm, its chosen setting, and all tries with their scores."""
    tries = (f"{text(one)}: {score:.2f}" for one, score in best.tries.items())
    return [f"`{best.arm}`", text(best.chosen), "; ".join(tries)]


def conditions_texts(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the different conditions that records were made under."""
    return sorted({", ".join(f"{k} {v}" for k, v in record["conditions"].items()) for record in records})


# --- pictures ---

COLOURS = 256  # of a PNG of lines and flat areas
_DPI = 150
_STYLE = Path(__file__).with_name("figures.mplstyle")


@dataclass(frozen=True)
class Picture:
    """A PNG, and what it shows, for those who cannot see it."""

    png: bytes
    alt: str


def picture(alt: str, figure_of: Callable[[], Figure], *, colours: int | None = COLOURS) -> Picture:
    """Draw a figure, in the reports' one style, with at most so many colours."""
    raw, small = io.BytesIO(), io.BytesIO()
    with matplotlib.style.context(_STYLE):
        figure_of().savefig(raw, format="png", dpi=_DPI)
    with Image.open(raw) as image:
        shown = image.convert("RGB")
        if colours is not None:
            shown = shown.quantize(colours, dither=Image.Dither.NONE)
        shown.save(small, format="PNG", optimize=True, dpi=(_DPI, _DPI))
    return Picture(small.getvalue(), alt)


def forest(panels: Mapping[str, Mapping[str, Difference]]) -> Picture:
    """Draw differences to plain CLIP with their intervals, by the panel's title and by the arm."""
    arms = list(next(iter(panels.values())))

    def figure_of() -> Figure:
        figure = Figure(figsize=(8.4, 1.2 + 0.3 * len(arms)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, of) in zip(axes, panels.items(), strict=True):
            for row, arm in enumerate(arms):
                d = of[arm]
                looks = {"fmt": "o", "markersize": 4, "lw": 1.2, "color": "C1" if d.established else "C2"}
                axis.errorbar(d.mean, row, xerr=d.half_width or 0.0, **looks)
            axis.axvline(0.0, color="C0", lw=1, ls="--")
            axis.set_yticks(range(len(arms)), arms)
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.grid(axis="x")
            axis.set_title(title)
            axis.set_xlabel("points, minus plain CLIP")
        return figure

    return picture(f"Differences to plain CLIP with their intervals: {'; '.join(panels)}.", figure_of)
