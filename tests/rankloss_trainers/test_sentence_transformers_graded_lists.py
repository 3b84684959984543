"""Graded lists in sentence-transformers' trainer, on a tiny model of random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_sentences
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from tiny_sentences import WORDS, embed, step, tiny_model, weights

from rankloss import ClipLoss, RankedLists
from rankloss_trainers.sentence_transformers import (
    ContrastiveLoss,
    RankedListsCollator,
    RankedListsLoss,
    RankedListsTrainer,
)


def texts(*, seed: int, number: int) -> list[str]:
    """Random texts of four words."""
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in row) for row in torch.randint(0, 40, (number, 4), generator=generator)]


def lists(number: int = 8, *, length: int | None = None) -> Any:
    """Queries with one to four candidates, some in several lists; grades are tied or −∞ here and there."""
    queries, pool = texts(seed=1, number=number), texts(seed=2, number=number + 3)
    cycle = [3.0, 1.0, 1.0, -math.inf]
    candidates, grades = [], []
    for n in range(number):
        size = length or 1 + n % 4
        candidates.append([pool[(n + 2 * k) % len(pool)] for k in range(size)])
        grades.append([cycle[(n + k) % 4] for k in range(size)])
    return datasets.Dataset.from_dict({"query": queries, "candidates": candidates, "label": grades})


def in_columns(data: Any) -> Any:
    """Lists of one length, with a column for each place of a candidate."""
    places = zip(*data["candidates"], strict=True)
    columns = {f"candidate_{k}": list(place) for k, place in enumerate(places, 1)}
    return datasets.Dataset.from_dict({"query": data["query"], **columns, "label": data["label"]})


def mean_of_lists(model: Any, data: Any, scale: float) -> torch.Tensor:
    """The mean of the losses of lists that have an order, one list at a time."""
    values = []
    for row in data:
        if len(set(row["label"])) > 1:
            q, c = embed(model, [row["query"]], row["candidates"])
            values.append(RankedLists()(q, c[None], torch.tensor([row["label"]]), scale))
    return sum(values) / len(values)


def loss_of_layers(model: Any, loss: Any, dimensions: list[int] | None) -> AdaptiveLayerLoss:
    """The loss applied to each layer of the model, and of each layer to its first dimensions if given."""
    all_layers: Any = {"n_layers_per_step": -1, "kl_div_weight": 0.0}
    if dimensions is None:
        return AdaptiveLayerLoss(model, loss, **all_layers)
    return Matryoshka2dLoss(model, loss, dimensions, n_dims_per_step=-1, **all_layers)


def train(
    directory: Path, loss: Any, model: Any, data: Any, trainer: Any = RankedListsTrainer, **options: Any
) -> Any:
    """Train by a class of trainers, one epoch by default, with more options; returns the trainer."""
    options = {"learning_rate": 0.1, "num_train_epochs": 1, **options}
    return tiny_sentences.train(directory, loss, model, train_dataset=data, kind=trainer, **options)


def gradient(model: Any) -> torch.Tensor:
    """The gradients of all parameters that have one, in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_table_of_lists_trains_as_an_own_loop(tmp_path: Path, mini_batch_size: int | None) -> None:
    model, own = tiny_model(), tiny_model()
    loss = RankedListsLoss(model, scale=30.0, mini_batch_size=mini_batch_size)
    trainer = train(tmp_path, loss, model, lists(), max_steps=2)
    lines = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        value = mean_of_lists(own, lists(), scale=30.0)
        assert line == pytest.approx(value.item(), abs=1e-3)
        step(own, value)
    assert not torch.allclose(weights(own), weights(tiny_model()), atol=1e-4)
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [None, ClipLoss()], ids=["alone", "beside CLIP's loss"])
@pytest.mark.parametrize("trainer", [RankedListsTrainer, SentenceTransformerTrainer])
def test_lists_train_alone_and_beside_a_loss_of_pairs(tmp_path: Path, trainer: Any, base: Any) -> None:
    """Lists of one length may be columns of the usual trainer."""
    model, own, data, scale = tiny_model(), tiny_model(), lists(length=3), 20.0
    table = data if trainer is RankedListsTrainer else in_columns(data)
    columns = table.to_dict()
    if base:  # its pairs are the query and the second column
        partners = texts(seed=3, number=8)
        columns = {"query": columns.pop("query"), "partner": partners, **columns}
    loss = RankedListsLoss(model, base=base, weight=0.5)
    train(tmp_path, loss, model, datasets.Dataset.from_dict(columns), trainer, max_steps=1)
    value = 0.5 * mean_of_lists(own, data, scale)
    if base:
        value = value + base(*embed(own, data["query"], partners), scale)
    step(own, value)
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-4, atol=1e-5)


def test_an_evaluation_has_every_list_where_a_training_drops_the_last(tmp_path: Path) -> None:
    model, data = tiny_model(), lists(11)  # a batch of 8, and 3 more
    loss = RankedListsLoss(model)
    trainer = train(tmp_path, loss, model, data, eval_dataset=data, dataloader_drop_last=True, max_steps=1)

    def number_of_lists(loader: Any) -> int:
        return sum(len(batch["label"]) for batch in loader)

    assert number_of_lists(trainer.get_train_dataloader()) == 8
    assert number_of_lists(trainer.get_eval_dataloader()) == 11
    assert number_of_lists(trainer.get_test_dataloader(data)) == 11


@pytest.mark.parametrize("in_batch_negatives", [False, True])
def test_without_labels_a_positive_is_a_pair_and_the_best_of_its_list(
    tmp_path: Path, in_batch_negatives: bool
) -> None:
    """Beside a base loss too; the expected value is made of cross-entropies alone."""
    model, own = tiny_model(), tiny_model()
    names = ("anchor", "positive", "negative_1", "negative_2")
    columns = dict(zip(names, (texts(seed=seed, number=8) for seed in range(1, 5)), strict=True))
    criterion = RankedLists(in_batch_negatives=in_batch_negatives)
    loss = RankedListsLoss(model, criterion, base=ClipLoss(), weight=0.5)
    data = datasets.Dataset.from_dict(columns)
    trainer = train(tmp_path, loss, model, data, SentenceTransformerTrainer, max_steps=1)
    anchor, positive, *negatives = embed(own, *columns.values())
    # Scores of each anchor with the eight positives, and with the eight negatives of either column.
    default_scale, diagonal = 20.0, torch.arange(8)
    scores = default_scale * anchor @ positive.T
    scores_of_negatives = [default_scale * anchor @ negative.T for negative in negatives]
    if in_batch_negatives:
        of_lists = F.cross_entropy(torch.cat([scores, *scores_of_negatives], dim=1), diagonal)
    else:  # the anchor's own positive, which comes first, and its two negatives
        own_scores = torch.stack([each.diagonal() for each in (scores, *scores_of_negatives)], dim=1)
        of_lists = F.cross_entropy(own_scores, torch.zeros(8, dtype=torch.int64))
    clip = (F.cross_entropy(scores, diagonal) + F.cross_entropy(scores.T, diagonal)) / 2
    expected = clip + 0.5 * of_lists
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    step(own, expected)
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-4, atol=1e-5)


def triplets(model: Any) -> RankedListsLoss:
    """Lists of a positive, a negative and those of the batch, as MultipleNegativesRankingLoss has them."""
    return RankedListsLoss(model, RankedLists(in_batch_negatives=True))


@pytest.mark.parametrize("dimensions", [None, [16, 4]], ids=["layers", "layers and dimensions"])
def test_losses_of_layers_take_lists(dimensions: list[int] | None) -> None:
    values, gradients = [], []
    for make in (triplets, MultipleNegativesRankingLoss):
        model = tiny_model().double()
        loss = loss_of_layers(model, make(model), dimensions)
        value = loss([model.preprocess(texts(seed=seed, number=4)) for seed in (1, 2, 3)], None)
        value.backward()
        values.append(value.detach())
        gradients.append(gradient(model))
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss_class", [RankedListsLoss, ContrastiveLoss])
@pytest.mark.parametrize("dimensions", [None, [16, 4]], ids=["layers", "layers and dimensions"])
def test_losses_of_layers_refuse_mini_batches(dimensions: list[int] | None, loss_class: Any) -> None:
    model = tiny_model().double()
    columns = [model.preprocess(texts(seed=seed, number=4)) for seed in (1, 2)]
    loss = loss_of_layers(model, loss_class(model, mini_batch_size=2), dimensions)
    with pytest.raises(ValueError, match=r"^mini_batch_size .*AdaptiveLayerLoss.*2"):
        loss(columns, None)


@pytest.mark.parametrize(
    "matryoshka_weights", [None, [1, 0.25]], ids=["all dimensions", "and the first four"]
)
def test_mini_batches_have_the_value_and_gradient_of_the_batch(
    matryoshka_weights: list[float] | None,
) -> None:
    """A list has 16 candidates, as many as the embedding has dimensions.

    MatryoshkaLoss cuts labels of this width, as if they were embeddings. It has to leave those whole that
    the collator makes.
    """
    data = [
        {"query": q, "candidates": texts(seed=3, number=16), "label": list(range(16))}
        for q in texts(seed=1, number=3)
    ]

    def value_and_gradient(mini_batch_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        model = tiny_model().double()
        criterion = RankedLists(in_batch_negatives=True)
        loss: Any = RankedListsLoss(model, criterion, mini_batch_size=mini_batch_size)
        if matryoshka_weights:
            loss = MatryoshkaLoss(model, loss, [16, 4], matryoshka_weights)
        batch = RankedListsCollator(model.preprocess)(data)
        features, labels = SentenceTransformerTrainer.collect_features(None, batch)
        value = loss(features, labels)
        (0.37 * value).backward()  # an upstream gradient that is not 1
        return value.detach(), gradient(model)

    expected_value, expected_gradient = value_and_gradient(None)
    assert expected_gradient.norm() > 0.01
    for mini_batch_size in (2, 100):  # of texts, of which a batch has less than 100
        value, of_weights = value_and_gradient(mini_batch_size)
        torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(of_weights, expected_gradient, rtol=1e-8, atol=1e-10)


def test_a_candidate_of_several_lists_is_one_row_of_a_batch() -> None:
    batch = RankedListsCollator(tiny_model().preprocess)(list(lists()))
    distinct = {candidate for row in lists() for candidate in row["candidates"]}
    assert len(batch["candidates_input_ids"]) == len(distinct)
    assert len(batch["query_input_ids"]) == 8


def test_a_batch_of_lists_has_their_candidates_and_grades() -> None:
    """In one column of integers, which no engine rounds: places in the pool, and the bits of the grades."""
    batch = RankedListsCollator(tiny_model().preprocess)(list(lists()))
    index, grade_bits = batch["label"].unbind(-1)
    grades = grade_bits.contiguous().view(torch.float64)
    pool = list(dict.fromkeys(candidate for row in lists() for candidate in row["candidates"]))
    for row, of_row, grades_of_row in zip(lists(), index, grades, strict=True):
        is_candidate = of_row >= 0
        assert [pool[place] for place in of_row[is_candidate].tolist()] == row["candidates"]
        assert grades_of_row[is_candidate].tolist() == row["label"]


ROW = {"query": "a", "candidates": ["b", "c"], "label": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        pytest.param([{"query": "a", "label": [1]}], "must have .* got query, label$", id="no candidates"),
        pytest.param(
            [{"query": "a", "candidates": ["b"]}], "must have .*; got query, candidates$", id="no label"
        ),
        pytest.param([{**ROW, "candidates": "bc"}], "^candidates .*row 0 .*'a'", id="one text, no list"),
        pytest.param([ROW, ROW], "query .*row 0 .*row 1.*NO_DUPLICATES", id="a query twice"),
    ],
)
def test_bad_lists_are_refused_with_the_row(rows: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RankedListsCollator(tiny_model().preprocess)(rows)


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        pytest.param(
            2, None, "need columns of candidates and a label", id="one candidate without a negative"
        ),
        pytest.param(3, torch.zeros(3, 3), "^labels .*2 .*3, 3", id="three grades of two candidates"),
        pytest.param(
            17,
            torch.zeros(3, 16)[:, :4],  # as MatryoshkaLoss cuts what is as wide as the embedding
            "^labels .*MatryoshkaLoss .*4 of 16.*RankedListsTrainer",
            id="cut by MatryoshkaLoss",
        ),
    ],
)
def test_labels_that_do_not_fit_the_columns_are_refused(columns: int, labels: Any, message: str) -> None:
    """The columns are a query and its candidates; the labels [3, candidates] are their grades."""
    model = tiny_model()
    features = [model.preprocess(texts(seed=seed, number=3)) for seed in range(columns)]
    with pytest.raises(ValueError, match=message):
        RankedListsLoss(model)(features, labels)


def test_a_scale_of_0_is_refused() -> None:
    model = tiny_model()
    features = [model.preprocess(texts(seed=seed, number=3)) for seed in range(3)]
    with pytest.raises(ValueError, match=r"^scale .*0"):
        RankedListsLoss(model, scale=0.0)(features, None)


def test_a_loss_of_lists_gives_the_model_card_its_options_and_its_paper() -> None:
    loss = RankedListsLoss(tiny_model(), RankedLists(model="top_one"), mini_batch_size=4)
    assert "model='top_one'" in loss.get_config_dict()["criterion"]
    assert "Listwise Approach" in loss.citation


def test_a_loss_of_pairs_gives_the_model_card_its_options_and_its_paper() -> None:
    loss = ContrastiveLoss(tiny_model(), "rankclip", {"top_k": 3})
    assert loss.get_config_dict()["options"]["rankclip"]["top_k"] == 3
    assert "RankCLIP" in loss.citation
