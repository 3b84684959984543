"""Lists beside a loss of pairs, as the catalogue has them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from named_inputs import N, inputs_of

import rankloss
import rankloss_trainers
from rankloss_trainers.catalog import choose, load
from rankloss_trainers.graded.term import RankedListsTerm

LISTS = inputs_of("ranked-lists")
V, T, SCALE = (LISTS.pop(key) for key in ("image_features", "text_features", "logit_scale"))


@pytest.mark.parametrize("base", [rankloss.ClipLoss(), rankloss.SigLipLoss()])
def test_entries_are_the_bases_and_the_weighted_lists(base: rankloss.ClipLoss | rankloss.SigLipLoss) -> None:
    bias = {"logit_bias": torch.tensor(-3.0)} if isinstance(base, rankloss.SigLipLoss) else {}
    lists = rankloss.RankedLists(in_batch_negatives=True)
    term = RankedListsTerm(lists, base, weight=0.5)
    pairs = {"image_features": V, "text_features": T, "logit_scale": SCALE, **bias}
    entries = term(**pairs, **LISTS, output_dict=True)
    assert entries.keys() == {"contrastive_loss", "ranked_lists_loss"}
    assert entries["contrastive_loss"] == base(**pairs)
    assert entries["ranked_lists_loss"] == 0.5 * lists(**LISTS, logit_scale=SCALE)
    torch.testing.assert_close(term(**pairs, **LISTS), sum(entries.values()))


def test_lists_alone_leave_the_pairs_out_and_a_bias_in_the_graph() -> None:
    term = RankedListsTerm(rankloss.RankedLists())
    bias = torch.tensor(-3.0, requires_grad=True)
    loss = term(SCALE, bias, image_features=V, text_features=T, **LISTS)
    assert loss == rankloss.RankedLists()(**LISTS, logit_scale=SCALE)
    loss.backward()
    assert bias.grad == 0
    with pytest.raises(ValueError, match="dist_image_features"):
        term(SCALE, dist_image_features=V, **LISTS)


def test_a_base_is_trained_where_the_data_have_pairs() -> None:
    pairs = {"image_features": V, "text_features": T}
    terms = [rankloss_trainers.create("ranked-lists", base_loss=x) for x in ("auto", "include")]
    for term in terms:
        assert {*term(SCALE, **pairs, **LISTS, output_dict=True)} == {"contrastive_loss", "ranked_lists_loss"}
    assert {*terms[0](SCALE, **LISTS, output_dict=True)} == {"ranked_lists_loss"}
    with pytest.raises(ValueError, match=r"base_loss.*include"):
        terms[1](SCALE, **LISTS)


def test_a_query_twice_in_a_batch_is_refused_where_its_candidates_would_be_negatives() -> None:
    ids = torch.tensor([3, 1, 2, 1, 0, 5, 6, 7])
    RankedListsTerm(rankloss.RankedLists())(SCALE, query_ids=ids, **LISTS)
    term = RankedListsTerm(rankloss.RankedLists(in_batch_negatives=True))
    term(SCALE, query_ids=torch.arange(N), **LISTS)
    with pytest.raises(ValueError, match=r"1 and 3 .*query"):
        term(SCALE, query_ids=ids, **LISTS)


def test_options_reach_the_loss() -> None:
    create = functools.partial(rankloss_trainers.create, "ranked-lists")
    given = {"model": "pairwise", "pair_weight": "difference", "chunk_size": 7, "base_loss": "exclude"}
    term = create(**given)
    assert (term.base, term.lists.pair_weight, term.lists.chunk_size) == (None, "difference", 7)
    assert create(model="lambda", gain="exponential").lists.gain == "exponential"
    for given, words in (({"gain": "exponential"}, "gain"), ({"base_loss": "x"}, "base_loss.*'x'")):
        with pytest.raises(ValueError, match=words):
            create(**given)
    for name in load("ranked-lists").options.keys() & inspect.signature(rankloss.RankedLists).parameters:
        assert getattr(create().lists, name) == getattr(rankloss.RankedLists(), name)


@pytest.mark.parametrize("given", [{"model": "lambda"}, {"model": "pairwise", "pair_weight": "difference"}])
def test_own_caption_on_top_needs_a_model_of_orders(given: Any) -> None:
    (loss,) = choose("ranked-lists", {"own_caption": "top", **given})
    with pytest.raises(ValueError, match=r"ranked-lists\.own_caption"):
        loss.build(rankloss.ClipLoss(), None)
    (loss,) = choose("ranked-lists", {"own_caption": "top"})
    assert loss.build(rankloss.ClipLoss(), None).lists.model == "plackett_luce"
    assert loss.columns.own == 1
