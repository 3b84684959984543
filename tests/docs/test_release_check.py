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


def test_a_release_has_the_tag_of_its_version_and_a_section_with_a_date() -> None:
    section = f"# Changelog\n\n## [{VERSION}], 2026-12-01\n\n- New.\n"
    release_check.check_tag(f"v{VERSION}", SOURCE, section)
    with pytest.raises(release_check.CheckError, match=rf"v9.9.9, but .*: tag v{VERSION}, or"):
        release_check.check_tag("v9.9.9", SOURCE, section)
    with pytest.raises(release_check.CheckError, match=f"no section for {VERSION} with a date"):
        release_check.check_tag(f"v{VERSION}", SOURCE, f"## [{VERSION}]\n")
