"""Writes the table of the rank terms' options into docs/options.md, from the options in the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from rankloss.options import CHOICES, RankOptions

DOCUMENT = Path(__file__).parents[1] / "docs/options.md"
SECTION = re.compile(r"(?<=<!-- rank-options -->\n).*?(?=<!-- /rank-options -->)", re.DOTALL)


def table() -> str:
    """One row per option: its values, the default first, and its effect."""
    lines = ["| option | values | effect |", "|---|---|---|"]
    for option in dataclasses.fields(RankOptions):
        none = f" ({option.metadata['none']})" if option.metadata["none"] else ""
        values = [f"`{option.default!r}`{none}, the default"]
        values += [f"`{choice!r}`" for choice in CHOICES[option.name] if choice != option.default]
        if not CHOICES[option.name]:
            values.append("a positive number" if "above" in option.metadata["bounds"] else "a whole number")
        lines.append(f"| `{option.name}` | {'; '.join(values)} | {option.metadata['help']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(SECTION.sub(lambda _: table(), text), encoding="utf-8")
