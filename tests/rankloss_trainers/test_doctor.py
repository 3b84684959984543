"""``rankloss doctor``: trainers that are there, missing or broken."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from rankloss_trainers import console, doctor
from rankloss_trainers.doctor import Trainer, examined

TRAINER = Trainer("transformers", "transformers", "rankloss", "like this")
SICK = TRAINER._replace(plugin=f"{__name__}:diagnose")
NEEDY = TRAINER._replace(plugin="no_such_module")
BROKEN = TRAINER._replace(plugin=f"{__name__}:no_such_function")
INSTALL = "pip install 'rankloss[transformers]'"
SHOWN = "transformers 5.24.0 (tested with <6,>=4.51)"
HERE = {"transformers": "5.24.0"}


def diagnose() -> list[str]:
    return ["It is too old."]


def test_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = console.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}")
    for known in doctor.TRAINERS:
        (line,) = [line for line in lines if line.startswith(f"{known.name}")]
        assert "not installed" in line or "not ready" in line or ": yes, " in line or ": no" in line
    assert code == (1 if any(line.endswith(": no") for line in lines) else 0)


@pytest.mark.parametrize(
    ("trainer", "versions", "works", "lines"),
    [
        (TRAINER, HERE, True, [f"{SHOWN}: yes, like this"]),
        (TRAINER, {}, True, [f"transformers: not installed: {INSTALL}"]),
        (NEEDY, HERE, True, [f"{SHOWN}: not ready to train: No module named 'no_such_module'"]),
        (SICK, HERE, False, [f"{SHOWN}: no", "- It is too old."]),
        (
            BROKEN,
            HERE,
            False,
            [
                f"{SHOWN}: no",
                f"- {__name__} cannot be imported: AttributeError: module {__name__!r} has no attribute "
                "'no_such_function'",
            ],
        ),
    ],
)
def test_trainer_is_shown_with_its_use_or_its_problem(
    monkeypatch: pytest.MonkeyPatch, trainer: Trainer, versions: dict[str, str], works: bool, lines: list[str]
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert examined(trainer) == (works, lines)
