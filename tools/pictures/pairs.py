"""Recall against the number of pairs: two frozen encoders, and models from scratch, from a study's report."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from style import NARROW, SMALL, Colors
from ways import STUDIES, mean

STUDY = "alignment"
SEEDS = 4  # of every cell, by the study's plan
UNNAMED = 8_000  # pairs; the study's name of these heads has no number
FROZEN = {
    "frozen encoders,\nclosed form + head": "both",
    "frozen encoders,\nclosed form": "cca",
    "frozen encoders,\nsearch, no training": "search",
}
SCRATCH = "trained from scratch,\nbest of three losses"
LOSSES = ("clip", "spread", "mimicry")
NAME_HEIGHT = 29.0  # points; of a line's name, which has two rows
GAP = 16.0  # points; between the axes and the names


def sizes() -> list[int]:
    """Return the numbers of pairs whose cells all have their seeds in the report, ascending."""
    report = (STUDIES / STUDY / f"report/{STUDY}.md").read_text(encoding="utf-8")
    _, _, section = report.partition("## All arms")
    row = r"^\| (\S+) +\| +`(\S+)` +\| +\S+ ± \S+ \((\d+)\)"  # cell, arm, mean ± interval (seeds)
    complete = {
        (cell, arm) for cell, arm, seeds in re.findall(row, section, re.MULTILINE) if int(seeds) >= SEEDS
    }
    numbers = (re.fullmatch(r"pairs-(\d+)", cell) for cell, _ in complete)
    trained = {int(number[1]) for number in numbers if number is not None}
    return sorted(pairs for pairs in trained if complete.issuperset(cells(pairs)))


def cells(pairs: int) -> list[tuple[str, str]]:
    """Return cell and arm of every score from so many pairs: of the frozen encoders, then from scratch."""
    heads = "heads-icons" if pairs == UNNAMED else f"heads-icons-{pairs}"
    return [*((heads, arm) for arm in FROZEN.values()), *((f"pairs-{pairs}", loss) for loss in LOSSES)]


def lines() -> dict[str, dict[int, float]]:
    """Return R@10 by the number of pairs, of each way."""
    scores_of: dict[str, dict[int, float]] = {name: {} for name in (*FROZEN, SCRATCH)}
    for pairs in sizes():
        scores = [mean(STUDY, *cell) for cell in cells(pairs)]
        frozen, from_scratch = scores[: len(FROZEN)], scores[len(FROZEN) :]
        for name, score in zip(FROZEN, frozen, strict=True):
            scores_of[name][pairs] = score
        scores_of[SCRATCH][pairs] = max(from_scratch)
    return scores_of


def apart(places: np.ndarray, least: float) -> np.ndarray:
    """Return ascending places, moved until neighbours are ``least`` apart, around the same centre."""
    # Minus as many least distances as there are places before, they must not fall.
    steps = least * np.arange(len(places))
    moved = np.maximum.accumulate(places - steps) + steps
    return moved - (moved - places).mean()


def draw(colors: Colors) -> Figure:
    """A line for each way, with its name and its last number beside the line's end."""
    figure = Figure(figsize=(NARROW, 3.5), layout="constrained")
    axes = figure.subplots()
    scores_of = lines()
    paints = dict(zip(scores_of, (colors.ours, colors.ours_too, colors.mark, colors.other), strict=True))
    for name, scores in scores_of.items():
        axes.plot(list(scores), list(scores.values()), color=paints[name], marker="o", clip_on=False)

    pairs = sizes()
    axes.set_xscale("log")
    axes.set_xticks(pairs, [f"{size / 1000:.0f}k" for size in pairs])
    axes.xaxis.set_minor_locator(NullLocator())
    highest = max(max(scores.values()) for scores in scores_of.values())
    axes.set_ylim(0, 10 * np.ceil(highest / 10))
    axes.set_xlabel("pairs to train on (icons)", fontsize=SMALL)
    axes.set_ylabel("R@10", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.tick_params(axis="x", pad=7)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    ends = {name: scores[pairs[-1]] for name, scores in scores_of.items()}
    _name_lines_at_their_ends(figure, ends, paints)
    return figure


def _name_lines_at_their_ends(figure: Figure, ends: dict[str, float], paints: dict[str, str]) -> None:
    """Write each name and number in its line's colour, right of the axes, where none hides another."""
    (axes,) = figure.axes
    names = sorted(ends, key=lambda name: ends[name])  # from the lowest
    texts = [
        axes.annotate(
            f"{name}: {ends[name]:.1f}",
            (1, ends[name]),
            xycoords=("axes fraction", "data"),
            xytext=(GAP, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=paints[name],
            linespacing=1.1,
            arrowprops={"arrowstyle": "-", "color": paints[name], "linewidth": 0.8, "relpos": (0, 0.5)},
        )
        for name in names
    ]
    figure.draw_without_rendering()  # lays out, so that the axes' height is known
    axes_height = axes.get_window_extent().height * 72 / figure.dpi  # in points
    heights = axes_height * np.array([ends[name] for name in names]) / axes.get_ylim()[1]
    places = apart(heights, NAME_HEIGHT)
    places -= max(0.0, places[-1] + NAME_HEIGHT / 2 - axes_height)  # the highest name stays beside the axes
    for text, height, place in zip(texts, heights, places, strict=True):
        text.set_position((GAP, place - height))
