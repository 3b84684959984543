"""Gains over CLIP's loss against epochs and against pairs, from the report of the study of captions."""

from __future__ import annotations

import itertools
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
    section = report.read_text(encoding="utf-8").partition("## Gains against epochs and pairs\n")[2]
    after = itertools.dropwhile(lambda line: not line.startswith("|"), section.splitlines())
    lines = itertools.takewhile(lambda line: line.startswith("|"), after)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found: dict[str, dict[str, list[Gain]]] = defaultdict(lambda: defaultdict(list))
    for curve, label, *of in rows:
        for arm, cell in zip(head[2:], of, strict=True):
            if arm in ARMS and (gain := _GAIN.fullmatch(cell)):
                found[curve][arm].append((label, float(gain[1].replace("−", "-")), float(gain[2])))
    return found


def draw(colors: Colors) -> Figure:
    """A panel for each curve, with a line for each arm."""
    curves = gains()
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    points = [
        list(dict.fromkeys(label for of in arms.values() for label, *_ in of)) for arms in curves.values()
    ]
    widths = [max(len("     ".join(labels)), 16) for labels in points]  # for the labels and the title
    panels = figure.subplots(1, len(curves), sharey=True, width_ratios=widths)
    styles = [(colors.ours, "o-"), (colors.ours_too, "s-"), (colors.bad, "^--"), (colors.other, "v:")]
    looks = dict(zip(ARMS, styles, strict=True))
    for axes, labels, (curve, arms) in zip(panels, points, curves.items(), strict=True):
        for shift, (arm, (color, style)) in enumerate(looks.items()):
            if arm not in arms:
                continue
            names, means, half = zip(*arms[arm], strict=True)
            places = [labels.index(name) + 0.08 * (shift - 1.5) for name in names]
            axes.errorbar(places, means, yerr=half, fmt=style, ms=4, lw=1.4, color=color, label=ARMS[arm])
        axes.axhline(0, color=colors.text, lw=1)
        axes.set_xticks(range(len(labels)), labels, fontsize=SMALL)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        axes.set_title(curve.replace(", ", "\nby "), fontsize=SMALL)
        axes.grid(axis="y")
    panels[0].set_ylabel("R@10 minus CLIP", fontsize=SMALL)
    lines, names = panels[-1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=SMALL)
    return figure
