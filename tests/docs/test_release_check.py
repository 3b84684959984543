"""The release check reads a wheel right, and stops where a release must."""

from __future__ import annotations

import importlib.util
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
    "rankloss_open_clip/doctor.py",
    "rankloss_trainers/sentence_transformers.py",
}


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        (None, ["rankloss"]),
        ("dev", ["rankloss"]),
        ("plots", ["rankloss", "rankloss.plots"]),
        ("open-clip", ["rankloss", "rankloss_open_clip.doctor"]),
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
