"""A teacher in sentence-transformers: labels or a folder, columns in either order, losses of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cka_clip import CkaLoss
from taught import folder
from tiny_sentences import pairs, tiny, train, weights

import rankloss
import rankloss_trainers
from rankloss_features import bind
from rankloss_features.folder import NAMES
from rankloss_trainers.sentence_transformers import ContrastiveLoss

ROWS, WIDTH = 32, 16
RANKED = {"schedule": "constant", "top_k": 4, "lambda_cross": 8.0, "lambda_in": 8.0}


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=-1) for name in NAMES}


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A folder, and data that are bound to it."""
    path = folder(tmp_path_factory.mktemp("features") / "x", pairs(ROWS), features(), "image", "text")
    return path, bind(pairs(ROWS), path, caption_column="text", column="label")


def trained(directory: Path, data: Any, loss: Any = "rankclip", **options: Any) -> torch.Tensor:
    model = tiny(directory)
    run = ContrastiveLoss(model, loss, options or None)
    train(directory, run, model, train_dataset=data, max_steps=2, learning_rate=0.1)
    return weights(model)


def labelled(data: Any, names: tuple[str, ...] = NAMES) -> Any:
    return data.add_column("label", torch.stack([features()[name] for name in names], 1).tolist())


@pytest.mark.parametrize(
    ("loss", "options"),
    [("rankclip", RANKED), ("rankclip", {**RANKED, "reference": "teacher"}), (CkaLoss(), {})],
)
def test_folder_and_labels_train_alike_and_the_columns_come_in_either_order(
    tmp_path: Path, bound: tuple[str, Any], loss: Any, options: dict[str, Any]
) -> None:
    path, data = bound
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    by_labels = trained(tmp_path, labelled(pairs(ROWS)).select(order), loss, **options)
    turned = labelled(pairs(ROWS).select_columns(["text", "image"]), NAMES[::-1]).select(order)
    torch.testing.assert_close(trained(tmp_path, turned, loss, **options), by_labels)
    if isinstance(loss, str):
        data, options = data.select(order), {**options, "reference_features": path}
        by_folder = [
            trained(tmp_path, data.select_columns(names).rename_column("image", "picture"), loss, **options)
            for names in (["image", "text", "label"], ["label", "text", "image"])
        ]
        assert torch.equal(by_folder[0], by_labels)
        torch.testing.assert_close(by_folder[1], by_labels)
        assert not torch.allclose(by_labels, trained(tmp_path, pairs(ROWS).select(order), loss, **RANKED))


def test_columns_of_other_pairs_are_refused_before_a_weight_changes(
    tmp_path: Path, bound: tuple[str, Any]
) -> None:
    path, data = bound
    before = weights(tiny(tmp_path))
    spoilt = data.map(lambda row: {"text": f"{row['text']}!"})
    others = data.rename_column("label", "other"), data.add_column("third", ["x"] * ROWS)
    for wrong in (spoilt, *others, labelled(pairs(ROWS)), data.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"reference_features needs .* the label of \S+bind\("):
            trained(tmp_path, wrong, "rankclip", **RANKED, reference_features=path)
    model = tiny(tmp_path)
    loss = ContrastiveLoss(model, "rankclip", {**RANKED, "reference_features": path})
    loss.run.set_progress(1, 1)
    columns = [model.preprocess(["word1", "word2"])] * 2
    with pytest.raises(RuntimeError, match=r"callbacks=\[Progress\(loss\)\]"):
        loss(columns, torch.tensor(data["label"][:2]))
    assert torch.equal(before, weights(tiny(tmp_path)))


@pytest.mark.parametrize(
    ("loss", "options", "has_labels", "message"),
    [
        (
            "rankclip-distill",
            {},
            False,
            "rankclip-distill needs a teacher's features: give labels, .*reference_features",
        ),
        (CkaLoss(), {}, False, "CkaLoss needs a teacher's features: give labels"),
        ("clip-streamed", {}, True, "clip-streamed does not use a teacher"),
        ("rankclip", {"reference": "own"}, True, "rankclip does not use a teacher"),
    ],
)
def test_teacher_that_is_missing_or_not_used_is_an_error(
    tmp_path: Path, loss: Any, options: dict[str, Any], has_labels: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, labelled(pairs(ROWS)) if has_labels else pairs(ROWS), loss, **options)


def test_data_that_are_bound_need_the_folder(tmp_path: Path, bound: tuple[str, Any]) -> None:
    with pytest.raises(ValueError, match="reference_features and the column label go together"):
        trained(tmp_path, bound[1])


@pytest.mark.parametrize("number", [9, 17])
def test_last_batch_of_one_pair_is_refused_before_the_first_step(tmp_path: Path, number: int) -> None:
    model = tiny(tmp_path)
    before, loss = weights(model), ContrastiveLoss(model)
    with pytest.raises(
        ValueError, match=rf"1 pair.* {number} pairs in batches of 8 on 1 .*dataloader_drop_last"
    ):
        train(tmp_path, loss, model, train_dataset=pairs(number))
    assert torch.equal(weights(model), before)
    train(tmp_path, loss, model, train_dataset=pairs(number), dataloader_drop_last=True)
    assert not torch.equal(weights(model), before)
    train(tmp_path, loss, model, train_dataset=pairs(number), max_steps=number // 8)  # is not reached


@pytest.mark.parametrize("loss", ["cyclip", rankloss.RankClipLoss(schedule="constant")])
def test_any_loss_trains_as_an_own_loop(tmp_path: Path, loss: Any) -> None:
    model, own = tiny(tmp_path), tiny(tmp_path)
    train(tmp_path, ContrastiveLoss(model, loss), model, learning_rate=0.1, max_steps=2)
    criterion = rankloss_trainers.create(loss) if isinstance(loss, str) else loss
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for start in (0, 8):
        batch = pairs().select(range(start, start + 8))
        embeddings = (own(own.preprocess(list(batch[x])))["sentence_embedding"] for x in ("image", "text"))
        optimizer.zero_grad()
        criterion(*map(F.normalize, embeddings), 20.0).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-5, atol=1e-6)


def test_model_card_has_the_citation_and_the_options(tmp_path: Path) -> None:
    loss = ContrastiveLoss(tiny(tmp_path), "rankclip", {"top_k": 3})
    assert "RankCLIP" in loss.citation
    assert loss.get_config_dict()["options"]["top_k"] == 3
