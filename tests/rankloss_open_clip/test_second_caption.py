"""A second caption, read from samples and from a CSV file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankloss_open_clip.columns.second_caption import SecondCaption


@pytest.mark.parametrize(
    ("key", "sample", "caption"),
    [
        ("Syn.TXT", {"syn.txt": b"made up"}, b"made up"),
        ("Syn.TXT", {"txt": b"raw"}, None),
        ("json:blip", {"json": json.dumps({"blip": "b", "url": "u"}).encode()}, "b"),
        ("json:blip", {"json": b'{"other": "d"}'}, None),
        ("json:blip", {"json": b"not json"}, None),
        ("json:blip", {}, None),
        ("syn", {"syn": b" \n"}, None),
        ("json:blip", {"json": b'{"blip": " "}'}, None),
    ],
)
def test_caption_of_a_sample(key: str, sample: dict[str, Any], caption: Any) -> None:
    assert SecondCaption(caption_key=key).read_sample(sample, "raw", b"") == caption


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath;title;syn\n1.png;raw;made\n2.png;5;NULL and void\n", ""),
        ("filepath;title\n1.png;raw\n", "'syn'.* filepath, title"),
        ("filepath;title;syn\n1.png;a;b\n2.png;c;\n3.png;d;\n", "2 rows: column 'syn' .* row 2"),
        ("filepath;title;syn\n1.png;a;b\n2.png;c; \n", "1 rows: column 'syn' .* row 2"),
    ],
)
def test_column_of_a_csv_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text)
    if message:
        with pytest.raises(ValueError, match=message):
            SecondCaption(caption_key="syn").read_rows(str(file), ";", None)
    else:
        assert SecondCaption(caption_key="syn").read_rows(str(file), ";", None) == ["made", "NULL and void"]
