"""A teacher's features as columns of the data, in Hugging Face's Trainer: where they are used, and looked at.

That they are ranked by is one of the steps in ``test_transformers.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import Pairs, build, clip, train, trainer, weights

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
        (Pairs(), {"loss": "rankclip-distill"}, "reference_image_features .*pixel_values, input_ids"),
        (
            renamed("reference_image_features", "reference_img_features"),
            {"loss": "rankclip-distill", "loss_options": {"lambda_cross": 0.0}},
            "have reference_text_features, .*reference_img_features",
        ),
        (Pairs(32, "image"), {}, "got reference_image_features alone"),
        (Pairs(32, "text"), {"loss": "clip-streamed"}, "reference_text_features, but clip-streamed"),
        (
            Pairs(32, *TEACHER),
            {"loss_options": {"reference": "own"}},
            "reference_text_features, but rankclip",
        ),
    ],
)
def test_columns_that_are_missing_or_of_no_use_are_an_error(
    tmp_path: Path, pairs: Pairs, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, pairs=pairs, **{"loss": "rankclip", **given})


def test_log_says_by_what_is_ranked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rankloss_trainers")
    options = {"schedule": "linear", "lambda_cross": 0.0}
    train(tmp_path, model=build("Siglip"), pairs=Pairs(32, "text"), loss="rankclip", loss_options=options)
    said = [record.getMessage() for record in caplog.records if "uses a teacher" in record.getMessage()]
    assert said == ["rankclip uses a teacher: reference_text_features"]
