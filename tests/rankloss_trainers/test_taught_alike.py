"""Ranks and mimicry of a wider teacher, joined: every trainer ends at the weights of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_sentences
import tiny_transformers
import torch
import torch.nn.functional as F
from taught import folder
from tiny_transformers import Pairs, clip
from torch import Tensor

import rankloss
import rankloss_trainers
from rankloss.losses import TEACHER
from rankloss_features import Features, bind
from rankloss_features.folder import NAMES
from rankloss_trainers.catalog import find
from rankloss_trainers.sentence_transformers import ContrastiveLoss

ROWS, OF_TEACHER, STEPS = 32, 24, 2
LOSS = "rankclip-distill+mimicry"
OPTIONS = {"schedule": "constant", "lambda_cross": 4.0, "lambda_in": 4.0, "top_k": 4, "weight": 0.5}


def features(width: int = OF_TEACHER) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: F.normalize(torch.randn(ROWS, width, generator=generator), dim=-1) for name in NAMES}


def taught(path: str, rows: slice) -> dict[str, Tensor]:
    arrays = Features(path).arrays.values()
    return {name: torch.from_numpy(x[rows].copy()) for name, x in zip(TEACHER, arrays, strict=True)}


def criterion(path: str, width: int) -> Any:
    """The loss of a plain loop."""
    loss = rankloss_trainers.create(LOSS, **OPTIONS)
    (part,) = (x for x in loss.modules() if isinstance(x, rankloss.MimicryLoss))
    part.components = Features(path).components(width).matrix
    return loss


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_hugging_face(tmp_path: Path, mini_batch_size: int | None) -> None:
    pairs = Pairs(ROWS)
    table = datasets.Dataset.from_dict({x: [f"{x} {i}" for i in range(ROWS)] for x in ("image", "caption")})
    path = folder(tmp_path / "x", table, features(), "image", "caption")
    columns = {name: x.tolist() for name, x in pairs.columns.items()}
    rows = datasets.Dataset.from_dict(columns).with_format("torch")
    bound = datasets.concatenate_datasets([bind(table, path).with_format("torch"), rows], axis=1)
    trained = tiny_transformers.train(
        tmp_path,
        pairs=bound,
        loss=LOSS,
        loss_options={**OPTIONS, "reference_features": path},
        max_steps=STEPS,
        mini_batch_size=mini_batch_size,
        **tiny_transformers.SGD,
    )
    model, loss = clip(), criterion(path, 8)
    pairs.columns.update(taught(path, slice(None)))
    log = tiny_transformers.own_loop(model, loss, pairs, [8], STEPS)
    torch.testing.assert_close(
        tiny_transformers.weights(trained.model), tiny_transformers.weights(model), rtol=1e-4, atol=1e-6
    )
    assert tiny_transformers.column(trained, "mimicry_loss") == pytest.approx(
        [x["mimicry_loss"] for x in log], rel=1e-4
    )


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_sentence_transformers(tmp_path: Path, mini_batch_size: int | None) -> None:
    data = tiny_sentences.pairs(ROWS)
    path = folder(tmp_path / "x", data, features(), "image", "text")
    model, own = tiny_sentences.tiny(tmp_path), tiny_sentences.tiny(tmp_path)
    options = {**OPTIONS, "reference_features": path}
    loss = ContrastiveLoss(model, LOSS, options, mini_batch_size=mini_batch_size)
    bound = bind(data, path, caption_column="text", column="label")
    tiny_sentences.train(tmp_path, loss, model, train_dataset=bound, learning_rate=0.1, max_steps=STEPS)
    plain, optimizer = criterion(path, 16), torch.optim.SGD(own.parameters(), lr=0.1)
    for start in range(0, 8 * STEPS, 8):
        batch = data.select(range(start, start + 8))
        embeddings = (own(own.preprocess(list(batch[x])))["sentence_embedding"] for x in ("image", "text"))
        optimizer.zero_grad()
        plain(*map(F.normalize, embeddings), 20.0, **taught(path, slice(start, start + 8))).backward()
        optimizer.step()
    torch.testing.assert_close(
        tiny_sentences.weights(model), tiny_sentences.weights(own), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("width", "spaces", "loss", "message"),
    [
        (8, "common", "mimicry", r"the teacher has 8 dimensions, fewer than the student's 16"),
        (OF_TEACHER, "separate", "mimicry", "separate spaces, .*; rankclip-distill ranks by them"),
        (OF_TEACHER, "separate", "rankclip+mimicry", "mimicry_reference_features: .*separate spaces"),
    ],
)
def test_a_teacher_that_cannot_be_copied_is_refused(
    tmp_path: Path, width: int, spaces: str, loss: str, message: str
) -> None:
    data = tiny_sentences.pairs(ROWS)
    path = folder(tmp_path / "x", data, features(width), "image", "text", spaces)
    model = tiny_sentences.tiny(tmp_path)
    before, bound = tiny_sentences.weights(model), bind(data, path, caption_column="text", column="label")

    def train() -> None:
        run = ContrastiveLoss(model, loss, {"reference_features": path})
        tiny_sentences.train(tmp_path, run, model, train_dataset=bound, max_steps=1)

    with pytest.raises(ValueError, match=message):
        train()
    assert torch.equal(before, tiny_sentences.weights(model))


def test_two_encoders_rank_the_in_modal_lists_alone(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", tiny_sentences.pairs(ROWS), features(), "image", "text", "separate")
    entry = find("rankclip-distill").load()
    assert entry.checked("x", {"reference_features": path})["lambda_cross"] == 0
    assert entry.checked("x", {"reference_features": path, "lambda_cross": 0})["lambda_cross"] == 0
    with pytest.raises(ValueError, match=r"lambda_cross: must be 0, as .*separate spaces.*; got 1"):
        entry.checked("x", {"reference_features": path, "lambda_cross": 1})
    joined = find("cyclip+rankclip").load().checked("x", {"reference_features": path})
    assert joined["rankclip_lambda_cross"] == 0
    assert joined["cyclip_lambda_cross"] == 0.25
