"""Writes the table of the rank terms' options into docs/options.md, from the options in the code."""

from __future__ import annotations

import re
from pathlib import Path

from rankloss.options import RankOptions
from rankloss_trainers.declared import options_of

DOCUMENT = Path(__file__).parents[1] / "docs/options.md"
SECTION = re.compile(r"(?<=<!-- rank-options -->\n).*?(?=<!-- /rank-options -->)", re.DOTALL)


def table() -> str:
    """One row per option: its values, the default first, and its effect."""
    lines = ["| option | values | effect |", "|---|---|---|"]
    for key, option in options_of(RankOptions).items():
        values = [f"`{option.default!r}`, the default"]
        values += [f"`{choice!r}`" for choice in option.choices.values() if choice != option.default]
        if not option.choices:
            values.append("a positive number" if float in option.types else "a whole number")
        lines.append(f"| `{key}` | {'; '.join(values)} | {option.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(SECTION.sub(lambda _: table(), text), encoding="utf-8")
