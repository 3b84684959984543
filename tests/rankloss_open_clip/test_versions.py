"""Support status of versions of open_clip."""

from __future__ import annotations

import importlib.metadata

import pytest

from rankloss_open_clip.versions import judge


@pytest.mark.parametrize(
    "version", ["3.0.0", "3.1.0", "3.2.0", "3.3.0", "3.3", "3.3.0.post1", "3.3.0+a.dev1"]
)
def test_tested_version_gets_no_remark(version: str) -> None:
    assert judge(version).usable
    assert judge(version).remark == ""


@pytest.mark.parametrize(
    "version",
    [
        "2.26.1",
        "2.30.0",
        "2.32.0",
        "3.0.0.dev0",
        "3.3.0rc1",
        "3.3.1",
        "3.4.0",
        "4.2.0.dev0",
        "10.0.0",
        "main",
        "",
    ],
)
def test_other_version_is_tried_with_a_remark(version: str) -> None:
    verdict = judge(version)
    assert verdict.usable
    assert verdict.remark == f"open_clip {version}: --loss is tested with 3.0.0 to 3.3.0, and tried with this"


@pytest.mark.parametrize("version", ["2.26.0", "2.24.0", "2.9.3", "1.0.0", "0.2.1"])
def test_version_without_the_trainer_is_refused(version: str) -> None:
    verdict = judge(version)
    assert not verdict.usable
    assert verdict.remark == f"open_clip {version} is older than 2.26.1, the oldest that --loss is for"


def test_installed_version_is_a_tested_one() -> None:
    assert judge(importlib.metadata.version("open_clip_torch")).remark == ""
