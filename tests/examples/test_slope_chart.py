"""The slope chart shows the ranks and the τ that SciPy computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from matplotlib.colors import same_color
from openmoji_demo import slope_chart as charts

from batches import Batch, batches

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


@settings(max_examples=25)
@any_chart
def test_each_line_joins_the_two_ranks_of_an_item(batch: Batch, term: charts.Term, items: int) -> None:
    """Equal items are tied, too, however a product rounds."""
    n, axes = len(batch.image), axes_of(batch, term, items)
    left, right = (scipy.stats.rankdata(-x, method="min").astype(int) for x in both_lists(batch, term))
    shown = left.argsort(kind="stable")[:items].tolist()
    at = {text.get_position(): text for text in axes.texts}
    assert (at.pop((0, -1)).get_text(), at.pop((1, -1)).get_text()) == ("by the picture", "by its caption")
    assert len(at) == 2 * len(shown)
    ranks = [int(at[1, place].get_text().split()[0]) for place in range(len(shown))]
    assert ranks == sorted(ranks)
    for place, (k, line) in enumerate(zip(shown, axes.lines, strict=True)):
        start, end = line.get_ydata()
        assert start == place
        assert at[0, start].get_text() == f"label {k}  {left[k]}"
        assert at[1, end].get_text() == f"{right[k]}  label {k}"
        weight = "bold" if k == n - 1 else "normal"
        assert at[0, start].get_fontweight() == at[1, end].get_fontweight() == weight
        assert same_color(line.get_color(), charts.FALLEN) == (end > start)
        assert same_color(line.get_color(), charts.RISEN) == (end < start)
