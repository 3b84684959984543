"""A teacher's principal components: what they are, and the command that writes them."""

import sys

import numpy as np
import pytest
from miniature_paper import components
from miniature_paper.components import principal_components

from rankloss_features.command import main as write_features

ROWS, WIDE, NARROW = 9, 8, 3


def features(seed):
    return np.random.default_rng(seed).normal(size=(ROWS, WIDE))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["components", *map(str, arguments)])
    return components.main()


def test_they_keep_products_best(monkeypatch):
    """As the truncated singular value decomposition of all features does, read in parts or not."""
    both = features(0), features(1)
    whole = principal_components(*both, NARROW)
    monkeypatch.setattr(components, "_ROWS", 4)
    kept = principal_components(*both, NARROW)
    u, s, vt = np.linalg.svd(np.concatenate(both), full_matrices=False)
    for found in (whole, kept):
        projected = np.concatenate(both) @ found @ found.T
        np.testing.assert_allclose(projected, (u[:, :NARROW] * s[:NARROW]) @ vt[:NARROW], atol=1e-12)


@pytest.fixture
def folder(tmp_path):
    """What ``rankloss features`` writes of a file of features."""
    given, data = tmp_path / "given.npz", tmp_path / "pairs.csv"
    np.savez(given, image_features=features(0), text_features=features(1))
    rows = "".join(f"{i}.png\ticon {i}\n" for i in range(ROWS))
    data.write_text(f"filepath\ttitle\n{rows}", encoding="utf-8")
    words = ("--features", given, "--data", data, "--output", tmp_path / "teacher", "--dtype", "float16")
    assert write_features(list(map(str, words))) == 0
    return tmp_path / "teacher"


def test_the_command_writes_those_of_a_folder(folder, tmp_path, monkeypatch):
    output = tmp_path / "components.npy"
    assert run(monkeypatch, folder, NARROW, output) == 0
    found = np.load(output)
    stored = (np.load(folder / f"{name}_features.npy") for name in ("image", "text"))
    expected = principal_components(*stored, NARROW)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert {path.name for path in tmp_path.glob("*.npy")} == {"components.npy"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "features.json").unlink(), "features.json"),
        (lambda folder: None, "fewer than 9"),
    ],
)
def test_another_folder_and_a_wider_student_are_refused(change, said, folder, tmp_path, monkeypatch, capsys):
    change(folder)
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, WIDE + 1, tmp_path / "components.npy")
    assert said in capsys.readouterr().err
    assert not (tmp_path / "components.npy").exists()
