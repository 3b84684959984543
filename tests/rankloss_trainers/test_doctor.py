"""``rankloss doctor``: trainers that are there, missing, untested or broken; what is odd in the process."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch

from rankloss_trainers import console, doctor
from rankloss_trainers.doctor import Trainer, examined, in_range, range_of

REQUIREMENTS = [
    "torch>=2.6",
    'open-clip-torch[training]<4,>=3.0; extra == "open-clip"',
    "transformers<6,>=5.0; extra == 'transformers'",
    'accelerate>=1.15; extra == "transformers"',
]


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


def trainer(plugin: str = "rankloss") -> Trainer:
    return Trainer("Trainer", ("transformers", "former-name"), "transformers", plugin, "like this")


def test_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = console.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}")
    assert any(line.startswith("kernel for 4,096 pairs on c") for line in lines)
    for known in doctor.TRAINERS:
        (line,) = [line for line in lines if line.startswith(f"{known.name}")]
        assert "not installed" in line or ": yes, " in line or ": no" in line
    assert code == (1 if any(line.endswith(": no") for line in lines) else 0)


def test_trainer_that_is_installed_is_shown_with_its_use(installed: dict[str, str]) -> None:
    installed["transformers"] = "5.24.0"
    assert examined(trainer()) == (True, ["Trainer 5.24.0: yes, like this"])


def test_other_distribution_serves_too(installed: dict[str, str]) -> None:
    installed["former-name"] = "1.0"
    assert examined(trainer()) == (True, ["Trainer 1.0: yes, like this"])


def test_untested_version_is_remarked_on(installed: dict[str, str]) -> None:
    installed["transformers"] = "6.1.0"
    assert examined(trainer()) == (True, ["Trainer 6.1.0 (tested with >=5.0,<6): yes, like this"])


def test_missing_trainer_is_no_problem(installed: dict[str, str]) -> None:
    assert examined(trainer()) == (
        True,
        ["Trainer: not installed: pip install 'rankloss[transformers]'"],
    )


def test_trainer_that_cannot_train_yet_says_what_it_lacks(installed: dict[str, str]) -> None:
    needy = dataclasses.replace(trainer(), needs=("accelerate",))
    installed["transformers"] = "5.1.0"
    assert examined(needy) == (
        True,
        ["Trainer 5.1.0: not ready to train without accelerate: pip install 'rankloss[transformers]'"],
    )
    installed["accelerate"] = "1.15.0"
    assert examined(needy) == (True, ["Trainer 5.1.0: yes, like this"])


def test_plugin_that_cannot_be_imported_is_a_problem(installed: dict[str, str]) -> None:
    installed["transformers"] = "5.24.0"
    works, (head, problem) = examined(trainer("no_such_module"))
    assert not works
    assert head == "Trainer 5.24.0: no"
    assert problem.startswith("- no_such_module cannot be imported: ModuleNotFoundError")


def test_problems_of_a_plugin_are_listed(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["transformers"] = "5.24.0"
    monkeypatch.setattr(doctor, "diagnose", lambda: ["torch is too old."], raising=False)
    assert examined(trainer("rankloss_trainers.doctor:diagnose")) == (
        False,
        ["Trainer 5.24.0: no", "- torch is too old."],
    )


def test_exit_code_tells_of_a_problem(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed["transformers"] = "5.24.0"
    for plugin, code in (("rankloss", 0), ("no_such_module", 1)):
        monkeypatch.setattr(doctor, "TRAINERS", (trainer(plugin),))
        assert doctor.main() == code
    assert "Trainer 5.24.0: no" in capsys.readouterr().out


def test_without_torch_nothing_else_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.main() == 1
    assert capsys.readouterr().out == "torch is not installed: pip install torch\n"


@pytest.mark.parametrize(
    ("extra", "distribution", "range_"),
    [
        ("open-clip", "open_clip_torch", ">=3.0,<4"),
        ("transformers", "transformers", ">=5.0,<6"),
        ("transformers", "accelerate", ">=1.15"),
        ("open-clip", "transformers", ""),
    ],
)
def test_range_is_that_of_the_extra(
    installed: dict[str, str], extra: str, distribution: str, range_: str
) -> None:
    assert range_of(extra, distribution) == range_


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("open_clip", "python -m rankloss_open_clip --trainer training.main "),
        ("sentence-transformers", "callbacks=[rankloss_trainers.sentence_transformers.Progress(loss)]"),
        ("Lightning", "callbacks=[rankloss_trainers.lightning.Progress()]"),
        ("accelerate", "set_progress(step, total_steps)"),
    ],
)
def test_report_says_how_the_loss_learns_where_training_stands(name: str, said: str) -> None:
    (known,) = [known for known in doctor.TRAINERS if known.name == name]
    assert said in known.use


def test_every_trainers_extra_exists() -> None:
    extras = importlib.metadata.metadata("rankloss").get_all("Provides-Extra") or []
    for known in doctor.TRAINERS:
        if known.extra and importlib.util.find_spec(known.plugin.partition(":")[0]) is not None:
            assert known.extra in extras, known


@pytest.mark.parametrize(
    ("version", "inside"),
    [("3.0", True), ("3.0.0", True), ("3.9.9", True), ("4", False), ("2.99", False), ("3.1.0.dev1", True)],
)
def test_bounds_are_compared_as_numbers(version: str, inside: bool) -> None:
    assert in_range(version, ">=3.0,<4") is inside


@pytest.fixture
def settings() -> Iterator[None]:
    """Put torch's settings back."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def test_peculiarities_are_told(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert doctor.peculiarities() == []
    if torch.set_flush_denormal(True):
        assert "flush-to-zero is on" in doctor.peculiarities()[0]
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    first, second = doctor.peculiarities()
    assert "torch raises where it has none" in first
    assert second.startswith("TORCH_DEVICE_BACKEND_AUTOLOAD=0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert "torch warns" in doctor.peculiarities()[0]
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("high")
    assert "'high'" in doctor.peculiarities()[0]


def test_examples_run() -> None:
    assert doctest.testmod(doctor) == (0, 2)
