"""The method: four matrices of similarities, and two rankings brought together."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from style import NARROW, SMALL, Colors

CONCEPTS = ("cat", "dog", "fox", "bird", "car", "bus", "bike", "boat")
ANCHOR = 0
SHOWN = 6
HEIGHT = 4.55  # inches

LEGEND = (
    "V: features of the pictures, T: of the captions, s: the scale.",
    "C(a | b): how unlikely a's scores make the order of b.",
)

# An illustration, not data: how alike concepts are, with what the pictures and the captions each get wrong.
LIKENESS = np.array(
    [  # furry, flies, wheels, on roads, in water, size
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.2],
        [1.0, 0.0, 0.0, 0.1, 0.1, 0.4],
        [0.9, 0.0, 0.0, 0.0, 0.0, 0.3],
        [0.3, 0.9, 0.0, 0.0, 0.1, 0.0],
        [0.0, 0.0, 1.0, 0.9, 0.0, 0.6],
        [0.0, 0.0, 1.0, 0.9, 0.0, 1.0],
        [0.0, 0.0, 0.8, 0.6, 0.0, 0.3],
        [0.0, 0.0, 0.0, 0.0, 1.0, 0.9],
    ]
)


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm embeddings of the pictures and of the captions."""
    random = np.random.default_rng(4)
    v = LIKENESS + 0.2 * random.normal(size=LIKENESS.shape) + 0.25
    t = LIKENESS + 0.2 * random.normal(size=LIKENESS.shape) + 0.25
    return v / np.linalg.norm(v, axis=1, keepdims=True), t / np.linalg.norm(t, axis=1, keepdims=True)


def draw(colors: Colors) -> Figure:
    """Above the matrices with one anchor's row marked, below the two pairs of rankings that are compared.

    Places are fractions of the figure: across as they are, upwards in inches over HEIGHT.
    """
    v, t = embeddings()
    matrices = {"S": v @ t.T, "R": t @ v.T, "I": v @ v.T, "X": t @ t.T}
    figure = Figure(figsize=(NARROW, HEIGHT))
    for height, line in enumerate(reversed(LEGEND)):
        figure.text(0.5, (0.07 + 0.2 * height) / HEIGHT, line, ha="center", fontsize=SMALL)
    lefts = (0.0, 0.245, 0.515, 0.76)
    for left, (name, matrix) in zip(lefts, matrices.items(), strict=True):
        axes = figure.add_axes((left, 1 - 1.55 / HEIGHT, 0.24, 1.0 / HEIGHT))
        _matrix(axes, name, matrix, colors)
    for middle, (first, second), term in (
        (0.2425, "SR", "cross-modal term"),
        (0.7575, "IX", "in-modal term"),
    ):
        figure.text(middle, 1 - 0.2 / HEIGHT, term, ha="center", fontsize=12, weight="bold")
        axes = figure.add_axes((middle - 0.09, 0.96 / HEIGHT, 0.18, 1.5 / HEIGHT))
        _slopes(axes, matrices[first][ANCHOR], matrices[second][ANCHOR], (first, second), colors)
        value = f"½·[C({first} | {second}) + C({second} | {first})]"
        figure.text(middle, 0.66 / HEIGHT, value, ha="center", fontsize=11)
    return figure


def _matrix(axes: Axes, name: str, matrix: np.ndarray, colors: Colors) -> None:
    """A matrix of similarities with its anchor's row marked, its formula above and its meaning below."""
    axes.imshow(matrix, cmap=colors.heat, vmin=0.1, vmax=1.15)
    row = Rectangle((-0.5, ANCHOR - 0.5), len(matrix), 1, fill=False, edgecolor=colors.mark, lw=2.4)
    row.set_clip_on(False)
    axes.add_patch(row)
    axes.axis("off")
    anchors, items = {"S": "VT", "R": "TV", "I": "VV", "X": "TT"}[name]
    nouns = {"V": "pictures", "T": "captions"}
    axes.set_title(f"{name} = s·{anchors}·{items}ᵀ", fontsize=SMALL, pad=4)
    meaning = f"{nouns[anchors]} rank\n{nouns[items]}"
    axes.text(0.5, -0.05, meaning, transform=axes.transAxes, ha="center", va="top", fontsize=SMALL)


def _slopes(axes: Axes, a: np.ndarray, b: np.ndarray, names: tuple[str, str], colors: Colors) -> None:
    """The first items by the scores a on the left, the same ones in the order of b on the right."""
    shown = np.argsort(-a)[:SHOWN]
    places_by_b = np.argsort(np.argsort(-b[shown]))
    for place, (item, place_by_b) in enumerate(zip(shown, places_by_b, strict=True)):
        color = colors.faint if place == place_by_b else colors.ours
        axes.plot((0.06, 0.94), (place, place_by_b), color=color, solid_capstyle="round")
        weight = "bold" if item == ANCHOR else "normal"
        axes.text(0, place, CONCEPTS[item], ha="right", va="center", weight=weight)
        axes.text(1, place_by_b, CONCEPTS[item], ha="left", va="center", weight=weight)
    axes.text(0, -1, f"row of {names[0]}", ha="right", va="center", color=colors.mark, weight="bold")
    axes.text(1, -1, f"row of {names[1]}", ha="left", va="center", color=colors.mark, weight="bold")
    axes.set(xlim=(0, 1), ylim=(SHOWN - 0.5, -1.4))
    axes.axis("off")
