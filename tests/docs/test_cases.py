"""One case has one setting: both columns of every row build the same loss, on every page."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

import pytest
from tools_folder import ROOT, tool

from rankloss_trainers import catalog, create
from rankloss_trainers.command_line import LossArguments
from rankloss_trainers.declared import Loss
from rankloss_trainers.option import options_of

cases = tool("cases.py")
README = ROOT / "README.md"
OTHERS = ("docs/papers.md",)
COMMANDS = re.compile(r"`([^`\n]*--loss [^`\n]*)`")


def by_command(command: str) -> list[Loss]:
    """The losses that a command line chooses."""
    parser = argparse.ArgumentParser()
    words = shlex.split(command)
    from_loss_on = words[words.index("--loss") :]
    first_loss = from_loss_on[1].split("+")[0]
    arguments = LossArguments(parser, list(catalog.known()), first_loss)
    chosen = arguments.chosen(parser.parse_args(from_loss_on))
    assert chosen is not None
    losses, *_of_run = chosen
    return losses


def by_call(call: str) -> list[Loss]:
    """The losses that a call of ``create``, as text, chooses; they are not built."""
    return eval(call, {"create": lambda name, **options: catalog.choose(name, options)})


def options_of_losses(losses: list[Loss]) -> dict[str, dict[str, Any]]:
    """The values of each loss's options, but for columns of the data, which some trainers have not."""
    options = {}
    for loss in losses:
        columns = loss.named.columns_class
        of_data = {} if columns is None else options_of(columns)
        options[loss.name] = {name: x for name, x in loss.values.items() if name not in of_data}
    return options


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.have)
def test_both_columns_of_a_row_build_the_same_loss(case: Any) -> None:
    typed = by_command(case.command())
    assert options_of_losses(typed) == options_of_losses(by_call(case.python()))
    assert [loss.name for loss in typed] == catalog.names_of(case.loss)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.have)
def test_the_loss_of_a_case_has_nothing_to_train(case: Any) -> None:
    loss = eval(case.python(), {"create": create})
    assert list(loss.parameters()) == []


SCRIPTS = {name: case for name, _, case in cases.EXAMPLES if name.endswith(".sh")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_open_clip_trains_the_loss_of_its_case(name: str) -> None:
    text = (ROOT / "examples/trainers" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^python -m open_clip_train.main .*", text, re.MULTILINE)
    words = shlex.split(command)
    from_loss_on = words[words.index("--loss") :]
    expected = shlex.split(SCRIPTS[name].command())
    options, others = from_loss_on[: len(expected)], from_loss_on[len(expected) :]
    assert options == expected
    assert [word for word in others if word.startswith(("--rankclip", "--clip-ids"))] == []


def rows_of_readme() -> list[tuple[str, str]]:
    """The command and the gain of each row of README's tables."""
    lines = [line for table in cases.tables_of_readme().values() for line in table.splitlines()[2:]]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [(command, gain) for _, _, command, gain, *_ in cells]


def test_a_row_of_the_readme_has_the_command_that_gave_its_numbers() -> None:
    measured = {(f"`{case.command()}`", case.brief()) for case in cases.CASES}
    assert {*rows_of_readme()} <= measured


def test_a_gain_of_the_readme_has_its_interval() -> None:
    assert [gain for _, gain in rows_of_readme() if not re.search(r"\d\.\d ± \d\.\d", gain)] == []


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.in_brief], ids=lambda case: case.loss)
def test_what_is_shown_in_brief_is_a_part_of_what_was_measured(case: Any) -> None:
    """Its gains, with the stars of those that are not significant; one or two, as a reader takes in."""
    number = re.compile(r"\*?[+−]\d+\.\d+ ± \d+\.\d+\*?")
    shown = number.findall(case.in_brief)
    assert 1 <= len(shown) <= 2
    assert set(shown) <= set(number.findall(case.gain))


def test_the_readme_has_at_most_three_rows_of_data_and_explains_its_scores_above_them() -> None:
    before = README.read_text(encoding="utf-8").partition("<!-- have -->")[0]
    assert len(cases.HAVE) <= 3
    scores = ("**R@10**", "**τ_c**", "±", "*Italic*")
    data_and_models = ("**Icons**", "**Emojis**", "**Photographs**", "**heads**")
    for word in (*scores, *data_and_models):
        assert word in before, word


def test_gains_have_one_decimal_in_the_readme_and_versions_stay() -> None:
    assert cases.of_readme("+1.05 ± 0.34, torch 2.13.0") == "+1.1 ± 0.3, torch 2.13.0"


def test_links_of_the_readme_lead_into_the_folder_of_pages() -> None:
    assert cases.of_readme("see [it](evidence.md#its-ranks)") == "see [it](docs/evidence.md#its-ranks)"


@pytest.mark.parametrize("page", [*cases.TABLES, "README.md"])
def test_the_tables_are_generated(page: str) -> None:
    file = ROOT / page
    assert file.read_text(encoding="utf-8") == cases.pages()[file], "python tools/cases.py writes them"


@pytest.mark.parametrize("name", [*cases.TABLES, "README.md", *OTHERS])
def test_the_commands_beside_the_tables_parse(name: str) -> None:
    outside_of_tables = cases.SECTION.sub("", (ROOT / name).read_text(encoding="utf-8"))
    prose = re.sub(r"\\\n|\n  ", " ", outside_of_tables)  # a command may go on in the next line
    quoted = [command for command in COMMANDS.findall(prose) if "…" not in command]
    typed = [command for command in quoted if command.split("--loss ")[1].strip()]
    typed += re.findall(r"^python -m open_clip_train.main .*?(--loss [^\n]*)$", prose, re.MULTILINE)
    for command in typed:
        by_command(command)  # or the parser exits
