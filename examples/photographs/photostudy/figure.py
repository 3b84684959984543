"""The reports' figures: differences to plain CLIP with their intervals, in panels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from examples_common.figures import picture
from examples_common.statistics import Difference
from matplotlib.figure import Figure

Panels = Mapping[str, Mapping[str, Difference | None]]
"""Differences by the panel's title, a measure or a data set, and by the arm."""


def write(path: Path, panels: Panels) -> str | None:
    """Draw the arms that have a difference in every panel, and return the picture's description.

    Nothing is written where no arm has.
    """
    first, *others = panels.values()
    shown = [arm for arm in first if all(of.get(arm) is not None for of in (first, *others))]
    if not shown:
        return None

    def figure_of() -> Figure:
        figure = Figure(figsize=(8.4, 1.2 + 0.3 * len(shown)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, of) in zip(axes, panels.items(), strict=True):
            for row, arm in enumerate(shown):
                d = of[arm]
                assert d is not None
                looks = {"fmt": "o", "markersize": 4, "lw": 1.2, "color": "C1" if d.established else "C2"}
                axis.errorbar(d.mean, row, xerr=d.half_width or 0.0, **looks)
            axis.axvline(0.0, color="C0", lw=1, ls="--")
            axis.set_yticks(range(len(shown)), shown)
            axis.set_ylim(len(shown) - 0.5, -0.5)
            axis.grid(axis="x")
            axis.set_title(title)
            axis.set_xlabel("points, minus plain CLIP")
        return figure

    drawn = picture(f"Differences to plain CLIP with their intervals: {'; '.join(panels)}.", figure_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn.png)
    return drawn.alt
