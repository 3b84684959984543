"""The release check reads a wheel right, and stops where a release must."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import metadata

import pytest
from tools_folder import ROOT, tool

release_check = tool("release_check.py")
EXTRAS = metadata("rankloss").get_all("Provides-Extra")


PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_extra_of_a_trainer_has_to_import_a_module() -> None:
    assert set(EXTRAS) - release_check.OF_A_CLONE == release_check.MODULES.keys()
    for modules in release_check.MODULES.values():
        for module in modules:
            assert importlib.util.find_spec(module) is not None


def test_every_package_is_typed_against_by_a_users_code() -> None:
    packages = re.search(r"^packages = \[(.*?)\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    assert tuple(re.findall(r"(\w+)\"", packages)) == release_check.PACKAGES
    for package, code in release_check.SNIPPETS.items():
        compile(code, package, "exec")
        assert re.search(rf"^(import|from) {package}$| {package} ", code, re.MULTILINE)


def test_lowest_versions_are_those_of_the_dependencies() -> None:
    lowest = release_check.lowest_of_core('x = 1\ndependencies = ["torch>=2.6", "numpy>=1.24"]\n')
    assert lowest == ["torch==2.6", "numpy==1.24"]
    core = release_check.lowest_of_core(PROJECT)
    assert [pin.partition("==")[0] for pin in core] == ["torch", "numpy"]
    assert release_check.pins_of("open-clip", core) == core
    assert release_check.pins_of("gpu", core) == []
    assert release_check.NEWER.keys() <= {*EXTRAS}


SOURCE = (ROOT / "rankloss/_version.py").read_text()
VERSION = SOURCE.split('"')[-2]


def test_a_release_has_the_tag_of_its_version_and_a_section_with_a_date() -> None:
    section = f"# Changelog\n\n## [{VERSION}], 2026-12-01\n\n- New.\n"
    release_check.check_tag(f"v{VERSION}", SOURCE, section)
    with pytest.raises(release_check.CheckError, match=rf"v9.9.9.*v{VERSION}"):
        release_check.check_tag("v9.9.9", SOURCE, section)
    with pytest.raises(release_check.CheckError, match=VERSION):
        release_check.check_tag(f"v{VERSION}", SOURCE, f"## [{VERSION}]\n")
