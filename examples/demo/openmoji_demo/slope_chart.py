"""The slope chart of two rankings of the same things.

It is drawn without pyplot: no window, no global state. The figures can be given to TensorBoard's
``add_figure`` and, once ``matplotlib.pyplot`` is imported, to ``wandb.Image``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor

from rankloss.metrics import kendall_tau

__all__ = ["Term", "compare_rankings", "slope_chart"]

Term = Literal["cross_modal", "in_modal"]

FALLEN, RISEN = "#e0702a", "#3b82d6"
"""The colours of items that the second list ranks lower than the first, and higher."""

_LONGEST = 32  # letters of a label


@torch.no_grad()
def slope_chart(
    image_features: Tensor,
    text_features: Tensor,
    labels: Sequence[str],
    anchor: int,
    *,
    term: Term = "cross_modal",
    items: int = 12,
    title: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    r"""One picture's ranking of the concepts on the left, its caption's on the right, a line per concept.

    ``term="cross_modal"`` takes row ``anchor`` of S = V·Tᵀ (the picture ranks the captions) and of R = Sᵀ
    (its caption ranks the pictures), ``"in_modal"`` that of I = V·Vᵀ and of X = T·Tᵀ. Parallel lines are
    agreement.

    The concepts shown are those that the picture ranks first; the numbers beside them are ranks among all N,
    from 1, tied items sharing the best rank, and Kendall's τ-b in the heading is over all N as well. Of the
    concepts shown, a line rises, in blue, to one that the caption places higher, and falls, in orange, to one
    that it places lower; the pair's own concept is bold.

    Args:
        image_features: ``[N, D]``, unit-norm.
        text_features: ``[N, D]``, unit-norm; row i belongs to image i.
        labels: N names; those of more than 32 letters are cut short.
        anchor: the row whose two rankings are compared, from 0.
        term: which lists.
        items: how many concepts are shown.
        title: what stands above τ, for instance a model's name.
        axes: where to draw; None makes a figure.

    Returns:
        The figure, which belongs to ``axes`` if they were given.

    Example:
        >>> v = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
        >>> figure = slope_chart(v, v, ["cat", "dog", "fox", "car", "bus"], anchor=0)
        >>> figure.axes[0].get_title()
        'Kendall τ = 1.000'
    """
    lists = _rows(image_features, text_features, anchor, term)
    names = ("by the picture", "by its caption")
    return compare_rankings(*lists, labels, own=anchor, names=names, items=items, title=title, axes=axes)


@torch.no_grad()
def compare_rankings(
    first: Tensor,
    second: Tensor,
    labels: Sequence[str],
    *,
    own: int | None = None,
    names: tuple[str, str] = ("first", "second"),
    items: int = 12,
    title: str | None = None,
    axes: Axes | None = None,
) -> Figure:
    """The chart of :func:`slope_chart` for any two lists of scores of the same N things.

    Args:
        first: ``[N]``, the left column's scores; the largest is ranked first.
        second: ``[N]``, the right column's scores.
        labels: N names; those of more than 32 letters are cut short.
        own: the item whose name is bold, from 0; None for none.
        names: what stands above the columns.
        items: how many things are shown, those that ``first`` ranks first.
        title: what stands above τ.
        axes: where to draw; None makes a figure.

    Returns:
        The figure, which belongs to ``axes`` if they were given.

    Example:
        >>> figure = compare_rankings(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 1.0, 2.0]), "abc")
        >>> figure.axes[0].get_title()
        'Kendall τ = 0.333'
    """
    left, right = _ranks(first), _ranks(second)
    tau = kendall_tau(first, second).item()
    shown = left.argsort(stable=True)[:items]
    texts = {item: _text(labels[item]) for item in shown.tolist()}
    if axes is None:
        letter = 0.7 * rcParams["font.size"] / 72  # inches: no less than most letters
        letters = max(map(len, texts.values())) + 6  # with a rank
        width = 1.8 + 2 * letter * letters
        figure = Figure(figsize=(width, 0.8 + 0.32 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
    heading = f"Kendall τ = {tau:.3f}" if math.isfinite(tau) else "Kendall τ: no ranking"
    axes.set_title(heading if title is None else f"{title}\n{heading}")
    for x, name, side in zip((0, 1), names, ("right", "left"), strict=True):
        axes.text(x, -1, name, ha=side, va="center", style="italic")
    # Places are among the shown; equal ranks keep the order of the left column.
    right_places = right[shown].argsort(stable=True).argsort().tolist()
    for left_place, (item, right_place) in enumerate(zip(shown.tolist(), right_places, strict=True)):
        width, weight = (3.0, "bold") if item == own else (1.6, "normal")
        color = _color(left_place, right_place)
        axes.plot((0.03, 0.97), (left_place, right_place), color=color, lw=width, solid_capstyle="round")
        name = texts[item]
        axes.text(0, left_place, f"{name}  {left[item]}", ha="right", va="center", weight=weight)
        axes.text(1, right_place, f"{right[item]}  {name}", ha="left", va="center", weight=weight)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -1.5))
    axes.axis("off")
    figure = axes.figure
    return figure if isinstance(figure, Figure) else figure.figure  # that of a subfigure


def _rows(image_features: Tensor, text_features: Tensor, anchor: int, term: Term) -> tuple[Tensor, Tensor]:
    """The anchor's row of S and of R, or of I and of X."""
    v, t = image_features.double(), text_features.double()
    items_of_picture, items_of_caption = (t, v) if term == "cross_modal" else (v, t)
    by_picture = items_of_picture @ v[anchor]
    by_caption = items_of_caption @ t[anchor]
    # A product may round equal rows differently, and break their tie: all take the score of the first.
    return by_picture[_first_equal(items_of_picture)], by_caption[_first_equal(items_of_caption)]


def _first_equal(features: Tensor) -> Tensor:
    """The first row that equals row i, for every i."""
    _, kind = features.unique(dim=0, return_inverse=True)
    return (kind[:, None] == kind).byte().argmax(-1)


def _ranks(scores: Tensor) -> Tensor:
    """Ranks from 1, the largest score first; equal scores share the best rank."""
    worst_last = -scores.double()  # a double, since an unsigned integer would wrap when it is negated
    return torch.searchsorted(worst_last.sort().values, worst_last) + 1


def _color(left_place: int, right_place: int) -> Any:
    """The colour of a line that rises, falls, or does neither: then the text's, faded."""
    if right_place > left_place:
        return FALLEN
    if right_place < left_place:
        return RISEN
    return to_rgba(rcParams["text.color"], 0.35)  # visible in a light style and in a dark one


def _text(label: str) -> str:
    """The label, at most so long that a line stays beside it, and with dollars that begin no mathematics."""
    shortened = label if len(label) <= _LONGEST else label[: _LONGEST - 1].rstrip() + "…"
    return shortened.replace("$", r"\$")
