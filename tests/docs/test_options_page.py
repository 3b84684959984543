"""The table in docs/options.md says what the options take."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from rankloss.options import RankOptions, choices_of

TOOL = Path(__file__).parents[2] / "tools/options_table.py"
SPEC = importlib.util.spec_from_file_location("options_table", TOOL)
assert SPEC is not None
assert SPEC.loader is not None
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

ROWS = dict(
    zip(
        (option.name for option in dataclasses.fields(RankOptions)),
        tool.table().splitlines()[2:],
        strict=True,
    )
)


def test_document_has_the_table() -> None:
    (shown,) = tool.SECTION.findall(tool.DOCUMENT.read_text(encoding="utf-8"))
    assert shown == tool.table(), "python tools/options_table.py writes it"


@pytest.mark.parametrize("name", ROWS)
def test_row_has_the_default_and_every_choice(name: str) -> None:
    _, option, values, meaning, _ = (cell.strip() for cell in ROWS[name].split("|"))
    default = next(field.default for field in dataclasses.fields(RankOptions) if field.name == name)
    assert option == f"`{name}`"
    assert values.startswith(f"`{default!r}`")
    assert all(f"`{choice!r}`" in values for choice in choices_of(name))
    assert meaning


@pytest.mark.parametrize("name", [name for name in ROWS if not choices_of(name)])
def test_kind_of_number_is_the_one_that_the_option_takes(name: str) -> None:
    needed = {"model": "top_one"} if name == "reference_scale" else {}
    if "a whole number" in ROWS[name]:
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            RankOptions(**{name: 2.5}, **needed)
    else:
        assert "a positive number" in ROWS[name]
        assert getattr(RankOptions(**{name: 2.5}, **needed), name) == 2.5
