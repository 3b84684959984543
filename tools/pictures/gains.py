"""Gains over CLIP's loss against epochs and against pairs, from the report of the study of captions."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors

REPORT = Path(__file__).parents[2] / "examples/studies/captions/report/captions.md"
ARMS = {
    "mimicry": "mimicry (icons alone)",
    "encoders": "two encoders",
    "captions": "captions",
    "rankclip": "RankCLIP",
}
_GAIN = re.compile(r"([+−]?[\d.]+) ± ([\d.]+)")

Gain = tuple[str, float, float]  # a point's label, the mean, and half of the 95 % interval


def gains(report: Path = REPORT) -> dict[str, dict[str, list[Gain]]]:
    """Gains by curve and arm, in the report's order."""
    _, _, section = report.read_text(encoding="utf-8").partition("## Gains against epochs and pairs\n")
    table = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert table is not None
    lines = table[0].splitlines()
    (_, _, *arms), _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    gains_of: dict[str, dict[str, list[Gain]]] = defaultdict(lambda: defaultdict(list))
    for curve, label, *cells in rows:
        for arm, cell in zip(arms, cells, strict=True):
            gain = _GAIN.fullmatch(cell)
            if arm in ARMS and gain is not None:
                mean, half_width = float(gain[1].replace("−", "-")), float(gain[2])
                gains_of[curve][arm].append((label, mean, half_width))
    return gains_of


def _labels(arms: dict[str, list[Gain]]) -> list[str]:
    """The labels of a curve's points, in the report's order."""
    return list(dict.fromkeys(label for points in arms.values() for label, _, _ in points))


def draw(colors: Colors) -> Figure:
    """A panel for each curve, with a line for each arm."""
    curves = gains()
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    labels_of = {curve: _labels(arms) for curve, arms in curves.items()}
    widths = [max(len("     ".join(labels)), 16) for labels in labels_of.values()]  # for labels and title
    panels = figure.subplots(1, len(curves), sharey=True, width_ratios=widths)
    styles = [(colors.ours, "o-"), (colors.ours_too, "s-"), (colors.bad, "^--"), (colors.other, "v:")]
    looks = dict(zip(ARMS, styles, strict=True))
    for axes, (curve, arms) in zip(panels, curves.items(), strict=True):
        labels = labels_of[curve]
        for number, (arm, (color, style)) in enumerate(looks.items()):
            if arm not in arms:
                continue
            names, means, half_widths = zip(*arms[arm], strict=True)
            shift = 0.08 * (number - 1.5)  # so that intervals of one point stand side by side
            places = [labels.index(name) + shift for name in names]
            axes.errorbar(
                places, means, yerr=half_widths, fmt=style, ms=4, lw=1.4, color=color, label=ARMS[arm]
            )
        axes.axhline(0, color=colors.text, lw=1)
        axes.set_xticks(range(len(labels)), labels, fontsize=SMALL)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        axes.set_title(curve.replace(", ", "\nby "), fontsize=SMALL)
        axes.grid(axis="y")
    panels[0].set_ylabel("R@10 minus CLIP", fontsize=SMALL)
    lines, names = panels[-1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=SMALL)
    return figure
