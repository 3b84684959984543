"""Pairs are those that the trainers see, and are bound to their own rows alone."""

from __future__ import annotations

import inspect
import io
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip_train.data
import pytest
from PIL import Image
from tiny_teacher import ROWS, WIDTH, data_of, picture, teacher, written

from rankloss_features import Features, bind
from rankloss_features.binding import COLUMN, references
from rankloss_features.checking import report
from rankloss_features.data import IMAGES, Table
from rankloss_features.folder import NAMES
from stored_features import stored


def test_the_picture_of_a_sample_is_the_one_the_trainer_prefers() -> None:
    (listed,) = re.findall(r'rename\(image="([^"]+)"', inspect.getsource(open_clip_train.data))
    assert tuple(listed.split(";")) == IMAGES


@pytest.mark.parametrize("kind", ["datasets", "csv"])
@pytest.mark.parametrize("has_bytes", [True, False])
def test_the_cameras_orientation_counts_as_in_training(tmp_path: Path, kind: str, has_bytes: bool) -> None:
    picture, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    image: Any = {"bytes": buffer.getvalue(), "path": None} if has_bytes else str(tmp_path / "a.png")
    data = datasets.Dataset.from_dict({"image": [image], "caption": ["a"]})
    data = data.cast_column("image", datasets.Image())
    (samples,) = Table(data, "image", "caption", kind=kind).read(0, [(0, 1)])
    trained = data[0]["image"].convert("RGB") if kind == "datasets" else picture
    np.testing.assert_array_equal(np.asarray(samples[0].open()), np.asarray(trained))
    assert data[0]["image"].size == (4, 2) != picture.size


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


def another_caption(row: dict[str, Any], i: int) -> dict[str, Any]:
    return {"caption": "another"} if i == 5 else row


HINT = "bind before"
SPOILT = [
    (lambda x: x.select([7, *range(1, 7), 0, *range(8, ROWS)]), f"row 0 .* row 7 of the 40 .*{HINT}"),
    (lambda x: x.map(another_caption, with_indices=True), "row 5 .*'another', .* 40 rows of .*/x$"),
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


def test_binding_makes_no_objects_of_rows(tmp_path: Path) -> None:
    """A row's number and hash are 16 bytes, of which there are some copies; a list of arrays takes 1,380."""
    rows = 20_000
    images, captions = [f"a/{i}.png" for i in range(rows)], [f"caption {i}" for i in range(rows)]
    names = [image[2:] for image in images]
    features = np.ones((rows, WIDTH), np.float16)
    path = stored(tmp_path / "x", [*zip(names, captions, strict=True)], text_features=features)
    data = datasets.Dataset.from_dict({"image": images, "caption": captions})
    tracemalloc.start()
    bind(data, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * rows
