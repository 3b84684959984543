"""The command ``rankloss``."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import subprocess
import sys

import pytest

import rankloss
from rankloss_trainers import catalog, console
from rankloss_trainers.command_line import flag, prefix_of, typed_options
from registered import register


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert console.main(argv) == 0
    return capsys.readouterr().out


def test_every_loss_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "losses").splitlines()
    found = catalog.known()
    assert [re.match(r"[\w-]+", line)[0] for line in lines] == list(found)
    assert all(line.endswith(catalog.load(name).summary) for name, line in zip(found, lines, strict=True))


@pytest.mark.parametrize("name", catalog.known())
def test_loss_that_is_named_has_its_own_defaults(capsys: pytest.CaptureFixture[str], name: str) -> None:
    loss, said = catalog.load(name), " ".join(printed(capsys, "losses", name).split())
    assert said.startswith(name)
    assert loss.summary in said
    for key, option in typed_options(loss).items():
        default = "must be given" if option.is_required else f"default: {option.spelled(option.default)}"
        shown = re.escape(f"{option.help} ({default})").replace("\\-", "-[ ]?")  # lines break there
        assert re.search(rf" {flag(prefix_of(name, loss), key)} (\S+ )?{shown}", said), option
        assert all(choice in said for choice in option.choices)


def test_loss_that_cannot_be_listed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, mine="no_such_module:LOSS")
    assert "\nmine (p 1.0): cannot be used: ModuleNotFoundError" in printed(capsys, "losses")
    with pytest.raises(SystemExit):
        console.main(["losses", "mime"])
    assert "got 'mime'; did you mean mine?" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_is_the_module_and_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rankloss", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("rankloss", run_name="__main__")
    assert capsys.readouterr().out == f"rankloss {rankloss.__version__}\n"
    assert printed(capsys).startswith("usage")
    (point,) = importlib.metadata.entry_points(group="console_scripts", name="rankloss")
    assert point.load() is console.main


def test_a_reader_that_ends_early_is_no_error() -> None:
    command = [sys.executable, "-m", "rankloss", "losses"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
