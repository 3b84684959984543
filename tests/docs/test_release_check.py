"""The release check reads a wheel right, and stops where a release must."""

from __future__ import annotations

import importlib.util
import re

import pytest
from tools_folder import ROOT, tool

release_check = tool("release_check.py")


def test_every_extra_of_a_trainer_has_to_import_a_module_of_the_project() -> None:
    for extra, modules in release_check.MODULES.items():
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        for module in modules:
            assert importlib.util.find_spec(module) is not None
    packages = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )[1]
    assert tuple(re.findall(r"(\w+)\"", packages)) == release_check.PACKAGES


SOURCE = (ROOT / "rankloss/_version.py").read_text()
VERSION = SOURCE.split('"')[-2]


def test_tag_of_a_release_with_its_section_is_accepted() -> None:
    release_check.check_tag(f"v{VERSION}", SOURCE, f"# Changelog\n\n## [{VERSION}], 2026-12-01\n\n- New.\n")


@pytest.mark.parametrize("tag", [VERSION, "v9.9.9", f"v{VERSION}.1"])
def test_tag_of_another_version_is_refused(tag: str) -> None:
    with pytest.raises(release_check.CheckError, match=rf"{tag}, but .*: tag v{VERSION}, or"):
        release_check.check_tag(tag, SOURCE, f"## [{VERSION}], 2026-12-01\n")


@pytest.mark.parametrize("heading", ["[Unreleased]", f"[{VERSION}], the first release", f"[{VERSION}]"])
def test_section_without_version_and_date_is_refused_with_what_to_write(heading: str) -> None:
    with pytest.raises(release_check.CheckError) as caught:
        release_check.check_tag(f"v{VERSION}", SOURCE, f"## {heading}\n")
    (written,) = re.findall(rf"into `(## \[{VERSION}\].*)`", str(caught.value))
    release_check.check_tag(f"v{VERSION}", SOURCE, f"{written}\n")
