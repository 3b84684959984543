"""The examples of the teachers' page train as printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not all(map(importlib.util.find_spec, ("transformers", "accelerate", "sentence_transformers"))):
    pytest.skip("a trainer is not installed", allow_module_level=True)

import tiny_sentences
import tiny_transformers
from taught import ROWS, features, folder
from tiny_transformers import Pairs, clip

from rankloss_trainers.sentence_transformers import ContrastiveLoss
from rankloss_trainers.transformers import ContrastiveTrainer


def pairs() -> Any:
    columns = {name: x.tolist() for name, x in Pairs(ROWS).columns.items()}
    names = {
        "image": [f"folder/{i}.png" for i in range(ROWS)],
        "caption": [f"caption {i}" for i in range(ROWS)],
    }
    return datasets.Dataset.from_dict({**names, **columns}).with_format("torch")


# --- the page ---------------------------------------------------------------------------------------------


PAGE = (Path(__file__).parents[2] / "docs/teachers.md").read_text()
HUGGING_FACE, BOUND_SENTENCES, PAIRS_OF_TEXTS, OWN_LOOP = re.findall(
    r"^```python\n((?!first, second).*?)^```$", PAGE, re.DOTALL | re.MULTILINE
)


def processor(images: list[str], text: list[str], **_: Any) -> dict[str, torch.Tensor]:
    """The stand-in of a processor: the columns of the pair that the name of a picture tells."""
    rows = [int(Path(image).stem) for image in images]
    assert text == [f"caption {row}" for row in rows]
    return {name: x[rows] for name, x in Pairs(ROWS).columns.items()}


def test_hugging_faces_example_trains_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = pairs().select_columns(["image", "caption"])
    folder(Path("teacher"), data, features(12), "image", "caption")  # wider than the model's 8
    names: dict[str, Any] = {"ContrastiveTrainer": ContrastiveTrainer, "processor": processor}
    names["TrainingArguments"] = lambda _, **given: tiny_transformers.arguments(
        tmp_path, max_steps=2, **given
    )
    names.update(model=clip(), pairs=data)
    exec(HUGGING_FACE, names)
    names["trainer"].train()
    assert tiny_transformers.lines(names["trainer"])[-1]["mimicry_loss"] > 0


def test_examples_of_sentence_transformers_train_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tiny_sentences.pairs(ROWS)
    captioned = data.rename_column("text", "caption")
    folder(Path("teacher"), captioned, features(20), "image", "caption")  # wider than the model's 16
    texts = data.rename_columns({"image": "question", "text": "answer"})
    for example, given, term in (
        (BOUND_SENTENCES, captioned, "mimicry_loss"),
        (PAIRS_OF_TEXTS, texts, "in_modal_loss"),
    ):
        model = tiny_sentences.tiny(tmp_path)
        names: dict[str, Any] = {"ContrastiveLoss": ContrastiveLoss, "np": np, "model": model, "pairs": given}
        names["teacher"] = tiny_sentences.tiny(tmp_path)
        exec(example, names)
        given = names["pairs"]
        ended = tiny_sentences.train(tmp_path, names["loss"], model, train_dataset=given, max_steps=2)
        assert ended.state.log_history[-2][term] > 0


class Towers(torch.nn.Module):
    """Two towers whose inputs are the numbers of the pairs."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(ROWS, 2 * self.width)

    def forward(self, rows: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
        features = self.embeddings(torch.from_numpy(rows)).split(self.width, dim=-1)
        return *(F.normalize(x, dim=-1) for x in features), 10.0


def test_the_example_of_an_own_loop_trains_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(Path("teacher"), pairs(), features(12), "image", "caption")
    model, rows = Towers(), np.arange(ROWS)
    exec(OWN_LOOP, {"model": model, "batches": [rows[:16], rows[16:]], "torch": torch})
    gradient = model.embeddings.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).min() > 0
