"""Principal components: those of a singular value decomposition, kept in the folder for its rows alone."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import ROWS, Sample, csv_data, forks, in_process, shards, table, written

from rankloss_features import Features
from rankloss_features.data import Data, Shards
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Encoder, Teacher

WIDTH, KEPT = 12, 5


def spread(seed: int, widths: tuple[int, int] = (WIDTH, WIDTH), names: Any = NAMES, **about: Any) -> Teacher:
    """Features of unequal variances, in a basis of their own."""
    encoders = {}
    for i, (name, width) in enumerate(zip(names, widths, strict=False)):
        random = np.random.default_rng(seed)
        basis = np.linalg.qr(random.standard_normal((width, width)))[0]
        noise = np.random.default_rng([seed, i]).standard_normal((ROWS, width))
        rows = torch.from_numpy(noise * 0.7 ** np.arange(width) @ basis).float()

        def prepare(samples: list[Sample], rows: torch.Tensor = rows) -> torch.Tensor:
            return rows[[x.row for x in samples]]

        encoders[name] = Encoder(prepare, lambda x: x, width, needs_pictures=i == 0)
    return Teacher({"weights": str(seed)}, encoders, **about)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return csv_data(table(tmp_path_factory.mktemp("data")))


@pytest.fixture
def folder(tmp_path: Path, data: Data) -> Path:
    written(tmp_path / "folder", data, spread(0))
    return tmp_path / "folder"


def unit(array: Any) -> Any:
    rows = np.asarray(array, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def is_right(features: Features, width: int = KEPT) -> None:
    stacked = np.concatenate([unit(array) for array in features.arrays.values()])
    _, values, vectors = np.linalg.svd(stacked, full_matrices=False)
    found = features.components(width)
    matrix = found.matrix.double().numpy()
    assert found.matrix.dtype == torch.float32
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(width), atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, vectors[:width].T @ vectors[:width], atol=1e-5)
    assert found.explained == pytest.approx((values[:width] ** 2).sum() / (values**2).sum(), abs=1e-6)
    assert (np.take_along_axis(matrix, np.abs(matrix).argmax(0)[None], 0) > 0).all()


def test_components_are_those_of_both_modalities_rows_and_the_log_has_what_is_kept(
    folder: Path, caplog: Any
) -> None:
    for width in (1, WIDTH):
        is_right(Features(str(folder)), width)
    with caplog.at_level(logging.INFO, "rankloss_features"):
        explained = Features(str(folder)).components(KEPT).explained
    assert f"{KEPT} of {WIDTH} dimensions, explained variance {100 * explained:.1f} %" in caplog.text


def test_of_one_modality_and_without_the_rows_that_are_absent(tmp_path: Path) -> None:
    data = Shards(shards(tmp_path, broken=(2, 5)))
    features = written(tmp_path / "x", data, spread(0, names=NAMES[:1]))
    present = features.present(slice(None))
    assert present.sum() == ROWS - 2
    _, values, vectors = np.linalg.svd(unit(features.arrays[NAMES[0]][present]))
    found = features.components(KEPT)
    assert found.explained == pytest.approx((values[:KEPT] ** 2).sum() / (values**2).sum(), abs=1e-6)
    matrix = found.matrix.double().numpy()
    np.testing.assert_allclose(matrix @ matrix.T, vectors[:KEPT].T @ vectors[:KEPT], atol=1e-5)


def ask(folder: Path, width: int, seen: Any) -> None:
    seen.put(Features(str(folder)).components(width).matrix.numpy().tobytes())


def test_processes_get_one_basis_that_is_computed_once(folder: Path) -> None:
    seen = forks.Queue()
    processes = [forks.Process(target=in_process, args=(ask, folder, KEPT, seen)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [seen.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(answers)) == 1
    kept = (folder / "components.npz").stat()
    is_right(Features(str(folder)), WIDTH - 1)  # another width, of the same file
    assert (folder / "components.npz").stat().st_mtime_ns == kept.st_mtime_ns
    assert Features(str(folder)).components(KEPT).matrix.numpy().tobytes() == answers[0]


def flipped(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    file.write_bytes(bytes(content))


def of_other_rows(file: Path) -> None:
    np.savez(file, **{**np.load(file), "rows": np.array("0" * 16)})


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    **{f"a bit at {at}": lambda file, at=at: flipped(file, at) for at in (0.0, 0.5, 1.0)},
    "of other rows": of_other_rows,
    "an array": lambda file: file.write_bytes((file.parent / "image_features.npy").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(folder: Path, damage: str) -> None:
    Features(str(folder)).components(KEPT)
    whole = (folder / "components.npz").read_bytes()
    DAMAGES[damage](folder / "components.npz")
    is_right(Features(str(folder)))
    with np.load(folder / "components.npz") as found:
        assert set(found) == {"matrix", "variances", "rows"}
    assert Features(str(folder)).components(KEPT).explained > 0
    assert (folder / "components.npz").stat().st_size == len(whole)


def test_damaged_rows_have_no_components(folder: Path) -> None:
    images = np.load(folder / "image_features.npy", mmap_mode="r+")
    images[3] = images[4]
    images.flush()
    with pytest.raises(ValueError, match=r"row 3 .* not as it was written"):
        Features(str(folder)).components(KEPT)
    assert not (folder / "components.npz").exists()


def on_a_full_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    is_right(Features(str(folder)))


def test_a_folder_that_cannot_be_written_still_has_components(folder: Path) -> None:
    assert in_process(on_a_full_disk, folder) == 0
    assert not (folder / "components.npz").exists()
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    is_right(Features(str(folder)))
    assert not (folder / "components.npz").exists()


def test_a_width_beyond_the_features_or_the_rows_is_refused(folder: Path, tmp_path: Path, data: Data) -> None:
    for width in (WIDTH + 1, 0):
        with pytest.raises(ValueError, match=f"width .* {WIDTH} dimensions and the {ROWS} rows .*{width}$"):
            Features(str(folder)).components(width)
    features = written(tmp_path / "x", data, spread(0, (ROWS + 5,) * 2))
    features.components(ROWS)
    with pytest.raises(ValueError, match=f"{ROWS + 5} dimensions and the {ROWS} rows .*; got {ROWS + 1}"):
        features.components(ROWS + 1)


@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH, 4)])
def test_separate_spaces_have_no_components(tmp_path: Path, data: Data, widths: Any) -> None:
    features = written(tmp_path / "x", data, spread(0, widths, spaces="separate"))
    with pytest.raises(ValueError, match=r"separate spaces.*--loss rankclip-distill"):
        features.components(4)
