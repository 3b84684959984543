"""A teacher of a few numbers, small pictures with captions, and processes that write their features."""

from __future__ import annotations

import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rankloss_features import Features, writing
from rankloss_features.data import Data, Sample, Shards, open_data
from rankloss_features.folder import NAMES, Draft
from rankloss_features.probing import FIXED
from rankloss_features.teachers import Encoder, Teacher, image_encoder
from rankloss_features.writing import write
from samples import add_sample

ROWS, WIDTH, BATCH = 40, 6, 8
SHARD = 12  # rows, so that a shard's second batch is cut to four
writing.SHARD_ROWS = SHARD * 16  # of which a sixteenth is the least that a shard has
CAPTIONS = [f"picture {i} of {i % 7} apples" for i in range(ROWS)]
SETTINGS = {"dtype": "float16", "precision": "fp32", "batch_size": BATCH, "command": "rankloss features …"}
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
CLIP_CONFIG = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "head_width": 8, "width": 16, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "heads": 2, "width": 16, "layers": 1},
}
CSV = {"csv_separator": "\t", "csv_img_key": "filepath", "csv_caption_key": "title"}
"""The options of the files of :func:`csv_table`."""
PIXELS, LETTERS = 8 * 8 * 3, 256
"""Inputs of the encoder of pictures, and of that of texts, which counts each byte."""
forks = multiprocessing.get_context("fork")


def picture(number: int, size: int = 8) -> bytes:
    """The content of a PNG file of a square picture; each number has another one."""
    noise = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def csv_table(folder: Path, captions: list[str] | None = None, order: Any = None) -> Path:
    """A CSV file of pictures and captions, in another order if one is given."""
    captions = CAPTIONS if captions is None else captions
    rows = []
    for i, caption in enumerate(captions):
        place = folder / f"{i}.png"
        place.write_bytes(picture(i))
        rows.append(f"{place}\t{caption}")
    ordered = rows if order is None else [rows[i] for i in order]
    file = folder / "pairs.csv"
    file.write_text("\n".join(["filepath\ttitle", *ordered]) + "\n")
    return file


def shards(
    folder: Path, captions: list[str] | None = None, broken: tuple[int, ...] = (), number: int = 2
) -> str:
    """The same pairs as a webdataset, by its pattern of shards, with samples between that a trainer skips.

    The pictures of broken samples are cut, so that they cannot be read. The pairs are dealt to the shards.
    """
    captions = CAPTIONS if captions is None else captions
    for shard in range(number):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard, len(captions), number):
                content = picture(i)[:40] if i in broken else picture(i)
                add_sample(tar, f"{i:03}", png=content, txt=captions[i].encode())
                add_sample(tar, f"{i:03}x", txt=b"no picture")
    return str(folder / f"{{0..{number - 1}}}.tar")


def dataset(folder: Path) -> Any:
    """The pairs of :func:`csv_table`, which has written their pictures, as a ``datasets.Dataset``."""
    import datasets

    images = [str(folder / f"{i}.png") for i in range(ROWS)]
    pairs = datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS})
    return pairs.cast_column("image", datasets.Image())


def csv_data(file: Path) -> Data:
    """The pairs of a file of :func:`csv_table`."""
    return open_data(Namespace(data=str(file), dataset_type="auto", **CSV))


def trainer_arguments(train_data: Any, kind: str = "auto") -> Namespace:
    """The arguments of open_clip's trainer."""
    return Namespace(train_data=None if train_data is None else str(train_data), dataset_type=kind, **CSV)


@functools.cache
def projection(name: str) -> Tensor:
    """The weights of an encoder."""
    inputs = PIXELS if name == NAMES[0] else LETTERS
    return torch.randn(inputs, WIDTH, generator=torch.Generator().manual_seed(len(name)))


def pixels(size: int, picture: Any) -> Tensor:
    """The pixels of a picture, from its upper left corner."""
    return torch.from_numpy(np.asarray(picture)[:size, :size].astype(np.float32) / 255 - 0.5).flatten()


def letters(samples: list[Sample]) -> Tensor:
    """How often each byte occurs in the captions."""
    bytes_of = [np.frombuffer(sample.caption.encode(), np.uint8) for sample in samples]
    counts = [np.bincount(caption, minlength=LETTERS) for caption in bytes_of]
    return torch.from_numpy(np.stack(counts)).float()


@functools.cache
def probe(name: str) -> Tensor:
    """The inputs of the fixed sample by which an encoder is known again."""
    return pixels(8, FIXED.open())[None] if name == NAMES[0] else letters([FIXED])


Change = Callable[[str, Tensor], Tensor]
"""From a modality and the features of a batch to the features that the teacher gives in their place."""


def teacher(change: Change = lambda _, features: features, **about: Any) -> Teacher:
    """Linear maps of pixels and of letters, with features of the data that ``change`` has changed.

    Features of the fixed sample are never changed, so that a changed teacher is the same teacher.
    """

    def encode(name: str, inputs: Tensor) -> Tensor:
        features = inputs @ projection(name)
        return features if torch.equal(inputs, probe(name)) else change(name, features)

    images, texts = (functools.partial(encode, name) for name in NAMES)
    encoders = {
        NAMES[0]: image_encoder(functools.partial(pixels, 8), images, WIDTH, torch.device("cpu")),
        NAMES[1]: Encoder(letters, texts, WIDTH),
    }
    return Teacher({"weights": "0", **about}, encoders, scale=100.0)


def write_features(
    output: Path, data: Data, teacher: Teacher, *, workers: int = 0, **settings: Any
) -> Features:
    """Write a folder of the data's features by the teacher; the folder, opened."""
    write(output, data, teacher, {**SETTINGS, **settings}, workers)
    return Features(str(output))


def record_batch_sizes(sizes: list[int], name: str = NAMES[0], *, kill_at: int | None = None) -> Change:
    """A change that changes nothing: it appends the number of rows of each batch of a modality to ``sizes``.

    With ``kill_at`` the process is killed in that batch, counted from 1, as by ``kill -9``.
    """

    def record(called: str, features: Tensor) -> Tensor:
        if called == name:
            sizes.append(len(features))
            if len(sizes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return features

    return record


def write_killed_in_batch(batch: int, output: Path, data: Data) -> None:
    """Write a folder of features in a process that is killed in that batch of captions, counted from 1."""
    killed = in_process(
        write_features, output, data, teacher(record_batch_sizes([], NAMES[1], kill_at=batch))
    )
    assert killed == -signal.SIGKILL


def started(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """A forked process, started, that calls a function; an exit code that this returns is the process's."""

    def call() -> None:
        os.environ.update(environment)
        tqdm.set_lock(threading.RLock())  # its own is shared with forks, and stays locked when one is killed
        torch.set_num_threads(1)
        returned = function(*args)
        sys.exit(returned if isinstance(returned, int) else 0)

    process = forks.Process(target=call)
    process.start()
    return process


def in_process(function: Callable[..., Any], *args: Any) -> int:
    """Call a function in a forked process; its exit code, −9 say where the signal 9 has killed it."""
    process = started(function, *args)
    process.join()
    return int(process.exitcode)


CALLS = {"open", "write", "flush", "fsync", "replace", "unlink", "mkdir"}
"""Functions that change a file or a folder."""


def kill_at_call(at: int) -> None:
    """Let this process be killed at a call, counted from 0, by which a folder of features is changed.

    Counted are those in ``folder.py`` and those of ``pathlib`` but its openings, which read pictures: others
    write into memory, as pickles are hashed, or onto the terminal.
    """
    calls = itertools.count()

    def kill(frame: Any, event: str, called: Any) -> None:  # is called at each call of a function
        if event != "c_call" or called.__name__ not in CALLS:
            return
        module = frame.f_globals["__name__"]
        is_of_pathlib = module.startswith("pathlib") and called.__name__ != "open"
        if (is_of_pathlib or module == Draft.__module__) and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(kill)


def under_torchrun(function: Callable[..., Any], *args: Any) -> None:
    """Call a function in two processes with the variables of torchrun, which must end without an error."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [started(function, *args, RANK=str(rank), **group) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def contents_of_files(folder: Path) -> dict[str, bytes]:
    """The bytes of each file of a folder by its name, without the lock, which stays."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def times_of_writing(folder: Path) -> dict[str, int]:
    """When each file of a folder was written, by its name, without the lock."""
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != ".lock"}


def contents_without_command(folder: str | Path) -> dict[str, bytes]:
    """As :func:`contents_of_files`, without ``folder.json``, which has the command and its ``--output``."""
    return {
        name: content for name, content in contents_of_files(Path(folder)).items() if name != "folder.json"
    }


def flip_a_bit(file: Path) -> None:
    """Change one bit in the middle of a file's numbers, in place."""
    header = 128  # bytes, of a file of NumPy
    content = bytearray(file.read_bytes())
    content[(header + len(content)) // 2] ^= 1
    file.write_bytes(content)


def data_of(kind: str, folder: Path, captions: list[str] | None = None) -> Data:
    """The pairs of a CSV file or of a webdataset, which is written into a folder."""
    folder.mkdir(exist_ok=True)
    return csv_data(csv_table(folder, captions)) if kind == "csv" else Shards(shards(folder, captions))


def prepare_otherwise(folder: Path, modality: str) -> None:
    """Change the mean and variance of pixels, or the tokenizer, of an encoder of ``rankloss sample``."""
    if modality == NAMES[0]:
        file = folder / "image_encoder/config.json"
        config = json.loads(file.read_text())
        config["pretrained_cfg"].update(mean=[0.0] * 3, std=[1.0] * 3)
    else:
        file = folder / "text_encoder/tokenizer.json"
        config = json.loads(file.read_text())
        words = config["model"]["vocab"]
        config["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    file.write_text(json.dumps(config))
