"""Lists of graded candidates in transformers' Trainer: pictures, texts, and weights against an own loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from PIL import Image
from tiny_pairs import tiny_clip
from tiny_transformers import (
    LOG_ROUNDING,
    SGD,
    PictureProcessor,
    build_trainer,
    graded_table,
    logged_lines,
    logged_values,
    train,
    weights,
)
from torch import Tensor, nn

import rankloss
from rankloss import metrics
from rankloss_trainers.cached import Split
from rankloss_trainers.catalog import choose
from rankloss_trainers.host import read_losses
from rankloss_trainers.runtime import Runtime
from rankloss_trainers.transformers.graded_lists import (
    METRICS,
    EmbeddingPlan,
    RankedListsCollator,
    check_lists_fit,
    check_table,
)
from rankloss_trainers.transformers.host import HOST

LISTS, RATE = {"loss": "ranked-lists"}, 0.1


def watched() -> Any:
    """The model, which lists the numbers of pictures and texts that its calls embed, as ``seen``."""
    model = tiny_clip()
    model.seen = []
    forward = model.forward

    @functools.wraps(forward)
    def watched_forward(pixel_values: Tensor, input_ids: Tensor, **more: Any) -> Any:
        model.seen.append((len(pixel_values), len(input_ids)))
        return forward(pixel_values=pixel_values, input_ids=input_ids, **more)

    model.forward = watched_forward
    return model


# --- an own loop --------------------------------------------------------------------------------------------


def embed(model: Any, items: list[Any]) -> Tensor:
    """Embeddings of texts, or of pictures, beside one of the other kind, which the model asks for."""
    features: Tensor
    if isinstance(items[0], str):
        inputs = PictureProcessor().tokenizer(items)["input_ids"]
        features = model(input_ids=inputs, pixel_values=torch.zeros(1, 3, 16, 16)).text_embeds
    else:
        inputs = PictureProcessor().image_processor(items)
        features = model(input_ids=torch.full((1, 8), 49), **inputs).image_embeds
    return features


def content(item: Any) -> Any:
    """A text itself, or a picture's bytes: equal for equal items."""
    return item if isinstance(item, str) else item.tobytes()


def lists_of(model: Any, rows: list[Any], owns: Sequence[Any] = ()) -> dict[str, Any]:
    """The lists of these rows, as the loss takes them; owns are no negatives of their queries."""
    pool = {content(item): item for row in rows for item in row["candidates"]}
    places = {of_item: place for place, of_item in enumerate(pool)}
    index = [torch.tensor([places[content(item)] for item in row["candidates"]]) for row in rows]
    grades = [torch.tensor(row["grades"], dtype=torch.float64) for row in rows]
    padded = nn.utils.rnn.pad_sequence(index, batch_first=True, padding_value=-1)
    inputs = {
        "query_features": embed(model, [row["query"] for row in rows]),
        "candidate_features": embed(model, [*pool.values()]),
        "candidate_index": padded,
        "mask": padded >= 0,
        "grades": nn.utils.rnn.pad_sequence(grades, batch_first=True),
        "logit_scale": model.logit_scale.exp(),
    }
    if owns:
        inputs["candidate_ids"] = torch.arange(len(pool))
        # −1 is the id of no candidate, of an own one that is in no list.
        inputs["excluded_ids"] = torch.tensor([places.get(content(own), -1) for own in owns])
    return inputs


def trained(rows: list[Any], micro_batches: int, steps: int, **options: Any) -> Tensor:
    """The weights after equal steps on all rows, whose losses are averaged over micro-batches."""
    model, loss = tiny_clip(), rankloss.RankedLists(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    size = len(rows) // micro_batches
    for _ in range(steps):
        optimizer.zero_grad()
        for start in range(0, len(rows), size):
            value = loss(**lists_of(model, rows[start : start + size]))
            (value / micro_batches).backward()
        optimizer.step()
    return weights(model)


def run(directory: Path, data: Any, **given: Any) -> Any:
    """Train on lists by SGD, by default with ``ranked-lists`` on the tiny model; returns the trainer."""
    options = {
        **LISTS,
        **SGD,
        "learning_rate": RATE,
        "processing_class": PictureProcessor(),
        "model": tiny_clip(),
    }
    return train(directory, pairs=data, **{**options, **given})


@pytest.mark.parametrize(
    ("options", "of_texts", "size", "micro_batches"),
    [
        pytest.param({}, False, None, 1, id="texts of pictures"),
        pytest.param({}, True, 3, 2, id="pictures of texts, in mini-batches, accumulated"),
        pytest.param({"model": "pairwise"}, True, None, 1, id="pairwise"),
        pytest.param({"in_batch_negatives": True}, False, 3, 1, id="in-batch negatives, in mini-batches"),
    ],
)
def test_weights_are_those_of_an_own_loop(
    tmp_path: Path, options: dict[str, Any], of_texts: bool, size: int | None, micro_batches: int
) -> None:
    """Each of three steps is of all eight lists, in one micro-batch or in several."""
    data = graded_table(queries_are_texts=of_texts)
    expected = trained(list(data), micro_batches, steps=3, **options)
    ended = run(
        tmp_path,
        data,
        loss_options=options,
        mini_batch_size=size,
        max_steps=3,
        per_device_train_batch_size=8 // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    torch.testing.assert_close(weights(ended.model), expected, rtol=1e-4, atol=1e-5)
    assert (expected - weights(tiny_clip())).abs().median() > 1e-3, "far above the tolerance"
    assert logged_values(ended, "ranked_lists_loss") == pytest.approx(
        logged_values(ended, "loss"), rel=1e-5, abs=LOG_ROUNDING
    )


def test_ranks_are_grades_the_other_way_round(tmp_path: Path) -> None:
    ranks = [[-g for g in row] for row in graded_table(queries_are_texts=True)["grades"]]
    of_grades = run(tmp_path, graded_table(queries_are_texts=True), max_steps=2)
    of_ranks = run(tmp_path, graded_table(queries_are_texts=True, grades=None, ranks=ranks), max_steps=2)
    assert torch.equal(weights(of_ranks.model), weights(of_grades.model))


def test_equal_queries_and_pictures_are_embedded_once_and_in_mini_batches(tmp_path: Path) -> None:
    data = graded_table(queries_are_texts=True)
    twice = datasets.concatenate_datasets([data, data])
    queries, pictures = {*data["query"]}, {x.tobytes() for row in data for x in row["candidates"]}
    whole = {"max_steps": 1, "per_device_train_batch_size": len(twice)}  # one batch, of either table
    once, repeated, one_by_one = (
        run(tmp_path, rows, model=watched(), mini_batch_size=size, **whole).model
        for rows, size in ((data, None), (twice, None), (data, 1))
    )
    assert once.seen == repeated.seen == [(len(pictures), len(queries))]
    torch.testing.assert_close(weights(repeated), weights(once))
    assert {rows for call in one_by_one.seen for rows in call} == {1}


PLANS_AND_SIZES = [
    (plan, size)
    for few in (1, 2, 5, 9)
    for plan in (EmbeddingPlan(queries=few, others=9), EmbeddingPlan(queries=9, others=few))
    for size in (1, 2, 4, 9, 20)
]
"""Plans of nine rows of one kind and as many or fewer of the other, and the size of their mini-batches."""


def split_columns(plan: EmbeddingPlan, size: int) -> tuple[Split, dict[str, Tensor], dict[str, Tensor]]:
    """The split of a plan; a column of each kind, with the numbers of its rows; both as repeated for it."""
    split = plan.split(size)
    assert split is not None
    columns = {"queries": torch.arange(plan.queries), "others": torch.arange(plan.others)}
    return split, columns, plan.repeated(columns, split)


@pytest.mark.parametrize(("plan", "size"), PLANS_AND_SIZES)
def test_every_mini_batch_has_rows_of_both_kinds_and_no_more_than_its_size(
    plan: EmbeddingPlan, size: int
) -> None:
    split, _columns, repeated = split_columns(plan, size)
    for column in repeated.values():
        shares = [len(share) for share in column.tensor_split(split.number)]  # as each column is split
        assert 1 <= min(shares) <= max(shares) <= size


@pytest.mark.parametrize(("plan", "size"), PLANS_AND_SIZES)
def test_repeated_rows_follow_the_distinct_ones_in_numbers_that_the_split_allows(
    plan: EmbeddingPlan, size: int
) -> None:
    """The distinct rows stay where they are, so that the index of a candidate still leads to its row."""
    split, columns, repeated = split_columns(plan, size)
    for name, distinct in columns.items():
        assert torch.equal(repeated[name][: len(distinct)], distinct)
        assert len(repeated[name]) in split.rows


def test_rows_that_are_fewer_than_the_mini_batches_are_repeated_from_the_first() -> None:
    plan, split = EmbeddingPlan(queries=2, others=9), Split(number=3, rows=(9, 3))
    assert plan.repeated({"few": torch.tensor([7, 8])}, split)["few"].tolist() == [7, 8, 7]


def with_a_bias() -> Any:
    """The model with a bias, whose gradients it lists as ``bias_gradients``."""
    model = tiny_clip()
    model.logit_bias = nn.Parameter(torch.tensor(-2.0))
    model.bias_gradients = []
    model.logit_bias.register_hook(model.bias_gradients.append)
    return model


def test_a_model_with_a_bias_trains_as_one_without_and_the_bias_stays(tmp_path: Path) -> None:
    """A loss of lists has no bias."""
    model = with_a_bias()
    run(tmp_path, graded_table(queries_are_texts=True), max_steps=1, model=model)
    without_bias = run(tmp_path, graded_table(queries_are_texts=True), max_steps=1).model
    trained_weights = dict(model.named_parameters())
    assert all(torch.equal(x, trained_weights[name]) for name, x in without_bias.named_parameters())
    assert model.bias_gradients == [0.0]  # one, of zero: DDP waits for a gradient of every parameter
    assert model.logit_bias.item() == -2.0


def test_a_module_trains_as_the_loss_of_its_name(tmp_path: Path) -> None:
    rows = graded_table(queries_are_texts=True)
    model = run(tmp_path, rows, max_steps=1, loss=rankloss.RankedLists()).model
    by_name = dict(run(tmp_path, rows, max_steps=1).model.named_parameters())
    assert all(torch.equal(x, by_name[name]) for name, x in model.named_parameters())


def test_texts_are_padded_for_a_model_with_a_bias_as_siglip_was_trained(tmp_path: Path) -> None:
    built = build_trainer(
        tmp_path,
        model=with_a_bias(),
        pairs=graded_table(queries_are_texts=True),
        processing_class=PictureProcessor(),
        **LISTS,
    )
    assert built.data_collator.padding == "max_length"


def own_of(data: Any) -> list[Any]:
    """For each query a candidate as its own: every second query's is of its list, the others' of another."""
    lists = data["candidates"]
    return [lists[n][0] if n % 2 else lists[(n + 3) % len(lists)][-1] for n in range(len(lists))]


PICTURE = Image.new("RGB", (16, 16), "red")
BESIDE_PAIRS: dict[str, Any] = {
    "loss": "rankclip+ranked-lists",
    "loss_options": {
        "rankclip": {"schedule": "constant", "lambda_in": 16.0},
        "ranked-lists": {"weight": 0.5, "in_batch_negatives": True},
    },
}


class OwnValues(NamedTuple):
    """Lists with own candidates, and the values of their losses by a plain call on a model of one's own.

    The own candidates are no negatives of their queries, also where another list has them.
    """

    data: Any
    model: Any
    pairs: tuple[Tensor, Tensor, Tensor]
    of_lists: Tensor


def beside_pairs(of_texts: bool) -> OwnValues:
    """Lists of texts, or of pictures, whose own candidates but one are in lists."""
    in_no_list = PICTURE if of_texts else "40"
    _, *in_lists = own_of(graded_table(queries_are_texts=of_texts))
    owns = [in_no_list, *in_lists]
    data, model = graded_table(queries_are_texts=of_texts, own=owns), tiny_clip()
    rows = list(data)
    contents_of_lists = {content(item) for row in rows for item in row["candidates"]}
    assert contents_of_lists & {*map(content, owns)}, "some are candidates"
    queries, own_features = embed(model, [row["query"] for row in rows]), embed(model, owns)
    images, texts = (own_features, queries) if of_texts else (queries, own_features)
    lists = rankloss.RankedLists(in_batch_negatives=True)(**lists_of(model, rows, owns))
    pairs = images, texts, model.logit_scale.exp()
    weight = BESIDE_PAIRS["loss_options"]["ranked-lists"]["weight"]
    return OwnValues(data, model, pairs, of_lists=weight * lists)


@pytest.mark.parametrize(("of_texts", "size"), [(False, None), (False, 3), (True, None)])
def test_a_loss_of_pairs_trains_beside_the_lists(tmp_path: Path, of_texts: bool, size: int | None) -> None:
    own = beside_pairs(of_texts)
    total = rankloss.RankClipLoss(schedule="constant", lambda_in=16.0)(*own.pairs) + own.of_lists
    total.backward()
    ended = run(tmp_path, own.data, max_steps=1, mini_batch_size=size, **BESIDE_PAIRS)
    for (name, actual), start in zip(ended.model.named_parameters(), own.model.parameters(), strict=True):
        expected = start.detach() - RATE * start.grad
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-4, atol=1e-5, msg=name)
    assert logged_lines(ended)[0]["loss"] == pytest.approx(total.item(), rel=1e-4)


@pytest.mark.parametrize(("of_texts", "size"), [(False, None), (False, 3), (True, None)])
def test_an_evaluation_is_of_the_base_and_the_lists_without_ranks(
    tmp_path: Path, of_texts: bool, size: int | None
) -> None:
    own = beside_pairs(of_texts)
    expected = rankloss.ClipLoss()(*own.pairs) + own.of_lists
    given = {"processing_class": PictureProcessor(), "mini_batch_size": size, **BESIDE_PAIRS}
    untrained = build_trainer(tmp_path, model=tiny_clip(), pairs=own.data, **given)
    assert untrained.evaluate(own.data)["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


# --- evaluation -------------------------------------------------------------------------------------------


def test_an_evaluation_has_the_mean_loss_and_the_mean_metrics_of_its_lists(tmp_path: Path) -> None:
    # Seven: with eight the means of τ-b and τ-c are equal, and a swap would pass.
    data = graded_table(queries_are_texts=True, number=7)
    given = {
        "model": tiny_clip(),
        "processing_class": PictureProcessor(),
        "per_device_eval_batch_size": 3,
        **LISTS,
    }
    evaluated = build_trainer(tmp_path, pairs=data, **given).evaluate(data)
    model, rows = tiny_clip(), list(data)
    sums = [
        rankloss.RankedLists()(**lists_of(model, batch)).item() * len(batch)
        for batch in (rows[:3], rows[3:6], rows[6:])
    ]
    assert evaluated["eval_loss"] == pytest.approx(sum(sums) / len(rows), rel=1e-4)
    metrics_of_a_list: dict[str, Any] = {
        "ndcg": metrics.ndcg,
        "reciprocal_rank": metrics.reciprocal_rank,
        "pairwise_accuracy": metrics.pairwise_accuracy,
        "kendall_tau_b": metrics.kendall_tau,
        "kendall_tau_c": functools.partial(metrics.kendall_tau, variant="c"),
    }
    for name, metric in metrics_of_a_list.items():
        values = []
        for row in rows:
            scores = (embed(model, [row["query"]]) * embed(model, row["candidates"])).sum(-1)
            values.append(metric(scores, torch.tensor(row["grades"])))
        expected = torch.stack(values).nanmean().item()  # a list without an order may have none
        assert evaluated[f"eval_{name}"] == pytest.approx(expected), name


def evaluated(directory: Path, model: Any, data: Any) -> Any:
    """The metrics of a table of lists."""
    return build_trainer(
        directory, model=model, pairs=data, processing_class=PictureProcessor(), **LISTS
    ).evaluate(data)


def test_a_metric_that_no_list_defines_is_left_out(tmp_path: Path) -> None:
    """Of a single candidate there is no order to agree with."""
    values = evaluated(tmp_path, tiny_clip(), graded_table(queries_are_texts=True, number=1))
    assert values.keys() & {f"eval_{name}" for name in METRICS} == {"eval_ndcg", "eval_reciprocal_rank"}


def test_every_metric_is_nan_where_the_features_of_a_list_are(tmp_path: Path) -> None:
    """As after a training that has diverged: a mean of the other lists would hide it."""
    model = tiny_clip()
    query = PictureProcessor().tokenizer(["0"])["input_ids"][0, 0]
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[query] = math.nan
    values = evaluated(tmp_path, model, graded_table(queries_are_texts=True))
    assert all(math.isnan(values[f"eval_{name}"]) for name in METRICS)


def test_an_attribute_base_that_is_no_loss_makes_no_loss_of_pairs() -> None:
    loss = rankloss.RankedLists()
    loss.base = 2.0
    check_lists_fit(Runtime(HOST, read_losses(loss, None)), "grades", has_pairs=False)


# --- bad input --------------------------------------------------------------------------------------------

ROW = {"query": "7", "candidates": [PICTURE], "grades": [1.0]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grades": []}, r"0 grades.*row 1.*'8'"),
        ({"candidates": ["7"]}, "^candidates .*pictures.*row 1"),
        ({"query": PICTURE, "candidates": ["7"]}, "^candidates .*pictures.*row 1"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RankedListsCollator(PictureProcessor())([ROW, {**ROW, "query": "8", **change}])


def test_a_table_without_any_order_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for grades, number_of_warnings in (([1.0, 1.0], 1), ([1.0, 0.0], 0)):
        caplog.clear()
        rows = datasets.Dataset.from_list([{**ROW, "candidates": [PICTURE] * 2, "grades": grades}, ROW])
        with caplog.at_level("WARNING", "rankloss_trainers"):
            check_table(Runtime(HOST, choose("ranked-lists")), rows)
        assert len(caplog.records) == number_of_warnings


def test_a_query_twice_is_refused_where_its_candidates_would_be_negatives(tmp_path: Path) -> None:
    twice = datasets.concatenate_datasets(
        [graded_table(queries_are_texts=True), graded_table(queries_are_texts=True).select([0])]
    )
    given = {"loss_options": {"in_batch_negatives": True}, "per_device_train_batch_size": 9}
    with pytest.raises(ValueError, match=r"query .*row 0 .*row 8"):
        run(tmp_path, twice, **given)


def test_a_query_twice_is_taken_where_no_candidates_are_negatives() -> None:
    assert len(RankedListsCollator(PictureProcessor())([ROW, ROW])["grade_bits"]) == 2


ONE_TEXT_EACH = {"candidates": [["7"]] * 8}
EXCLUDED = {"loss_options": {"base_loss": "exclude"}}


@pytest.mark.parametrize(
    ("more", "given", "error", "named"),
    [
        ({"grades": [[1.0]] * 7 + [[math.nan]], **ONE_TEXT_EACH}, {}, ValueError, "^grades .*nan in row 7"),
        ({"grades": None}, {}, ValueError, "need the columns .*; got query, candidates$"),
        ({"ranks": [[1]] * 8}, {}, ValueError, "need the columns .*; got query, candidates, grades, ranks$"),
        ({"own": ["7"] * 8}, EXCLUDED, ValueError, "have own, of pairs that ranked-lists does not train"),
        ({}, {"loss_options": {"own_caption": "top"}}, ValueError, "own_caption: is for open_clip"),
        ({}, {"loss_options": {"base_loss": "include"}}, ValueError, "^ranked-lists needs .* column own"),
        ({}, {"loss": "rankclip+ranked-lists"}, ValueError, r"^rankclip\+ranked-lists needs .* column own"),
        ({}, {"data_collator": lambda _: {"input_ids": torch.ones(2)}}, KeyError, "candidate_index"),
        ({}, {"loss": "rankclip"}, ValueError, "No columns in the dataset match"),  # of the Trainer
        ({}, {"processing_class": None}, TypeError, "tokenizer .*NoneType"),
    ],
)
def test_what_cannot_train_is_refused_before_the_model_is_called(
    tmp_path: Path, more: Any, given: Any, error: type[Exception], named: str
) -> None:
    model = watched()
    with pytest.raises(error, match=named):
        run(
            tmp_path,
            graded_table(queries_are_texts=False, **more),
            model=model,
            per_device_train_batch_size=2,
            **given,
        )
    assert model.seen == []


@pytest.mark.parametrize(
    "options", [{"model": "top_one"}, {"model": "pairwise", "pair_weight": "difference"}]
)
def test_ranks_are_no_values(tmp_path: Path, options: dict[str, Any]) -> None:
    ranks = [[-g for g in row] for row in graded_table(queries_are_texts=True)["grades"]]
    data = graded_table(queries_are_texts=True, grades=None, ranks=ranks)
    for given in (data, data.to_iterable_dataset()):  # before training, and in the first batch
        more = {"max_steps": 1, "accelerator_config": {"dispatch_batches": False}}
        with pytest.raises(ValueError, match=r"^ranks .*ranked-lists"):
            run(tmp_path, given, loss_options=options, **more)


def test_a_loader_that_slices_batches_is_refused(tmp_path: Path) -> None:
    """As accelerate makes it for a stream by default, one process reads and slices the batches of all."""
    with pytest.raises(ValueError, match="dispatch_batches"):
        run(tmp_path, graded_table(queries_are_texts=True).to_iterable_dataset(), max_steps=1)
