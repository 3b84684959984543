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
    csv_data,
    data_of,
    files,
    flip,
    picture,
    shards,
    table,
    teacher,
    written,
)

import rankloss_trainers
from rankloss_features import Features, bind, opening, sources
from rankloss_features import data as data_module
from rankloss_features.binding import COLUMN, references
from rankloss_features.checking import report
from rankloss_features.data import IMAGES, Data, Shards, Table, is_first_pair, open_data
from rankloss_features.folder import NAMES, PICTURES, identity_of, numbers_of, read_about, write_about
from rankloss_features.teachers import Encoder, Teacher
from samples import add_sample
from stored_features import stored


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return data_of("csv", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    """A folder ``whole``, and a folder ``other`` of the same pairs in another order."""
    place = tmp_path_factory.mktemp("folders")
    written(place / "whole", data, teacher())
    (place / "others").mkdir()
    others = csv_data(table(place / "others", order=[*range(1, ROWS), 0]))
    written(place / "other", others, teacher(weights="1"))
    return place


def test_the_files_are_arrays_of_numpy_in_the_order_of_the_rows(place: Path) -> None:
    features = Features(str(place / "whole")).check()
    for name in NAMES:
        array = np.concatenate([np.load(x) for x in sorted((place / "whole").glob(f"{name}-*.npy"))])
        assert len(array) == ROWS
        for found in (features, pickle.loads(pickle.dumps(features))):
            np.testing.assert_array_equal(found.arrays[name][:], array)
            np.testing.assert_array_equal(found.arrays[name][11:37:2], array[11:37:2])
            np.testing.assert_array_equal(found.take(np.array([39, 0, 12, 12]))[name], array[[39, 0, 12, 12]])
        for rows in ([ROWS], [-1], [True] * ROWS, [0.5]):
            with pytest.raises(IndexError, match=f"rows .*from 0 to {ROWS - 1}"):
                features.arrays[name][rows]
    assert read_about(place / "whole")["rows"] == ROWS


# --- damage -----------------------------------------------------------------------------------------------

SHARDS = [f"{name}-00001.npy" for name in (*NAMES, PICTURES)]
CHANGES: dict[str, Callable[[bytes, bytes, bytes], bytes | None]] = {
    "missing": lambda *_: None,
    "empty": lambda *_: b"",
    "a list": lambda *_: b"[]",
    "cut": lambda x, *_: x[:-9],
    "longer": lambda x, *_: x + b"0",
    "a bit": lambda x, *_: x[:-2] + bytes([x[-2] ^ 1]) + x[-1:],
    "a digit of the header or an entry": lambda x, *_: re.sub(rb"[468]", b"5", x, count=1),
    "reversed": lambda x, *_: x[:128] + x[:127:-1],
    "of another modality": lambda x, modality, _: modality,
    "of another data set": lambda x, _, other: other,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["folder.json", "pairs.npy", *SHARDS])
def test_a_damaged_file_is_named_and_the_folders_command_mends_it_or_says_why_not(
    place: Path, data: Data, tmp_path: Path, file: str, change: str
) -> None:
    folder = Path(shutil.copytree(place / "whole", tmp_path / "damaged"))
    others = folder / "text_features-00000.npy", place / "other" / file
    content = CHANGES[change](*(x.read_bytes() for x in (folder / file, *others)))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    is_named = change != "of another data set" and (file, change) != ("folder.json", "missing")
    for read in (lambda: Features(str(folder)).check(), lambda: report(str(folder), data)):
        with pytest.raises(ValueError, match=str(folder / file if is_named else folder)):
            read()
    if file in SHARDS:
        written(folder, data, teacher())
        assert files(folder) == files(place / "whole")
    else:
        with pytest.raises(ValueError, match=str(folder)):
            written(folder, data, teacher())


def test_a_run_refuses_a_damaged_folder(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "whole", tmp_path / "damaged"))
    rankloss_trainers.create("rankclip", teacher=str(folder))
    flip(folder / SHARDS[0])
    with pytest.raises(ValueError, match=f"{folder / SHARDS[0]} is not as it was written"):
        rankloss_trainers.create("rankclip", teacher=str(folder))


def test_folders_that_are_older_or_unfinished_are_refused_with_their_command(
    place: Path, data: Data, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(place / "whole", tmp_path / "x"))
    command, quoted = "rm -rf ~ #\x1b[2J", r"'rm -rf ~ #\\x1b\[2J'"
    write_about(folder, {**(read_about(folder) or {}), "complete": False, "command": command})
    with pytest.raises(ValueError, match=f"unfinished.*{quoted}"):
        Features(str(folder))
    with pytest.raises(ValueError, match=f"begun with another batch_size, 8, not 4.*{quoted}"):
        written(folder, data, teacher(), batch_size=4)
    (folder / "folder.json").unlink()
    for name, format_ in (("features.json", 2), ("folder.json", 3)):
        (folder / name).write_text(json.dumps({"format": format_, "rows": 7, "command": command}))
        for read in (lambda: Features(str(folder)), lambda: written(folder, data, teacher())):
            with pytest.raises(ValueError, match=f"{name} .*delete it and give its command again, {quoted}"):
                read()


# --- pairs ----------------------------------------------------------------------------------------------


def test_the_picture_of_a_sample_is_the_one_the_trainer_prefers() -> None:
    (listed,) = re.findall(r'rename\(image="([^"]+)"', inspect.getsource(open_clip_train.data))
    assert tuple(listed.split(";")) == IMAGES


@pytest.mark.parametrize("kind", ["datasets", "csv", "webdataset"])
def test_the_cameras_orientation_counts_where_it_counts_in_training(tmp_path: Path, kind: str) -> None:
    plain, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = tmp_path / "a.png"
    plain.save(file, exif=exif)
    trained: Any = plain
    if kind == "csv":
        (tmp_path / "a.csv").write_text(f"filepath\ttitle\n{file}\ta\n")
        data = csv_data(tmp_path / "a.csv")
    elif kind == "webdataset":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add_sample(tar, "a", png=file.read_bytes(), txt=b"a")
        data = Shards(str(tmp_path / "a.tar"))
    else:
        columns = {"image": [str(file)], "caption": ["a"]}
        dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        dataset.save_to_disk(tmp_path / "data")
        data = open_data(data_args(tmp_path / "data"))
        trained = dataset[0]["image"].convert("RGB")
        assert trained.size == (4, 2) != plain.size
    list(data.pairs())
    ((sample,),) = data.read(0, [(0, 1)])
    np.testing.assert_array_equal(np.asarray(data.rendering.open(sample.source)), np.asarray(trained))


def data_args(folder: Path) -> Namespace:
    keys = {"image_column": "image", "caption_column": "caption"}
    return Namespace(data=str(folder), dataset_type="auto", **keys)


# --- binding ----------------------------------------------------------------------------------------------


def pairs(*, is_named: bool) -> Any:
    """Pictures in memory, with a path's name or without, of seven captions."""
    images = [{"bytes": picture(i), "path": f"{i}.png" if is_named else None} for i in range(ROWS)]
    columns = {"image": images, "caption": [f"a photograph of class {i % 7}" for i in range(ROWS)]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture(scope="module", params=[True, False], ids=["named", "nameless"])
def bound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """Data, and the folder of their features."""
    data, folder = pairs(is_named=request.param), tmp_path_factory.mktemp("bound")
    return data, written(folder / "x", Table(data, "image", "caption", data="given"), teacher()).path


HINT = "bind before"
SPOILT = [
    (lambda x: x.select([7, *range(1, 7), 0, *range(8, ROWS)]), f"row 0 .* row 7 of the 40 .*{HINT}"),
    (
        lambda x: x.map(lambda row, i: {"caption": "another"} if i == 5 else row, with_indices=True),
        "row 5 .*'another', .* 40 rows of .*/x$",
    ),
    (lambda x: x.select(range(ROWS - 1)), f" 39: row 39 .*{HINT}"),
    (lambda x: x.select([3, 4]), f"row 0 .* row 3 .*{HINT}"),
    (lambda x: x.select([*range(ROWS), 0]), f"row 40 .* row 0 of the 40 .*{HINT}"),
]


@pytest.mark.parametrize(("change", "named"), SPOILT)
def test_data_are_bound_to_their_own_rows_alone(bound: tuple[Any, str], change: Any, named: str) -> None:
    data, path = bound
    with pytest.raises(ValueError, match=named):
        bind(change(data), path)
    with pytest.raises(ValueError, match=named.removesuffix(f".*{HINT}").rstrip()):
        report(path, Table(change(data), "image", "caption", data="the data"))


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
    """A picture without a path may stand beside it or not."""
    monkeypatch.setattr(data_module, "_BLOCK", 2)
    images = [{"bytes": picture(i), "path": name} for i, name in ((0, "x"), (1, None), (0, "x"), (2, "y"))]
    rows = datasets.Dataset.from_dict({"image": images, "caption": [*"abcd"]})
    found = Table(rows.cast_column("image", datasets.Image()), "image", "caption", data="given").sources()
    assert found[0] == found[2]
    assert len({*found}) == 3


@pytest.mark.parametrize("is_embedded", [True, False])
def test_pictures_of_one_file_name_are_told_apart(tmp_path: Path, is_embedded: bool) -> None:
    data = products(tmp_path, is_embedded=is_embedded)
    pairs = Table(data, "image", "caption", data="given")
    sources = pairs.sources()  # by which an evaluation knows the captions of one picture
    assert sources[::2] == sources[1::2]
    assert len({*sources}) == ROWS // 2
    path = written(tmp_path / "x", pairs, teacher()).path
    bind(data, path)
    reordered = data.select([2, 3, 0, 1, *range(4, ROWS)])
    with pytest.raises(ValueError, match=f"row 0 .* is row 2 of the {ROWS}"):
        bind(reordered, path)
    for rows in ([5], [4, 5]):  # in one folder alone
        assert is_first_pair(int(Features(path).pairs[rows[0]]), data.select(rows), "image", "caption")
    assert not is_first_pair(int(Features(path).pairs[3]), data.select([5]), "image", "caption")
    csv = [
        row["path"] or row["bytes"]
        for row in data.cast_column("image", datasets.Image(decode=False))["image"]
    ]
    if not is_embedded:
        Features(path).compare_columns(data["caption"][:], csv, "the CSV file")
        with pytest.raises(ValueError, match="row 0 of the CSV file"):
            Features(path).compare_columns(data["caption"][:], [*csv[2:], *csv[:2]], "the CSV file")


# --- pictures by their content ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_embedded", [True, False])
def test_another_picture_of_the_same_name_is_refused_where_pictures_are_read(
    tmp_path: Path, is_embedded: bool
) -> None:
    """By a check, which reads all, and of few rows by a binding and a resumption, too."""
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(ROWS)]
    if not is_embedded:
        images = [str(tmp_path / f"{i}.png") for i in range(ROWS)]
        table(tmp_path)

    def data() -> Any:
        rows = datasets.Dataset.from_dict({"image": images, "caption": [f"a {i}" for i in range(ROWS)]})
        return rows.cast_column("image", datasets.Image())

    def pairs() -> Table:
        return Table(data(), "image", "caption", data="these")

    path = written(tmp_path / "x", pairs(), teacher()).path
    bind(data(), path)
    report(path, pairs())
    if is_embedded:
        images[7] = {"bytes": picture(99), "path": "7.png"}
    else:
        (tmp_path / "7.png").write_bytes(picture(99))
    named = rf"row 7 of {{}}: the picture '7.png' is not the one .* {path} .*delete the folder"
    for call, where in (
        (lambda: report(path, pairs()), "these"),
        (lambda: bind(data(), path), "the data"),
        (lambda: written(Path(path), pairs(), teacher()), "these"),
        (lambda: written(tmp_path / "y", pairs(), stored_teacher(path)), "these"),
    ):
        with pytest.raises(ValueError, match=named.format(where)):
            call()


def stored_teacher(path: str) -> Teacher:
    """The teacher of ``--features``, with the rows of a folder."""
    given = dict.fromkeys(("model", "image_encoder", "text_encoder", "spaces"))
    return sources.load(["features"], Namespace(features=path, **given), torch.device("cpu"))


def test_the_identities_of_pictures_go_with_the_rows_of_a_folder(
    tmp_path: Path, data: Data, place: Path
) -> None:
    whole = Features(str(place / "whole"))
    expected = numbers_of([identity_of(picture(i)) for i in range(ROWS)])
    again = written(tmp_path / "x", data, stored_teacher(whole.path), batch_size=5)
    for features in (whole, again):
        assert features.pictures is not None
        np.testing.assert_array_equal(features.pictures[:], expected)
        np.testing.assert_array_equal(np.load(f"{features.path}/pictures-00000.npy"), expected[:12])
    texts = replace(teacher(), encoders={NAMES[1]: teacher().encoders[NAMES[1]]})
    without = written(tmp_path / "texts", data, texts).check()
    assert without.pictures is None
    assert "pictures: by their names" in report(without.path, data)


def test_a_start_reads_few_pictures_and_a_check_each_once(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A binding to a large table reads as many as to a small one."""
    read: list[Any] = []
    monkeypatch.setattr(opening, "content_of", lambda path: read.append(path) or Path(path).read_bytes())
    monkeypatch.setattr(data_module, "_LOOKED_AT", 6)
    columns = {"image": [str(tmp_path / f"{i}.png") for i in range(ROWS)], "caption": CAPTIONS}
    table(tmp_path)
    data = datasets.Dataset.from_dict(columns)
    bind(data, str(place / "whole"))
    assert [Path(path).name for path in read] == [f"{i}.png" for i in (0, 7, 15, 23, 31, 39)]
    read.clear()
    report(str(place / "whole"), Table(data, "image", "caption", data="these"))
    assert len(read) == ROWS


def test_samples_of_shards_are_known_by_their_content(tmp_path: Path) -> None:
    """Keys may change, and two shards may have the same; another picture of a key is another pair."""

    def written_shards(name: str, *samples: tuple[str, int, str]) -> Shards:
        with tarfile.open(tmp_path / name, "w") as tar:
            for key, number, caption in samples:
                add_sample(tar, key, png=picture(number), txt=caption.encode())
        return Shards(str(tmp_path / name))

    written_shards("a0.tar", ("000", 0, "a dog"), ("001", 1, "a cat"))
    written_shards("a1.tar", ("000", 2, "a dog"), ("001", 0, "a dog"))  # of equal keys and captions
    both = Shards(f"{tmp_path}/a{{0..1}}.tar")
    features = written(tmp_path / "x", both, teacher()).check()
    samples = [("0", 0, "a dog"), ("1", 1, "a cat"), ("2", 2, "a dog"), ("3", 0, "a dog")]
    report(features.path, written_shards("renamed.tar", *samples))
    with pytest.raises(ValueError, match=r"row 2 of .*, image '2' with caption 'a dog', is none of the 4"):
        report(features.path, written_shards("changed.tar", *samples[:2], ("2", 9, "a dog"), samples[3]))


def test_pictures_whose_folder_moved_keep_their_names(tmp_path: Path) -> None:
    data = products(tmp_path, is_embedded=False)
    path = written(tmp_path / "x", Table(data, "image", "caption", data="given"), teacher()).path
    bind(products(tmp_path, is_embedded=False, folder="moved/elsewhere"), path)


def test_bound_rows_find_their_features(bound: tuple[Any, str], tmp_path: Path) -> None:
    data, path = bound
    features, rows = Features(path), np.random.default_rng(0).permutation(ROWS)[:9]
    shuffled = bind(data, path).select(rows)
    shuffled.save_to_disk(tmp_path / "saved")
    for found in (shuffled, datasets.load_from_disk(tmp_path / "saved")):
        taken = references(features, np.array(found[COLUMN]))
        for name in NAMES:
            np.testing.assert_array_equal(taken[f"reference_{name}"], features.take(rows)[name])
    other = written(tmp_path / "other", data_of("csv", tmp_path / "data"), teacher()).path
    with pytest.raises(ValueError, match=f"row {rows[0]} .*{other}"):
        references(Features(other), np.array(shuffled[COLUMN]))


def test_a_caption_that_changes_after_the_binding_keeps_the_features_of_the_old_one(
    bound: tuple[Any, str],
) -> None:
    """As the page says: a batch has no picture's name, and tokens in place of its captions."""
    data, path = bound
    features = Features(path)
    changed = bind(data, path).map(lambda _: {"caption": "another"})
    taken = references(features, np.array(changed[COLUMN]))
    for name in NAMES:
        np.testing.assert_array_equal(taken[f"reference_{name}"], features.take(np.arange(ROWS))[name])
    with pytest.raises(ValueError, match=r"row 0 .*'another'"):  # the order that the page asks for
        bind(data.map(lambda _: {"caption": "another"}), path)


def test_only_a_table_is_bound_and_once(bound: tuple[Any, str]) -> None:
    data, path = bound
    for other, message in (
        (datasets.DatasetDict(train=data), "got DatasetDict; bind each split"),
        (data.to_iterable_dataset(), "got IterableDataset"),
        ([*data], "got list"),
    ):
        with pytest.raises(TypeError, match=f"dataset must be a datasets.Dataset; {message}"):
            bind(other, path)
    with pytest.raises(ValueError, match=f"dataset has a column {COLUMN} already: bind it once"):
        bind(bind(data, path), path)


def test_binding_makes_no_objects_of_rows(tmp_path: Path) -> None:
    """A row's number and hash are 16 bytes, of which there are some copies; a list of arrays takes 1,380."""
    rows = 20_000
    images, captions = [f"a/{i}.png" for i in range(rows)], [f"caption {i}" for i in range(rows)]
    names = [image[2:] for image in images]
    features = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float16)
    path = stored(tmp_path / "x", [*zip(names, captions, strict=True)], text_features=features)
    data = datasets.Dataset.from_dict({"image": images, "caption": captions})
    tracemalloc.start()
    bind(data, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * rows


# --- components -------------------------------------------------------------------------------------------

WIDTH, KEPT = 12, 5


def spread(widths: tuple[int, ...] = (WIDTH, WIDTH), **about: Any) -> Teacher:
    """Features of unequal variances, in a basis of their own; of images alone for one width."""

    def encoder(i: int, width: int) -> Encoder:
        basis = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
        noise = np.random.default_rng([0, i]).standard_normal((ROWS, width))
        rows = torch.from_numpy(noise * 0.7 ** np.arange(width) @ basis).float()
        return Encoder(lambda of: rows[[x.row for x in of]], lambda x: x, width, needs_pictures=i == 0)

    encoders = {name: encoder(i, width) for i, (name, width) in enumerate(zip(NAMES, widths, strict=False))}
    return Teacher({}, encoders, **about)


@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH,)])
def test_components_are_those_of_a_singular_value_decomposition(
    tmp_path: Path, widths: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of both modalities, or of one and without the rows that have no features."""
    features = written(tmp_path / "x", Shards(shards(tmp_path, broken=(2, 5))), spread(widths))
    rows = np.concatenate([x[:] for x in features.arrays.values()]).astype(np.float64)
    rows = rows[rows.any(1)]
    _, values, vectors = np.linalg.svd(
        rows / np.linalg.norm(rows, axis=1, keepdims=True), full_matrices=False
    )
    for width in (1, KEPT, WIDTH):
        with caplog.at_level(logging.INFO, "rankloss_features"):
            found = Features(features.path).components(width)
        matrix = found.matrix.double().numpy()
        assert found.matrix.dtype == torch.float32
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(width), atol=1e-6)
        np.testing.assert_allclose(matrix @ matrix.T, vectors[:width].T @ vectors[:width], atol=1e-5)
        assert found.explained == pytest.approx((values[:width] ** 2).sum() / (values**2).sum(), abs=1e-6)
        assert (np.take_along_axis(matrix, np.abs(matrix).argmax(0)[None], 0) > 0).all()
        assert f"{100 * found.explained:.1f} %" in caplog.text


def test_folders_without_such_components_are_refused(tmp_path: Path, data: Data) -> None:
    features = written(tmp_path / "x", data, spread((ROWS + 5,) * 2))
    features.components(ROWS)
    for width in (ROWS + 1, 0):
        with pytest.raises(
            ValueError,
            match=f"width must be at least 1 .*{ROWS + 5} dimensions and the {ROWS} rows .* got {width}$",
        ):
            features.components(width)
    flip(tmp_path / "x/text_features-00001.npy")
    with pytest.raises(ValueError, match=r"text_features-00001\.npy is not as it was written"):
        features.components(KEPT)
    for widths in ((WIDTH, WIDTH), (WIDTH, 4)):
        features = written(tmp_path / f"{widths}", data, spread(widths, spaces="separate"))
        with pytest.raises(ValueError, match="separate spaces"):
            features.components(4)
