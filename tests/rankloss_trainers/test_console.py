"""The command ``rankloss``: its losses, and trainers that are there, missing or broken."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import subprocess
import sys
from typing import Any, NoReturn

import pytest
import torch

import rankloss
from rankloss_trainers import catalog, console, doctor
from rankloss_trainers.command_line import flag, prefix_of, typed_options
from rankloss_trainers.doctor import Trainer
from registered import register


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The output of a command line, which has to succeed."""
    assert console.main(argv) == 0
    return capsys.readouterr().out


def test_every_loss_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It begins with its name, and ends with its summary."""
    lines = printed(capsys, "losses").splitlines()
    for name, line in zip(catalog.known(), lines, strict=True):
        assert re.match(rf"{name}[^\w-]", line)
        assert line.endswith(catalog.load(name).summary)


@pytest.mark.parametrize("name", catalog.known())
def test_the_page_of_a_loss_has_each_option_with_its_own_default(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Each stands there by its flag, a name for its value, its help and its default."""
    loss = catalog.load(name)
    on_one_line = " ".join(printed(capsys, "losses", name).split())
    assert on_one_line.startswith(name)
    assert loss.summary in on_one_line
    for key, option in typed_options(loss).items():
        default = "must be given" if option.is_required else f"default: {option.spelled(option.default)}"
        # A line may break behind a hyphen of the help, which is a space here.
        help_text = re.escape(f"{option.help} ({default})").replace("\\-", "-[ ]?")
        assert re.search(rf" {flag(prefix_of(name, loss), key)} (\S+ )?{help_text}", on_one_line), option
        assert all(choice in on_one_line for choice in option.choices)


def test_a_loss_tells_its_other_defaults_beside_others(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "losses", "rankclip-distill")
    changed = "lambda-cross 16.0, lambda-in 16.0, top-k 4"
    assert f"\nBeside mimicry, rankclip-distill has other defaults: {changed}.\n" in page


def test_a_loss_that_cannot_be_imported_is_listed_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is offered in place of a misspelt name."""
    register(monkeypatch, mine="no_such_module:LOSS")
    assert "\nmine (p 1.0): cannot be used: ModuleNotFoundError" in printed(capsys, "losses")
    with pytest.raises(SystemExit):
        console.main(["losses", "mime"])
    assert "got 'mime'; did you mean mine?" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rankloss", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("rankloss", run_name="__main__")
    assert capsys.readouterr().out == f"rankloss {rankloss.__version__}\n"


def test_the_command_is_installed() -> None:
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name="rankloss")
    assert entry_point.load() is console.main


def test_without_a_word_the_command_shows_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    assert text.startswith("usage")
    assert re.search(r"^ +losses  ", text, re.MULTILINE), "the commands, each with its line"


def test_a_reader_that_ends_early_is_no_error() -> None:
    command = [sys.executable, "-m", "rankloss", "losses"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


# --- rankloss doctor ------------------------------------------------------------------------------------

TRAINER = Trainer(name="transformers", distribution="transformers", plugin="rankloss", use="like this")
SICK = TRAINER._replace(plugin=f"{__name__}:diagnose")
NEEDY = TRAINER._replace(plugin="no_such_module")
BROKEN = TRAINER._replace(plugin=f"{__name__}:no_such_function")
MISSING = TRAINER._replace(distribution="no-such-distribution")
INSTALLED_VERSIONS = {"transformers": "5.24.0"}


def diagnose() -> list[str]:
    """The problems of SICK."""
    return ["It is too old."]


def test_report_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = console.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}")
    for known in doctor.TRAINERS:
        (line,) = [line for line in lines if line.startswith(known.name)]
        assert "not installed" in line or "not ready" in line or ": yes, " in line or ": no" in line
    is_one_ready = any(": yes, " in line for line in lines)
    is_one_broken = any(line.endswith(": no") for line in lines)
    assert code == (0 if is_one_ready and not is_one_broken else 1)


@pytest.mark.parametrize(
    ("trainers", "code", "shown"),
    [
        ([TRAINER], 0, "5.24.0 (tested with <6,>=4.51): yes, like this"),
        ([TRAINER, NEEDY], 0, "not ready to train: No module named 'no_such_module'"),
        ([TRAINER, MISSING], 0, "transformers: not installed: pip install 'rankloss[transformers]'"),
        ([TRAINER, SICK], 1, ": no\n- It is too old."),
        ([TRAINER, BROKEN], 1, ": no\n- test_console cannot be imported: AttributeError: "),
        ([NEEDY], 1, "pip install 'rankloss[open-clip]'"),
        ([SICK], 1, "No trainer is ready: see the problems above."),
    ],
)
def test_trainers_are_shown_and_status_is_0_only_if_one_is_ready_and_none_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, trainers: list[Trainer], code: int, shown: str
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: INSTALLED_VERSIONS.get(name) or version(name)
    )
    monkeypatch.setattr(doctor, "TRAINERS", trainers)
    assert console.main(["doctor"]) == code
    report = capsys.readouterr().out
    assert shown in report
    installed = [trainer for trainer in trainers if trainer is not MISSING]
    assert report.count("5.24.0 (tested with <6,>=4.51)") == len(installed)
    assert ("rankloss[open-clip]" in report) == (trainers == [NEEDY]), "advice where none is there"


def test_without_metadata_of_rankloss_the_tested_versions_are_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def requires(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr(doctor, "TRAINERS", [TRAINER])
    assert console.main(["doctor"]) == 0
    assert "(tested with unknown versions: rankloss is imported from its source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cuda", "hip", "shown"),
    [
        ("12.8", None, "CUDA 12.8: no GPU is found"),
        (None, "6.2.41133", "ROCm 6.2.41133: no GPU is found"),
        (None, None, "torch without CUDA: no GPU is found"),
    ],
)
def test_the_toolkit_of_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, shown: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert shown in doctor.machine()
