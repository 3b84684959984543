"""The slope chart shows the ranks and the τ that SciPy computes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from matplotlib.colors import same_color
from openmoji_demo import slope_chart as charts

from batches import Batch, batches


@settings(max_examples=25)
@given(batches(max_n=24), st.sampled_from(["cross_modal", "in_modal"]), st.integers(2, 30))
def test_chart_shows_the_ranks(batch: Batch, term: charts.Term, items: int) -> None:
    """Equal items are tied, too, however a product rounds."""
    v, t = batch.image.float(), batch.text.float()
    n, labels = len(v), [f"label {k}" for k in range(len(v))]
    figure = charts.slope_chart(v.requires_grad_(), t, labels, n - 1, term=term, items=items, title="A model")
    pairs = ((v, t), (t, v)) if term == "cross_modal" else ((v, v), (t, t))
    # Rounded, so that equal items have equal products.
    first, second = ((x.double() @ y.double().T)[n - 1].detach().numpy().round(12) for x, y in pairs)
    left, right = (scipy.stats.rankdata(-x, method="min").astype(int) for x in (first, second))
    tau = scipy.stats.kendalltau(first, second).statistic
    (axes,) = figure.axes
    heading = "Kendall τ: no ranking" if np.isnan(tau) else f"Kendall τ = {tau:.3f}"
    assert axes.get_title() == f"A model\n{heading}"
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
