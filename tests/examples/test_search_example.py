"""The example of a search of one's own pictures, of products that are not in the pairs to align by."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs"))

from tools_folder import ROOT, loaded


@dataclass(frozen=True)
class Search:
    """A search for some words."""

    words: str
    found: list[tuple[str, float]]
    """The paths of pictures, each with its cosine."""
    printed: str


@pytest.fixture(scope="module", params=["black triangle", "white cross"])
def search(
    request: pytest.FixtureRequest, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Search:
    example, output = loaded(ROOT / "examples/search_pictures.py"), tmp_path_factory.mktemp("search")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = example.main(str(sample_folder), str(output / "search"), f"a {request.param}")
    return Search(request.param, found, printed.getvalue())


def test_words_find_a_picture_of_their_product(search: Search) -> None:
    assert any(search.words.replace(" ", "-") in picture for picture, _ in search.found)


def test_the_best_picture_comes_first(search: Search) -> None:
    cosines = [cosine for _, cosine in search.found]
    assert cosines == sorted(cosines, reverse=True)


def test_a_search_prints_its_pictures_and_an_evaluation(search: Search) -> None:
    assert all(picture in search.printed for picture, _ in search.found)
    assert "median rank" in search.printed
