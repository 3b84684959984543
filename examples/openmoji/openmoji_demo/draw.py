"""Draws the model's answers for some held-out emojis, and its training curves."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from .evaluate import TestSet

matplotlib.use("Agg")

import matplotlib.pyplot as plt

QUERIES = 8
TOP = 5
_GREEN, _GREY, _INK = "#1b7f3b", "#6b6b6b", "#222222"
_CURVES = {
    "loss": ("total", _INK, "-"),
    "contrastive_loss": ("contrastive", "#33658a", "-"),
    "cross_modal_loss": ("cross-modal rank term, weighted by λ", "#e07a1f", "-"),
    "in_modal_loss": ("in-modal rank term, weighted by λ", "#7b4fa3", "--"),
}
Curves = Mapping[str, Sequence[tuple[int, float]]]


def choose_queries(similarity: torch.Tensor, seed: int = 0) -> list[int]:
    """Draw queries at random, as many with the right caption among the first five as without.

    Where there are too few of one kind, the other fills up.
    """
    found = [_rank(scores, right) <= TOP for right, scores in enumerate(similarity)]
    order = list(range(len(found)))
    random.Random(seed).shuffle(order)
    hits = [i for i in order if found[i]]
    misses = [i for i in order if not found[i]]
    half = QUERIES // 2
    chosen = hits[: max(half, QUERIES - len(misses))]
    return chosen + misses[: QUERIES - len(chosen)]


def draw(
    path: Path,
    *,
    title: str,
    test_set: TestSet,
    similarity: torch.Tensor,
    curves: Mapping[str, Curves],
    epochs: int,
) -> None:
    """Save the picture.

    Args:
        path: The PNG to write.
        title: Name of the model whose answers are shown.
        test_set: The held-out emojis in colour.
        similarity: That model's picture × caption scores.
        curves: TensorBoard scalars of each trained run by its label, the model shown last.
        epochs: Number of epochs that the curves span.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(15, 8.6), layout="constrained")
    answers, training = figure.subfigures(1, 2, width_ratios=(2.15, 1), wspace=0.03)
    _draw_answers(answers, title, test_set, similarity)
    _draw_curves(training, curves, epochs)
    figure.supxlabel(
        "Emojis: OpenMoji, CC BY-SA 4.0, drawn as pixels; this picture is under the same licence.",
        fontsize=8,
        color=_GREY,
    )
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _draw_answers(area: Any, title: str, test_set: TestSet, similarity: torch.Tensor) -> None:
    chosen = choose_queries(similarity)
    rows = (len(chosen) + 1) // 2
    found = sum(_rank(similarity[query], query) <= TOP for query in chosen)
    area.suptitle(
        f"{title}: the {TOP} nearest of {len(test_set.captions)} captions for emojis never seen in training\n"
        f"Drawn at random: {found} with the right caption (green) among the {TOP}, "
        f"{len(chosen) - found} without (its place is shown below)",
        fontsize=11,
        x=0.02,
        ha="left",
    )
    grid = area.subplots(rows, 4, width_ratios=(0.8, 2.6, 0.8, 2.6), squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for position, query in enumerate(chosen):
        column, row = divmod(position, rows)
        picture, text = grid[row, 2 * column], grid[row, 2 * column + 1]
        picture.imshow(test_set.images[query], interpolation="nearest")
        text.set(xlim=(0, 1), ylim=(0, 1))
        scores = similarity[query]
        order = scores.argsort(descending=True, stable=True)[:TOP].tolist()
        lines = [(0.9 - 0.155 * place, place + 1, caption) for place, caption in enumerate(order)]
        if query not in order:
            lines.append((0.9 - 0.155 * TOP - 0.03, _rank(scores, query), query))
        for height, place, caption in lines:
            style = {"color": _GREEN if caption == query else _INK, "fontsize": 9}
            if caption == query and query in order:
                style["weight"] = "bold"
            text.text(0.0, height, f"{place}  {_shorten(test_set.captions[caption])}", **style)


def _rank(scores: torch.Tensor, right: int) -> int:
    return int((scores > scores[right]).sum()) + 1


def _shorten(caption: str, width: int = 52) -> str:
    return textwrap.shorten(caption, width, placeholder=" …").replace(", …", " …")


def _draw_curves(area: Any, curves: Mapping[str, Curves], epochs: int) -> None:
    losses, lambdas = area.subplots(2, 1, height_ratios=(2.2, 1), sharex=True)
    shown = list(curves)[-1]
    # The trainer logs the last step of every epoch, so the last point closes the last epoch.
    steps_per_epoch = (curves[shown]["train/loss"][-1][0] + 1) / epochs
    for label, scalars in curves.items():
        for key, (name, colour, style) in _CURVES.items():
            points = scalars.get(f"train/{key}")
            if not points or (label != shown and key != "contrastive_loss"):
                continue
            if key == "loss" and "train/cross_modal_loss" not in scalars:
                continue
            losses.plot(
                *_by_epoch(points, steps_per_epoch),
                color=colour,
                linestyle=style if label == shown else ":",
                linewidth=1.4,
                label=f"{label}: {name}" if len(curves) > 1 else name,
            )
    losses.set_ylim(bottom=0)
    losses.set_ylabel("training loss, nats")
    losses.set_title(f"Training curves of {shown}, from TensorBoard", loc="left", fontsize=11)
    losses.legend(frameon=False)
    losses.grid(alpha=0.25)
    points = curves[shown].get("train/rank_lambda")
    if points:
        lambdas.plot(*_by_epoch(points, steps_per_epoch), color="#b3202a")
        lambdas.set_ylim(bottom=0)
    else:
        lambdas.text(
            0.5, 0.5, "no ranking terms, so no λ", ha="center", transform=lambdas.transAxes, color=_GREY
        )
    lambdas.set_ylabel("λ, weight of the rank terms")
    lambdas.set_xlabel("epoch")
    lambdas.grid(alpha=0.25)


def _by_epoch(points: Sequence[tuple[int, float]], steps_per_epoch: float) -> tuple[list[float], list[float]]:
    return [step / steps_per_epoch for step, _ in points], [value for _, value in points]
