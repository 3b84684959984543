"""The command ``rankloss``."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from rankloss_trainers import catalog, console
from rankloss_trainers.catalog import Candidate, flag


def test_every_loss_is_listed_with_its_options_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["losses"]) == 0
    blocks = re.split(r"^(?=\S)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    found = catalog.candidates()
    assert [re.match(r"[\w-]+", block)[0] for block in blocks] == list(found)  # type: ignore[index]
    for block, (name, candidate) in zip(blocks, found.items(), strict=True):
        entry = candidate.load()
        head, *lines = block.splitlines()
        assert entry.help in head
        for line, option in zip(lines, entry.options, strict=True):
            assert re.match(rf"  {flag(name, entry, option)}\b", line)
            default = option.unset if option.default is None else option.default
            assert line.endswith(f"(default: {default})")
            for choice in option.keywords.get("choices", ()):
                assert choice in line


def test_named_losses_are_listed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["losses", "cyclip"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cyclip: the trainer's own plus CyCLIP's cyclic consistency terms",
        "  --cyclip-lambda-cross X  weight of the cross-modal term (default: 0.25)",
        "  --cyclip-lambda-in X     weight of the in-modal term (default: 0.25)",
    ]


def test_broken_package_is_named_and_stops_nothing() -> None:
    broken = Candidate("mine", "no_such_module:LOSS", "my-package 1.0")
    (line,) = console.described(broken)
    assert line.startswith("mine (my-package 1.0): cannot be used: ModuleNotFoundError")


def test_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.main(["losses", "rankclap"])
    assert "no loss is called rankclap; there are rankclip, " in capsys.readouterr().err


def test_command_is_installed() -> None:
    points = importlib.metadata.entry_points(group="console_scripts", name="rankloss")
    assert [point.value for point in points] == ["rankloss_trainers.console:main"]
    (point,) = points
    assert point.load() is console.main


def test_list_loads_no_trainer() -> None:
    code = (
        "import sys; from rankloss_trainers.console import main; main(['losses']); "
        "sys.exit(', '.join({'transformers', 'open_clip', 'lightning'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGPIPE")
@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        ("rankloss_trainers.console losses", ""),
        ("rankloss_trainers.console losses", "1"),
        ("rankloss_trainers.console --help", ""),
    ],
)
def test_reader_that_leaves_ends_it_without_a_word(command: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    arguments = [sys.executable, "-m", *command.split()]
    try:
        done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_else_fails_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    @console.readers_may_leave()
    def command() -> None:
        print("begun")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        command()
    assert capsys.readouterr().out == "begun\n"
