"""A second caption, read from samples and from a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankloss_open_clip.columns.second_caption import SecondCaption


@pytest.mark.parametrize(
    ("key", "sample", "caption"),
    [
        pytest.param("Syn.TXT", {"syn.txt": b"made up"}, b"made up", id="a member, whatever its case"),
        pytest.param("json:blip", {"json": b'{"blip": "b", "url": "u"}'}, "b", id="a field of the JSON"),
    ],
)
def test_second_caption_of_a_sample_is_a_member_or_a_field(
    key: str, sample: dict[str, Any], caption: str | bytes
) -> None:
    assert SecondCaption(caption_key=key).read_sample(sample, caption="raw", image=b"") == caption


@pytest.mark.parametrize(
    ("key", "sample"),
    [
        pytest.param("syn.txt", {"txt": b"raw"}, id="no such member"),
        pytest.param("syn", {"syn": b" \n"}, id="a blank member"),
        pytest.param("json:blip", {}, id="no JSON"),
        pytest.param("json:blip", {"json": b"not json"}, id="JSON that cannot be read"),
        pytest.param("json:blip", {"json": b'{"other": "d"}'}, id="no such field"),
        pytest.param("json:blip", {"json": b'{"blip": " "}'}, id="a blank field"),
    ],
)
def test_a_sample_without_a_second_caption_has_none(key: str, sample: dict[str, Any]) -> None:
    """By which the sample is skipped; see ``TextColumn.read_sample``."""
    assert SecondCaption(caption_key=key).read_sample(sample, caption="raw", image=b"") is None


def second_captions_of_rows(tmp_path: Path, text: str) -> list[str]:
    """The second captions in the column ``syn`` of a CSV file with this text."""
    file = tmp_path / "data.csv"
    file.write_text(text)
    captions: list[str] = SecondCaption(caption_key="syn").read_rows(str(file), separator=";", dataset=None)
    return captions


def test_second_captions_of_rows_are_the_column_as_it_is_written(tmp_path: Path) -> None:
    """Also a text that begins with a word for a missing value."""
    text = "filepath;title;syn\n1.png;raw;made\n2.png;5;NULL and void\n"
    assert second_captions_of_rows(tmp_path, text) == ["made", "NULL and void"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("filepath;title\n1.png;raw\n", "'syn'.* filepath, title", id="no such column"),
        pytest.param(
            "filepath;title;syn\n1.png;a;b\n2.png;c;\n3.png;d;\n",
            "2 rows: column 'syn' .* row 2",
            id="two empty cells",
        ),
        pytest.param(
            "filepath;title;syn\n1.png;a;b\n2.png;c; \n", "1 rows: column 'syn' .* row 2", id="a blank cell"
        ),
    ],
)
def test_a_row_without_a_second_caption_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        second_captions_of_rows(tmp_path, text)
