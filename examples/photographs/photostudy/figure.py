"""The report's figure: every comparison's differences in recall and in correlation with people."""

from __future__ import annotations

from examples_common.figures import picture
from examples_common.page import Picture
from matplotlib.figure import Figure

from .findings import CORRELATION, PRIMARY, Findings

_PANELS = {PRIMARY: "R@10, mean of both directions", CORRELATION: "τ_c with the experts"}
_ALT = "Differences to plain CLIP in R@10 and in the correlation with experts, with their intervals."


def draw(found: Findings) -> Picture | None:
    """Draw the comparisons that can be stated; None without any."""
    shown = [name for name in found.rows if found.primary(name) is not None]

    def figure_of() -> Figure:
        figure = Figure(figsize=(8.4, 1.2 + 0.3 * len(shown)), layout="constrained")
        for axis, (measure, title) in zip(figure.subplots(1, 2, sharey=True), _PANELS.items(), strict=True):
            for row, name in enumerate(shown):
                d = found.difference(name, measure)
                looks = {"fmt": "o", "markersize": 4, "lw": 1.2, "color": "C1" if d.established else "C2"}
                axis.errorbar(d.mean, row, xerr=d.half_width or 0.0, **looks)
            axis.axvline(0.0, color="C0", lw=1, ls="--")
            axis.set_yticks(range(len(shown)), shown)
            axis.set_ylim(len(shown) - 0.5, -0.5)
            axis.grid(axis="x")
            axis.set_title(title)
            axis.set_xlabel("points, minus plain CLIP")
        return figure

    return picture(_ALT, figure_of) if shown else None
