"""Recall in evaluations of Hugging Face's Trainer: over batches and processes, by ids, with its limits."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import PartialState
from tiny_pairs import Pairs, tiny_clip
from tiny_transformers import InOrder, arguments

from process_pool import Pools
from rankloss import InputWarning, metrics
from rankloss_trainers.transformers.retrieval import Retrieval

NUMBER = 13  # which neither batches nor processes divide
GROUPS = [n % 5 for n in range(NUMBER)]


class Grouped(Pairs):
    """Pairs with a column of ids."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "group": torch.tensor(GROUPS[i])}


def recall_of_all(**ids: Any) -> dict[str, float]:
    """Recall of the pairs, whose embeddings one call of the model has."""
    inputs = Pairs(NUMBER).batch()
    with torch.no_grad():
        output = tiny_clip().eval()(**inputs)
    values = metrics.recall(output.image_embeds, output.text_embeds, **ids)
    return {f"eval_{name}": value.item() for name, value in values.items()}


def evaluated(folder: Path, pairs: Any, **given: Any) -> dict[str, float]:
    """Recall as the Trainer evaluates it, in batches of four."""
    loss, options = given.pop("loss", "rankclip"), given.pop("loss_options", None)
    args = arguments(folder, per_device_eval_batch_size=4, remove_unused_columns=False, **given)
    trainer = InOrder(
        tiny_clip(), args, train_dataset=pairs, eval_dataset=pairs, loss=loss, loss_options=options
    )
    return {name: x for name, x in trainer.evaluate().items() if "_to_" in name}


BY_IDS = {"loss": "clip-ids", "loss_options": {"key": "group"}}


def test_an_evaluation_logs_recall_of_all_its_pairs_at_once(tmp_path: Path) -> None:
    values = evaluated(tmp_path, Pairs(NUMBER))
    assert values == pytest.approx(recall_of_all())
    assert {"eval_image_to_text_R@10", "eval_text_to_image_median_rank"} < set(values)
    assert len(values) == 2 * (3 + 1), "in both directions, R@1, R@5, R@10 and the median rank"


def test_an_evaluation_has_every_row_where_a_training_drops_the_last_batch(tmp_path: Path) -> None:
    assert evaluated(tmp_path, Pairs(NUMBER), dataloader_drop_last=True) == pytest.approx(recall_of_all())


def test_a_prediction_has_every_row_where_a_training_drops_the_last_batch(tmp_path: Path) -> None:
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)
    trainer = InOrder(tiny_clip(), args, train_dataset=Pairs(NUMBER), eval_dataset=Pairs(NUMBER))
    assert sum(len(batch["input_ids"]) for batch in trainer.get_train_dataloader()) == 8
    assert len(trainer.predict(Pairs(NUMBER)).predictions[0]) == NUMBER


def test_the_mean_of_both_directions_is_a_metric_of_its_own() -> None:
    """The second text is nearer to the first image than to its own."""
    retrieval = Retrieval([], processes=1)
    one_process: Any = SimpleNamespace(gather_for_metrics=lambda columns: columns)
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    retrieval.add(one_process, torch.eye(2), texts, inputs={}, processor=None)
    values = retrieval.measure()
    assert (values["image_to_text_R@1"], values["text_to_image_R@1"], values["mean_R@1"]) == (1, 0.5, 0.75)


CAPTIONS_OF_ONE = 4  # rows, of which the first two have one caption, too


def repeated(pairs: Pairs) -> Pairs:
    """The pairs, of which the first four have one picture, and the first two one caption."""
    pairs.columns["pixel_values"][:CAPTIONS_OF_ONE] = pairs.columns["pixel_values"][0].clone()
    pairs.columns["input_ids"][1] = pairs.columns["input_ids"][0]
    return pairs


def recall_of_distinct(ids: list[int]) -> dict[str, float]:
    """Recall of the distinct pictures and captions of :func:`repeated`, by these ids of its rows."""
    with torch.no_grad():
        output = tiny_clip().eval()(**repeated(Pairs(NUMBER)).batch())
    images, texts = [0, *range(CAPTIONS_OF_ONE, NUMBER)], [0, *range(2, NUMBER)]  # the first row of each
    by_ids = {"image_ids": [ids[row] for row in images], "text_ids": [ids[row] for row in texts]}
    values = metrics.recall(output.image_embeds[images], output.text_embeds[texts], **by_ids)
    return {f"eval_{name}": value.item() for name, value in values.items()}


def test_rows_of_one_picture_are_its_captions(tmp_path: Path) -> None:
    # The rows of the first picture have id 0, and the others one each.
    values = recall_of_distinct([max(0, row - CAPTIONS_OF_ONE + 1) for row in range(NUMBER)])
    across = {name: x for name, x in values.items() if "text_to_text" not in name}
    assert evaluated(tmp_path, repeated(Pairs(NUMBER))) == pytest.approx(across)


def test_a_picture_in_several_rows_is_no_answer_to_itself_by_ids(tmp_path: Path) -> None:
    pairs = repeated(Pairs(NUMBER))
    rows_of_id_0 = CAPTIONS_OF_ONE + 2  # those of the first picture, and two other pictures
    ids = [0] * rows_of_id_0 + [1] * (NUMBER - rows_of_id_0)
    pairs.columns["group"] = torch.tensor(ids)
    values = evaluated(tmp_path, pairs, **BY_IDS)
    assert values == pytest.approx(recall_of_distinct(ids))
    assert {"eval_image_to_image_R@1", "eval_text_to_text_R@1"} < set(values)


def test_without_ids_a_caption_finds_its_own_picture_alone_and_a_warning_says_so(tmp_path: Path) -> None:
    pairs = Pairs(NUMBER)
    pairs.columns["input_ids"][1] = pairs.columns["input_ids"][0]
    with torch.no_grad():
        output = tiny_clip().eval()(**pairs.batch())
    expected = metrics.recall(output.image_embeds, output.text_embeds)
    with pytest.warns(InputWarning, match="1 captions of the evaluation repeat that of another picture"):
        values = evaluated(tmp_path, pairs)
    assert values == pytest.approx({f"eval_{name}": value.item() for name, value in expected.items()})


def test_pairs_of_one_id_are_partners_in_an_evaluation(tmp_path: Path) -> None:
    values = evaluated(tmp_path, Grouped(NUMBER), **BY_IDS)
    assert values == pytest.approx(recall_of_all(image_ids=GROUPS, text_ids=GROUPS))
    assert {"eval_image_to_image_R@1", "eval_text_to_text_R@5"} < set(values)
    assert values["eval_image_to_text_R@5"] > recall_of_all()["eval_image_to_text_R@5"]


IDS_OF_CAPTIONS = [0, 0, *range(2, NUMBER)]  # the first two rows have one caption


@pytest.mark.parametrize(
    ("key", "ids", "rows_of_texts"),
    [
        pytest.param("group", GROUPS, [*range(NUMBER)], id="a caption of two groups is two texts"),
        pytest.param("captions", IDS_OF_CAPTIONS, [0, *range(2, NUMBER)], id="a caption is one text"),
    ],
)
def test_ids_may_be_texts_of_a_table_or_equal_captions(
    tmp_path: Path, key: str, ids: list[int], rows_of_texts: list[int]
) -> None:
    pairs = Pairs(NUMBER)
    pairs.columns["input_ids"][1] = pairs.columns["input_ids"][0]
    with torch.no_grad():
        output = tiny_clip().eval()(**pairs.batch())
    expected = metrics.recall(
        output.image_embeds,
        output.text_embeds[rows_of_texts],
        image_ids=ids,
        text_ids=[ids[row] for row in rows_of_texts],
    )
    columns = {name: x.tolist() for name, x in pairs.columns.items()}
    if key == "group":
        columns["group"] = [f"product {n}" for n in GROUPS]
    table = datasets.Dataset.from_dict(columns)
    values = evaluated(tmp_path, table, loss="clip-ids", loss_options={"key": key})
    assert values == pytest.approx({f"eval_{name}": x.item() for name, x in expected.items()})


def test_recall_can_choose_the_best_checkpoint(tmp_path: Path) -> None:
    choice = {"metric_for_best_model": "image_to_text_R@5", "greater_is_better": True}
    steps = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = arguments(tmp_path, **choice, **steps)
    trainer = InOrder(tiny_clip(), args, train_dataset=Pairs(16), eval_dataset=Pairs(NUMBER))
    trainer.train()
    logged = [x["eval_image_to_text_R@5"] for x in trainer.state.log_history if "eval_loss" in x]
    assert trainer.state.best_metric == max(logged)


def test_k_beyond_the_pairs_is_left_out(tmp_path: Path) -> None:
    values = evaluated(tmp_path, Pairs(6))
    assert "eval_image_to_text_R@5" in values
    assert "eval_image_to_text_R@10" not in values


def test_recall_of_a_pair_without_numbers_is_nan(tmp_path: Path) -> None:
    broken = Pairs(6)
    broken.columns["pixel_values"][3] = math.nan
    values = evaluated(tmp_path, broken)
    assert "eval_image_to_text_R@1" in values
    assert all(math.isnan(x) for x in values.values())


def evaluated_by_each(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Recall of the pairs, without ids and by them, in a process of several."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    return {
        "pairs": evaluated(folder / "pairs", Pairs(NUMBER)),
        "ids": evaluated(folder / "ids", Grouped(NUMBER), **BY_IDS),
        "processes": PartialState().num_processes,
    }


def test_two_processes_measure_each_pair_once(tmp_path: Path, pools: Pools) -> None:
    for of_process in pools[2].run(evaluated_by_each, tmp_path):
        assert of_process["processes"] == 2
        assert of_process["pairs"] == pytest.approx(recall_of_all())
        assert of_process["ids"] == pytest.approx(recall_of_all(image_ids=GROUPS, text_ids=GROUPS))
