"""A folder is read as it was written or refused by its file, and bound to its own pairs; its components."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import re
import shutil
import tarfile
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip_train.data
import pytest
import torch
from PIL import Image
from tiny_teacher import (
    CAPTIONS,
    ROWS,
    SHARD,
    contents_of_files,
    csv_data,
    csv_table,
    data_of,
    flip_a_bit,
    picture,
    shards,
    teacher,
    write_features,
)

import rankloss_trainers
from rankloss_features import Features, bind, opening, sources
from rankloss_features import data as data_module
from rankloss_features.binding import COLUMN, references
from rankloss_features.checking import report
from rankloss_features.data import IMAGES, Data, Sample, Shards, Table, is_first_pair, open_data
from rankloss_features.folder import NAMES, PICTURES, identity_of, numbers_of, read_about, write_about
from rankloss_features.teachers import Encoder, Teacher
from samples import add_sample
from stored_features import features_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The pairs of a CSV file."""
    return data_of("csv", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    """A folder ``whole`` of the data, and a folder ``other`` of their pairs in another order."""
    place = tmp_path_factory.mktemp("folders")
    write_features(place / "whole", data, teacher())
    (place / "others").mkdir()
    others = csv_data(csv_table(place / "others", order=[*range(1, ROWS), 0]))
    write_features(place / "other", others, teacher(weights="1"))
    return place


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_pickled", [False, True], ids=["opened", "pickled"])
def test_the_files_are_arrays_of_numpy_in_the_order_of_the_rows(
    place: Path, name: str, is_pickled: bool
) -> None:
    """Also of a folder that was pickled, as it is for another process."""
    features = Features(str(place / "whole")).check()
    if is_pickled:
        features = pickle.loads(pickle.dumps(features))
    rows = np.array([39, 0, 12, 12])  # of several shards, without their order, and one of them twice
    whole = np.concatenate([np.load(file) for file in sorted((place / "whole").glob(f"{name}-*.npy"))])
    np.testing.assert_array_equal(features.arrays[name][:], whole)
    np.testing.assert_array_equal(features.arrays[name][11:37:2], whole[11:37:2])
    np.testing.assert_array_equal(features.take(rows)[name], whole[rows])


def test_a_folder_has_a_row_for_each_pair(place: Path) -> None:
    features = Features(str(place / "whole"))
    assert {len(array[:]) for array in features.arrays.values()} == {ROWS}
    assert read_about(place / "whole")["rows"] == ROWS


@pytest.mark.parametrize(
    "rows", [[ROWS], [-1], [True] * ROWS, [0.5]], ids=["after the last", "negative", "booleans", "a fraction"]
)
def test_rows_that_a_folder_has_not_are_refused(place: Path, rows: list[Any]) -> None:
    array = Features(str(place / "whole")).arrays[NAMES[0]]
    with pytest.raises(IndexError, match=f"rows .*from 0 to {ROWS - 1}"):
        array[rows]


# --- damage -----------------------------------------------------------------------------------------------

SHARDS = [f"{name}-00001.npy" for name in (*NAMES, PICTURES)]
HEADER = 128  # bytes, of a file of NumPy
CHANGES: dict[str, Callable[[bytes, bytes, bytes], bytes | None]] = {
    "missing": lambda *_: None,
    "empty": lambda *_: b"",
    "a list": lambda *_: b"[]",
    "cut": lambda content, *_: content[:-9],
    "longer": lambda content, *_: content + b"0",
    "a bit": lambda content, *_: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
    "a digit of the header or an entry": lambda content, *_: re.sub(rb"[468]", b"5", content, count=1),
    "reversed": lambda content, *_: content[:HEADER] + content[HEADER:][::-1],
    "of the first shard of texts": lambda content, of_texts, _: of_texts,
    "of another folder": lambda content, _, of_other: of_other,
}
"""The damaged content: of a file's, of the first shard of texts', and of that file's in another folder."""

every_change = pytest.mark.parametrize("change", CHANGES)


def damaged(place: Path, folder: Path, file: str, change: str) -> Path:
    """A copy of the whole folder, in which a file is changed or missing."""
    shutil.copytree(place / "whole", folder)
    sources = (folder / file, folder / "text_features-00000.npy", place / "other" / file)
    content = CHANGES[change](*(source.read_bytes() for source in sources))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    return folder


@every_change
@pytest.mark.parametrize("file", ["folder.json", "pairs.npy", *SHARDS])
def test_a_damaged_file_is_named(place: Path, data: Data, tmp_path: Path, file: str, change: str) -> None:
    """Or its folder, where ``folder.json`` is missing, or another folder's and no file fits it."""
    folder = damaged(place, tmp_path / "damaged", file, change)
    is_missing_or_anothers = file == "folder.json" and change in ("missing", "of another folder")
    named = str(folder if is_missing_or_anothers else folder / file)
    with pytest.raises(ValueError, match=named):
        Features(str(folder)).check()
    with pytest.raises(ValueError, match=named):
        report(str(folder), data)


@every_change
@pytest.mark.parametrize("file", SHARDS)
def test_the_folders_command_mends_a_damaged_shard(
    place: Path, data: Data, tmp_path: Path, file: str, change: str
) -> None:
    folder = damaged(place, tmp_path / "damaged", file, change)
    write_features(folder, data, teacher())
    assert contents_of_files(folder) == contents_of_files(place / "whole")


@every_change
@pytest.mark.parametrize("file", ["folder.json", "pairs.npy"])
def test_the_folders_command_does_not_go_on_with_damaged_entries_or_pairs(
    place: Path, data: Data, tmp_path: Path, file: str, change: str
) -> None:
    folder = damaged(place, tmp_path / "damaged", file, change)
    before = contents_of_files(folder)
    with pytest.raises(ValueError, match=str(folder)):
        write_features(folder, data, teacher())
    assert contents_of_files(folder) == before


def test_a_run_refuses_a_damaged_folder(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "whole", tmp_path / "damaged"))
    rankloss_trainers.create("rankclip", teacher=str(folder))
    flip_a_bit(folder / SHARDS[0])
    with pytest.raises(ValueError, match=f"{folder / SHARDS[0]} is not as it was written"):
        rankloss_trainers.create("rankclip", teacher=str(folder))


COMMAND = "rm -rf ~ #\x1b[2J"
"""The command of a folder that another made, with a character that clears a terminal."""
QUOTED = r"'rm -rf ~ #\\x1b\[2J'"
"""A regular expression of the command as an error may show it."""


@pytest.fixture
def unfinished(place: Path, tmp_path: Path) -> Path:
    """A folder that was not written to its end."""
    folder = Path(shutil.copytree(place / "whole", tmp_path / "x"))
    write_about(folder, {**(read_about(folder) or {}), "complete": False, "command": COMMAND})
    return folder


def test_an_unfinished_folder_is_refused_with_its_command(unfinished: Path) -> None:
    with pytest.raises(ValueError, match=f"unfinished.*{QUOTED}"):
        Features(str(unfinished))


def test_an_unfinished_folder_does_not_go_on_with_another_setting(unfinished: Path, data: Data) -> None:
    with pytest.raises(ValueError, match=f"begun with another batch_size, 8, not 4.*{QUOTED}"):
        write_features(unfinished, data, teacher(), batch_size=4)


@pytest.mark.parametrize(("name", "version"), [("features.json", 2), ("folder.json", 3)])
def test_a_folder_of_an_older_format_is_refused_with_its_command(
    data: Data, tmp_path: Path, name: str, version: int
) -> None:
    (tmp_path / name).write_text(json.dumps({"format": version, "rows": 7, "command": COMMAND}))
    words = f"{name} .*delete it and give its command again, {QUOTED}"
    with pytest.raises(ValueError, match=words):
        Features(str(tmp_path))
    with pytest.raises(ValueError, match=words):
        write_features(tmp_path, data, teacher())


# --- pairs ----------------------------------------------------------------------------------------------


def test_the_picture_of_a_sample_is_the_one_the_trainer_prefers() -> None:
    (listed,) = re.findall(r'rename\(image="([^"]+)"', inspect.getsource(open_clip_train.data))
    assert tuple(listed.split(";")) == IMAGES


@pytest.fixture
def turned(tmp_path: Path) -> tuple[Path, Image.Image]:
    """A file of a camera that was turned by a quarter, and its picture as the file stores it."""
    as_stored, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3)), Image.Exif()
    exif[0x0112] = 6  # the orientation: turned by a quarter
    as_stored.save(tmp_path / "a.png", exif=exif)
    return tmp_path / "a.png", as_stored


def opened(data: Data) -> np.ndarray:
    """The first picture, as features are computed of it."""
    list(data.pairs())
    ((sample,),) = data.read(0, [(0, 1)])
    return np.asarray(data.rendering.open(sample.source))


def test_the_cameras_orientation_does_not_count_in_a_table(turned: Any, tmp_path: Path) -> None:
    """As in open_clip's training."""
    file, as_stored = turned
    (tmp_path / "a.csv").write_text(f"filepath\ttitle\n{file}\ta\n")
    np.testing.assert_array_equal(opened(csv_data(tmp_path / "a.csv")), np.asarray(as_stored))


def test_the_cameras_orientation_does_not_count_in_shards(turned: Any, tmp_path: Path) -> None:
    """As in open_clip's training."""
    file, as_stored = turned
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "a", png=file.read_bytes(), txt=b"a")
    np.testing.assert_array_equal(opened(Shards(str(tmp_path / "a.tar"))), np.asarray(as_stored))


def test_the_cameras_orientation_counts_in_a_data_set(turned: Any, tmp_path: Path) -> None:
    """As where a training reads it."""
    file, as_stored = turned
    columns = {"image": [str(file)], "caption": ["a"]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "data")
    keys = {"image_column": "image", "caption_column": "caption"}
    data = open_data(Namespace(data=str(tmp_path / "data"), dataset_type="auto", **keys))
    trained = dataset[0]["image"].convert("RGB")
    assert trained.size == as_stored.size[::-1]
    np.testing.assert_array_equal(opened(data), np.asarray(trained))


# --- binding ----------------------------------------------------------------------------------------------


def pairs(*, is_named: bool) -> Any:
    """Pictures in memory, each named by a path or none of them, with seven captions in turn."""
    images = [{"bytes": picture(i), "path": f"{i}.png" if is_named else None} for i in range(ROWS)]
    columns = {"image": images, "caption": [f"a photograph of class {i % 7}" for i in range(ROWS)]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture(scope="module", params=[True, False], ids=["named", "nameless"])
def bindable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """Data that are not yet bound, and the folder of their features."""
    data, folder = pairs(is_named=request.param), tmp_path_factory.mktemp("bound")
    return data, write_features(folder / "x", Table(data, "image", "caption", data="given"), teacher()).path


CHANGED_ROW = 5


def with_another_caption(data: Any) -> Any:
    """The data with the caption ``another`` in one row."""
    return data.map(lambda row, i: {"caption": "another"} if i == CHANGED_ROW else row, with_indices=True)


CHOSEN = {
    "two rows exchanged": ([7, *range(1, 7), 0, *range(8, ROWS)], "row 0 .* row 7 of the 40"),
    "the last row left out": (range(ROWS - 1), "has 40 rows, .* has 39: row 39 is missing"),
    "two rows": ([3, 4], "row 0 .* row 3 of the 40"),
    "the first row again": ([*range(ROWS), 0], "row 40 .* row 0 of the 40"),
}
"""Rows that are chosen of the data, and the error of their binding."""
every_choice = pytest.mark.parametrize(("rows", "error"), CHOSEN.values(), ids=CHOSEN)
CHANGED_ERROR = f"row {CHANGED_ROW} .*'another', .* {ROWS} rows of .*/x$"


@every_choice
def test_chosen_rows_are_not_bound_and_their_user_is_told_to_bind_before(
    bindable: tuple[Any, str], rows: Any, error: str
) -> None:
    data, path = bindable
    with pytest.raises(ValueError, match=error) as refusal:
        bind(data.select(rows), path)
    assert "bind before" in str(refusal.value)


@every_choice
def test_a_report_refuses_chosen_rows(bindable: tuple[Any, str], rows: Any, error: str) -> None:
    data, path = bindable
    with pytest.raises(ValueError, match=error):
        report(path, Table(data.select(rows), "image", "caption", data="the data"))


def test_a_caption_that_changes_before_the_binding_is_refused(bindable: tuple[Any, str]) -> None:
    data, path = bindable
    with pytest.raises(ValueError, match=CHANGED_ERROR):
        bind(with_another_caption(data), path)


def test_a_report_refuses_data_with_another_caption(bindable: tuple[Any, str]) -> None:
    data, path = bindable
    with pytest.raises(ValueError, match=CHANGED_ERROR):
        report(path, Table(with_another_caption(data), "image", "caption", data="the data"))


def products(tmp_path: Path, *, is_embedded: bool, folder: str = "data") -> Any:
    """Two captions of each product's ``front.png``, whose folder alone tells the products apart."""
    images: list[Any] = []
    for i in range(ROWS // 2):
        file = tmp_path / folder / f"p{i}" / "front.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
        images += [{"bytes": picture(i), "path": "front.png"} if is_embedded else str(file)] * 2
    captions = [f"a {side}" for _ in range(ROWS // 2) for side in ("front", "back")]
    columns = {"image": images, "caption": captions}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_a_picture_has_one_source_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read in blocks of two: the first block has a picture without a path, the second has not."""
    monkeypatch.setattr(data_module, "_BLOCK", 2)
    images = [{"bytes": picture(i), "path": name} for i, name in ((0, "x"), (1, None), (0, "x"), (2, "y"))]
    rows = datasets.Dataset.from_dict({"image": images, "caption": [*"abcd"]})
    table = Table(rows.cast_column("image", datasets.Image()), "image", "caption", data="given")
    source_of_row = table.sources()
    assert source_of_row[0] == source_of_row[2]
    assert len({*source_of_row}) == 3


@pytest.mark.parametrize("path", [None, ""], ids=["no path", "an empty path"])
def test_the_source_of_a_picture_without_a_path_does_not_depend_on_other_rows(path: str | None) -> None:
    images = [{"bytes": picture(0), "path": path}, {"bytes": picture(1), "path": path}]

    def sources(of: list[dict[str, Any]]) -> list[str]:
        rows = datasets.Dataset.from_dict({"image": of, "caption": ["a"] * len(of)})
        return Table(rows.cast_column("image", datasets.Image()), "image", "caption", data="given").sources()

    alone, beside_another = sources(images[:1]), sources(images)
    assert alone == beside_another[:1]
    assert beside_another[0] != beside_another[1]


@pytest.fixture(params=[True, False], ids=["embedded", "files"])
def of_one_name(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A data set whose pictures have one file name."""
    return products(tmp_path, is_embedded=request.param)


def test_pictures_of_one_file_name_have_different_sources(of_one_name: Any) -> None:
    """By its source an evaluation knows the captions of one picture."""
    source_of_row = Table(of_one_name, "image", "caption", data="given").sources()
    assert source_of_row[::2] == source_of_row[1::2]  # each picture has two rows
    assert len({*source_of_row}) == ROWS // 2


def test_a_binding_tells_pictures_of_one_file_name_apart(of_one_name: Any, tmp_path: Path) -> None:
    table = Table(of_one_name, "image", "caption", data="given")
    path = write_features(tmp_path / "x", table, teacher()).path
    bind(of_one_name, path)
    reordered = of_one_name.select([2, 3, 0, 1, *range(4, ROWS)])  # the first two products are exchanged
    with pytest.raises(ValueError, match=f"row 0 .* is row 2 of the {ROWS}"):
        bind(reordered, path)


def test_the_first_pair_of_some_rows_is_known_by_its_hash(of_one_name: Any, tmp_path: Path) -> None:
    """Although it has the path below the folder of all pictures, and that of some rows may lie deeper."""
    table = Table(of_one_name, "image", "caption", data="given")
    hashes = write_features(tmp_path / "x", table, teacher()).pairs
    assert is_first_pair(int(hashes[5]), of_one_name.select([5]), "image", "caption")
    assert is_first_pair(int(hashes[4]), of_one_name.select([4, 5]), "image", "caption")
    # Row 3 has the caption and the file name of row 5, in another product's folder.
    assert not is_first_pair(int(hashes[3]), of_one_name.select([5]), "image", "caption")


def test_columns_of_a_csv_file_tell_pictures_of_one_file_name_apart(tmp_path: Path) -> None:
    data = products(tmp_path, is_embedded=False)
    features = write_features(tmp_path / "x", Table(data, "image", "caption", data="given"), teacher())
    images = data.cast_column("image", datasets.Image(decode=False))["image"]
    captions, paths = data["caption"][:], [image["path"] for image in images]
    features.compare_columns(captions, paths, "the CSV file")
    paths_of_next_product = [*paths[2:], *paths[:2]]
    with pytest.raises(ValueError, match=f"row 0 of the CSV file, .* is row 2 of the {ROWS}"):
        features.compare_columns(captions, paths_of_next_product, "the CSV file")


# --- pictures by their content ----------------------------------------------------------------------------


def embedded(_: Path, changed: tuple[int, ...] = ()) -> Any:
    """A column of pictures in memory with their names, in which the changed rows have another picture."""
    contents = [picture(99 if i in changed else i) for i in range(ROWS)]
    return [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]


def in_files(folder: Path, changed: tuple[int, ...] = ()) -> Any:
    """The same as a column of files in a folder."""
    csv_table(folder)
    for row in changed:
        (folder / f"{row}.png").write_bytes(picture(99))
    return [str(folder / f"{i}.png") for i in range(ROWS)]


@pytest.mark.parametrize("images_of", [embedded, in_files])
def test_another_picture_of_the_same_name_is_refused_where_pictures_are_read(
    tmp_path: Path, images_of: Any
) -> None:
    """By a check, which reads all; and by a binding and a writing, which read up to ``_LOOKED_AT``."""

    def dataset(*changed: int) -> Any:
        """The pairs, of which these rows have another picture."""
        columns = {"image": images_of(tmp_path, changed), "caption": [f"a {i}" for i in range(ROWS)]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    same = dataset()
    path = write_features(tmp_path / "x", Table(same, "image", "caption", data="these"), teacher()).path
    bind(same, path)
    report(path, Table(same, "image", "caption", data="these"))
    other = dataset(7)
    pairs = Table(other, "image", "caption", data="these")
    named = f"the picture '7.png' is not the one .* {path} .*delete the folder"
    with pytest.raises(ValueError, match=f"row 7 of the data: {named}"):
        bind(other, path)
    for command in (
        lambda: report(path, pairs),  # --check
        lambda: write_features(Path(path), pairs, teacher()),  # the folder's own command once more
        lambda: write_features(tmp_path / "y", pairs, stored_teacher(path)),  # --features
    ):
        with pytest.raises(ValueError, match=f"row 7 of these: {named}"):
            command()


def stored_teacher(path: str) -> Teacher:
    """The teacher of ``--features``, with the rows of a folder."""
    other_options = dict.fromkeys(("model", "image_encoder", "text_encoder", "spaces"))
    return sources.load(["features"], Namespace(features=path, **other_options), torch.device("cpu"))


def test_a_folder_without_the_features_of_some_pictures_is_no_teacher_of_features(tmp_path: Path) -> None:
    """The error says why its rows are zeros."""
    of_shards = Shards(shards(tmp_path, broken=(2, 5)))
    path = write_features(tmp_path / "x", of_shards, teacher()).path
    expected = f"--features {path}: 2 rows have no features: their pictures could not be read"
    with pytest.raises(ValueError, match=re.escape(expected)):
        stored_teacher(path)


def test_the_identities_of_pictures_go_with_the_rows_of_a_folder(
    tmp_path: Path, data: Data, place: Path
) -> None:
    whole = Features(str(place / "whole"))
    expected = numbers_of([identity_of(picture(i)) for i in range(ROWS)])
    again = write_features(tmp_path / "x", data, stored_teacher(whole.path), batch_size=5)
    for features in (whole, again):
        assert features.pictures is not None
        np.testing.assert_array_equal(features.pictures[:], expected)
        first_shard = np.load(f"{features.path}/pictures-00000.npy")
        np.testing.assert_array_equal(first_shard, expected[:SHARD])


def test_a_folder_of_texts_knows_pictures_by_their_names(tmp_path: Path, data: Data) -> None:
    of_texts = replace(teacher(), encoders={NAMES[1]: teacher().encoders[NAMES[1]]})
    features = write_features(tmp_path / "texts", data, of_texts).check()
    assert features.pictures is None
    assert "pictures: by their names" in report(features.path, data)


@pytest.fixture
def read_pictures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of pictures that are read, in a list that grows."""
    names: list[str] = []

    def content_of(path: str) -> bytes:
        names.append(Path(path).name)
        return Path(path).read_bytes()

    monkeypatch.setattr(opening, "content_of", content_of)
    return names


def paths_and_captions(folder: Path) -> Any:
    """The pairs as a data set of the paths of their pictures."""
    csv_table(folder)
    columns = {"image": [str(folder / f"{i}.png") for i in range(ROWS)], "caption": CAPTIONS}
    return datasets.Dataset.from_dict(columns)


def test_a_binding_reads_few_pictures(
    tmp_path: Path, place: Path, read_pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as ``_LOOKED_AT``, in equal distances."""
    monkeypatch.setattr(data_module, "_LOOKED_AT", 6)
    bind(paths_and_captions(tmp_path), str(place / "whole"))
    assert read_pictures == [f"{i}.png" for i in (0, 7, 15, 23, 31, 39)]


def test_a_check_reads_each_picture_once(tmp_path: Path, place: Path, read_pictures: list[str]) -> None:
    report(str(place / "whole"), Table(paths_and_captions(tmp_path), "image", "caption", data="these"))
    assert sorted(read_pictures) == sorted(f"{i}.png" for i in range(ROWS))


def shard_of_samples(file: Path, *samples: tuple[str, int, str]) -> Shards:
    """Write a shard of samples: a key, the number of a picture, a caption."""
    with tarfile.open(file, "w") as tar:
        for key, number, caption in samples:
            add_sample(tar, key, png=picture(number), txt=caption.encode())
    return Shards(str(file))


@pytest.fixture
def of_two_shards(tmp_path: Path) -> str:
    """A folder of the features of two shards, whose samples have the same keys."""
    shard_of_samples(tmp_path / "a0.tar", ("000", 0, "a dog"), ("001", 1, "a cat"))
    shard_of_samples(tmp_path / "a1.tar", ("000", 2, "a dog"), ("001", 0, "a dog"))
    return write_features(tmp_path / "x", Shards(f"{tmp_path}/a{{0..1}}.tar"), teacher()).path


def test_samples_of_shards_may_have_other_keys(of_two_shards: str, tmp_path: Path) -> None:
    """The same four samples are in one shard now."""
    samples = [("0", 0, "a dog"), ("1", 1, "a cat"), ("2", 2, "a dog"), ("3", 0, "a dog")]
    assert "4 rows" in report(of_two_shards, shard_of_samples(tmp_path / "renamed.tar", *samples))


def test_a_sample_of_shards_with_another_picture_is_another_pair(of_two_shards: str, tmp_path: Path) -> None:
    """The third has picture 9 in place of 2."""
    samples = [("0", 0, "a dog"), ("1", 1, "a cat"), ("2", 9, "a dog"), ("3", 0, "a dog")]
    changed = shard_of_samples(tmp_path / "changed.tar", *samples)
    with pytest.raises(ValueError, match=r"row 2 of .*, image '2' with caption 'a dog', is none of the 4"):
        report(of_two_shards, changed)


def test_pictures_whose_folder_moved_keep_their_names(tmp_path: Path) -> None:
    data = products(tmp_path, is_embedded=False)
    path = write_features(tmp_path / "x", Table(data, "image", "caption", data="given"), teacher()).path
    bind(products(tmp_path, is_embedded=False, folder="moved/elsewhere"), path)


def test_bound_rows_find_their_features(bindable: tuple[Any, str], tmp_path: Path) -> None:
    data, path = bindable
    features, rows = Features(path), np.random.default_rng(0).permutation(ROWS)[:9]
    shuffled = bind(data, path).select(rows)
    shuffled.save_to_disk(tmp_path / "saved")
    for rows_of_table in (shuffled, datasets.load_from_disk(tmp_path / "saved")):
        taken = references(features, np.array(rows_of_table[COLUMN]))
        for name in NAMES:
            np.testing.assert_array_equal(taken[f"reference_{name}"], features.take(rows)[name])


def test_bound_rows_have_no_features_in_another_folder(bindable: tuple[Any, str], tmp_path: Path) -> None:
    data, path = bindable
    other = write_features(tmp_path / "other", data_of("csv", tmp_path / "data"), teacher())
    with pytest.raises(ValueError, match=f"row 5 .*{other.path}"):
        references(other, np.array(bind(data, path).select([5, 3])[COLUMN]))


def test_a_caption_that_changes_after_the_binding_keeps_the_features_of_the_old_one(
    bindable: tuple[Any, str], tmp_path: Path
) -> None:
    """A batch, which has no picture's name, and tokens in place of captions, cannot tell."""
    data, path = bindable
    changed = with_another_caption(bind(data, path))
    assert changed["caption"][CHANGED_ROW] == "another"
    taken = references(Features(path), np.array(changed[COLUMN]))
    of_old = Features(path).take(np.arange(ROWS))
    for name in NAMES:
        np.testing.assert_array_equal(taken[f"reference_{name}"], of_old[name])
    # The teacher gives the new caption other features, which a reading by captions would have found.
    of_new = write_features(tmp_path / "new", Table(changed, "image", "caption", data="changed"), teacher())
    new_texts = of_new.arrays["text_features"][:]
    assert (new_texts[CHANGED_ROW] != of_old["text_features"][CHANGED_ROW]).any()


def test_only_a_table_is_bound(bindable: tuple[Any, str]) -> None:
    data, path = bindable
    for other, message in (
        (datasets.DatasetDict(train=data), "got DatasetDict; bind each split"),
        (data.to_iterable_dataset(), "got IterableDataset"),
        ([*data], "got list"),
    ):
        with pytest.raises(TypeError, match=f"dataset must be a datasets.Dataset; {message}"):
            bind(other, path)


def test_data_are_bound_once(bindable: tuple[Any, str]) -> None:
    data, path = bindable
    with pytest.raises(ValueError, match=f"dataset has a column {COLUMN} already: bind it once"):
        bind(bind(data, path), path)


def test_binding_makes_no_objects_of_rows(tmp_path: Path) -> None:
    """A row's number and hash are 16 bytes, of which there are some copies; a list of arrays takes 1,380."""
    rows = 20_000
    images, captions = [f"a/{i}.png" for i in range(rows)], [f"caption {i}" for i in range(rows)]
    names = [image[2:] for image in images]
    features = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float16)
    path = features_folder(tmp_path / "x", [*zip(names, captions, strict=True)], text_features=features)
    data = datasets.Dataset.from_dict({"image": images, "caption": captions})
    tracemalloc.start()
    bind(data, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * rows  # bytes: a few copies of 16, far from 1,380


# --- components -------------------------------------------------------------------------------------------

WIDTH, KEPT = 12, 5


def spread(widths: tuple[int, ...] = (WIDTH, WIDTH), **about: Any) -> Teacher:
    """A teacher whose features have unequal variances along a random basis; of images alone for one width."""

    def encoder(modality: int, width: int) -> Encoder:
        basis = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
        noise = np.random.default_rng([0, modality]).standard_normal((ROWS, width))
        rows = torch.from_numpy(noise * 0.7 ** np.arange(width) @ basis).float()

        def prepare(samples: list[Sample]) -> torch.Tensor:
            return rows[[sample.row for sample in samples]]

        return Encoder(prepare, lambda features: features, width, needs_pictures=modality == 0)

    encoders = {NAMES[modality]: encoder(modality, width) for modality, width in enumerate(widths)}
    return Teacher({}, encoders, **about)


@pytest.fixture(params=[(WIDTH, WIDTH), (WIDTH,)], ids=["both modalities", "one"])
def spread_features(request: pytest.FixtureRequest, tmp_path: Path) -> Features:
    """A folder of features in which two pictures could not be read."""
    return write_features(tmp_path / "x", Shards(shards(tmp_path, broken=(2, 5))), spread(request.param))


def decomposed(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The singular values and right vectors of all rows that have features, each of unit norm."""
    rows = np.concatenate([array[:] for array in features.arrays.values()]).astype(np.float64)
    rows = rows[rows.any(1)]
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    _, values, vectors = np.linalg.svd(units, full_matrices=False)
    return values, vectors


every_width = pytest.mark.parametrize("width", [1, KEPT, WIDTH])


@every_width
def test_components_span_the_first_vectors_of_a_singular_value_decomposition(
    spread_features: Features, width: int
) -> None:
    _, vectors = decomposed(spread_features)
    matrix = spread_features.components(width).matrix.double().numpy()
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(width), atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, vectors[:width].T @ vectors[:width], atol=1e-5)


@every_width
def test_the_explained_share_is_that_of_the_squared_singular_values_and_is_logged(
    spread_features: Features, width: int, caplog: pytest.LogCaptureFixture
) -> None:
    values, _ = decomposed(spread_features)
    with caplog.at_level(logging.INFO, "rankloss_features"):
        explained = spread_features.components(width).explained
    assert explained == pytest.approx((values[:width] ** 2).sum() / (values**2).sum(), abs=1e-6)
    assert f"{100 * explained:.1f} %" in caplog.text


@every_width
def test_components_are_float32_and_their_largest_entry_is_positive(
    spread_features: Features, width: int
) -> None:
    matrix = spread_features.components(width).matrix
    assert matrix.dtype == torch.float32
    largest = matrix.abs().argmax(dim=0, keepdim=True)
    assert (matrix.gather(0, largest) > 0).all()


@pytest.mark.parametrize("width", [ROWS + 1, 0])
def test_more_components_than_rows_or_none_are_refused(tmp_path: Path, data: Data, width: int) -> None:
    features = write_features(tmp_path / "x", data, spread((ROWS + 5,) * 2))
    features.components(ROWS)  # the most that there are
    bounds = f"width must be at least 1 .*{ROWS + 5} dimensions and the {ROWS} rows .* got {width}$"
    with pytest.raises(ValueError, match=bounds):
        features.components(width)


def test_components_of_a_damaged_folder_are_refused(tmp_path: Path, data: Data) -> None:
    features = write_features(tmp_path / "x", data, spread())
    flip_a_bit(tmp_path / "x/text_features-00001.npy")
    with pytest.raises(ValueError, match=r"text_features-00001\.npy is not as it was written"):
        features.components(KEPT)


@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH, 4)])
def test_separate_spaces_have_no_components(tmp_path: Path, data: Data, widths: Any) -> None:
    features = write_features(tmp_path / "x", data, spread(widths, spaces="separate"))
    with pytest.raises(ValueError, match="separate spaces"):
        features.components(4)
