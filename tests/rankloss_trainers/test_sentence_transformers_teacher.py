"""A teacher in sentence-transformers: labels or a folder, columns in either order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import taught
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from taught import ROWS, TAUGHT_LOSS, teacher_features, teacher_inputs, write_teacher_folder
from tiny_sentences import embed, pairs, tiny_model, train, train_in_plain_loop, weights

from counting import LOSSES_AND_FOLDERS, count_calls
from rankloss import MimicryLoss, RankClipLoss
from rankloss.losses import TEACHER
from rankloss_features import bind
from rankloss_features.folder import NAMES
from rankloss_trainers.sentence_transformers import ContrastiveLoss
from registered import NAMES as LOSSES
from registered import input_names

ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
RANKED = {"schedule": "constant", "top_k": 4, "lambda_cross": 8.0, "lambda_in": 8.0}


def labelled(data: Any, names: tuple[str, ...] = NAMES) -> Any:
    """Pairs with the teacher's features of both columns as labels, in the order of these names."""
    return data.add_column("label", torch.stack([teacher_features()[name] for name in names], 1).tolist())


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A folder, and data that are bound to it."""
    path = write_teacher_folder(
        tmp_path_factory.mktemp("features") / "x",
        pairs(ROWS),
        teacher_features(),
        image_column="image",
        caption_column="text",
    )
    return path, bind(pairs(ROWS), path, caption_column="text", column="label")


def trained(
    directory: Path,
    data: Any,
    loss: Any = "rankclip",
    mini_batch_size: int | None = None,
    teacher: str | None = None,
    **options: Any,
) -> Any:
    """The weights after two steps of the trainer, with a loss and its options."""
    model = tiny_model()
    of_trainer = ContrastiveLoss(
        model, loss, options or None, teacher=teacher, mini_batch_size=mini_batch_size
    )
    train(directory, of_trainer, model, train_dataset=data, max_steps=2, learning_rate=0.1)
    return weights(model)


def weights_of_plain_loop(criterion: Any, path: str) -> Any:
    """The weights after the two steps of a plain loop, with the folder's features of each batch."""
    own, batches = tiny_model(), [ORDER[:8], ORDER[8:16]]
    train_in_plain_loop(own, criterion, pairs(ROWS), batches, given=lambda rows: teacher_inputs(path, rows))
    return weights(own)


@pytest.mark.parametrize(
    ("columns", "modalities"),
    [
        pytest.param(["image", "text"], NAMES, id="images first"),
        pytest.param(["text", "image"], NAMES[::-1], id="texts first"),
    ],
)
def test_a_teacher_of_labels_trains_as_a_plain_loop_in_either_order_of_columns(
    tmp_path: Path,
    bound: tuple[str, Any],
    columns: list[str],
    modalities: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = bound
    criterion, loss = (RankClipLoss(schedule="constant", top_k=4) for _ in range(2))
    data = labelled(pairs(ROWS).select_columns(columns), modalities)
    calls = count_calls(monkeypatch, **LOSSES_AND_FOLDERS)
    actual = trained(tmp_path, data.select(ORDER), loss, teacher="given")
    assert calls == {"build": 1}, "one loss is built, in all steps; no folder is opened"
    torch.testing.assert_close(actual, weights_of_plain_loop(criterion, path), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("is_turned", "mini_batch_size"), [(True, None), (False, 3)], ids=["turned", "in mini-batches"]
)
def test_a_folder_trains_as_a_plain_loop(
    tmp_path: Path,
    bound: tuple[str, Any],
    is_turned: bool,
    mini_batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In either order of columns, whatever their names; of a wider teacher the loss mimics components."""
    path, data = bound
    if is_turned:
        data = data.select_columns(["label", "text", "image"]).rename_column("image", "picture")
    calls = count_calls(monkeypatch, **LOSSES_AND_FOLDERS)
    options = taught.taught_options()
    actual = trained(tmp_path, data.select(ORDER), TAUGHT_LOSS, mini_batch_size, teacher=path, **options)
    assert calls == {"choose": 1, "build": 2, "open": 1}, "two losses are joined, one folder is opened"
    width_of_model = 16
    expected = weights_of_plain_loop(taught.loss_of_plain_loop(path, width_of_model), path)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


OF_LISTS = [name for name in LOSSES if "candidate_features" in input_names(name)]
OF_CAPTIONS = [name for name in LOSSES if "caption_features" in input_names(name)]


@pytest.mark.parametrize("name", OF_LISTS)
def test_a_loss_of_lists_is_refused_with_the_class_that_serves_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} .*RankedListsLoss"):
        ContrastiveLoss(tiny_model(), name)


@pytest.mark.parametrize("name", OF_CAPTIONS)
def test_a_loss_of_a_second_caption_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a column"):
        ContrastiveLoss(tiny_model(), name, {"caption_key": "x"})


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in (*OF_LISTS, *OF_CAPTIONS)])
def test_every_loss_of_pairs_trains_with_its_defaults(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    is_taught, before = TEACHER[0] in input_names(name), weights(model)
    data = pairs(ROWS)
    if is_taught:
        teacher = teacher_features(width=16)  # as wide as the model: mimicry compares them as they are
        both = torch.stack([teacher[modality] for modality in NAMES], 1)
        data = data.add_column("label", both.tolist())  # the one column that a loss is handed
    loss = ContrastiveLoss(model, name, teacher="given" if is_taught else None)
    trainer = train(tmp_path, loss, model, train_dataset=data, max_steps=2)
    values = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(values) == 2  # one a step
    assert torch.tensor(values).isfinite().all()
    assert not torch.equal(weights(model), before)


def test_agreement_is_logged_with_a_loss_without_ranks(tmp_path: Path) -> None:
    model = tiny_model()
    loss = ContrastiveLoss(model, "tiny", agreement_every=2)
    trainer = train(tmp_path, loss, model, max_steps=3)
    taus = [line["in_modal_tau"] for line in trainer.state.log_history if "loss" in line]
    assert taus[0] == taus[1], "of the first step, until it is computed again"
    assert taus[1] != taus[2], "computed every second step"


def test_a_narrower_teacher_is_copied_into_the_first_dimensions_and_zeros_into_the_others(
    tmp_path: Path,
) -> None:
    path = write_teacher_folder(
        tmp_path / "x", pairs(ROWS), teacher_features(width=8), image_column="image", caption_column="text"
    )
    data = bind(pairs(ROWS), path, caption_column="text", column="label")
    actual = trained(tmp_path / "taught", data.select(ORDER), "mimicry", teacher=path)
    mimicry = MimicryLoss()
    mimicry.components = torch.eye(8, 16)  # the model's first 8 of 16 dimensions are the teacher's
    torch.testing.assert_close(actual, weights_of_plain_loop(mimicry, path), rtol=1e-4, atol=1e-6)


def test_data_that_are_not_bound_to_the_folder_are_refused_before_a_weight_changes(
    tmp_path: Path, bound: tuple[str, Any]
) -> None:
    path, data = bound
    model = tiny_model()
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
    assert torch.equal(before, weights(model))


def test_labels_of_a_folder_without_the_callback_that_checks_them_are_an_error(
    bound: tuple[str, Any],
) -> None:
    path, data = bound
    model = tiny_model()
    loss = ContrastiveLoss(model, "rankclip", RANKED, teacher=path)
    with pytest.raises(RuntimeError, match=r"the columns were not compared .*Progress"):
        loss([model.preprocess(["word1", "word2"])] * 2, torch.tensor(data["label"][:2]))


def test_labels_of_a_folder_that_no_loss_names_are_refused(tmp_path: Path, bound: tuple[str, Any]) -> None:
    _, data = bound
    with pytest.raises(ValueError, match=r"^teacher and the column label go together: .*got None and labels"):
        trained(tmp_path, data, "rankclip")


def test_a_loss_that_needs_a_teacher_names_the_labels_that_are_missing(tmp_path: Path) -> None:
    message = "rankclip-distill needs a teacher's features: give labels, .*FOLDER"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, pairs(ROWS), "rankclip-distill")


def test_labels_of_a_teacher_that_a_loss_does_not_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip-streamed does not use a teacher"):
        trained(tmp_path, labelled(pairs(ROWS)), "clip-streamed")


class LossInTraining(NamedTuple):
    """A loss that is told of its step, without a trainer, and the tokenized columns of all pairs."""

    model: Any
    loss: ContrastiveLoss
    columns: list[dict[str, Any]]


@pytest.fixture
def in_training() -> LossInTraining:
    model = tiny_model()
    loss = ContrastiveLoss(model, "rankclip", RANKED)
    loss.run.set_progress(1, 1)
    columns = [model.preprocess(list(pairs(ROWS)[name])) for name in ("image", "text")]
    return LossInTraining(model, loss, columns)


def with_a_nan() -> torch.Tensor:
    """Labels of both columns, the teacher's features; row 3 of the second has a NaN."""
    labels = torch.stack([*teacher_features().values()], 1)
    labels[3, 1] = torch.nan
    return labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(with_a_nan(), "column 1 of labels must be finite; row 3", id="a NaN"),
        pytest.param(torch.rand(ROWS, 3, 6), r"two columns; got shape \(32, 3, 6\)", id="of three columns"),
    ],
)
def test_labels_that_are_no_features_of_two_columns_are_refused(
    in_training: LossInTraining, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        in_training.loss(in_training.columns, labels)


@pytest.mark.parametrize(
    "labels", [torch.ones(ROWS), torch.ones(ROWS, dtype=torch.int64)], ids=["float", "integer"]
)
def test_labels_of_one_number_a_pair_are_no_teacher(
    in_training: LossInTraining, labels: torch.Tensor
) -> None:
    """They are grades or classes of other losses, and change no entry here."""
    without = in_training.loss(in_training.columns, None)
    assert "in_modal_loss" in without
    assert in_training.loss(in_training.columns, labels) == without


def test_labels_of_one_vector_a_pair_are_the_teacher_of_both_columns(in_training: LossInTraining) -> None:
    vectors = teacher_features()[NAMES[1]]
    images, texts = embed(in_training.model, *pairs(ROWS).to_dict().values())
    expected = in_training.loss.run(
        image_features=images,
        text_features=texts,
        logit_scale=20.0,
        **dict.fromkeys(TEACHER, vectors),
    )
    assert in_training.loss(in_training.columns, vectors)["in_modal_loss"] == expected.terms["in_modal_loss"]


def test_last_batch_of_one_pair_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_model()
    before, loss = weights(model), ContrastiveLoss(model)
    with pytest.raises(ValueError, match=r"1 pair.* 9 pairs in batches of 8 on 1 .*dataloader_drop_last"):
        train(tmp_path, loss, model, train_dataset=pairs(9))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "option", [{"dataloader_drop_last": True}, {"max_steps": 1}], ids=["dropped", "not reached"]
)
def test_last_batch_of_one_pair_that_is_dropped_or_not_reached_is_no_error(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    model = tiny_model()
    train(tmp_path, ContrastiveLoss(model), model, train_dataset=pairs(9), **option)
    assert not torch.equal(weights(model), weights(tiny_model()))


OF_THE_MODELS_WIDTH = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=-1)


def in_matryoshka(model: Any, mini_batch_size: int | None) -> tuple[MatryoshkaLoss, list[dict[str, Any]]]:
    """A loss at 16 and at 4 dimensions, in the middle of a training, and the columns of eight pairs."""
    ranked = {"schedule": "constant"}
    loss = ContrastiveLoss(model, "rankclip", ranked, output_dict=False, mini_batch_size=mini_batch_size)
    loss.run.set_progress(1, 1)
    data = pairs(8)
    columns = [model.preprocess(list(data[name])) for name in data.column_names]
    return MatryoshkaLoss(model, loss, [16, 4]), columns


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_labels_that_matryoshka_cuts_are_refused(mini_batch_size: int | None) -> None:
    """Their first numbers alone would be another teacher."""
    model = tiny_model()
    wrapped, columns = in_matryoshka(model, mini_batch_size)
    with pytest.raises(ValueError, match=r"cut the teacher\'s labels to 4 of 16 dimensions: .*as teacher"):
        wrapped(columns, OF_THE_MODELS_WIDTH)


def test_in_mini_batches_a_teacher_that_matryoshka_leaves_whole_has_the_same_gradient() -> None:
    """It is of another width than the model."""
    narrower = torch.nn.functional.normalize(OF_THE_MODELS_WIDTH[..., :12], dim=-1)

    def value_and_gradient(mini_batch_size: int | None) -> list[torch.Tensor]:
        model = tiny_model()
        wrapped, columns = in_matryoshka(model, mini_batch_size)
        value = wrapped(columns, narrower)
        value.backward()
        return [value.detach(), *(x.grad for x in model.parameters() if x.grad is not None)]

    torch.testing.assert_close(value_and_gradient(3), value_and_gradient(None), rtol=1e-4, atol=1e-5)
