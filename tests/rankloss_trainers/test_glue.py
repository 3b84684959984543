"""What a user pastes: at most five lines that a training without rankloss would not have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
AT_MOST = 5
IMPORTED = {"ContrastiveTrainer", "LossOptions"}  # by the examples before, or by the text
METHODS = {"set_progress", "set_epoch", "schedule_value"}  # only losses of rankloss have them


def examples() -> list[tuple[str, str]]:
    """The Python blocks of the trainers' pages, by page and line; those with prompts show schedules."""
    found = []
    for page in ("trainers.md", "trainers-more.md"):
        text = (DOCS / page).read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if not block[1].startswith(">>>"):
                found.append((f"{page}:{text[: block.start()].count(chr(10)) + 1}", block[1]))
    return found


def glue(code: str) -> set[int]:
    """The lines that import from rankloss, name what is imported, derive from it, or call its methods."""
    tree = ast.parse(code)
    names = set(IMPORTED)
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            ours = [
                a for a in node.names if f"{getattr(node, 'module', '') or a.name}".startswith("rankloss")
            ]
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in ours}
            lines |= {node.lineno} if ours else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(named(base, names) for base in node.bases):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif (isinstance(node, ast.Name) and node.id in names) or (
            isinstance(node, ast.Attribute) and node.attr in METHODS
        ):
            lines.add(node.lineno)
    return lines


def named(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


@pytest.mark.parametrize(("place", "code"), examples(), ids=[place for place, _ in examples()])
def test_glue_is_five_lines_at_most(place: str, code: str) -> None:
    assert len(glue(code)) <= AT_MOST, place
