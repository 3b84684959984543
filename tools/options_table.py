"""Writes the tables of options into docs/options.md, from the options in the code."""

from __future__ import annotations

import re
from pathlib import Path

import rankloss
from rankloss_trainers.option import Option, options_of
from rankloss_trainers.run_options import RunOptions

DOCUMENT = Path(__file__).parents[1] / "docs/options.md"
SECTION = re.compile(r"(<!-- options (\w+) -->\n)(.*?)(?=<!-- /options -->)", re.DOTALL)
OWNERS = {
    "ranks": rankloss.RankOptions,
    "rankclip": rankloss.RankClipLoss,
    "spread": rankloss.SpreadLoss,
    "run": RunOptions,
}
KINDS = {float: "number", int: "integer", str: "text"}


def table(name: str) -> str:
    """One row per option."""
    lines = ["| option | default | else | effect |", "|---|---|---|---|"]
    for key, option in options_of(OWNERS[name]).items():
        lines.append(f"| `{key}` | `{option.default!r}` | {_others(option)} | {option.help} |")
    return "\n".join(lines) + "\n"


def _others(option: Option) -> str:
    """The other values."""
    if option.choices:
        return ", ".join(f"`{value!r}`" for value in option.choices.values() if value != option.default)
    return next(text for kind, text in KINDS.items() if kind in option.types)


if __name__ == "__main__":
    page = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(SECTION.sub(lambda match: match[1] + table(match[2]), page), encoding="utf-8")
