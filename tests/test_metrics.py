from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import VECTORS, Batch, batches, random_batch, vector_batch
from rankloss import metrics

pair_of_lists = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, n), min_size=n, max_size=n)] * 2)
)


@given(pair_of_lists)
def test_kendall_and_spearman_match_scipy_ties_included(lists: tuple[list[int], list[int]]) -> None:
    x, y = (torch.tensor(v, dtype=torch.float64) for v in lists)
    if len(set(lists[0])) == 1 or len(set(lists[1])) == 1:
        assert metrics.kendall_tau(x, y).isnan()
        assert metrics.spearman_rho(x, y).isnan()
        return
    assert metrics.kendall_tau(x, y).item() == pytest.approx(
        scipy.stats.kendalltau(x, y).statistic, abs=1e-12
    )
    assert metrics.spearman_rho(x, y).item() == pytest.approx(
        scipy.stats.spearmanr(x, y).statistic, abs=1e-12
    )


def test_leading_dimensions_are_lists() -> None:
    x, y = torch.rand(2, 3, 4, 21, generator=torch.Generator().manual_seed(0))
    for measure in (metrics.kendall_tau, metrics.spearman_rho):
        assert measure(x, y).shape == (3, 4)
        torch.testing.assert_close(measure(x, y)[1, 2], measure(x[1, 2], y[1, 2]))


def test_equal_modalities_agree_perfectly_and_a_sample_of_anchors_is_taken_when_asked() -> None:
    batch = random_batch(0, 50, 8, 1.0)
    for value in metrics.rank_agreement(batch.image, batch.image).values():
        assert value.item() == pytest.approx(1)
    ends = torch.stack(
        [
            metrics.kendall_tau((batch.image @ batch.image.T)[i], (batch.text @ batch.text.T)[i])
            for i in (0, 49)
        ]
    )
    sampled = metrics.rank_agreement(batch.image, batch.text, max_anchors=2)
    assert sampled["in_modal_tau"].item() == pytest.approx(ends.mean().item(), abs=1e-12)


@pytest.mark.parametrize("n", [7, 17, 65])
def test_equal_items_are_tied_whatever_the_products_rounding(n: int) -> None:
    batch = random_batch(n, n, 5, 1.0, duplicates=3)
    v, t = batch.image, batch.text
    pairs = {
        # Products that round equal columns alike.
        "cross_modal": ((v[:, None] * t).sum(-1), (t[:, None] * v).sum(-1)),
        "in_modal": ((v[:, None] * v).sum(-1), (t[:, None] * t).sum(-1)),
    }
    actual = metrics.rank_agreement(v, t)
    for term, (a, b) in pairs.items():
        expected = metrics.kendall_tau(a, b).mean().item()
        assert actual[f"{term}_tau"].item() == pytest.approx(expected, abs=1e-12)


def test_alignment_and_uniformity_match_the_published_analysis_scripts_values() -> None:
    batch = vector_batch(VECTORS["0:6:4:10"])
    assert metrics.alignment(batch.image, batch.text).item() == pytest.approx(2.49989752858144, rel=1e-12)
    assert metrics.uniformity(batch.image, batch.text).item() == pytest.approx(-1.97326705984705, rel=1e-12)


def test_uniformity_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(0, 23, 5, 1.0)
    whole = metrics.uniformity(batch.image, batch.text)
    monkeypatch.setattr(metrics, "_BLOCK", 23 * 4)
    torch.testing.assert_close(metrics.uniformity(batch.image, batch.text), whole, rtol=1e-12, atol=0)


@given(batches(), st.floats(-3, 3))
def test_modality_gap_is_the_distance_of_the_centres(batch: Batch, shift: float) -> None:
    assert metrics.modality_gap(batch.image, batch.image).item() == 0
    moved = batch.image + shift * torch.eye(batch.image.shape[1], dtype=torch.float64)[0]
    assert metrics.modality_gap(batch.image, moved).item() == pytest.approx(abs(shift), abs=1e-10)
