"""The workflows: pinned actions, the Pythons that are promised, and who may publish."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS: dict[str, dict[str, Any]] = {path.stem: yaml.safe_load(path.read_text()) for path in PATHS}
JOBS = [(workflow, name, job) for workflow, w in WORKFLOWS.items() for name, job in w["jobs"].items()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_action_is_pinned_to_a_commit_and_says_its_version(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert lines
    assert [
        line for line in lines if not re.search(r"uses: [\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)
    ] == []


def test_an_action_has_one_pin() -> None:
    used = {step["uses"] for _, _, job in JOBS for step in job["steps"] if "uses" in step}
    actions = [use.partition("@")[0] for use in used]
    assert len(actions) == len(set(actions))


def test_every_promised_python_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [c.split()[-1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == promised
    assert project["requires-python"] == f">={promised[0]}"


def test_every_trainer_of_the_matrix_is_tested() -> None:
    targets = re.findall(r"^test-versions-([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert WORKFLOWS["ci"]["jobs"]["trainers"]["strategy"]["matrix"]["trainer"] == targets


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
