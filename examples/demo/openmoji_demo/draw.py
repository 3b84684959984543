"""Draws the scores, the answers for held-out emojis, and two rankings of the same concepts."""

import itertools
import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image

from . import metrics, report
from .evaluate import HELD_OUT, TRAINING, Agreement, Found, TestSet
from .slope_chart import compare_rankings

QUERIES = 6
TOP = 5
TEN = 10
_SHOWN = {"image_to_text": TEN, "text_to_image": TEN, "subgroup": 1, "group": 1}  # cut-offs of the scores
_CONCEPTS = 10
_TITLE: dict[str, Any] = {"fontsize": 11, "x": 0.02, "ha": "left"}
_GREEN, _GREY, _INK, _PALE = "#1b7f3b", "#6b6b6b", "#222222", "#d9d9d6"
_COLOURS = ("#8a8f98", "#0072b2", "#d55e00", "#009e73")


def draw(
    path: Path,
    *,
    agreement: Agreement,
    picture: Image.Image,
    block: report.Block,
    found: Mapping[str, Found],
    test_set: TestSet,
    similarities: Mapping[str, torch.Tensor],
) -> None:
    """Save the picture, with a column for each model.

    It has the scores of ``block``, the answers for held-out emojis in colour by the picture × caption
    ``similarities``, and the rankings of one training concept with its ``picture``.
    """
    names = list(similarities)
    settings = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({**mpl.rcParamsDefault, **settings}):
        figure = Figure(figsize=(max(9.6, 4.8 * len(names)), 15.6), layout="constrained")
        scores, answers, rankings = figure.subfigures(3, 1, height_ratios=(3.2, 8.2, 4.4), hspace=0.02)
        _draw_scores(scores, names, block, found)
        _draw_answers(answers, test_set, similarities)
        _draw_rankings(rankings, names, agreement, picture)
        licence = "Emojis: OpenMoji, CC BY-SA 4.0, drawn as pixels; this picture is under the same licence."
        figure.supxlabel(licence, fontsize=8.5, color=_GREY)
        figure.savefig(path, dpi=120, facecolor="white")


def _draw_scores(area: Any, names: Sequence[str], block: report.Block, found: Mapping[str, Found]) -> None:
    """Draw a group of bars for each task, with a bar for each model and one for the untrained baseline."""
    first, *others = names
    title = f"Scores for {block.n} emojis never seen in training, percent; thin lines: ± one standard error\n"
    if others:
        differences = [
            f"{name} {report.difference(found[name])} ({report.verdict(found[name])})" for name in others
        ]
        title += f"R@10 of both ways minus {first}'s: {'; '.join(differences)}"
    area.suptitle(title, **_TITLE)
    axis = area.subplots()
    colours = dict(zip(names, itertools.cycle(_COLOURS))) | {report.KNN: _PALE}
    width = 0.8 / len(colours)
    for place, (name, colour) in enumerate(colours.items()):
        values = [block.rows[name][task][cutoff] for task, cutoff in _SHOWN.items()]
        shift = (place - (len(colours) - 1) / 2) * width  # from the middle of its group
        bars = axis.bar(
            [group + shift for group in range(len(_SHOWN))],
            values,
            0.92 * width,
            yerr=[metrics.standard_error(value, block.n) for value in values],
            error_kw={"lw": 0.8, "ecolor": _GREY},
            color=colour,
            label=name,
        )
        axis.bar_label(bars, fmt="%.1f", label_type="center", color=_INK if name == report.KNN else "white")
    heads = []
    for task, cutoff in _SHOWN.items():
        score = f"R@{cutoff}" if cutoff == TEN else f"top-{cutoff}"
        heads.append(f"{report.HEADS[task]}, {score}")
    axis.set_xticks(range(len(_SHOWN)), heads)
    axis.tick_params(axis="x", length=0)
    axis.legend(loc="upper left", ncols=len(colours), frameon=False, fontsize=10)
    axis.margins(y=0.2)


def _draw_rankings(area: Any, names: Sequence[str], agreement: Agreement, picture: Image.Image) -> None:
    """Draw the two rankings of one training concept under each model, and its picture in the corner."""
    concept = agreement.labels[agreement.anchor]
    taus = []
    for name in names:
        tau = agreement.averages[name]
        taus.append(f"{name} {tau[TRAINING]:.3f} and {tau[HELD_OUT]:.3f}")
    averages = "; ".join(taus)
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
    corner = area.add_axes((0.92, 0.86, 0.07, 0.14))
    corner.imshow(picture, interpolation="nearest")
    corner.axis("off")


def _draw_answers(area: Any, test_set: TestSet, similarities: Mapping[str, torch.Tensor]) -> None:
    """Draw some held-out pictures, a row each, with the nearest captions under each model."""
    chosen = random.Random(0).sample(range(len(test_set.images)), QUERIES)
    area.suptitle(
        f"The {TOP} nearest of {len(test_set.captions)} captions for {QUERIES} of them, drawn at random\n"
        f"The right caption is green, and stands below where it is not among the {TOP}.",
        **_TITLE,
    )
    widths = (0.62, *[2.6] * len(similarities))
    grid = area.subplots(len(chosen), len(widths), width_ratios=widths, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for axis, (name, similarity) in zip(grid[0, 1:], similarities.items(), strict=True):
        right = sum(_rank(scores, query) <= TOP for query, scores in enumerate(similarity))
        axis.set_title(f"{name}: right for {right} of {len(similarity)}", loc="left", weight="bold")
    for row, query in zip(grid, chosen, strict=True):
        row[0].imshow(test_set.images[query], interpolation="nearest")
        for axis, similarity in zip(row[1:], similarities.values(), strict=True):
            axis.set(xlim=(0, 1), ylim=(0, 1))
            _write_answers(axis, test_set.captions, similarity[query], query)


def _write_answers(axis: Any, captions: Sequence[str], scores: torch.Tensor, query: int) -> None:
    """Write the nearest captions of a picture, and below them its own if that is not among them."""
    nearest = scores.argsort(descending=True, stable=True)[:TOP].tolist()
    ranked = list(enumerate(nearest, start=1))
    if query not in nearest:
        ranked.append((_rank(scores, query), query))
    for line, (rank, caption) in enumerate(ranked):
        is_right = caption == query
        colour = _GREEN if is_right else _INK
        weight = "bold" if is_right and query in nearest else "normal"
        text = f"{rank}  {_shorten(captions[caption], 46)}"
        axis.text(0.0, 0.92 - 0.17 * line, text, va="center", fontsize=9.5, color=colour, weight=weight)


def _rank(scores: torch.Tensor, right: int) -> int:
    """Return the rank of the right answer, from 1; tied answers share the best rank."""
    return int((scores > scores[right]).sum()) + 1


def _shorten(caption: str, width: int) -> str:
    """Return a caption that ends at a word, and not at a comma, within a width."""
    return textwrap.shorten(caption, width, placeholder=" …").replace(", …", " …")
