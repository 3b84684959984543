"""The rounds as one picture: every trial's difference to plain CLIP with its interval."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from examples_common.page import Picture
from matplotlib.figure import Figure

from miniature_paper.figures import Theme, picture

from .ladder import Step
from .objective import OBJECTIVE

_WIDTH, _ROW, _HEAD = 8.4, 0.2, 0.75


def draw(steps: Sequence[Step]) -> Picture | None:
    """Draw the finished rounds; None if there is none."""
    shown = [(step, [s for s in step.standings if s.differences]) for step in steps if not step.missing]
    sizes = [max(len(standings), 1) for _, standings in shown]

    def figure_of(theme: Theme) -> Figure:
        height = sum(sizes) * _ROW + len(sizes) * _HEAD
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=sizes)[:, 0]
        for number, (axis, (step, standings)) in enumerate(zip(axes, shown, strict=True), start=1):
            for row, standing in enumerate(standings):
                difference = standing.differences[OBJECTIVE]
                looks = {"fmt": "o", "markersize": 4, "lw": 1.2}
                colour = theme.rank if standing.trial in step.kept else theme.muted
                axis.errorbar(difference.mean, row, xerr=difference.half_width or 0.0, color=colour, **looks)
            axis.set_yticks(range(len(standings)), [_label(standing.trial.name) for standing in standings])
            for label in axis.get_yticklabels():
                if "\n" in label.get_text():
                    label.set_fontsize(6)
            axis.set_ylim(len(standings) - 0.5, -0.5)
            axis.axvline(0.0, color=theme.clip, lw=1, ls="--")
            axis.grid(axis="x")
            axis.set_title(f"Round {number}: {len(standings)} settings")
        axes[-1].set_xlabel("objective less plain CLIP's (points, validation side)")
        return figure

    if not any(standings for _, standings in shown):
        return None
    return picture("Every trial's mean difference to plain CLIP, round by round.", figure_of)


def _label(name: str) -> str:
    """A trial's name; one of many factors takes lines, or it would leave no room for the intervals."""
    lines = textwrap.wrap(name.replace("+", "+ "), width=42, break_on_hyphens=False)
    return "\n".join(line.replace("+ ", "+") for line in lines)
