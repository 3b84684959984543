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
    """Of a module that is there; an extra of a clone, such as that of its tests, is in no wheel's use."""
    assert set(EXTRAS) - release_check.OF_A_CLONE == release_check.MODULES.keys()
    modules = {module for of_extra in release_check.MODULES.values() for module in of_extra}
    assert {module for module in modules if importlib.util.find_spec(module) is None} == set()


def test_the_packages_of_the_check_are_those_of_the_wheel() -> None:
    listed = re.search(r"^packages = \[(.*?)\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    assert tuple(re.findall(r"(\w+)\"", listed)) == release_check.PACKAGES


def test_every_package_is_typed_against_by_a_users_code() -> None:
    for package, code in release_check.SNIPPETS.items():
        compile(code, package, "exec")  # a SyntaxError where it is no Python
        assert re.search(rf"^(import|from) {package}$| {package} ", code, re.MULTILINE)


MADE_UP = {
    "name": "x",
    "dependencies": ["torch>=2.6", "numpy>=1.24"],
    "optional-dependencies": {
        "a": ["A[train]>=3.0,<4; python_version < '3.11'", "numpy>=2"],
        "b": ["x[a]", "b>=0.1"],
        "d": ["c<2"],
    },
}
"""A project whose extra b has the requirements of its extra a, too."""
FLOORS_OF_A = {"torch==2.6", "numpy==2", 'A[train]==3.0; python_version < "3.11"'}


@pytest.mark.parametrize(
    ("extra", "floors"),
    [
        pytest.param("", {"torch==2.6", "numpy==1.24"}, id="no extra"),
        pytest.param("a", FLOORS_OF_A, id="a"),
        pytest.param("b", {*FLOORS_OF_A, "b==0.1"}, id="b, with a's"),
    ],
)
def test_floors_are_every_requirements_lower_bound_as_an_exact_version(extra: str, floors: set[str]) -> None:
    assert {*release_check.floors_of(extra, MADE_UP)} == floors


def test_a_requirement_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(release_check.CheckError, match="'c<2' of d must have one lower bound, >="):
        release_check.floors_of("d", MADE_UP)


@pytest.mark.parametrize("requirement", ["torch", "torch==2.6", "torch~=2.6", "torch>2.6", "torch>=2.6,>=3"])
def test_a_requirement_of_the_core_without_a_single_lower_bound_is_refused(requirement: str) -> None:
    project = {**MADE_UP, "dependencies": [requirement]}
    message = re.escape(f"the requirement '{requirement}' of the core must have one lower bound, >=")
    with pytest.raises(release_check.CheckError, match=message):
        release_check.floors_of("", project)


@pytest.mark.parametrize("extra", release_check.MODULES)
def test_every_extra_of_a_user_has_floors(extra: str) -> None:
    floors = release_check.floors_of(extra, release_check.project_table())
    assert {"torch", "numpy"} <= {re.split(r"[\[=]", floor)[0] for floor in floors}


SOURCE = (ROOT / "rankloss/_version.py").read_text()
VERSION = SOURCE.split('"')[-2]


DATED = f"# Changelog\n\n## [{VERSION}], 2026-12-01\n\n- New.\n"
"""A change log in which the version has the day of its release."""


def test_a_release_with_the_tag_of_its_version_and_a_dated_section_is_accepted() -> None:
    release_check.check_tag(f"v{VERSION}", SOURCE, DATED)  # or it raises a CheckError


def test_a_tag_of_another_version_is_refused() -> None:
    with pytest.raises(release_check.CheckError, match=rf"v9\.9\.9.*v{re.escape(VERSION)}"):
        release_check.check_tag("v9.9.9", SOURCE, DATED)


def test_a_release_whose_section_has_no_date_is_refused() -> None:
    with pytest.raises(release_check.CheckError, match=re.escape(VERSION)):
        release_check.check_tag(f"v{VERSION}", SOURCE, f"## [{VERSION}]\n")
