"""Writes the tables of options into docs/options.md, from the options in the code."""

from __future__ import annotations

import re
from pathlib import Path

import rankloss
from rankloss_trainers.declared import Option, options_of
from rankloss_trainers.run_options import RunOptions

DOCUMENT = Path(__file__).parents[1] / "docs/options.md"
SECTION = re.compile(r"(<!-- options (\w+) -->\n)(.*?)(?=<!-- /options -->)", re.DOTALL)
OWNERS = {
    "ranks": rankloss.RankOptions,
    "rankclip": rankloss.RankClipLoss,
    "run": RunOptions,
}


def table(name: str) -> str:
    """One row per option: its values, the default first, and its effect."""
    lines = ["| option | values | effect |", "|---|---|---|"]
    for key, option in options_of(OWNERS[name]).items():
        lines.append(f"| `{key}` | {_values(option)} | {option.help} |")
    return "\n".join(lines) + "\n"


def _values(option: Option) -> str:
    values = [f"`{option.default!r}`, the default"]
    values += [f"`{choice!r}`" for choice in option.choices.values() if choice != option.default]
    kinds = {float: "a number", int: "a whole number", str: "text"}
    if not option.choices:
        values.append(next(text for kind, text in kinds.items() if kind in option.types))
    return "; ".join(values)


if __name__ == "__main__":
    page = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(SECTION.sub(lambda match: match[1] + table(match[2]), page), encoding="utf-8")
