"""The command ``rankloss``."""

from __future__ import annotations

import importlib.metadata
import re

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
        said = " ".join(block.split())
        assert entry.help in said
        for option in entry.options:
            assert f" {flag(name, entry, option)} " in said
            default = option.unset if option.default is None else option.default
            assert said.count(f"(default: {default})") >= 1
            assert all(choice in said for choice in option.keywords.get("choices", ()))
    assert console.main(["losses", "cyclip"]) == 0
    (alone,) = (block for block in blocks if block.startswith("cyclip"))
    assert capsys.readouterr().out == alone


def test_what_cannot_be_listed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Candidate("mine", "no_such_module:LOSS", "my-package 1.0")
    assert console.described(broken).startswith("mine (my-package 1.0): cannot be used: ModuleNotFoundError")
    with pytest.raises(SystemExit):
        console.main(["losses", "rankclap"])
    assert "rankclap; there are rankclip, " in capsys.readouterr().err


def test_command_is_installed() -> None:
    (point,) = importlib.metadata.entry_points(group="console_scripts", name="rankloss")
    assert point.load() is console.main
