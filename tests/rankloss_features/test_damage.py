"""Every reader refuses a damaged folder; the command that wrote it refuses it, too, or mends it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

if not all(map(importlib.util.find_spec, ("transformers", "accelerate", "sentence_transformers"))):
    pytest.skip("a trainer is not installed", allow_module_level=True)

import tiny_sentences
import tiny_transformers
from tiny_teacher import ROWS, WIDTH, csv_data, data_of, files, table, teacher, written

from rankloss_features.checking import report
from rankloss_features.data import Data
from rankloss_features.folder import NAMES, read_about, write_about
from rankloss_open_clip.arguments import check_run
from rankloss_trainers import catalog
from rankloss_trainers.sentence_transformers import ContrastiveLoss


class Place(NamedTuple):
    """A folder, its data, the folder of another data set, and the readers of folders."""

    whole: Path
    data: Data
    other: Path
    readers: dict[str, Callable[[str], Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("damage")
    data = data_of("csv", folder / "data")
    written(folder / "whole", data, teacher())
    (folder / "others").mkdir()
    others = csv_data(table(folder / "others", order=[*range(1, ROWS), 0]))
    written(folder / "other", others, teacher(weights="1"))
    model, clip = tiny_sentences.tiny(folder), tiny_transformers.clip()

    def open_clip(path: str) -> None:
        check_run(catalog.choose("rankclip", {"reference_features": path}), SimpleNamespace())

    def hugging_face(path: str) -> None:
        options = {"reference_features": path}
        tiny_transformers.trainer(folder, model=clip, loss="rankclip", loss_options=options)

    readers = {
        "open_clip": open_clip,
        "Hugging Face": hugging_face,
        "sentence-transformers": lambda path: ContrastiveLoss(model, options={"reference_features": path}),
        "--check": lambda path: report(path, data),
    }
    return Place(folder / "whole", data, folder / "other", readers)


Change = Callable[[Path, Path], Any]
"""Damage to a file of a folder, of which another data set's is given."""


def bytes_of(change: Callable[[bytes], bytes]) -> Change:
    return lambda file, _: file.write_bytes(change(file.read_bytes()))


def array_of(change: Callable[[Any], Any]) -> Change:
    return lambda file, _: np.save(file, change(np.load(file)))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


ANY: dict[str, Change] = {
    "missing": lambda file, _: file.unlink(),
    "empty": bytes_of(lambda _: b""),
    "cut in its beginning": bytes_of(lambda x: x[:70]),
    "cut at its end": bytes_of(lambda x: x[:-9]),
    "zeros": bytes_of(lambda x: bytes(len(x))),
    "a flipped bit": bytes_of(flipped),
    "of another data set": lambda file, other: shutil.copy(other, file),
}
ARRAY: dict[str, Change] = {
    "of zeros": array_of(np.zeros_like),
    "reversed": array_of(lambda x: x[::-1]),
    "of another type": array_of(lambda x: x.astype(np.float64)),
    "of objects": array_of(lambda x: x.astype(object)),
    "of fewer rows": array_of(lambda x: x[:-1]),
}
FILES = {
    "features.json": {**ANY, "a list": bytes_of(lambda _: b"[]"), "a number": bytes_of(lambda _: b"3")},
    **{f"{name}.npy": {**ANY, **ARRAY} for name in (*NAMES, "pairs", "rows")},
}


def entries(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Change:
    """Damage to the entries of features.json, of which another data set's are given."""

    def damage(folder: Path, other: Path) -> None:
        about, others = (json.loads((x / "features.json").read_text()) for x in (folder, other))
        change(about, others)
        (folder / "features.json").write_text(json.dumps(about))

    return damage


def field(name: str, value: Any) -> Change:
    return entries(lambda about, _: about.pop(name) if value is None else about.update({name: value}))


def field_cut(name: str) -> Change:
    return entries(lambda about, _: about.update({name: about[name][:-1]}))


def fields_swapped(name: str, other: str) -> Change:
    return entries(lambda about, _: about.update({name: about[other], other: about[name]}))


def field_copied(name: str) -> Change:
    return entries(lambda about, others: about.update({name: others[name]}))


TEXTS = ("dtype", "precision", "command", "rows_hash", "hash")
FIELDS: dict[str, list[Any]] = {
    name: [None, "x", []]
    for name in (
        *(*TEXTS, "format", "complete", "teacher", "scale"),
        *("widths", "batch_size", "rows", "data", "skipped", "spaces"),
    )
}
FIELDS["widths"] += [{}, {NAMES[0]: WIDTH}, {"../other/x": WIDTH}, {**dict.fromkeys(NAMES, WIDTH), "x": 1}]
FIELDS["rows"] += [ROWS - 1, 0, -1, "40", 4e1, 10**30]


def swapped(first: str, second: str) -> Change:
    def change(folder: Path, _: Path) -> None:
        (folder / first).rename(folder / "x")
        (folder / second).rename(folder / first)
        (folder / "x").rename(folder / second)

    return change


def on_all(change: Change, *names: str) -> Change:
    return lambda folder, other: [change(folder / name, other / name) for name in names]


ARRAYS = [f"{name}.npy" for name in NAMES]
DAMAGES: dict[str, Change] = {
    **{f"{name}, {kind}": on_all(change, name) for name, x in FILES.items() for kind, change in x.items()},
    **{f"{name} = {value}": field(name, value) for name, x in FIELDS.items() for value in x},
    **{f"{name}, cut": field_cut(name) for name in TEXTS},
    **{f"{x} and {y} swapped": fields_swapped(x, y) for x, y in zip([*FIELDS][1:], FIELDS, strict=False)},
    **{f"{x} of another data set": field_copied(x) for x in ("teacher", "data", "rows_hash", "hash")},
    "arrays swapped": swapped(*ARRAYS),
    "hashes swapped": swapped("pairs.npy", "rows.npy"),
    "rows reversed, not pairs": on_all(ARRAY["reversed"], *ARRAYS, "rows.npy"),
    "all reversed": on_all(ARRAY["reversed"], *ARRAYS, "rows.npy", "pairs.npy"),
    "pairs of another data set": on_all(ANY["of another data set"], "pairs.npy", "rows.npy"),
    "arrays of another data set": on_all(ANY["of another data set"], *ARRAYS, "pairs.npy", "rows.npy"),
}


def refused(read: Callable[[str], Any], folder: Path) -> bool:
    """Refusal by an error that names the folder."""
    try:
        read(str(folder))
    except ValueError as error:
        return str(folder) in str(error)
    return False


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_or_mended(place: Place, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(place.whole, tmp_path / "damaged"))
    DAMAGES[damage](folder, place.other)
    for name, read in place.readers.items():
        assert refused(read, folder), name
    if not refused(lambda path: written(Path(path), place.data, teacher()), folder):
        assert files(folder) == files(place.whole)
        for read in place.readers.values():
            read(str(folder))


def test_a_folder_of_the_earlier_format_says_how_to_renew_it(place: Place, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.whole, tmp_path / "old"))
    field("format", None)(folder, folder)
    for read in (*place.readers.values(), lambda path: written(Path(path), place.data, teacher())):
        with pytest.raises(ValueError, match=r"renew the folder, delete it and give its command again"):
            read(str(folder))


def test_a_command_of_unknown_origin_is_quoted(place: Place, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.whole, tmp_path / "x"))
    command = "rm -rf ~ #\x1b[2J"
    write_about(folder, {**(read_about(folder) or {}), "complete": False, "command": command})
    for read in place.readers.values():
        with pytest.raises(ValueError, match=r"anyone may have written, .*'rm -rf ~ #\\x1b\[2J'"):
            read(str(folder))
    with pytest.raises(ValueError, match=r"account, its command was 'rm -rf ~ #\\x1b\[2J'"):
        written(folder, place.data, teacher(), batch_size=4)
