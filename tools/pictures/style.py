"""The one style of all pictures, in two themes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 6.4  # inches; with letters of 10 points and more, it can be read on a phone
NARROW = 4.8  # inches; of the README's pictures, which text flows around
SMALL = 10  # points


@dataclass(frozen=True)
class Colors:
    """Colours of a theme."""

    text: str
    faint: str  # grids, frames, what stands back
    ours: str
    ours_too: str  # a second line or bar of ours: another hue, since a lighter one is the darker one at night
    other: str
    bad: str
    heat: str  # a colour map
    mark: str  # the row that the picture speaks of


THEMES = {
    "light": Colors(
        text="#24292f",
        faint="#c4ccd4",
        ours="#2f6fd0",
        ours_too="#12948a",
        other="#8b949e",
        bad="#d9822b",
        heat="Blues",
        mark="#d9822b",
    ),
    "dark": Colors(
        text="#e6edf3",
        faint="#48515b",
        ours="#6ea8ff",
        ours_too="#3fc1b0",
        other="#8b949e",
        bad="#f0a050",
        heat="Blues_r",
        mark="#f0a050",
    ),
}


def save(draw: Callable[[Colors], Figure], theme: str, path: Path) -> None:
    """Draw a picture in a theme, and write it as an SVG file that is the same every time."""
    colors = THEMES[theme]
    settings = {
        "font.family": "DejaVu Sans",  # matplotlib brings it
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.edgecolor": colors.faint,
        "axes.labelcolor": colors.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colors.faint,
        "grid.linewidth": 0.6,
        "text.color": colors.text,
        "xtick.color": colors.text,
        "ytick.color": colors.text,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 2.2,
        "legend.frameon": False,
        "svg.hashsalt": path.stem,
    }
    with mpl.rc_context({**mpl.rcParamsDefault, **settings}):
        figure = draw(colors)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = path.read_text(encoding="utf-8")
    svg = re.sub(r' d="[^"]+"', _in_hundredths, svg)  # of all paths
    svg = re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)  # without spaces at the ends of lines
    path.write_text(svg, encoding="utf-8")


def _in_hundredths(path: re.Match[str]) -> str:
    """A path whose numbers are cut at a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])
