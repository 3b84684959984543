"""The sample: its pairs, its models in their libraries, and the folder that it may not overwrite."""

from __future__ import annotations

import csv
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


def rows(folder: Path, part: str) -> list[dict[str, str]]:
    with open(folder / f"{part}.csv", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


Parts = dict[str, list[dict[str, str]]]


@pytest.fixture
def parts(sample_folder: Path) -> Parts:
    """The rows of both sides."""
    return {part: rows(sample_folder, part) for part in ("train", "val")}


def test_64_pictures_have_captions_of_their_own_that_end_in_their_class(parts: Parts) -> None:
    assert [len(part) for part in parts.values()] == [48, 16]
    both = [*parts["train"], *parts["val"]]
    assert len({row["filepath"] for row in both}) == len({row["title"] for row in both}) == 64
    assert {row["title"].split()[-1] for row in both} == {row["class"] for row in both}
    assert len({np.asarray(Image.open(row["filepath"])).tobytes() for row in both}) == 64


def test_every_product_has_two_pictures_on_one_side(parts: Parts) -> None:
    products = {part: [row["product"] for row in listed] for part, listed in parts.items()}
    assert not {*products["train"]} & {*products["val"]}
    assert all(listed.count(x) == 2 for listed in products.values() for x in listed)


def test_both_sides_have_the_same_words(parts: Parts) -> None:
    words = {part: {w for row in listed for w in row["title"].split()} for part, listed in parts.items()}
    assert words["train"] == words["val"]


def test_the_pictures_are_the_same_at_every_call(sample_folder: Path, tmp_path: Path) -> None:
    sample.write_pairs(tmp_path / "again")
    for file in (sample_folder / "pictures").iterdir():
        assert (tmp_path / "again/pictures" / file.name).read_bytes() == file.read_bytes()


def test_both_clips_encode_pictures_and_titles(sample_folder: Path) -> None:
    row = rows(sample_folder, "val")[0]
    picture, name = Image.open(row["filepath"]), f"local-dir:{sample_folder}/open_clip"
    model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True)
    with torch.no_grad():
        features = model.eval()(transform(picture)[None], open_clip.get_tokenizer(name)([row["title"]]))[:2]
    assert [x.shape for x in features] == [(1, 32), (1, 32)]
    processor = AutoProcessor.from_pretrained(sample_folder / "transformers")
    theirs = AutoModel.from_pretrained(sample_folder / "transformers")
    inputs: Any = processor(text=[row["title"]], images=picture, return_tensors="pt")
    assert theirs(**inputs).text_embeds.shape == (1, 32)
    assert len(processor.tokenizer.tokenize(row["title"])) == 4  # a word is a token


def test_both_encoders_are_known_to_the_features_command(sample_folder: Path) -> None:
    assert (
        image_encoders.load(str(sample_folder / "image_encoder"), None, CPU).encoders["image_features"].width
        == 64
    )
    texts = text_encoders.load(str(sample_folder / "text_encoder"), 8, CPU).encoders["text_features"]
    red, blue = texts.encode(["a red circle", "a blue circle"])
    assert texts.width == 32
    assert not torch.equal(red, blue)


def test_the_command_writes_the_folder_and_names_a_next_one(tmp_path: Path, capsys: Any) -> None:
    assert main(["sample", "--output", str(tmp_path / "new")]) == 0
    assert f"rankloss evaluate --model local-dir:{tmp_path}/new/open_clip" in capsys.readouterr().out
    assert (tmp_path / "new/val.csv").is_file()


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["sample", "--output", str(tmp_path)]) == 1
    assert f"--output {tmp_path} is there and not empty: give a new folder" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["mine.txt"]
