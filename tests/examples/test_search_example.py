"""The example of a search of one's own pictures: it finds pictures of products that were not aligned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs"))

from tools_folder import ROOT, loaded


@pytest.mark.parametrize("words", ["black triangle", "white cross"])
def test_words_find_pictures_of_their_product(
    sample_folder: Path, tmp_path: Path, words: str, capsys: Any
) -> None:
    example = loaded(ROOT / "examples/search_pictures.py")
    found = example.main(str(sample_folder), str(tmp_path / "search"), f"a {words}")
    assert any(words.replace(" ", "-") in picture for picture, _ in found)
    assert [cosine for _, cosine in found] == sorted((cosine for _, cosine in found), reverse=True)
    printed = capsys.readouterr().out
    assert "median rank" in printed
    assert all(picture in printed for picture, _ in found)
