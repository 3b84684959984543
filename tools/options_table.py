"""Writes the tables of options into docs/options.md, from the options in the code."""

from __future__ import annotations

import re
from pathlib import Path

import rankloss
from rankloss_trainers.option import Option, options_of
from rankloss_trainers.run_options import RunOptions

DOCUMENT = Path(__file__).parents[1] / "docs/options.md"
SECTION = re.compile(r"(<!-- options (\w+) -->\n)(.*?)(?=<!-- /options -->)", re.DOTALL)  # the mark, its name
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
    """The values of an option that are not its default, or their kind."""
    if option.choices:
        others = [value for value in option.choices.values() if value != option.default]
        return ", ".join(f"`{value!r}`" for value in others)
    kinds = [noun for kind, noun in KINDS.items() if kind in option.types]
    return kinds[0]


if __name__ == "__main__":
    page = DOCUMENT.read_text(encoding="utf-8")
    filled = SECTION.sub(lambda match: match[1] + table(match[2]), page)
    DOCUMENT.write_text(filled, encoding="utf-8")
