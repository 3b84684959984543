"""Every trainer ranks each pair by its own row, and refuses others before a weight changes."""

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
from tiny_teacher import written
from tiny_transformers import Pairs, clip, weights

from rankloss_features import Features, bind
from rankloss_features.binding import taught
from rankloss_features.data import Table
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Encoder, Teacher
from rankloss_trainers.sentence_transformers import ContrastiveLoss, RankClipLoss
from rankloss_trainers.transformers import ContrastiveTrainer

ROWS, WIDTH = 32, 6
RANKED = {"schedule": "constant", "top_k": 4, "lambda_cross": 8.0, "lambda_in": 8.0}


def features(seed: int = 0, width: int = WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(ROWS, width, generator=generator), dim=-1) for name in NAMES}


def folder_of(
    path: Path, dataset: Any, image: str, caption: str, seed: int = 0, width: int = WIDTH
) -> Features:
    def encoder(rows: torch.Tensor) -> Encoder:
        return Encoder(lambda samples: rows[[x.row for x in samples]], lambda x: x, width)

    teacher = Teacher({}, {name: encoder(x) for name, x in features(seed, width).items()})
    return written(path, Table(dataset, image, caption, data="given"), teacher, dtype="float32")


def pairs() -> Any:
    columns = {name: x.tolist() for name, x in Pairs(ROWS).columns.items()}
    names = {
        "image": [f"folder/{i}.png" for i in range(ROWS)],
        "caption": [f"caption {i}" for i in range(ROWS)],
    }
    return datasets.Dataset.from_dict({**names, **columns}).with_format("torch")


def another_caption(row: dict[str, Any], i: int) -> dict[str, Any]:
    return {"caption": "another"} if i == 5 else row


SPOILT = [
    (lambda data: data.select([1, 0, *range(2, ROWS)]), "row 0 .* in row 1"),
    (lambda data: data.map(another_caption, with_indices=True), "row 5 .*'another'"),
    (lambda data: data.select(range(ROWS - 1)), "row 31 is missing"),
    (lambda data: data.select([*range(ROWS), 0]), "row 32 .*32 rows"),
]


@pytest.mark.parametrize(("change", "message"), SPOILT)
def test_data_are_bound_to_their_own_rows_alone(tmp_path: Path, change: Any, message: str) -> None:
    folder = folder_of(tmp_path / "x", pairs(), "image", "caption")
    with pytest.raises(ValueError, match=message):
        bind(change(pairs()), folder.path)


# --- Hugging Face -----------------------------------------------------------------------------------------


def test_hugging_face_ranks_every_pair_by_its_own_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", pairs(), "image", "caption")
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    bound = bind(pairs(), folder.path).select(order).remove_columns(["image", "caption"])
    columns = Pairs(ROWS)
    columns.columns.update({f"reference_{name}": x for name, x in features().items()})
    columns.columns = {name: x[order] for name, x in columns.columns.items()}
    options, trained = {**RANKED, "reference_features": folder.path}, []
    for number, (data, given) in enumerate([(bound, options), (columns, {**RANKED, "reference": "teacher"})]):
        run = tmp_path / str(number)
        arguments = {
            "max_steps": 2,
            "dataloader_num_workers": number,
            "loss": "rankclip",
            "loss_options": given,
        }
        trained.append(tiny_transformers.train(run, pairs=data, **arguments))
    assert torch.equal(weights(trained[0].model), weights(trained[1].model))
    # Evaluation does without, and does not show the model the column.
    assert trained[0].evaluate(bound)["eval_loss"] == pytest.approx(trained[1].evaluate(columns)["eval_loss"])


def test_hugging_face_refuses_data_that_are_not_bound_to_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", pairs(), "image", "caption")
    renamed = pairs().map(lambda row: {"caption": f"{row['caption']}!"})
    other = folder_of(tmp_path / "other", renamed, "image", "caption", seed=5)
    options = {**RANKED, "reference_features": folder.path}
    for data, message in ((pairs(), "reference_pair"), (bind(renamed, other.path), "row 0 .*bind")):
        given = {"loss": "rankclip", "loss_options": options, "max_steps": 1}
        trained = tiny_transformers.trainer(tmp_path, pairs=data, **given)
        with pytest.raises(ValueError, match=message):
            trained.train()
        assert torch.equal(weights(trained.model), weights(clip()))


# --- sentence-transformers --------------------------------------------------------------------------------


def trained(tmp_path: Path, labelled: Any, **options: Any) -> torch.Tensor:
    model = tiny_sentences.tiny(tmp_path)
    loss = RankClipLoss(model, **{**RANKED, **options})
    tiny_sentences.train(tmp_path, loss, model, train_dataset=labelled, max_steps=2)
    return tiny_sentences.weights(model)


def labelled(labels: torch.Tensor) -> Any:
    return tiny_sentences.pairs(ROWS).add_column("label", labels.tolist())


def test_sentence_transformers_takes_a_teacher_as_its_distillation_does(tmp_path: Path) -> None:
    data = tiny_sentences.pairs(ROWS)
    folder = folder_of(tmp_path / "x", data, "image", "text")
    own, teacher = trained(tmp_path, data), labelled(torch.stack([*features().values()], 1))
    by_labels = trained(tmp_path, teacher)
    assert not torch.equal(own, by_labels)
    bound = bind(data, folder.path, caption_column="text", column="label")
    assert torch.equal(by_labels, trained(tmp_path, bound, reference_features=folder.path))
    cached = trained(tmp_path, bound, reference_features=folder.path, mini_batch_size=3)
    torch.testing.assert_close(cached, by_labels)


def test_labels_are_one_embedding_for_both_columns_or_no_teachers() -> None:
    texts = features()[NAMES[1]]
    found = taught(None, texts)
    assert list(found) == [f"reference_{name}" for name in NAMES]
    assert all(x is texts for x in found.values())
    for scores in (None, torch.ones(ROWS), torch.ones(ROWS, dtype=torch.int64)):
        assert taught(None, scores) == {}


def test_sentence_transformers_refuses_labels_that_are_no_teachers(tmp_path: Path) -> None:
    data = tiny_sentences.pairs(ROWS)
    folder, before = folder_of(tmp_path / "x", data, "image", "text"), tiny_sentences.tiny(tmp_path)
    other = folder_of(tmp_path / "y", data.map(lambda row: {"text": f"{row['text']}!"}), "image", "text")
    bound = bind(data, folder.path, caption_column="text", column="label").with_format("torch")["label"][:]
    nan = torch.stack([*features().values()], 1)
    nan[3, 1] = torch.nan
    model, embeddings = tiny_sentences.tiny(tmp_path), [*features(7).values()]
    for labels, options, message in (
        (bound, {}, "reference_features"),
        (None, {"reference_features": folder.path}, "label"),
        (bound, {"reference_features": other.path}, "row 0 .*bind"),
        (nan, {}, "column 1 of labels .*row 3"),
        (torch.rand(ROWS, 3, WIDTH), {}, "two columns"),
    ):
        loss = RankClipLoss(model, **{**RANKED, **options})
        loss.run.set_progress(1, 1)
        loss.image_column = 0
        with pytest.raises(ValueError, match=message):
            loss._entries(embeddings, labels)
    with pytest.raises(ValueError, match="two columns"):
        tiny_sentences.train(
            tmp_path, loss, model, train_dataset=labelled(torch.rand(ROWS, 3, WIDTH)), max_steps=1
        )
    assert torch.equal(tiny_sentences.weights(model), tiny_sentences.weights(before))


# --- the page ---------------------------------------------------------------------------------------------


PAGE = (Path(__file__).parents[2] / "docs/teachers.md").read_text()
HUGGING_FACE, BOUND_SENTENCES, PAIRS_OF_TEXTS, OWN_LOOP = re.findall(
    r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
)


def processor(images: list[str], text: list[str], **_: Any) -> dict[str, torch.Tensor]:
    """The stand-in of a processor: the columns of the pair that the name of a picture tells."""
    rows = [int(Path(image).stem) for image in images]
    assert text == [f"caption {row}" for row in rows]
    return {name: x[rows] for name, x in Pairs(ROWS).columns.items()}


def test_hugging_faces_example_trains_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = pairs().select_columns(["image", "caption"])
    folder_of(Path("teacher"), data, "image", "caption", width=12)  # wider than the model's 8
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
    folder_of(Path("teacher"), captioned, "image", "caption", width=20)  # wider than the model's 16
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
    folder_of(Path("teacher"), pairs(), "image", "caption", width=12)
    model, rows = Towers(), np.arange(ROWS)
    exec(OWN_LOOP, {"model": model, "batches": [rows[:16], rows[16:]], "torch": torch})
    gradient = model.embeddings.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).min() > 0
