"""The table in docs/options.md says what the options take."""

from __future__ import annotations

import dataclasses

import pytest
from tools_folder import tool

from rankloss.options import RankOptions, choices_of

options_table = tool("options_table.py")
FIELDS = {option.name: option for option in dataclasses.fields(RankOptions)}
ROWS = dict(zip(FIELDS, options_table.table().splitlines()[2:], strict=True))


def test_document_has_the_table() -> None:
    (shown,) = options_table.SECTION.findall(options_table.DOCUMENT.read_text(encoding="utf-8"))
    assert shown == options_table.table(), "python tools/options_table.py writes it"


@pytest.mark.parametrize("name", [name for name in ROWS if not choices_of(name)])
def test_kind_of_number_is_the_one_that_the_option_takes(name: str) -> None:
    needed = {"model": "top_one"} if name == "reference_scale" else {}
    if "a whole number" in ROWS[name]:
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            RankOptions(**{name: 2.5}, **needed)
    else:
        assert "a positive number" in ROWS[name]
        assert getattr(RankOptions(**{name: 2.5}, **needed), name) == 2.5
