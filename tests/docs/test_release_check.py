"""The release check reads a wheel right, and stops where a release must."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("release_check", ROOT / "tools/release_check.py")
assert SPEC is not None
assert SPEC.loader is not None
release_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release_check)

FILES = {
    "rankloss/__init__.py",
    "rankloss/plots.py",
    "rankloss_open_clip/diagnosis.py",
    "rankloss_trainers/sentence_transformers.py",
}


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        (None, ["rankloss"]),
        ("dev", ["rankloss"]),
        ("plots", ["rankloss", "rankloss.plots"]),
        ("open-clip", ["rankloss", "rankloss_open_clip.diagnosis"]),
        ("sentence-transformers", ["rankloss", "rankloss_trainers.sentence_transformers"]),
    ],
)
def test_each_extra_has_to_import_what_it_is_for(extra: str | None, modules: list[str]) -> None:
    assert release_check.modules_of(extra, FILES) == modules


def test_a_wheel_is_read(tmp_path: Path) -> None:
    wheel = tmp_path / "rankloss-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("rankloss/__init__.py", "")
        archive.writestr(
            "rankloss-1.2.dist-info/METADATA",
            "Metadata-Version: 2.4\nName: rankloss\nVersion: 1.2\n"
            "Provides-Extra: plots\nProvides-Extra: dev\n",
        )
    version, extras, files = release_check.contents(wheel)
    assert (version, extras) == ("1.2", ["plots", "dev"])
    assert files == {"rankloss/__init__.py", "rankloss-1.2.dist-info/METADATA"}


def test_a_command_that_fails_is_shown_with_what_it_said() -> None:
    with pytest.raises(release_check.CheckError, match=r"no-such-option(.|\n)*unknown option"):
        release_check.run("python3", "--no-such-option")


SOURCE = (ROOT / "rankloss/_version.py").read_text()
VERSION = SOURCE.split('"')[-2]


def test_tag_of_a_release_with_its_section_is_accepted() -> None:
    release_check.check_tag(f"v{VERSION}", SOURCE, f"# Changelog\n\n## [{VERSION}], 2026-12-01\n\n- New.\n")


@pytest.mark.parametrize("tag", [VERSION, "v9.9.9", f"v{VERSION}.1"])
def test_tag_of_another_version_is_refused(tag: str) -> None:
    with pytest.raises(release_check.CheckError, match=rf"{tag}, but .*: tag v{VERSION}, or"):
        release_check.check_tag(tag, SOURCE, f"## [{VERSION}], 2026-12-01\n")


@pytest.mark.parametrize("heading", ["[Unreleased]", f"[{VERSION}], not published", f"[{VERSION}]"])
def test_section_without_version_and_date_is_refused_with_what_to_write(heading: str) -> None:
    with pytest.raises(release_check.CheckError) as caught:
        release_check.check_tag(f"v{VERSION}", SOURCE, f"## {heading}\n")
    (written,) = re.findall(rf"into `(## \[{VERSION}\].*)`", str(caught.value))
    release_check.check_tag(f"v{VERSION}", SOURCE, f"{written}\n")
