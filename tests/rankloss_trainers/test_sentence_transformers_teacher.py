"""A teacher in sentence-transformers: labels or a folder, columns in either order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import taught
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from taught import LOSS, ROWS, features, folder, references
from tiny_sentences import embed, own_loop, pairs, tiny, train, weights

from counting import LOSSES_AND_FOLDERS, count_calls
from rankloss import RankClipLoss
from rankloss.losses import TEACHER
from rankloss_features import bind
from rankloss_features.folder import NAMES
from rankloss_trainers.sentence_transformers import ContrastiveLoss
from registered import NAMES as LOSSES
from registered import input_names

ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
RANKED = {"schedule": "constant", "top_k": 4, "lambda_cross": 8.0, "lambda_in": 8.0}


def labelled(data: Any, names: tuple[str, ...] = NAMES) -> Any:
    return data.add_column("label", torch.stack([features()[name] for name in names], 1).tolist())


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A folder, and data that are bound to it."""
    path = folder(tmp_path_factory.mktemp("features") / "x", pairs(ROWS), features(), "image", "text")
    return path, bind(pairs(ROWS), path, caption_column="text", column="label")


def trained(
    directory: Path,
    data: Any,
    loss: Any = "rankclip",
    size: int | None = None,
    teacher: str | None = None,
    **options: Any,
) -> Any:
    model = tiny()
    run = ContrastiveLoss(model, loss, options or None, teacher=teacher, mini_batch_size=size)
    train(directory, run, model, train_dataset=data, max_steps=2, learning_rate=0.1)
    return weights(model)


@pytest.mark.parametrize("how", ["labels", "labels, turned", "folder, turned", "folder, in mini-batches"])
def test_a_teacher_trains_as_a_plain_loop(
    tmp_path: Path, bound: tuple[str, Any], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns may come in either order; of the folder's teacher, a wider one, the loss mimics components."""
    path, data = bound
    if "labels" in how:
        criterion, loss = (RankClipLoss(schedule="constant", top_k=4) for _ in range(2))
        options = {"teacher": "given"}
        names = ("image", "text") if how == "labels" else ("text", "image")
        data = labelled(pairs(ROWS).select_columns(list(names)), NAMES if how == "labels" else NAMES[::-1])
    else:
        criterion, loss, options = (
            taught.criterion(path, 16),
            LOSS,
            {**taught.taught_options(), "teacher": path},
        )
    if how == "folder, turned":
        data = data.select_columns(["label", "text", "image"]).rename_column("image", "picture")
    calls = count_calls(monkeypatch, **LOSSES_AND_FOLDERS)
    found = trained(tmp_path, data.select(ORDER), loss, 3 if "mini" in how else None, **options)
    assert calls == (
        {"build": 1} if "labels" in how else {"choose": 1, "build": 2, "open": 1}
    )  # of joined losses two
    own, batches = tiny(), [ORDER[:8], ORDER[8:16]]
    own_loop(own, criterion, pairs(ROWS), batches, given=lambda rows: references(path, rows))
    torch.testing.assert_close(found, weights(own), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_registered_loss_trains_with_its_defaults_or_says_what_serves_it(
    tmp_path: Path, name: str
) -> None:
    model, needed = tiny(), input_names(name)
    if "candidate_features" in needed:
        with pytest.raises(ValueError, match=f"^{name} .*RankedListsLoss"):
            ContrastiveLoss(model, name)
        return
    if "caption_features" in needed:
        with pytest.raises(ValueError, match=f"{name} needs a column"):
            ContrastiveLoss(model, name, {"caption_key": "x"})
        return
    is_taught, before = TEACHER[0] in needed, weights(model)
    data = pairs(ROWS)
    if is_taught:  # of the model's width, which mimicry compares
        rows = features(16)
        data = data.add_column("label", torch.stack([rows[x] for x in NAMES], 1).tolist())
    loss = ContrastiveLoss(model, name, teacher="given" if is_taught else None)
    trainer = train(tmp_path, loss, model, train_dataset=data, max_steps=2)
    values = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(values) == 2
    assert torch.tensor(values).isfinite().all()
    assert not torch.equal(weights(model), before)


def test_agreement_is_logged_with_any_loss(tmp_path: Path) -> None:
    model = tiny()
    loss = ContrastiveLoss(model, "tiny", agreement_every=2)
    trainer = train(tmp_path, loss, model, max_steps=3)
    taus = [line["in_modal_tau"] for line in trainer.state.log_history if "loss" in line]
    assert taus[0] == taus[1] != taus[2]


def test_a_narrower_teacher_is_copied_into_some_of_the_dimensions(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", pairs(ROWS), features(8), "image", "text")
    data = bind(pairs(ROWS), path, caption_column="text", column="label")
    taught = trained(tmp_path / "taught", data, "mimicry", teacher=path)
    assert not torch.equal(taught, trained(tmp_path / "alone", pairs(ROWS), "clip-streamed"))


def test_columns_of_other_pairs_are_refused_before_a_weight_changes(
    tmp_path: Path, bound: tuple[str, Any]
) -> None:
    path, data = bound
    model = tiny()
    before = weights(model)
    loss = ContrastiveLoss(model, "rankclip", RANKED, teacher=path)
    spoilt = data.map(lambda row: {"text": f"{row['text']}!"})
    for wrong in (
        spoilt,
        data.add_column("third", ["x"] * ROWS),
        labelled(pairs(ROWS)),
        data.to_iterable_dataset(),
        datasets.DatasetDict({"right": data, "spoilt": spoilt}),
    ):
        with pytest.raises(ValueError, match=r"teacher .*bind"):
            train(tmp_path, loss, model, train_dataset=wrong, max_steps=2)
    loss.run.set_progress(1, 1)
    with pytest.raises(RuntimeError, match="Progress"):
        loss([model.preprocess(["word1", "word2"])] * 2, torch.tensor(data["label"][:2]))
    assert torch.equal(before, weights(model))


def test_labels_that_are_no_teachers_missing_or_of_no_use_are_refused(
    tmp_path: Path, bound: tuple[str, Any]
) -> None:
    for data, name, message in (
        (bound[1], "rankclip", "teacher .*label"),
        (
            pairs(ROWS),
            "rankclip-distill",
            "rankclip-distill needs a teacher's features: give labels, .*FOLDER",
        ),
        (labelled(pairs(ROWS)), "clip-streamed", "clip-streamed does not use a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, data, name)
    model, nan = tiny(), torch.stack([*features().values()], 1)
    nan[3, 1] = torch.nan
    columns = [model.preprocess(list(pairs(ROWS)[name])) for name in ("image", "text")]
    loss = ContrastiveLoss(model, "rankclip", RANKED)
    loss.run.set_progress(1, 1)
    for labels, message in ((nan, "1 .*labels .*row 3"), (torch.rand(ROWS, 3, 6), "labels|columns")):
        with pytest.raises(ValueError, match=message):
            loss(columns, labels)
    own = loss(columns, None)["in_modal_loss"]
    for labels in (torch.ones(ROWS), torch.ones(ROWS, dtype=torch.int64)):  # as other losses have them
        assert loss(columns, labels)["in_modal_loss"] == own
    texts = features()[NAMES[1]]
    student = dict(
        zip(("image_features", "text_features"), embed(model, *pairs(ROWS).to_dict().values()), strict=True)
    )
    both = loss.run(**student, logit_scale=20.0, **dict(zip(TEACHER, (texts, texts), strict=True)))
    assert loss(columns, texts)["in_modal_loss"] == both.terms["in_modal_loss"]


def test_last_batch_of_one_pair_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny()
    before, loss = weights(model), ContrastiveLoss(model)
    with pytest.raises(ValueError, match=r"1 pair.* 9 pairs in batches of 8 on 1 .*dataloader_drop_last"):
        train(tmp_path, loss, model, train_dataset=pairs(9))
    assert torch.equal(weights(model), before)
    train(tmp_path, loss, model, train_dataset=pairs(9), dataloader_drop_last=True)
    assert not torch.equal(weights(model), before)
    train(tmp_path, loss, model, train_dataset=pairs(9), max_steps=1)  # is not reached


def test_labels_that_matryoshka_cuts_are_refused(tmp_path: Path) -> None:
    """Its first numbers alone would be another teacher; in mini-batches the numbers are the same."""
    values, labels = [], torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=-1)
    for size in (None, 3):
        model, given = tiny(), pairs(8)
        ranked = {"schedule": "constant"}
        loss = ContrastiveLoss(model, "rankclip", ranked, output_dict=False, mini_batch_size=size)
        wrapped = MatryoshkaLoss(model, loss, [16, 4])
        columns = [model.preprocess(list(given[name])) for name in given.column_names]
        loss.run.set_progress(1, 1)
        with pytest.raises(
            ValueError, match=r"cut the teacher\'s labels to 4 of 16 dimensions: .*as teacher"
        ):
            wrapped(columns, labels)
        # A teacher of another width is left whole.
        value = wrapped(columns, labels[..., :12].contiguous())
        value.backward()
        values += [
            value.detach()[None],
            *(x.grad.flatten() for x in model.parameters() if x.grad is not None),
        ]
    plain, cached = torch.cat(values).chunk(2)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
