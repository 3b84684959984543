"""The rounds as one picture: every trial's difference to plain CLIP with its interval."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import matplotlib
from examples_common.page import Picture
from matplotlib.figure import Figure

from miniature_paper.figures import DARK, LIGHT, Theme

from .ladder import Standing, Step
from .objective import OBJECTIVE

_WIDTH, _ROW, _HEAD = 8.4, 0.2, 0.75


def draw(steps: Sequence[Step]) -> Picture | None:
    """Draw the finished rounds; None if there is none."""
    finished = [step for step in steps if not step.missing]
    shown = [[s for s in step.standings if s.differences] for step in finished]
    if not any(shown):
        return None
    sizes = [max(len(standings), 1) for standings in shown]
    light, dark = (_png(finished, shown, sizes, theme) for theme in (LIGHT, DARK))
    return Picture(light, dark, "Every trial's mean difference to plain CLIP, round by round.")


def _png(
    finished: Sequence[Step], shown: Sequence[Sequence[Standing]], sizes: Sequence[int], theme: Theme
) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **theme.settings()}):
        height = sum(sizes) * _ROW + len(sizes) * _HEAD
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=sizes)[:, 0]
        for number, (axis, step, standings) in enumerate(zip(axes, finished, shown, strict=True), start=1):
            for row, standing in enumerate(standings):
                difference = standing.differences[OBJECTIVE]
                kept = standing.trial in step.kept
                axis.errorbar(
                    difference.mean,
                    row,
                    xerr=difference.half_width or 0.0,
                    fmt="o",
                    markersize=4,
                    lw=1.2,
                    color=theme.rank if kept else theme.muted,
                )
            axis.set_yticks(range(len(standings)), [_label(standing.trial.name) for standing in standings])
            for label in axis.get_yticklabels():
                if "\n" in label.get_text():
                    label.set_fontsize(6)
            axis.set_ylim(len(standings) - 0.5, -0.5)
            axis.axvline(0.0, color=theme.clip, lw=1, ls="--")
            axis.grid(axis="x")
            axis.set_title(f"Round {number}: {len(standings)} settings")
        axes[-1].set_xlabel("objective less plain CLIP's (points, validation side)")
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _label(name: str) -> str:
    """A trial's name; one of many factors takes lines, or it would leave no room for the intervals."""
    lines = textwrap.wrap(name.replace("+", "+ "), width=42, break_on_hyphens=False)
    return "\n".join(line.replace("+ ", "+") for line in lines)
