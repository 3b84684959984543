"""The command ``rankloss``."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest

import rankloss
from rankloss_trainers import catalog, console
from rankloss_trainers.catalog import Candidate, flag


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert console.main(argv) == 0
    return capsys.readouterr().out


def test_every_loss_is_listed_and_its_options_once(capsys: pytest.CaptureFixture[str]) -> None:
    listed = printed(capsys, "losses")
    found = catalog.candidates()
    assert re.findall(r"^[\w-]+", listed, re.MULTILINE) == list(found)
    entries = {name: candidate.load() for name, candidate in found.items()}
    flags = {flag(name, entry, option) for name, entry in entries.items() for option in entry.options}
    assert sorted(re.findall(r"^  (--\S+)", listed, re.MULTILINE)) == sorted(flags)
    defaults = "(default: 1.0; rankclip-cross: 0.0; rankclip-distill: 64.0)"
    assert defaults in " ".join(listed.split())


@pytest.mark.parametrize("name", catalog.candidates())
def test_loss_that_is_named_has_its_own_defaults(capsys: pytest.CaptureFixture[str], name: str) -> None:
    entry, said = catalog.candidates()[name].load(), " ".join(printed(capsys, "losses", name).split())
    assert said.startswith(name)
    assert entry.help in said
    for option in entry.options:
        default = option.unset if option.default is None else option.default
        shown = re.escape(f"{option.help} (default: {default})").replace("\\-", "-[ ]?")  # lines break there
        assert re.search(rf" {flag(name, entry, option)} (\S+ )?{shown}", said), option
        assert all(choice in said for choice in option.keywords.get("choices", ()))


def test_what_cannot_be_listed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Candidate("mine", "no_such_module:LOSS", "my-package 1.0")
    (line,) = console.described([broken])
    assert line.startswith("mine (my-package 1.0): cannot be used: ModuleNotFoundError")
    with pytest.raises(SystemExit):
        console.main(["losses", "rankclap"])
    assert "rankclap; there are rankclip, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"), [(["--version"], f"rankloss {rankloss.__version__}\n"), ([], "usage")]
)
def test_command_is_the_module_too(argv: list[str], said: str) -> None:
    command = [sys.executable, "-m", "rankloss", *argv]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith(said)


def test_command_is_installed() -> None:
    (point,) = importlib.metadata.entry_points(group="console_scripts", name="rankloss")
    assert point.load() is console.main
