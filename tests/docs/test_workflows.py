"""The workflows: pinned actions, who may publish; and versions that stand in more than one place."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

yaml = pytest.importorskip("yaml")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PATHS = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS: dict[str, dict[str, Any]] = {path.stem: yaml.safe_load(path.read_text()) for path in PATHS}
NOX = {  # the literals of noxfile.py, which cannot be imported without nox
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and isinstance(node.value, ast.Dict)
}
JOBS = [(workflow, name, job) for workflow, w in WORKFLOWS.items() for name, job in w["jobs"].items()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_action_is_pinned_to_a_commit_and_says_its_version(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert lines
    assert [
        line for line in lines if not re.search(r"uses: [\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)
    ] == []


def test_every_promised_python_is_tested() -> None:
    promised = [c.split()[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_nox_begins_with_the_lowest_versions_and_ci_runs_every_trainer() -> None:
    core = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    assert NOX["LOWEST"] == {name: lower_bound(r) + ".0" for name, r in core.items()}
    assert WORKFLOWS["ci"]["jobs"]["trainers"]["strategy"]["matrix"]["trainer"] == list(NOX["TRAINERS"])
    for extra, versions in NOX["TRAINERS"].items():
        requirement = Requirement(EXTRAS[extra][0])
        assert f"{versions[0]}.".startswith(f"{lower_bound(requirement)}.")
        assert all(version in requirement.specifier for version in versions)


def test_hooks_are_those_of_the_environment() -> None:
    """pre-commit's pins are versions that pyproject.toml allows, and each tool has one."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pins = {pin for hook in repository["hooks"] for pin in hook.get("additional_dependencies", ())}
    allowed = {r.name: r for r in map(Requirement, EXTRAS["dev"])}
    assert {Requirement(pin).name for pin in pins} == {"ruff", "codespell"}
    assert len(pins) == 2
    for pin in map(Requirement, pins):
        assert allowed[pin.name].extras == pin.extras
        assert str(pin.specifier).removeprefix("==") in allowed[pin.name].specifier


def lower_bound(requirement: Requirement) -> str:
    (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
    return bound


def test_a_job_may_write_only_where_it_publishes() -> None:
    assert {tuple(workflow["permissions"].items()) for workflow in WORKFLOWS.values()} == {
        (("contents", "read"),)
    }
    widened = {(workflow, name): job["permissions"] for workflow, name, job in JOBS if "permissions" in job}
    assert widened == {
        ("docs", "publish"): {"pages": "write", "id-token": "write"},
        ("release", "publish"): {"id-token": "write"},
    }


def test_release_is_published_from_its_environment_after_the_check_and_without_a_secret() -> None:
    build, publish = (WORKFLOWS["release"]["jobs"][name] for name in ("build", "publish"))
    assert any(
        "make release-check" in step.get("run", "") and "--tag" in step["run"] for step in build["steps"]
    )
    assert (publish["needs"], publish["environment"]) == ("build", "release")
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
