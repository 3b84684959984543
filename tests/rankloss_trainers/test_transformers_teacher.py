"""A teacher's features and the pairs' ids in Hugging Face's Trainer: a folder, and columns that are checked.

That columns are used is one of the steps in ``test_transformers.py``.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_teacher
import torch
from taught import (
    ROWS,
    TAUGHT_LOSS,
    loss_of_plain_loop,
    taught_options,
    teacher_features,
    teacher_inputs,
    write_teacher_folder,
)
from tiny_pairs import Pairs, tiny_clip
from tiny_transformers import (
    SGD,
    arguments,
    build_trainer,
    logged_values,
    train,
    train_in_plain_loop,
    weights,
)

import rankloss
from counting import LOSSES_AND_FOLDERS, count_calls
from rankloss_features import bind, sources
from rankloss_features.caching import Spec
from rankloss_features.folder import COMMON_SPACE, NAMES, SEPARATE_SPACES
from rankloss_features.teachers import Teacher
from rankloss_trainers.catalog import load
from rankloss_trainers.pair_ids import hash_tokens
from rankloss_trainers.transformers import ContrastiveTrainer
from registered import NAMES as NAMES_OF_LOSSES

TEACHER = ("image", "text")  # the modalities of a teacher's features, as Pairs adds them
ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()


def captioned(caption: str = "caption") -> Any:
    """Names and captions of the pairs."""
    columns = {"image": [f"{i}.png" for i in range(ROWS)], "caption": [f"{caption} {i}" for i in range(ROWS)]}
    return datasets.Dataset.from_dict(columns)


def joined(names: Any) -> Any:
    """Names and captions, which may be bound to a folder, with the model's inputs."""
    columns = {name: x.tolist() for name, x in Pairs(ROWS).columns.items()}
    inputs = datasets.Dataset.from_dict(columns).with_format("torch")
    return datasets.concatenate_datasets([names.with_format("torch"), inputs], axis=1)


@pytest.mark.parametrize(
    ("mini_batch_size", "names"),
    [
        pytest.param(None, NAMES, id="images and texts"),
        pytest.param(3, NAMES, id="images and texts, in mini-batches"),
        pytest.param(None, NAMES[1:], id="texts alone"),
    ],
)
def test_a_folder_trains_as_a_plain_loop_wherever_its_rows_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_batch_size: int | None, names: tuple[str, ...]
) -> None:
    """Ranks and mimicry of a wider teacher, whose components the loss is given; nothing is built twice."""
    path = write_teacher_folder(
        tmp_path / "x",
        captioned(),
        teacher_features(names=names),
        image_column="image",
        caption_column="caption",
    )
    # A teacher of texts alone ranks no cross-modal lists.
    options = {"lambda_cross": 4.0 if len(names) == 2 else 0.0}
    data = joined(bind(captioned(), path)).select(ORDER)
    given = {"loss_options": taught_options(**options), "mini_batch_size": mini_batch_size, **SGD}
    calls = count_calls(monkeypatch, **LOSSES_AND_FOLDERS)
    trained = train(tmp_path, pairs=data, loss=TAUGHT_LOSS, teacher=path, max_steps=2, **given)
    assert calls == {"choose": 1, "build": 2, "open": 1}, "two losses are joined, one folder is opened"
    pairs, model = Pairs(ROWS), tiny_clip()
    in_order = {name: x[ORDER] for name, x in pairs.columns.items()}
    pairs.columns = {**in_order, **teacher_inputs(path, ORDER)}
    loss = loss_of_plain_loop(path, width=8, **options)  # of the model's embeddings
    log = train_in_plain_loop(model, loss, pairs, [8], steps=2)
    torch.testing.assert_close(weights(trained.model), weights(model), rtol=1e-4, atol=1e-6)
    expected = [terms["mimicry_loss"] for terms in log]
    assert logged_values(trained, "mimicry_loss") == pytest.approx(expected, rel=1e-4)


def spoilt(value: float, rows: slice, name: str = "reference_text_features") -> Pairs:
    """Pairs with a teacher of both modalities, in which some rows of one of them are of one number."""
    pairs = Pairs(ROWS, *TEACHER)
    pairs.columns[name][rows] = value
    return pairs


def renamed(old: str, new: str) -> Pairs:
    """Pairs with a teacher of both modalities, of which a column has another name."""
    pairs = Pairs(ROWS, *TEACHER)
    pairs.columns[new] = pairs.columns.pop(old)
    return pairs


def bound_pairs(*more: str) -> Pairs:
    """Pairs with the column that binds them to the rows of a folder."""
    pairs = Pairs(ROWS, *more)
    pairs.columns["reference_pair"] = torch.zeros(ROWS, 2, dtype=torch.int64)
    return pairs


def grouped(**columns: Any) -> Any:
    """A table of pairs with more columns."""
    return datasets.Dataset.from_dict({**{x: y.tolist() for x, y in Pairs(8).columns.items()}, **columns})


BY_GROUP = {"loss": "clip-ids", "loss_options": {"key": "group"}}


def dropping(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch without the teacher's columns."""
    return {x: torch.stack([each[x] for each in examples]) for x in ("pixel_values", "input_ids")}


@pytest.mark.parametrize(
    ("pairs", "given", "message"),
    [
        (spoilt(math.nan, slice(3, 4), "reference_image_features"), {}, "reference_image_features .*row 3"),
        (Pairs(), {"loss": "rankclip-distill"}, "reference_image_features .*have pixel_values, input_ids"),
        (
            renamed("reference_image_features", "reference_img_features"),
            {"loss": "rankclip-distill", "loss_options": {"lambda_cross": 0.0}},
            "reference_text_features, .*reference_img_features",
        ),
        (
            renamed("reference_image_features", "reference_image_feature"),
            {"loss_options": {"lambda_cross": 0.0}},
            "reference_image_feature, which rankclip does not use; did you mean reference_image_features",
        ),
        (Pairs(ROWS, "image"), {}, "got reference_image_features alone"),
        # Sources of a teacher that contradict each other.
        (bound_pairs(), {}, "have reference_pair, of a folder that no option teacher names"),
        (Pairs(), {"teacher": "given"}, "rankclip needs a teacher's features"),
        (
            Pairs(ROWS, *TEACHER),
            {"data_collator": dropping},
            "have reference_image_features, and the batch has not",
        ),
        # Columns of no ids.
        (grouped(), BY_GROUP, "no column group of ids; they have pixel_values"),
        (grouped(group=[0.5] * 8), BY_GROUP, "ids in column group must be texts or integers; .* 0.5"),
        (grouped(group=["train"] * 8), BY_GROUP, "column group has one value in all 8 rows"),
    ],
)
def test_columns_that_are_damaged_missing_or_of_no_use_are_an_error_before_a_weight_changes(
    tmp_path: Path, pairs: Any, given: dict[str, Any], message: str
) -> None:
    trained = build_trainer(tmp_path, pairs=pairs, max_steps=1, **{"loss": "rankclip", **given})
    with pytest.raises(ValueError, match=message):
        trained.train()
    assert torch.equal(weights(trained.model), weights(tiny_clip()))


@pytest.mark.parametrize(
    ("pairs", "given"),
    [([], {}), (grouped(group=["a"] * 8).select([]), BY_GROUP)],
    ids=["a list", "a table with a column of ids"],
)
def test_data_without_rows_are_refused_by_the_trainers_own_error(
    tmp_path: Path, pairs: Any, given: dict[str, Any]
) -> None:
    trainer = ContrastiveTrainer(tiny_clip(), arguments(tmp_path), train_dataset=pairs, **given)
    with pytest.raises(ValueError, match="num_samples=0"):
        trainer.train()


def test_columns_are_looked_at_in_workers_and_not_in_evaluation(tmp_path: Path) -> None:
    bad = spoilt(math.nan, slice(3, 4))
    trained = train(tmp_path, pairs=Pairs(ROWS, *TEACHER), max_steps=1, dataloader_num_workers=1)
    assert trained.evaluate(bad)["eval_loss"] == trained.evaluate(Pairs())["eval_loss"]
    with pytest.raises(ValueError, match="reference_text_features"):
        next(iter(build_trainer(tmp_path, pairs=bad, dataloader_num_workers=1).get_train_dataloader()))


def test_two_teachers_unbound_data_and_data_of_another_folder_are_refused(tmp_path: Path) -> None:
    path = write_teacher_folder(
        tmp_path / "x", captioned(), teacher_features(), image_column="image", caption_column="caption"
    )
    other = write_teacher_folder(
        tmp_path / "other",
        captioned("another"),
        teacher_features(),
        image_column="image",
        caption_column="caption",
    )
    for pairs, message in (
        (bound_pairs(*TEACHER), f"teacher '{path}' and reference_image_features, .* two teachers"),
        (Pairs(ROWS), "no column reference_pair, which rankloss_features.bind"),
        (joined(bind(captioned("another"), other)), r"row 0 .*bind"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, pairs=pairs, loss="rankclip", teacher=path)


def test_a_teacher_that_is_no_folder_of_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^teacher: {tmp_path} is no folder of `rankloss features`"):
        build_trainer(tmp_path, teacher=str(tmp_path))


# --- a teacher that computes its features ---------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The teachers that were loaded: tiny encoders in the place of those that an extra installs.

    Both encode the captions: the table's pictures are names of no files.
    """
    teachers: list[Any] = []

    def load_tiny(given: list[str], args: Any, device: torch.device) -> Teacher:
        teachers.append(given)
        whole = tiny_teacher.teacher(text_encoder=args.text_encoder)
        names = [name for name in NAMES if f"{name.partition('_')[0]}_encoder" in given]
        encoders = dict.fromkeys(names, whole.encoders[NAMES[1]])
        spaces = COMMON_SPACE if len(names) == 1 else SEPARATE_SPACES
        return Teacher(whole.about, encoders, spaces=spaces)

    monkeypatch.setattr(sources, "load", load_tiny)
    monkeypatch.setattr(Spec, "check", lambda spec: spec)
    return teachers


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where computed features are kept."""
    monkeypatch.setenv("RANKLOSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("teacher", ["text=other", "image=some,text=other"])
def test_a_named_teacher_computes_its_features_once_and_trains_as_their_folder(
    tmp_path: Path, loaded: list[Any], cache: Path, teacher: str
) -> None:
    given = {"loss": "rankclip-in", "loss_options": {"schedule": "constant"}, "max_steps": 2, **SGD}
    by_name, again = (train(tmp_path, pairs=joined(captioned()), teacher=teacher, **given) for _ in range(2))
    assert len(loaded) == 1
    (about,) = cache.glob("*/folder.json")
    bound = joined(bind(captioned(), str(about.parent)))
    by_folder = train(tmp_path, pairs=bound, teacher=str(about.parent), **given)
    assert by_folder.loss_runtime.teaching.use == "required"
    for trained in (by_name, again):
        assert torch.equal(weights(trained.model), weights(by_folder.model))


def test_a_named_teacher_of_data_that_it_cannot_read_names_the_command(
    tmp_path: Path, loaded: list[Any]
) -> None:
    captions = captioned().select_columns("caption")
    with pytest.raises(ValueError, match=r"no column 'image', but .*`rankloss features --text-encoder other"):
        build_trainer(tmp_path, pairs=captions, loss="rankclip-in", teacher="text=other")
    assert loaded == []


def test_a_named_teacher_that_a_loss_cannot_use_is_refused_before_it_is_loaded(
    tmp_path: Path, loaded: list[Any]
) -> None:
    with pytest.raises(ValueError, match=r"^mimicry cannot copy two encoders that have no common space; "):
        build_trainer(tmp_path, pairs=joined(captioned()), loss="mimicry", teacher="image=some,text=other")
    assert loaded == []


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", [x for x in NAMES_OF_LOSSES if load(x).teacher not in (None, "required")])
def test_every_loss_with_a_teacher_of_its_own_trains_with_it_and_its_defaults(
    tmp_path: Path, loaded: list[Any], name: str
) -> None:
    ended = train(tmp_path, pairs=joined(captioned()), loss=name, max_steps=2, **SGD)
    assert len(loaded) == 1
    assert ended.loss_runtime.teaching.use == "required"
    assert all(math.isfinite(x) for x in logged_values(ended, "loss"))
    assert logged_values(ended, "mimicry_loss")[1] > 0
    assert not torch.equal(weights(ended.model), weights(tiny_clip()))


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("loss", ["mimicry", "rankclip-distill", "rankclip-distill+mimicry"])
def test_two_encoders_that_are_aligned_teach_losses_that_need_a_common_space(
    tmp_path: Path, cache: Path, loss: str
) -> None:
    """Their features are computed by the flag, or are those of the folder that this has left."""
    given = {"loss": loss, "max_steps": 2, **SGD}
    by_flag = train(tmp_path, pairs=joined(captioned()), teacher="image=a,text=b,align", **given)
    for name in loss.split("+"):
        term = {"mimicry": "mimicry_loss", "rankclip-distill": "cross_modal_loss"}[name]
        assert logged_values(by_flag, term)[0] > 0
    (about,) = cache.glob("*align*/folder.json")
    bound = joined(bind(captioned(), str(about.parent)))
    by_folder = train(tmp_path, pairs=bound, teacher=str(about.parent), **given)
    assert torch.equal(weights(by_flag.model), weights(by_folder.model))
    assert not torch.equal(weights(by_flag.model), weights(tiny_clip()))


@pytest.mark.usefixtures("loaded")
def test_a_computed_teacher_lies_outside_of_what_push_to_hub_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    given = {"loss": "rankclip-in", "teacher": "image=efficientnet-lite0,text=minilm"}
    train(tmp_path / "run", pairs=joined(captioned()), **given, max_steps=1, **SGD)
    (about,) = (tmp_path / "teachers").glob("*/folder.json")
    assert about.is_file()
    assert not list((tmp_path / "run").rglob("folder.json"))


# --- ids of pairs ---------------------------------------------------------------------------------------


class Grouped(Pairs):
    """Pairs with a column of ids, and some captions twice."""

    def __init__(self, number: int = 16) -> None:
        super().__init__(number)
        self.columns["input_ids"][1::4] = self.columns["input_ids"][::4]
        self.group = [f"picture {n % 5}" for n in range(number)]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "group": self.group[i]}


@pytest.mark.parametrize(
    ("name", "options", "loss_of"),
    [
        ("rankclip", {"schedule": "constant"}, rankloss.RankClipLoss),
        ("spread", {"weight": 0.5}, rankloss.SpreadLoss),
    ],
)
@pytest.mark.parametrize("key", ["captions", "group"])
@pytest.mark.parametrize("size", [None, 3])
def test_a_run_of_transformers_trains_with_the_ids_of_its_data(
    tmp_path: Path, key: str, size: int | None, name: str, options: dict[str, Any], loss_of: Any
) -> None:
    data, model = Grouped(8), tiny_clip()
    ended = train(
        tmp_path,
        pairs=data,
        loss=f"{name}+clip-ids",
        loss_options={"clip-ids": {"key": key}, name: options},
        mini_batch_size=size,
        max_steps=1,
        eval_dataset=Pairs(8),
        eval_strategy="steps",
        eval_steps=1,
        **SGD,
    )
    if key == "captions":
        ids = hash_tokens(data.columns, None)
    else:
        ids = torch.tensor([data.group.index(x) for x in data.group])
    assert 0 < len({*ids.tolist()}) < 8
    data.columns["pair_ids"] = ids
    train_in_plain_loop(model, loss_of(rankloss.ClipLoss(same_id="ignore"), **options), data, [8], steps=1)
    torch.testing.assert_close(weights(ended.model), weights(model), rtol=1e-4, atol=1e-6)
    assert logged_values(ended, "pairs_with_partner")[0] > 0
    assert logged_values(ended, "eval_loss"), "of pairs without ids"


def test_ids_are_read_without_the_transform_of_the_data(tmp_path: Path) -> None:
    """Which decodes pictures: those of the first row, and of two batches, as a loader reads ahead."""
    pairs, decoded = Pairs(64), []

    def decode(rows: dict[str, list[Any]], kept: bool = True) -> dict[str, Any]:
        decoded.extend(rows["row"])
        inputs = {name: [column[row] for row in rows["row"]] for name, column in pairs.columns.items()}
        return {**inputs, "group": rows["group"]} if kept else inputs

    table = datasets.Dataset.from_dict({"row": [*range(64)], "group": [f"{n // 2}" for n in range(64)]})
    given = {**BY_GROUP, "remove_unused_columns": False}
    ended = train(tmp_path, pairs=table.with_transform(decode), max_steps=1, **given)
    assert logged_values(ended, "pairs_with_partner") == [1.0]
    assert len(decoded) <= 1 + 2 * 8
    without_group = table.with_transform(functools.partial(decode, kept=False))
    with pytest.raises(ValueError, match=r"group .*transform"):
        train(tmp_path, pairs=without_group, max_steps=1, **given)
