"""The oracle is itself checked: against the published vectors, and against values written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from batches import VECTORS, relative_error, vector_batch
from rankloss import reference


@pytest.mark.parametrize("key", VECTORS)
def test_reference_matches_the_vectors(key: str) -> None:
    case = VECTORS[key]
    batch = vector_batch(case)
    v, t, s = batch.image.numpy(), batch.text.numpy(), batch.scale
    found = {"clip": reference.clip(v, t, s)}
    found |= {term: getattr(reference, term)(v, t, s) for term in ("cross_modal", "in_modal")}
    owed = {"clip": case["clip"], **case["row_mean"]}
    if "batch_list_sum" in case:
        sums, options = case["batch_list_sum"], {"lists": "batch", "reduction": "sum"}
        found["cross, batch"] = reference.cross_modal(v, t, s, **options)
        found["in, batch"] = reference.in_modal(v, t, s, **options)
        found["cross, shifted"] = reference.cross_modal(v, t, s, **options, worth="shifted")
        owed["cross, batch"] = sums["cross_modal"]
        owed["in, batch"] = (sums["in_modal I|X"] + sums["in_modal X|I"]) / 2
        owed["cross, shifted"] = case["batch_list_sum_shifted_worth"]["cross_modal"]
    for name, value in found.items():
        assert relative_error(value, owed[name]) < 1e-10, name


def test_reference_of_a_list_written_out_by_hand() -> None:
    # Best first: scores 2, 1, 0.
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert float(reference.plackett_luce_nll([2, 0, 1], [9, 1, 5])) == pytest.approx(expected, rel=1e-15)
    # The last two tied: both have the denominator of two items.
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + 2 * math.log(math.e + 1) - 1
    assert float(reference.plackett_luce_nll([2, 0, 1], [9, 1, 1])) == pytest.approx(expected, rel=1e-15)


def test_lists_are_what_rankloss_makes_of_them() -> None:
    with pytest.raises(ValueError, match=r"worth='identity' needs scores above 0.* smallest is -0.1$"):
        reference.plackett_luce_nll([0.3, -0.1], [1.0, 2.0], worth="identity")
    with pytest.raises(ValueError, match=r"worth='shifted' needs scores above -1.* smallest is -1$"):
        reference.plackett_luce_nll([0.3, -1.0], [1.0, 2.0], worth="shifted")
    lists = [[0.0, 0.0], [1.0, 2.0]], [[math.nan, 1.0], [1.0, 2.0]]
    assert np.isnan(reference.plackett_luce_nll(*lists)).tolist() == [True, False]
    order = np.array([2**53, 2**53 + 1])  # one number in float64
    assert reference.plackett_luce_nll([0.0, 1.0], order) == pytest.approx(math.log1p(math.exp(-1)))


def test_mean_of_a_list_written_out_by_hand() -> None:
    # Of three orthogonal pairs each list has one winner and two tied others: ranks 1, 2, 2.
    mu = [1 / math.log(2), 1 / math.log(3), 1 / math.log(3)]
    terms = [math.log(math.exp(2) + 2) - 2, math.log(2), math.log(2)]
    expected = sum(m * x for m, x in zip(mu, terms, strict=True)) / sum(mu)
    actual = reference.cross_modal(np.eye(3), np.eye(3), 2.0, discount="log")
    assert actual == pytest.approx(expected, rel=1e-14)
    assert reference.cross_modal(np.eye(3), np.eye(3), 2.0, top_k=1) == pytest.approx(terms[0], rel=1e-14)


def test_lambda_weights_written_out_by_hand() -> None:
    # Ranks 1, 2, 3; grades 0, 2, 1: the ideal DCG of the linear gains is 2 + 1/log₂ 3.
    ideal, second = 2 + 1 / math.log2(3), 1 / math.log2(3)
    owed = np.zeros((3, 3))
    owed[1, 0] = (1 - second + 10 * (1 - second)) * 2 / ideal
    owed[1, 2] = (second - 1 / 2 + 10 * (1 - second)) * 1 / ideal
    owed[2, 0] = (1 - 1 / 2 + 10 * (second - 1 / 2)) * 1 / ideal
    found = reference.lambda_weights([3.0, 2.0, 1.0], [0.0, 2.0, 1.0])
    np.testing.assert_allclose(found, owed, rtol=1e-14)
    value = 0.0
    for p, q, difference in ((1, 0, 1.0), (1, 2, -1.0), (2, 0, 2.0)):  # x_q − x_p
        value += owed[p, q] * math.log1p(math.exp(difference))
    assert reference.lambda_loss([3.0, 2.0, 1.0], [0.0, 2.0, 1.0]) == pytest.approx(value, rel=1e-14)
