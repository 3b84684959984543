"""The map of the house in CONTRIBUTING.md is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = (
    (ROOT / "CONTRIBUTING.md")
    .read_text(encoding="utf-8")
    .partition("<!-- map:")[2]
    .partition("<!-- /map -->")[0]
)
FOLDERS = (
    "rankloss",
    "integrations/rankloss_trainers",
    "integrations/rankloss_open_clip",
    "integrations/rankloss_features",
    "integrations/rankloss_baselines",
    "integrations/rankloss_triton",
)


def on_the_map(folder: str) -> list[str]:
    section = MAP.partition(f"### `{folder}/`")[2].partition("###")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def in_the_tree(folder: str, rows: list[str]) -> set[str]:
    """The files below a folder; those of a folder that has a row of its own stand for that row."""
    root = ROOT / folder
    found = set()
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        found.add(next((row for row in rows if row.endswith("/") and name.startswith(row)), name))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_on_the_map_once_and_nothing_else(folder: str) -> None:
    rows = on_the_map(folder)
    assert len(rows) == len(set(rows))
    assert set(rows) == in_the_tree(folder, rows)


def test_every_file_that_the_recipes_name_exists() -> None:
    recipes = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding")[2]
    named = {
        name
        for name in re.findall(r"`((?:\w+/)+[\w.]*)`", recipes)
        if "NAME" not in name and "TRAINER" not in name
    }
    assert len(named) > 10
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing
