"""``rankloss doctor``: trainers that are there, missing or broken."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch

from rankloss_trainers import console, doctor
from rankloss_trainers.doctor import Trainer, examined

REQUIREMENTS = [
    "torch>=2.6",
    'open-clip-torch[training]<4,>=3.0; extra == "open-clip"',
    "transformers<6,>=5.0; extra == 'transformers'",
    'accelerate>=1.15; extra == "transformers"',
]
TRAINER = Trainer("Trainer", ("transformers", "former-name"), "transformers", "rankloss", "like this")
NEEDY = dataclasses.replace(TRAINER, needs=("accelerate",))
SICK = dataclasses.replace(TRAINER, plugin=f"{__name__}:diagnose")
BROKEN = dataclasses.replace(TRAINER, plugin="no_such_module")
OPEN_CLIP = dataclasses.replace(TRAINER, distributions=("open_clip_torch",), extra="open-clip")
INSTALL = "pip install 'rankloss[transformers]'"
IN_RANGE = "Trainer 5.24.0 (tested with >=5.0,<6)"


def diagnose() -> list[str]:
    return ["It is too old."]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that are installed, by their versions."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)
    return versions


def test_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = console.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}")
    assert any(line.startswith("kernel for 4,096 pairs on c") for line in lines)
    for known in doctor.TRAINERS:
        (line,) = [line for line in lines if line.startswith(f"{known.name}")]
        assert "not installed" in line or ": yes, " in line or ": no" in line
    assert code == (1 if any(line.endswith(": no") for line in lines) else 0)


@pytest.mark.parametrize(
    ("trainer", "versions", "works", "lines"),
    [
        (TRAINER, {"transformers": "5.24.0"}, True, [f"{IN_RANGE}: yes, like this"]),
        (TRAINER, {"former-name": "1.0"}, True, ["Trainer 1.0: yes, like this"]),
        (OPEN_CLIP, {"open_clip_torch": "3"}, True, ["Trainer 3 (tested with >=3.0,<4): yes, like this"]),
        (TRAINER, {}, True, [f"Trainer: not installed: {INSTALL}"]),
        (
            NEEDY,
            {"transformers": "5.1.0"},
            True,
            [f"Trainer 5.1.0: not ready to train without accelerate: {INSTALL}"],
        ),
        (NEEDY, {"transformers": "5.24.0", "accelerate": "1.15"}, True, [f"{IN_RANGE}: yes, like this"]),
        (SICK, {"transformers": "5.24.0"}, False, [f"{IN_RANGE}: no", "- It is too old."]),
        (
            BROKEN,
            {"transformers": "5.24.0"},
            False,
            [
                f"{IN_RANGE}: no",
                "- no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
            ],
        ),
    ],
)
def test_trainer_is_shown_with_its_use_or_its_problem(
    installed: dict[str, str], trainer: Trainer, versions: dict[str, str], works: bool, lines: list[str]
) -> None:
    installed.update(versions)
    assert examined(trainer) == (works, lines)


def test_every_trainers_extra_exists() -> None:
    extras = importlib.metadata.metadata("rankloss").get_all("Provides-Extra") or []
    for known in doctor.TRAINERS:
        assert known.extra in extras, known
