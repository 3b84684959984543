"""Draws two rankings of the same concepts, and the answers for held-out emojis."""

import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from examples_common.slope_chart import compare_rankings
from matplotlib.figure import Figure
from PIL import Image

from .evaluate import HELD_OUT, TRAINING, Agreement, TestSet

QUERIES = 6
TOP = 5
_CONCEPTS = 10
_TITLE: dict[str, Any] = {"fontsize": 11, "x": 0.02, "ha": "left"}
_GREEN, _GREY, _INK = "#1b7f3b", "#6b6b6b", "#222222"


def draw(
    path: Path,
    *,
    agreement: Agreement,
    picture: Image.Image,
    test_set: TestSet,
    similarities: Mapping[str, torch.Tensor],
) -> None:
    """Save the picture; of more than two models, it shows the first and the last.

    It has the rankings of one training concept with its ``picture``, and answers for held-out emojis in
    colour by the picture × caption ``similarities``.
    """
    names = list(dict.fromkeys([next(iter(similarities)), next(reversed(similarities))]))
    settings = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({**mpl.rcParamsDefault, **settings}):
        figure = Figure(figsize=(9.6, 12.4), layout="constrained")
        rankings, answers = figure.subfigures(2, 1, height_ratios=(4.4, 8.2), hspace=0.02)
        _draw_rankings(rankings, names, agreement, picture)
        _draw_answers(answers, test_set, {name: similarities[name] for name in names})
        licence = "Emojis: OpenMoji, CC BY-SA 4.0, drawn as pixels; this picture is under the same licence."
        figure.supxlabel(licence, fontsize=8.5, color=_GREY)
        figure.savefig(path, dpi=120, facecolor="white")


def _draw_rankings(area: Any, names: Sequence[str], agreement: Agreement, picture: Image.Image) -> None:
    concept = agreement.labels[agreement.anchor]
    taus = ((name, agreement.averages[name]) for name in names)
    averages = "; ".join(f"{name} {tau[TRAINING]:.3f} and {tau[HELD_OUT]:.3f}" for name, tau in taus)
    area.suptitle(
        f"How the picture and the caption of “{concept}” rank the {agreement.concepts[TRAINING]:,} training "
        "concepts\n"
        "Beside the names: ranks. Shown are the picture's first ten; a parallel line is agreement.\n"
        f"Average τ of all training concepts, and of those never seen: {averages}.",
        **_TITLE,
    )
    axes = area.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        compare_rankings(
            *agreement.scores[name],
            [_shorten(label, 20) for label in agreement.labels],
            own=agreement.anchor,
            names=("by the picture", "by its caption"),
            items=_CONCEPTS,
            title=name,
            axes=axis,
        )
    corner = area.add_axes((0.89, 0.8, 0.09, 0.19))
    corner.imshow(picture, interpolation="nearest")
    corner.axis("off")


def _draw_answers(area: Any, test_set: TestSet, similarities: Mapping[str, torch.Tensor]) -> None:
    chosen = random.Random(0).sample(range(len(test_set.images)), QUERIES)
    area.suptitle(
        f"The {TOP} nearest of {len(test_set.captions)} captions for emojis never seen in training\n"
        f"Drawn at random; the right caption is green, and stands below where it is not among the {TOP}.",
        **_TITLE,
    )
    widths = (0.62, *[2.6] * len(similarities))
    grid = area.subplots(len(chosen), len(widths), width_ratios=widths, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for axis, name in zip(grid[0, 1:], similarities, strict=True):
        axis.set_title(name, loc="left", weight="bold")
    for row, query in zip(grid, chosen, strict=True):
        row[0].imshow(test_set.images[query], interpolation="nearest")
        for axis, similarity in zip(row[1:], similarities.values(), strict=True):
            axis.set(xlim=(0, 1), ylim=(0, 1))
            _write_answers(axis, test_set.captions, similarity[query], query)


def _write_answers(axis: Any, captions: Sequence[str], scores: torch.Tensor, query: int) -> None:
    order = scores.argsort(descending=True, stable=True)[:TOP].tolist()
    lines = list(enumerate(order, start=1))
    if query not in order:
        lines.append((_rank(scores, query), query))
    for line, (place, caption) in enumerate(lines):
        colour, weight = _INK, "normal"
        if caption == query:
            colour, weight = _GREEN, "bold" if query in order else "normal"
        text = f"{place}  {_shorten(captions[caption], 46)}"
        axis.text(0.0, 0.92 - 0.17 * line, text, va="center", fontsize=9.5, color=colour, weight=weight)


def _rank(scores: torch.Tensor, right: int) -> int:
    return int((scores > scores[right]).sum()) + 1


def _shorten(caption: str, width: int) -> str:
    return textwrap.shorten(caption, width, placeholder=" …").replace(", …", " …")
