"""Options of one kind of data beside another kind: ``rankloss features``, ``evaluate`` and ``heads``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_teacher import ROWS, csv_table, dataset, shards

from rankloss_features import data, train_heads
from rankloss_features.errors import flag
from rankloss_trainers.console import main

# Nothing is there: neither pairs nor models are read before an option is refused.
COMMANDS = {
    "features": "--image-encoder none --text-encoder none --output {}/x",
    "evaluate": "--model local-dir:none",
    "heads": "--image-encoder none --text-encoder none --output {}/x",
}
MISSING = {"csv": "none.csv", "webdataset": "none.tar", "datasets": "folder"}
NOUNS = {"csv": "a CSV file", "webdataset": "a webdataset", "datasets": "a folder of datasets"}
OPTIONS = [(kind, name) for kind, options in data.OPTIONS.items() for name in options]
"""The kind of data of each option, and its name."""
OF_OTHERS = [
    (kind_of_data, kind_of_option, name)
    for kind_of_data in MISSING
    for kind_of_option, name in OPTIONS
    if kind_of_option != kind_of_data
]
"""Every kind of data with every option of another kind."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    shards(folder)
    csv_table(folder)
    datasets.DatasetDict({"train": dataset(folder)}).save_to_disk(folder / "images")
    dataset(folder).save_to_disk(folder / "one-table")
    return folder


# Below the fixture's folder.
PLACES = {"csv": "pairs.csv", "webdataset": "{0..1}.tar", "datasets": "images"}


def parsed(*arguments: str) -> argparse.Namespace:
    """The options of data on a command line."""
    parser = argparse.ArgumentParser()
    data.add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("kind_of_data", "kind_of_option", "name"), OF_OTHERS)
def test_an_option_of_another_kind_of_data_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: Any, command: str, kind_of_data: str, kind_of_option: str, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    file = f"{tmp_path}/{MISSING[kind_of_data]}"
    value = data.OPTIONS[kind_of_option][name].default  # which is refused, too, where a user gives it
    options = ["--data", file, flag(name), value]
    assert main([command, *COMMANDS[command].format(tmp_path).split(), *options]) == 1
    its_data = f"an option of {NOUNS[kind_of_option]}"
    reason = f"{flag(name)} {value!r} is {its_data}: --data {file} is {NOUNS[kind_of_data]}"
    assert capsys.readouterr().err == f"rankloss {command}: {reason}\n"


def captions_of(*arguments: str) -> list[str]:
    """The captions of the data that a command line opens."""
    return [caption for block in data.open_data(parsed(*arguments)).pairs() for caption in block.captions]


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_an_option_that_is_left_out_has_its_default(place: Path, kind: str, name: str) -> None:
    file = str(place / PLACES[kind])
    captions = captions_of("--data", file)
    assert captions == captions_of("--data", file, flag(name), data.OPTIONS[kind][name].default)
    assert len(captions) == ROWS


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_the_help_shows_the_default_of_an_option(kind: str, name: str) -> None:
    parser = argparse.ArgumentParser()
    data.add_options(parser)
    without_spaces = "".join(parser.format_help().split())  # which wrap words in the help
    default = data.OPTIONS[kind][name].default.replace("\t", r"\t")
    # Behind the option, and before the parentheses of any other.
    assert re.search(rf"{flag(name)}[^-][^()]*\(default:{re.escape(default)}\)", without_spaces)


def test_the_type_that_is_given_is_the_kind_of_data_whatever_its_name(tmp_path: Path) -> None:
    file = str(tmp_path / "pairs.tar")  # by its name a webdataset
    with pytest.raises(
        ValueError, match=f"--text-key 'a' is an option of a webdataset: --data {file} is a CSV"
    ):
        data.open_data(parsed("--data", file, "--dataset-type", "csv", "--text-key", "a"))


def test_a_split_of_a_single_table_is_refused(place: Path) -> None:
    """Also the split ``train``, which is taken of other data where none is named."""
    file = str(place / "one-table")
    assert data.open_data(parsed("--data", file)).counts == [ROWS]
    for split in ("test", "train"):
        with pytest.raises(ValueError, match=f"--split {split}: {file} is a single table, without splits"):
            data.open_data(parsed("--data", file, "--split", split))


def heads_options(place: Path, val_data: str, *options: str) -> argparse.Namespace:
    """The command line of heads that train on a CSV file, with other data held out."""
    encoders = ["--image-encoder", "a", "--text-encoder", "b", "--output", "x"]
    files = ["--data", str(place / "pairs.csv"), "--val-data", val_data]
    return train_heads._parser().parse_args([*encoders, *files, *options])


def test_heads_take_the_options_of_either_kind_where_held_out_pairs_are_of_another(place: Path) -> None:
    options = ("--csv-caption-key", "title", "--text-key", "txt")
    args = heads_options(place, str(place / "{0..1}.tar"), *options)
    for opened in (data.open_data(args), data.open_data(args, args.val_data)):
        assert sum(len(block.captions) for block in opened.pairs()) == ROWS


def test_heads_refuse_an_option_of_neither_kind(place: Path) -> None:
    args = heads_options(place, str(place / "{0..1}.tar"), "--split", "train")
    places = "--data .*pairs.csv is a CSV file, and --val-data .*tar is a webdataset"
    with pytest.raises(ValueError, match=f"--split 'train' is an option of a folder of datasets: {places}"):
        data.open_data(args)


def test_heads_refuse_held_out_pairs_of_no_kind(place: Path) -> None:
    with pytest.raises(ValueError, match=r"--val-data none\.xyz is no folder"):
        data.open_data(heads_options(place, "none.xyz"))
