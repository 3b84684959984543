"""``rankloss doctor``: trainers that are there, missing or broken; what in the process changes results."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch

from rankloss_trainers import console, doctor
from rankloss_trainers.doctor import Trainer, environment_warnings, examined

REQUIREMENTS = [
    "torch>=2.6",
    'open-clip-torch[training]<4,>=3.0; extra == "open-clip"',
    "transformers<6,>=5.0; extra == 'transformers'",
    'accelerate>=1.15; extra == "transformers"',
]
TRAINER = Trainer("Trainer", ("transformers", "former-name"), "transformers", "rankloss", "like this")
NEEDY = dataclasses.replace(TRAINER, needs=("accelerate",))
BROKEN = dataclasses.replace(TRAINER, plugin="no_such_module")
OPEN_CLIP = dataclasses.replace(TRAINER, distributions=("open_clip_torch",), extra="open-clip")
INSTALL = "pip install 'rankloss[transformers]'"
IN_RANGE = "Trainer 5.24.0 (tested with >=5.0,<6)"


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


def test_problems_of_a_plugin_are_listed_and_told_by_the_exit_code(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed["transformers"] = "5.24.0"
    monkeypatch.setattr(doctor, "diagnose", lambda: ["It is too old."], raising=False)
    sick = dataclasses.replace(TRAINER, plugin="rankloss_trainers.doctor:diagnose")
    for trainer, code in ((TRAINER, 0), (sick, 1)):
        monkeypatch.setattr(doctor, "TRAINERS", (trainer,))
        assert doctor.main() == code
    assert capsys.readouterr().out.endswith(f"{IN_RANGE}: no\n- It is too old.\n")


def test_without_torch_nothing_else_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert doctor.main() == 1
    assert capsys.readouterr().out == (
        "torch cannot be imported: ModuleNotFoundError: No module named 'torch'\n"
    )


def test_every_trainers_extra_exists() -> None:
    extras = importlib.metadata.metadata("rankloss").get_all("Provides-Extra") or []
    for known in doctor.TRAINERS:
        if known.extra and importlib.util.find_spec(known.plugin.partition(":")[0]) is not None:
            assert known.extra in extras, known


@pytest.fixture
def settings() -> Iterator[None]:
    """Put torch's settings back."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def test_what_changes_results_is_told(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert environment_warnings() == []
    if torch.set_flush_denormal(True):
        assert "flush-to-zero is on" in environment_warnings()[0]
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    first, second = environment_warnings()
    assert "torch raises where it has none" in first
    assert second.startswith("TORCH_DEVICE_BACKEND_AUTOLOAD=0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert "torch warns" in environment_warnings()[0]
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("high")
    assert "'high'" in environment_warnings()[0]
