"""The tables and lists of docs/options.md that repeat the code are the code's."""

from __future__ import annotations

import re

from tools_folder import ROOT, tool

from rankloss import schedules

PAGE = (ROOT / "docs/options.md").read_text(encoding="utf-8")
options_table = tool("options_table.py")


def test_the_table_of_the_rank_terms_is_generated() -> None:
    (shown,) = options_table.SECTION.findall(PAGE)
    assert shown == options_table.table(), "python tools/options_table.py writes it"


def test_every_schedule_is_named_with_its_last_value() -> None:
    (row,) = re.findall(r"^\| `schedule` .*", PAGE, re.MULTILINE)
    assert re.findall(r"`\"(\w+)\"`", row.partition(": ")[2]) == list(schedules.NAMES)
