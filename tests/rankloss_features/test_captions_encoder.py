"""``--text-encoder captions``: fitted once, stored in the folder, and refused where words cannot teach."""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import CAPTIONS, ROWS, csv_data, data_of, files, flip, in_process, table, teacher, written
from torch import Tensor

from rankloss_features import Features, text_encoders
from rankloss_features.caching import Spec
from rankloss_features.captions import CaptionVectors
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Teacher
from rankloss_trainers.console import main

IMAGES, TEXTS = NAMES
THINGS = ("りんご", "車", "犬", "猫", "家")
JAPANESE = [f"{colour}{thing}" for colour in ("赤い", "青い", "白い", "黒い") for thing in THINGS]


def of_captions(name: str, kill_at: int | None = None) -> Teacher:
    """Two encoders, of which that of images ends the process at a batch."""
    calls = iter(range(1, 100))

    def kill(_: str, features: Tensor) -> Tensor:
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return features

    texts = text_encoders.load(name, 8, torch.device("cpu"))
    encoders = {IMAGES: teacher(kill).encoders[IMAGES], **texts.encoders}
    return Teacher(texts.about, encoders, spaces="separate")


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
@pytest.mark.parametrize("kill_at", [1, 4])
def test_rows_are_those_of_the_stored_vectors_and_a_killed_run_goes_on_with_them(
    tmp_path: Path, kind: str, kill_at: int
) -> None:
    data, output = data_of(kind, tmp_path / "data"), tmp_path / "output"
    features = written(tmp_path / "whole", data, of_captions("captions:4")).check()
    captions = [caption for block, _ in data.pairs() for caption in block]
    stored = CaptionVectors.load(tmp_path / "whole/captions.npz")
    assert stored.tokens == CaptionVectors.fit(captions, dimensions=4).tokens
    rows = features.take(np.arange(ROWS))[TEXTS]
    np.testing.assert_allclose(rows, stored.transform(captions), atol=1e-3)
    assert features.about["teacher"] == {"text_encoder": "captions", "dimensions": 4, "characters": False}
    assert in_process(written, output, data, of_captions("captions:4", kill_at)) == -signal.SIGKILL
    written(output, data, of_captions("captions:4")).check()
    assert files(output) == files(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"another teacher, .*'dimensions': 4.* not .*'dimensions': 5"):
        written(output, data, of_captions("captions:5"))
    flip(output / "captions.npz")
    write_again = functools.partial(written, output, data, of_captions("captions:4"))
    for read in (lambda: Features(str(output)).check(), write_again):
        with pytest.raises(ValueError, match=r"output/captions\.npz is not as it was written"):
            read()


def test_many_captions_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoders, "MOST_CAPTIONS", 20)
    written(tmp_path / "output", data_of("csv", tmp_path), of_captions("captions:2")).check()
    few = CaptionVectors.load(tmp_path / "output/captions.npz").tokens
    assert 2 <= len(few) < len({*" ".join(CAPTIONS).split()})


def command(folder: Path, captions: list[str], *options: str) -> int:
    data = ["--data", str(table(folder, captions)), "--workers", "0", "--output", str(folder / "x")]
    return main(["features", *data, *options])


def test_the_share_of_captions_that_share_a_word_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = [f"word{i}" for i in range(38)] + ["two words"] * 2
    for name, captions, level, share in (
        ("many", CAPTIONS, logging.INFO, "100.0 %"),
        ("few", few, logging.WARNING, "5.0 %"),
    ):
        (tmp_path / name).mkdir()
        caplog.clear()
        assert command(tmp_path / name, captions, "--text-encoder", "captions:1") == 0
        (found,) = (record for record in caplog.records if "batch of 250" in record.message)
        assert (found.levelno, found.message.startswith(share)) == (level, True)


def test_a_language_without_spaces_is_counted_by_characters(tmp_path: Path, capsys: Any) -> None:
    assert command(tmp_path, JAPANESE, "--text-encoder", "captions:4") == 1
    assert "captions:characters" in capsys.readouterr().err
    assert command(tmp_path, JAPANESE, "--text-encoder", "captions:8:characters") == 0
    rows = Features(str(tmp_path / "x")).check().take(np.arange(len(JAPANESE)))[TEXTS]
    similarity = rows @ rows.T
    of_colour, of_thing = similarity[0, 1:5].mean(), similarity[0, 5::5].mean()
    of_neither = np.delete(similarity[0], [*range(5), *range(5, 20, 5)]).mean()
    assert min(of_colour, of_thing) > of_neither + 0.1


@pytest.mark.parametrize(
    ("captions", "encoder", "message"),
    [
        (["!?", "...", "—"], "captions", "none of 3 has a word; the first is '!\\?'"),
        (["a dog"] * 5, "captions", "all 5 are equal, 'a dog'"),
        (["one", "two", "three"], "captions", "no token occurs in two captions"),
        (["a dog", "a cat", "a dog and a cat"], "captions", "dimensions: must be at most 3, .*; got 256"),
        (CAPTIONS, "captions:0", "captions is followed by :DIMENSIONS, .*; got 'captions:0'"),
        (CAPTIONS, "captions:characters:8", "got 'captions:characters:8'"),
    ],
)
def test_captions_that_cannot_teach_are_refused_before_the_first_row(
    tmp_path: Path, captions: list[str], encoder: str, message: str, capsys: Any
) -> None:
    assert command(tmp_path, captions, "--text-encoder", encoder) == 1
    said = capsys.readouterr().err
    assert said.startswith("rankloss features: --text-encoder captions")
    assert re.search(message, said), said
    assert not [*tmp_path.glob("x/[!.]*")]


def test_a_training_names_it_as_the_command_does(tmp_path: Path) -> None:
    for text, options in {
        "captions": ["--text-encoder", "captions"],
        "captions:64:characters": ["--text-encoder", "captions:64:characters"],
        "text=captions": ["--text-encoder", "captions"],
        "image=test_vit,text=captions:64": ["--image-encoder", "test_vit", "--text-encoder", "captions:64"],
    }.items():
        assert Spec.of(text).check().options() == options
    with pytest.raises(ValueError, match="--text-encoder captions:many: captions is followed by"):
        Spec.of("text=captions:many").check()
    teacher = Spec.of("captions:4").load(torch.device("cpu"), 8)
    assert written(tmp_path / "x", csv_data(table(tmp_path)), teacher).check().common_space
