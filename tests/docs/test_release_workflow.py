"""The workflow of a release: its files are built before anything of a third party is installed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from tools_folder import ROOT, tool

release_check = tool("release_check.py")
GITHUB = ROOT / ".github"
WORKFLOW = yaml.safe_load((GITHUB / "workflows/release.yml").read_text())
JOBS = WORKFLOW["jobs"]


def commands(job: dict[str, Any]) -> list[str]:
    """The command of each step of a job, or the action without its version."""
    return [step.get("run") or step["uses"].partition("@")[0] for step in job["steps"]]


def test_files_are_built_and_uploaded_with_tools_of_known_hashes_alone() -> None:
    install = "python -m pip install --require-hashes --no-deps --only-binary=:all: -r .github/requirements/"
    assert commands(JOBS["build"]) == [
        "actions/checkout",
        "actions/setup-python",
        f"{install}build.txt",
        "python -m build --no-isolation --outdir dist",
        "actions/upload-artifact",
    ]
    # Then come the list of what an installation brings, and its upload.
    *_, download, tools, check, _, _ = commands(JOBS["check"])
    assert (download, tools) == ("actions/download-artifact", f"{install}check.txt")
    assert "release_check.py --built --tag" in check


def test_what_is_published_was_built_and_checked() -> None:
    assert JOBS["check"]["needs"] == "build"
    assert JOBS["publish"]["needs"] == ["build", "check"]
    publishing = [name for name, job in JOBS.items() if "pypa/gh-action-pypi-publish" in commands(job)]
    assert publishing == ["publish"]


def test_a_job_has_no_other_right_than_it_needs() -> None:
    """To build and to check it reads the code, as every job that names no right of its own."""
    rights = {name: job.get("permissions", WORKFLOW["permissions"]) for name, job in JOBS.items()}
    assert rights == {
        "build": {"contents": "read"},
        "check": {"contents": "read"},
        "publish": {"id-token": "write"},
        "attach": {"contents": "write"},
    }


def test_a_release_has_a_bill_of_its_materials() -> None:
    assert any("sbom.json" in command for command in commands(JOBS["attach"]))


def test_actions_are_pinned_to_commits() -> None:
    used = [
        action
        for file in (GITHUB / "workflows").glob("*.yml")
        for action in re.findall(r"uses: (.*)", file.read_text())
    ]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), action


@pytest.mark.parametrize("name", ["build", "check"])
def test_tools_of_a_release_are_pinned_by_hashes(name: str) -> None:
    folder = GITHUB / "requirements"
    # A requirement goes on in lines that are indented.
    requirements = re.split(r"\n(?=\S)", (folder / f"{name}.txt").read_text().strip())
    for requirement in requirements:
        assert re.match(r"[\w.-]+==[\w.]+ ?(;.*)?\\\n", requirement), requirement
        assert "--hash=sha256:" in requirement
    pinned = {requirement.partition("==")[0] for requirement in requirements}
    assert {*(folder / f"{name}.in").read_text().split()} <= pinned


def test_dependabot_looks_at_actions_and_at_python() -> None:
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    watched = {(update["package-ecosystem"], update["directory"]) for update in updates}
    assert watched == {("github-actions", "/"), ("pip", "/"), ("pip", "/.github/requirements")}


@pytest.mark.parametrize(
    ("files", "found"), [([], "nothing"), (["rankloss-8.9.tar.gz"], r"rankloss-8\.9\.tar\.gz")]
)
def test_a_folder_without_the_files_of_the_version_is_no_release(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, files: list[str], found: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(release_check, "DIST", tmp_path)
    with pytest.raises(release_check.CheckError, match=rf"must have rankloss-9\.0-py3-.*; it has {found}"):
        release_check.check_files("9.0")
