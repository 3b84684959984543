"""The slope chart shows the ranks and the τ that SciPy computes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("matplotlib")

from examples_common import slope_chart as charts
from matplotlib.colors import same_color


def features(n: int, seed: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if ties:  # small integers: equal similarities are equal to the last bit, in any order of summation
        v, t = torch.randint(-1, 2, (2, n, 2), generator=generator).double()
        return v, t
    v, t = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    return normalize(v, dim=-1), normalize(v + t, dim=-1)


batches = st.tuples(st.integers(2, 24), st.integers(0, 2**16), st.booleans())
terms = st.sampled_from(["cross_modal", "in_modal"])


def rankings(v: Tensor, t: Tensor, anchor: int, term: charts.Term) -> tuple[np.ndarray, np.ndarray, float]:
    """The anchor's ranks of all concepts by its picture and by its caption, and τ, from SciPy."""
    s, r, i, x = v @ t.T, t @ v.T, v @ v.T, t @ t.T
    a, b = (m[anchor].numpy() for m in ((s, r) if term == "cross_modal" else (i, x)))
    left, right = (scipy.stats.rankdata(-scores, method="min").astype(int) for scores in (a, b))
    return left, right, scipy.stats.kendalltau(a, b).statistic


@given(st.integers(8, 70), st.integers(2, 70), st.integers(0, 2**16), terms)
def test_equal_items_are_tied_however_a_product_rounds(n: int, d: int, seed: int, term: charts.Term) -> None:
    v, t = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    t[1:] = t[1].clone()
    left, right = charts._rows(v, t, 0, term)
    of_texts = left if term == "cross_modal" else right
    assert (of_texts[1:] == of_texts[1]).all()


@settings(max_examples=25)
@given(batches, terms, st.integers(2, 30))
def test_chart_shows_the_ranks(batch: tuple[int, int, bool], term: charts.Term, items: int) -> None:
    v, t = features(*batch)
    n = len(v)
    labels = [f"label {k}" for k in range(n)]
    figure = charts.slope_chart(v.requires_grad_(), t, labels, n - 1, term=term, items=items, title="A model")
    v = v.detach()
    left, right, tau = rankings(v, t, n - 1, term)
    shown = left.argsort(kind="stable")[:items].tolist()
    (axes,) = figure.axes
    heading = "Kendall τ: no ranking" if np.isnan(tau) else f"Kendall τ = {tau:.3f}"
    assert axes.get_title() == f"A model\n{heading}"

    def side(x: float) -> dict[float, tuple[str, str]]:
        texts = [text for text in axes.texts if text.get_position()[0] == x]
        return {text.get_position()[1]: (text.get_text(), str(text.get_fontweight())) for text in texts}

    on_left, on_right = side(0), side(1)
    assert on_left.pop(-1)[0] == "by the picture"
    assert on_right.pop(-1)[0] == "by its caption"
    assert [text for text, _ in on_left.values()] == [f"label {k}  {left[k]}" for k in shown]
    assert sorted(text for text, _ in on_right.values()) == sorted(f"{right[k]}  label {k}" for k in shown)
    ranks = [int(on_right[place][0].split()[0]) for place in range(len(shown))]
    assert ranks == sorted(ranks)
    for texts in (on_left, on_right):
        assert {
            text.split()[-1 if texts is on_right else 1] for text, w in texts.values() if w == "bold"
        } <= {str(n - 1)}
    assert len(axes.lines) == len(shown)
    for k, line in zip(shown, axes.lines, strict=True):
        start, end = line.get_ydata()
        assert on_left[start][0].startswith(f"label {k} ")
        assert on_right[end][0].endswith(f" {k}")
        color = line.get_color()
        assert same_color(color, charts.FALLEN) == (end > start)
        assert same_color(color, charts.RISEN) == (end < start)
