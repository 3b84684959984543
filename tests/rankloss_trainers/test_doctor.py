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
HERE = {"transformers": "5.24.0"}


def diagnose() -> list[str]:
    return ["It is too old."]


def test_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = console.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}")
    for known in doctor.TRAINERS:
        (line,) = [line for line in lines if line.startswith(known.name)]
        assert "not installed" in line or "not ready" in line or ": yes, " in line or ": no" in line
    ready = any(": yes, " in line for line in lines)
    assert code == (1 if any(line.endswith(": no") for line in lines) or not ready else 0)


@pytest.mark.parametrize(
    ("trainers", "code"),
    [([TRAINER], 0), ([TRAINER, NEEDY], 0), ([TRAINER, SICK], 1), ([NEEDY], 1), ([SICK], 1)],
)
def test_status_is_0_only_if_a_trainer_is_ready_and_none_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trainers: list[Trainer], code: int
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", HERE.__getitem__)
    monkeypatch.setattr(doctor, "TRAINERS", trainers)
    assert console.main(["doctor"]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("rankloss[open-clip]" in last) == (TRAINER not in trainers)


@pytest.mark.parametrize(
    ("trainer", "versions", "state", "words"),
    [
        (TRAINER, HERE, True, ["yes", "like this"]),
        (TRAINER, {}, None, ["not installed", "pip install 'rankloss[transformers]'"]),
        (NEEDY, HERE, None, ["not ready", "no_such_module"]),
        (SICK, HERE, False, ["no", "It is too old."]),
        (BROKEN, HERE, False, ["no", "cannot be imported", "no_such_function"]),
    ],
)
def test_trainer_is_shown_with_its_use_or_its_problem(
    monkeypatch: pytest.MonkeyPatch,
    trainer: Trainer,
    versions: dict[str, str],
    state: bool | None,
    words: list[str],
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found, lines = examined(trainer)
    assert found is state
    assert ("5.24.0 (tested with <6,>=4.51)" in lines[0]) == bool(versions)
    assert [word for word in words if word not in "\n".join(lines)] == []
