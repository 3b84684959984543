"""The slope chart shows the ranks and the τ that SciPy computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from matplotlib.colors import same_color
from matplotlib.text import Text
from openmoji_demo import slope_chart as charts

from batches import Batch, batches, random_batch

any_chart = given(batches(max_n=24), st.sampled_from(["cross_modal", "in_modal"]), st.integers(2, 30))


def axes_of(batch: Batch, term: charts.Term, items: int) -> Any:
    """The axes of a chart of the last pair, whose items are labelled by their number."""
    v, t = batch.image.float(), batch.text.float()
    labels = [f"label {k}" for k in range(len(v))]
    chart = charts.slope_chart(
        v.requires_grad_(), t, labels, len(v) - 1, term=term, items=items, title="A model"
    )
    (axes,) = chart.axes
    return axes


def both_lists(batch: Batch, term: charts.Term) -> list[np.ndarray]:
    """The similarities of the last pair, rounded, so that equal items have equal products."""
    v, t = batch.image.float().double(), batch.text.float().double()
    pairs = ((v, t), (t, v)) if term == "cross_modal" else ((v, v), (t, t))
    return [(x @ y.T)[-1].numpy().round(12) for x, y in pairs]


@settings(max_examples=25)
@any_chart
def test_the_title_has_the_agreement_of_both_lists(batch: Batch, term: charts.Term, items: int) -> None:
    tau = scipy.stats.kendalltau(*both_lists(batch, term)).statistic
    heading = "Kendall τ: no ranking" if np.isnan(tau) else f"Kendall τ = {tau:.3f}"
    assert axes_of(batch, term, items).get_title() == f"A model\n{heading}"


@dataclass(frozen=True)
class Line:
    """A line of a chart: its ends, counted from the top, their texts, and its item k with its ranks."""

    ends: tuple[float, float]
    texts: tuple[Text, Text]
    color: Any
    k: int
    ranks: tuple[int, int]


def lines_of(batch: Batch, term: charts.Term, items: int) -> list[Line]:
    """The lines of a chart from above, each with the text at either end: no other text is there."""
    axes = axes_of(batch, term, items)
    left, right = (scipy.stats.rankdata(-x, method="min").astype(int) for x in both_lists(batch, term))
    shown = left.argsort(kind="stable")[:items].tolist()
    at = {text.get_position(): text for text in axes.texts if text.get_position()[1] >= 0}
    assert len(at) == 2 * len(shown)
    lines = []
    for k, line in zip(shown, axes.lines, strict=True):
        start, end = line.get_ydata()
        texts = at[0, start], at[1, end]
        lines.append(Line((start, end), texts, line.get_color(), k, (int(left[k]), int(right[k]))))
    return lines


def test_both_sides_are_named_above() -> None:
    axes = axes_of(random_batch(0, 6, 4, 1.0), "cross_modal", 6)
    heads = {}
    for text in axes.texts:
        side, height = text.get_position()
        if height < 0:  # above the first line
            heads[side] = text.get_text()
    assert heads == {0: "by the picture", 1: "by its caption"}


@settings(max_examples=25)
@any_chart
def test_each_line_joins_the_two_ranks_of_an_item(batch: Batch, term: charts.Term, items: int) -> None:
    """Items stand by rank on both sides. Equal items are tied, too, however a product rounds."""
    lines = lines_of(batch, term, items)
    for line in lines:
        assert line.texts[0].get_text() == f"label {line.k}  {line.ranks[0]}"
        assert line.texts[1].get_text() == f"{line.ranks[1]}  label {line.k}"
    assert [line.ends[0] for line in lines] == [*range(len(lines))]
    by_place = sorted(lines, key=lambda line: line.ends[1])
    assert [line.ends[1] for line in by_place] == [*range(len(lines))]
    ranks = [line.ranks[1] for line in by_place]
    assert ranks == sorted(ranks)


@settings(max_examples=25)
@any_chart
def test_the_own_pair_alone_is_bold(batch: Batch, term: charts.Term, items: int) -> None:
    for line in lines_of(batch, term, items):
        weight = "bold" if line.k == len(batch.image) - 1 else "normal"
        assert [text.get_fontweight() for text in line.texts] == [weight, weight]


@settings(max_examples=25)
@any_chart
def test_the_colour_of_a_line_says_whether_its_item_falls_or_rises(
    batch: Batch, term: charts.Term, items: int
) -> None:
    for line in lines_of(batch, term, items):
        start, end = line.ends
        assert same_color(line.color, charts.FALLEN) == (end > start)
        assert same_color(line.color, charts.RISEN) == (end < start)
