"""The commands that the documents print: their targets, scripts and options exist."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").glob("**/README.md"),
]


def commands() -> list[str]:
    """Every command of a console block, without its prompt and comment; continued lines are one.

    Where lines have a prompt, those without one are what was printed.
    """
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            found |= {" ".join(shlex.split(line, comments=True)) for line in prompted or lines}
    return sorted(found - {""})


def programs() -> dict[str, set[str]]:
    """The options that the documents give to every Python program: a file, or ``-m MODULE``."""
    options: dict[str, set[str]] = {}
    for command in commands():
        module = r"(-m (?:open_clip_train\.main|rankloss\S+|studies\S*))(.*)"
        file = r"^python (\w\S+\.py)(.*)"
        match = re.search(module, command) or re.search(file, command)
        if match is not None:
            program, arguments = match.groups()
            of_program = arguments.partition(" -- ")[0].partition("|")[0]
            options.setdefault(program, set()).update(re.findall(r" (--[a-z][\w-]*)", of_program))
    return {program: given for program, given in options.items() if given}


@functools.cache
def help_of(program: str) -> str:
    """The help of a program, in lines that are too long to be broken."""
    environment = {**os.environ, "COLUMNS": "500", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program.split(), "--help"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    return result.stdout


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_knows_the_target(command: str) -> None:
    make = ["make", "--dry-run", *command.split()[1:]]
    shown = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Nothing to be done" not in shown, "a folder of this name, and no target"


def test_scripts_of_the_commands_exist() -> None:
    script = r"\b\w[\w/.-]*\.(?:py|sh)\b"
    named = {word for command in commands() for word in re.findall(script, command)}
    of_transformers = {"run_clip.py"}
    ours = named - of_transformers
    assert len(ours) >= 3, "the pattern finds the documents' scripts"
    assert {name for name in ours if not (ROOT / name).exists()} == set()


@pytest.mark.slow
@pytest.mark.parametrize("program", programs())
def test_program_knows_the_options(program: str) -> None:
    text = help_of(program)
    if program.startswith("-m rankloss"):  # they add to the command line of what they run
        text += help_of("-m open_clip_train.main")
    # Of the package that docs/writing.md shows, and of the runner itself, which shows the trainer's help.
    not_in_a_help = {"--uniform-weight", "--trainer"}
    known = {*re.findall(r"--[\w-]+", text)}
    assert programs()[program] - known <= not_in_a_help
