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


def test_floors_are_every_requirements_lower_bound_as_an_exact_version() -> None:
    project = {
        "name": "x",
        "dependencies": ["torch>=2.6", "numpy>=1.24"],
        "optional-dependencies": {
            "a": ["A[train]>=3.0,<4; python_version < '3.11'", "numpy>=2"],
            "b": ["x[a]", "b>=0.1"],
            "c": ["c<2"],
        },
    }
    core = ["torch==2.6", "numpy==1.24"]
    assert release_check.floors_of("", project) == core
    a = ["torch==2.6", "numpy==2", 'A[train]==3.0; python_version < "3.11"']
    assert {*release_check.floors_of("a", project)} == {*a}
    assert {*release_check.floors_of("b", project)} == {*a, "b==0.1"}
    with pytest.raises(release_check.CheckError, match="'c<2' of c has no lower bound"):
        release_check.floors_of("c", project)


def test_every_extra_of_a_user_has_floors() -> None:
    for extra in release_check.MODULES:
        names = [
            re.split(r"[\[=]", floor)[0]
            for floor in release_check.floors_of(extra, release_check.project_table())
        ]
        assert {"torch", "numpy"} <= {*names}, extra


SOURCE = (ROOT / "rankloss/_version.py").read_text()
VERSION = SOURCE.split('"')[-2]


def test_a_release_has_the_tag_of_its_version_and_a_section_with_a_date() -> None:
    section = f"# Changelog\n\n## [{VERSION}], 2026-12-01\n\n- New.\n"
    release_check.check_tag(f"v{VERSION}", SOURCE, section)
    with pytest.raises(release_check.CheckError, match=rf"v9.9.9.*v{VERSION}"):
        release_check.check_tag("v9.9.9", SOURCE, section)
    with pytest.raises(release_check.CheckError, match=VERSION):
        release_check.check_tag(f"v{VERSION}", SOURCE, f"## [{VERSION}]\n")
