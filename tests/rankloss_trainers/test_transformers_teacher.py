"""A teacher's features as columns of the data, in Hugging Face's Trainer: where they are used, and looked at.

That they are ranked by is one of the steps in ``test_transformers.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from cka_clip import CkaLoss
from taught import folder
from tiny_transformers import Pairs, clip, column, train, trainer, weights

from rankloss_features import bind

TEACHER = ("image", "text")


def taught(rows: slice, value: float, name: str = "reference_text_features") -> Pairs:
    """Pairs with a teacher of both modalities, in which some rows of one of them are of one number."""
    pairs = Pairs(32, *TEACHER)
    pairs.columns[name][rows] = value
    return pairs


def renamed(old: str, new: str) -> Pairs:
    pairs = Pairs(32, *TEACHER)
    pairs.columns[new] = pairs.columns.pop(old)
    return pairs


def bound_pairs(*more: str) -> Pairs:
    pairs = Pairs(32, *more)
    pairs.columns["reference_pair"] = torch.zeros(32, 2, dtype=torch.int64)
    return pairs


@pytest.mark.parametrize(
    ("name", "rows", "value", "message"),
    [
        ("reference_image_features", slice(3, 4), math.nan, "row 3"),
        ("reference_text_features", slice(None), 0.4, "one row"),
    ],
)
def test_features_that_no_teacher_gives_are_an_error_before_a_weight_changes(
    tmp_path: Path, name: str, rows: slice, value: float, message: str
) -> None:
    trained = trainer(tmp_path, pairs=taught(rows, value, name), max_steps=3)
    with pytest.raises(ValueError, match=rf"{name}\b.*\b{message}\b"):
        trained.train()
    assert torch.equal(weights(trained.model), weights(clip()))


def test_they_are_looked_at_in_workers_and_not_in_evaluation(tmp_path: Path) -> None:
    bad = taught(slice(3, 4), math.nan)
    trained = train(tmp_path, pairs=Pairs(32, *TEACHER), max_steps=1, dataloader_num_workers=1)
    assert trained.evaluate(bad)["eval_loss"] == trained.evaluate(Pairs())["eval_loss"]
    with pytest.raises(ValueError, match="reference_text_features"):
        next(iter(trainer(tmp_path, pairs=bad, dataloader_num_workers=1).get_train_dataloader()))


@pytest.mark.parametrize(
    ("pairs", "given", "message"),
    [
        (Pairs(), {"loss": "rankclip-distill"}, "reference_image_features .*have pixel_values, input_ids"),
        (
            renamed("reference_image_features", "reference_img_features"),
            {"loss": "rankclip-distill", "loss_options": {"lambda_cross": 0.0}},
            "have .*reference_text_features, .*reference_img_features",
        ),
        (Pairs(), {"loss": "rankclip-distill"}, r"or loss_options \{'reference_features': FOLDER\}"),
        (Pairs(32, "image"), {}, "got reference_image_features alone"),
        (Pairs(32, "text"), {"loss": "clip-streamed"}, "reference_text_features, but clip-streamed"),
        (
            Pairs(32, *TEACHER),
            {"loss_options": {"reference": "own"}},
            "reference_text_features, but rankclip",
        ),
        (Pairs(), {"loss": CkaLoss()}, "CkaLoss needs a teacher's features"),
        # Two sources that contradict each other.
        (bound_pairs(), {}, "have reference_pair, of a folder that no option reference_features names"),
        (bound_pairs(), {"loss": "clip-streamed"}, "reference_pair"),
    ],
)
def test_columns_that_are_missing_or_of_no_use_are_an_error(
    tmp_path: Path, pairs: Pairs, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, pairs=pairs, **{"loss": "rankclip", **given})


def test_two_teachers_are_an_error(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({name: [f"{name} {i}" for i in range(32)] for name in TEACHER})
    features = {f"{side}_features": Pairs(32, side).columns[f"reference_{side}_features"] for side in TEACHER}
    path = folder(tmp_path / "x", table, features, *TEACHER)
    options = {"reference_features": path}
    with pytest.raises(ValueError, match=f"reference_features: {path} excludes reference own"):
        trainer(tmp_path, loss="rankclip", loss_options={**options, "reference": "own"})
    message = f"reference_features '{path}' and reference_image_features, .* are two teachers"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, pairs=bound_pairs(*TEACHER), loss="rankclip", loss_options=options)
    with pytest.raises(ValueError, match=r"reference_features: .* is no folder"):
        trainer(tmp_path, loss="rankclip", loss_options={"reference_features": str(tmp_path)})


def test_folder_of_one_modality_ranks_within_both(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({name: [f"{name} {i}" for i in range(32)] for name in TEACHER})
    data = Pairs(32, "text")
    taught = {"text_features": data.columns.pop("reference_text_features")}
    path = folder(tmp_path / "x", table, taught, *TEACHER)
    rows = datasets.Dataset.from_dict({name: x.tolist() for name, x in data.columns.items()}).with_format(
        "torch"
    )
    bound = datasets.concatenate_datasets(
        [bind(table, path, caption_column="text").with_format("torch"), rows], axis=1
    )
    options = {"lambda_cross": 0.0, "schedule": "constant", "reference_features": path}
    trained = [
        train(tmp_path, pairs=pairs, loss="rankclip-distill", loss_options=given, max_steps=2)
        for pairs, given in (
            (bound, options),
            (Pairs(32, "text"), {**options, "reference_features": None}),
        )
    ]
    assert torch.equal(*(weights(run.model) for run in trained))


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_module_with_a_teacher_of_its_own_is_trained_with_it(
    tmp_path: Path, mini_batch_size: int | None
) -> None:
    trained = train(
        tmp_path, pairs=Pairs(32, *TEACHER), loss=CkaLoss(), max_steps=3, mini_batch_size=mini_batch_size
    )
    first, *_, last = column(trained, "cka_loss")
    assert last < first
