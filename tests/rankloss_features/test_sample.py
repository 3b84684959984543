"""The sample: its pairs, its models in their libraries, and the folder that it may not overwrite."""

from __future__ import annotations

import csv
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from rankloss_features import image_encoders, sample, text_encoders
from rankloss_trainers.console import main

CPU = torch.device("cpu")


def read_rows(folder: Path, part: str) -> list[dict[str, str]]:
    """The rows of a part's table, ``train`` or ``val``, by the names of its columns."""
    with open(folder / f"{part}.csv", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


Parts = dict[str, list[dict[str, str]]]


@pytest.fixture
def parts(sample_folder: Path) -> Parts:
    """The rows of ``train.csv`` and of ``val.csv``."""
    return {part: read_rows(sample_folder, part) for part in ("train", "val")}


def test_48_pairs_are_trained_on_and_16_held_out(parts: Parts) -> None:
    """Two pictures of each product; of each of eight colours three shapes are trained on, one is held out."""
    assert (len(parts["train"]), len(parts["val"])) == (48, 16)


def test_every_picture_is_another_and_has_a_caption_of_its_own(parts: Parts) -> None:
    rows = [*parts["train"], *parts["val"]]
    assert len({row["filepath"] for row in rows}) == 64
    assert len({row["title"] for row in rows}) == 64
    assert len({np.asarray(Image.open(row["filepath"])).tobytes() for row in rows}) == 64


def test_a_caption_ends_in_the_class_of_its_picture(parts: Parts) -> None:
    for row in [*parts["train"], *parts["val"]]:
        assert row["title"].split()[-1] == row["class"]


def test_every_product_has_two_pictures_on_one_side(parts: Parts) -> None:
    trained, held_out = (Counter(row["product"] for row in parts[part]) for part in ("train", "val"))
    assert not trained.keys() & held_out.keys()
    assert {*trained.values(), *held_out.values()} == {2}


def test_both_sides_have_the_same_words(parts: Parts) -> None:
    trained, held_out = (" ".join(row["title"] for row in parts[part]) for part in ("train", "val"))
    assert {*trained.split()} == {*held_out.split()}


def test_the_pictures_are_the_same_at_every_call(sample_folder: Path, tmp_path: Path) -> None:
    sample.write_pairs(tmp_path / "again")
    for file in (sample_folder / "pictures").iterdir():
        assert (tmp_path / "again/pictures" / file.name).read_bytes() == file.read_bytes()


def test_open_clips_model_encodes_pictures_and_titles(sample_folder: Path) -> None:
    row, name = read_rows(sample_folder, "val")[0], f"local-dir:{sample_folder}/open_clip"
    model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True)
    pictures = transform(Image.open(row["filepath"]))[None]
    tokens = open_clip.get_tokenizer(name)([row["title"]])
    with torch.no_grad():
        image_features, text_features, _ = model.eval()(pictures, tokens)
    assert image_features.shape == text_features.shape == (1, 32)


def test_transformers_model_encodes_pictures_and_titles_of_a_token_a_word(sample_folder: Path) -> None:
    row, folder = read_rows(sample_folder, "val")[0], sample_folder / "transformers"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    picture = Image.open(row["filepath"])
    inputs: Any = processor(text=[row["title"]], images=picture, return_tensors="pt")
    assert model(**inputs).text_embeds.shape == (1, 32)
    words = row["title"].split()
    assert len(words) == 4  # so that a title of one word cannot hide a tokenizer of whole titles
    assert len(processor.tokenizer.tokenize(row["title"])) == len(words)


def test_the_image_encoder_is_known_to_the_features_command(sample_folder: Path) -> None:
    teacher = image_encoders.load(str(sample_folder / "image_encoder"), None, CPU)
    assert teacher.encoders["image_features"].width == 64


def test_the_text_encoder_is_known_to_the_features_command(sample_folder: Path) -> None:
    texts = text_encoders.load(str(sample_folder / "text_encoder"), 8, CPU).encoders["text_features"]
    red, blue = texts.encode(["a red circle", "a blue circle"])
    assert texts.width == 32
    assert not torch.equal(red, blue)


def test_the_command_writes_the_folder_and_names_a_command_to_try(tmp_path: Path, capsys: Any) -> None:
    assert main(["sample", "--output", str(tmp_path / "new")]) == 0
    assert f"rankloss evaluate --model local-dir:{tmp_path}/new/open_clip" in capsys.readouterr().out
    assert (tmp_path / "new/val.csv").is_file()


def test_the_command_to_try_is_quoted_for_a_shell(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "with a space"
    assert main(["sample", "--output", str(folder)]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    words = ["--model", f"local-dir:{folder}/open_clip", "--data", f"{folder}/val.csv"]
    assert shlex.split(command) == ["rankloss", "evaluate", *words, "--ids-key", "product"]


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["sample", "--output", str(tmp_path)]) == 1
    assert f"--output {tmp_path} is there and not empty: give a new folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
