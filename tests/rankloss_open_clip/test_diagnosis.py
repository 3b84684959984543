"""What the doctor and the runner say where something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import open_clip
import pytest
import torch

from rankloss_open_clip import __main__ as runner
from rankloss_open_clip import bootstrap, doctor


def with_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(open_clip, "__version__", version)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())


def test_nothing_is_wrong_here() -> None:
    assert doctor.diagnose() == []


def test_version_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "2.24.0")
    (problem,) = doctor.diagnose()
    assert problem.startswith("open_clip 2.24.0 is older than 2.26.1")
    assert "pip install 'open_clip_torch[training]>=3.0'" in problem


def test_version_that_is_only_tried_is_remarked_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_version(monkeypatch, "2.32.0")
    assert doctor.main() == 0
    assert "But open_clip 2.32.0: --loss is tested with 3.0.0 to 3.3.0" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["torch", "open_clip_train"])
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    without(monkeypatch, module, "open_clip")
    assert doctor.diagnose()[0].startswith(f"{module} is not installed: pip install")


def test_torch_without_autoload_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "attached", lambda: False)
    monkeypatch.delattr(torch, "_import_device_backends")
    assert any("loads no plug-ins, 2.5 is the first that does" in problem for problem in doctor.diagnose())


def test_missing_entry_point_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "attached", lambda: False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert any("its entry point is not registered" in problem for problem in doctor.diagnose())


def test_switched_off_autoload_is_named_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "attached", lambda: False)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"torch {torch.__version__}"
    assert lines[4].startswith("- TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading plug-ins")


def test_runner_without_the_trainer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "open_clip_train", "open_clip")
    with pytest.raises(SystemExit, match="open_clip_train is not installed: pip install 'open_clip_torch"):
        runner.main()


def test_trainer_of_an_old_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "open_clip_train")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"open_clip_torch": "2.24.0"}[name])
    expected = (
        "open_clip 2.24.0 is older than 2.26.1, the oldest that --loss is for; its trainer is the package "
        "`training`, which has to be named: python -m rankloss_open_clip --trainer training.main"
    )
    assert doctor.diagnose() == [f"{expected}."]
    with pytest.raises(SystemExit) as exit_:
        runner.main()
    assert exit_.value.code == expected


def test_open_clip_without_its_trainer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "open_clip_train", "training")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"open_clip_torch": "3.3.0"}[name])
    assert doctor.diagnose() == [
        "open_clip 3.3.0 is installed, but its trainer, open_clip_train, is not: "
        "pip install 'open_clip_torch[training]>=3.0'."
    ]
