"""Properties of every loss: the order of the pairs, the names of the modalities, units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from all_losses import IMAGE, LOSSES, TEXT, further
from batches import Batch, assert_close, batches, gradients

pytestmark = pytest.mark.filterwarnings("ignore:.*unit-norm")
ONE_DIRECTION = ("lists", "alip")  # of a picture's texts
# With an unscaled term, bins from −1 to 1, or ties of what is unit-norm.
OF_UNIT_NORM = ("mimicry", "cyclip", "alip", "ranks, bins", "ranks, all pairs")
few = settings(max_examples=settings.default.max_examples // 10)


def batches_for(name: str) -> st.SearchStrategy[Batch]:
    return batches(ties=name != "lists, negatives")  # whose queries have to differ


@pytest.mark.parametrize("name", LOSSES)
@few
@given(data=st.data())
def test_the_order_of_the_pairs_does_not_matter(name: str, data: st.DataObject) -> None:
    v, t, s = inputs = data.draw(batches_for(name)).leaves()
    order = torch.tensor(data.draw(st.permutations(range(len(v)))))
    given = further(v, t)
    value = LOSSES[name](*inputs, given)
    permuted = LOSSES[name](v[order], t[order], s, {key: x[order] for key, x in given.items()})
    found, owed = ([x, *gradients(x, inputs, -1.3)] for x in (permuted, value))
    assert_close(found, owed, 1e-9)


@pytest.mark.parametrize("name", [x for x in LOSSES if not x.startswith(ONE_DIRECTION)])
@few
@given(batch=batches())
def test_images_and_texts_may_change_places(name: str, batch: Batch) -> None:
    v, t, s = inputs = batch.leaves()
    given = further(v, t)
    swapped = LOSSES[name](t, v, s, {**given, IMAGE: given[TEXT], TEXT: given[IMAGE]})
    value = LOSSES[name](*inputs, given)
    found, owed = ([x, *gradients(x, inputs, -1.3)] for x in (swapped, value))
    assert_close(found, owed, 1e-9)


@pytest.mark.parametrize("name", [x for x in LOSSES if not x.startswith(OF_UNIT_NORM)])
@few
@given(data=st.data(), factor=st.sampled_from([0.5, 2.0]))
def test_only_products_of_features_and_scale_count(name: str, data: st.DataObject, factor: float) -> None:
    v, t, s = inputs = data.draw(batches_for(name)).leaves()
    given = further(v, t)
    value = LOSSES[name](*inputs, given)
    given = {key: factor * x if key == "caption_features" else x for key, x in given.items()}
    scaled = LOSSES[name](factor * v, factor * t, s / factor**2, given)
    found, owed = ([x, *gradients(x, inputs, -1.3)] for x in (scaled, value))
    assert_close(found, owed, 1e-9)
