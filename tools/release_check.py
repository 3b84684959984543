"""Builds the package and checks what a release would publish: ``make release-check``.

The files are built into ``dist``: a source distribution, and the wheel from it. Then the wheel is installed
into a fresh environment, imported, and uninstalled: for the core alone and for every extra, with the newest
versions of what they require and, on Python 3.10 and 3.11, with every requirement at its lower bound. mypy
checks a user's code against it. The first check that fails ends the run with an error.

``--tests`` runs the tests against the installed wheel instead: ``make test-wheel``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # build depends on it there

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# Bytes, by the end of a file's name: room for the text, not for records or pictures of studies that slip in.
SIZE_LIMITS = {".whl": 1_000_000, ".gz": 2_000_000}
IMPORT_LIMIT = 0.1  # seconds of CPU time, over torch's own import

_OF_USERS = {  # a user's code, by the package that it is typed against
    "rankloss": """
import torch
from rankloss import ClipLoss, Gather, RankClipLoss, metrics
loss = RankClipLoss(ClipLoss(gather=Gather(local_loss=True)), top_k=8, schedule="constant")
loss.set_progress(1, 2)
scale: float | None = loss.schedule_value
tau: torch.Tensor = metrics.kendall_tau(torch.rand(2, 3), torch.rand(2, 3))
""",
    "rankloss_trainers": """
import rankloss_trainers
from torch import nn
loss: nn.Module = rankloss_trainers.create("rankclip", top_k=8)
""",
    "rankloss_open_clip": """
import types
import rankloss_open_clip
def attach(trainer: types.ModuleType) -> None:
    rankloss_open_clip.attach(trainer, "create_loss")
""",
    "rankloss_features": """
import numpy as np
from rankloss_features import Features
def widths(folder: str) -> list[int]:
    return [rows.shape[1] for rows in Features(folder).check().take(np.arange(2)).values()]
""",
    "rankloss_triton": """
import torch
import rankloss_triton
from rankloss import RankOptions
reason: str | None = rankloss_triton.why_not(RankOptions(), torch.device("cpu"), torch.float32, 8, 8)
""",
}
_BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
PACKAGES = tuple(Path(folder).name for folder in _BUILD["targets"]["wheel"]["packages"])
SNIPPETS = {package: _OF_USERS.get(package, f"import {package}\n") for package in PACKAGES}
MODULES = {  # what an installation with an extra has to be able to import
    "open-clip": ["rankloss_open_clip.training", "open_clip_train.main"],
    "transformers": ["rankloss_trainers.transformers"],
    "sentence-transformers": ["rankloss_trainers.sentence_transformers"],
    "lightning": ["rankloss_trainers.lightning"],
    "features": ["rankloss_features.command"],
    "encoders": ["rankloss_features.packages"],
    "gpu": ["rankloss_triton.rows"],
}
OF_A_CLONE = {"examples", "test", "docs", "dev"}  # extras that no user installs from the registry
EXTRAS = "from importlib.metadata import metadata; print(*metadata('rankloss').get_all('Provides-Extra'))"
IMPORT_TIME = """
import time, torch, numpy
start = time.process_time()
import rankloss
print(time.process_time() - start)
"""


class CheckError(Exception):
    """Defect with which a release must not be published."""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command in an environment that names no Python path, and return its output."""
    arguments = [str(argument) for argument in command]
    environment = {**_without_python_paths(), **variables}
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise CheckError(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")
    return result.stdout


def _without_python_paths() -> dict[str, str]:
    """The environment without variables that change which Python, or which packages, a command finds."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def uv(*arguments: str | Path) -> str:
    """Run uv, which links packages from its cache: an environment takes seconds instead of minutes."""
    return run(sys.executable, "-m", "uv", "--quiet", "--no-python-downloads", *arguments)


def release_of(interpreter: str) -> str:
    """The release of an interpreter, such as 3.12."""
    python = run(sys.executable, "-m", "uv", "python", "find", interpreter).strip()
    return run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()


def floors_of(extra: str, project: Mapping[str, Any]) -> list[str]:
    """The requirements of the core and of an extra, each at its lower bound, as exact versions.

    A resolver that is asked for the lowest versions of a package with an extra sees one direct requirement,
    and one that is given the list may pass over a bound that cannot be installed.

    Args:
        extra: The extra; empty for the core.
        project: The table ``project`` of ``pyproject.toml``.

    Raises:
        CheckError: A requirement has no lower bound by ``>=``, or several.
    """
    floors: dict[tuple[str, str], str] = {}
    for text in [*project["dependencies"], *_listed(extra, project)]:
        requirement = Requirement(text)
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if len(bounds) != 1:
            raise CheckError(
                f"the requirement {text!r} of {extra or 'the core'} must have one lower bound, >="
            )
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        marker = f"; {requirement.marker}" if requirement.marker else ""
        # An extra's floor takes the place of the core's.
        floors[requirement.name, marker] = f"{requirement.name}{extras}=={bounds[0]}{marker}"
    return list(floors.values())


def _listed(extra: str, project: Mapping[str, Any]) -> list[str]:
    """The requirements of an extra, with those of the extras that it includes."""
    listed: list[str] = []
    for text in project["optional-dependencies"].get(extra, []):
        requirement = Requirement(text)
        if requirement.name == project["name"]:  # other extras of this package
            for name in sorted(requirement.extras):
                listed += _listed(name, project)
        else:
            listed.append(text)
    return listed


def project_table() -> Mapping[str, Any]:
    """The table ``project`` of ``pyproject.toml``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table: Mapping[str, Any] = tomllib.loads(text)["project"]
    return table


@contextmanager
def environment_with(interpreter: str, *requirements: str) -> Iterator[tuple[Path, Path]]:
    """A fresh environment with the wheel and its requirements: its folder, and its interpreter.

    Args:
        interpreter: Its Python: a version, or a path.
        *requirements: Packages to install; the project's own come from ``dist``.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        uv("venv", "--clear", "--python", interpreter, directory)
        python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
        # Not a wheel of the same version that an earlier run has left in the cache.
        fresh = ["--find-links", DIST, "--refresh-package", "rankloss"]
        uv("pip", "install", "--python", python, *fresh, *requirements)
        uv("pip", "check", "--python", python)
        yield directory, python


def version_in(source: str) -> str:
    """The version in the text of ``rankloss/_version.py``."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    return str(version)


def check_tag(tag: str, source: str, changelog: str) -> None:
    """Compare a tag with the version's source and with the headings of the change log."""
    version = version_in(source)
    if tag != f"v{version}":
        raise CheckError(
            f"the tag is {tag}, but rankloss/_version.py is {version}: tag v{version}, or change the file"
        )
    if not re.search(rf"^## \[{re.escape(version)}\], \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        raise CheckError(
            f"CHANGELOG.md has no section for {version} with a date: turn its newest heading into "
            f"`## [{version}], {datetime.date.today()}` (CONTRIBUTING.md, Releasing)"
        )


def build() -> None:
    """The source distribution, and the wheel built from it."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST)


def check_files(version: str) -> None:
    """Check the two files in ``dist``: their names, metadata, content and size."""
    names = {f"rankloss-{version}.tar.gz", f"rankloss-{version}-py3-none-any.whl"}
    if {file.name for file in DIST.glob("*")} != names:
        found = ", ".join(sorted(file.name for file in DIST.glob("*"))) or "nothing"
        raise CheckError(f"{DIST} must have {' and '.join(sorted(names))}; it has {found}")
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    run(sys.executable, "-m", "check_wheel_contents", "--toplevel", ",".join(PACKAGES), *DIST.glob("*.whl"))
    for file in sorted(DIST.iterdir()):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
        limit = SIZE_LIMITS[file.suffix]
        if file.stat().st_size >= limit:
            raise CheckError(f"{file.name} has {file.stat().st_size:,} bytes; the limit is {limit:,}")


def check_installation(interpreter: str, version: str, extra: str, floors: Sequence[str] = ()) -> list[str]:
    """Install the wheel into a fresh environment, import it, and uninstall it; the extras that it has."""
    requirement = f"rankloss[{extra}]=={version}" if extra else f"rankloss=={version}"
    modules = ["rankloss", *MODULES.get(extra, [])]
    with environment_with(interpreter, requirement, *floors) as (directory, python):
        # From another directory than the source tree, which would be imported in place of the wheel.
        files = ", ".join(f"{module}.__file__" for module in modules)
        script = f"import {', '.join(modules)}; print({files}, sep='\\n')"
        lines = run(python, "-c", script, cwd=directory).splitlines()
        for imported in lines[-len(modules) :]:  # after what the modules print themselves
            if not Path(imported).is_relative_to(directory):
                raise CheckError(f"{imported} was imported, which is not in {directory}")
        if not extra:  # or another package's imports would be timed
            seconds = min(float(run(python, "-c", IMPORT_TIME, cwd=directory)) for _ in range(5))
            print(f"import rankloss: {seconds * 1000:.0f} ms over torch")
            if seconds > IMPORT_LIMIT:
                raise CheckError(
                    f"import rankloss takes {seconds:.3f} s over torch; the limit is {IMPORT_LIMIT} s"
                )
        extras = run(python, "-c", EXTRAS, cwd=directory).split()
        uv("pip", "uninstall", "--python", python, "rankloss")
        left = [path for path in directory.rglob("*") if "rankloss" in str(path.relative_to(directory))]
        if left:
            raise CheckError(f"uninstalling rankloss left {', '.join(map(str, left))}")
    versions = "lowest" if floors else "newest"
    names = ", ".join(modules)
    print(f"{requirement}, Python {interpreter}, {versions} requirements: imports {names}", flush=True)
    return extras


def check_types(interpreter: str, requirement: str) -> None:
    """Let mypy check a user's code against the types of the installed packages."""
    with environment_with(interpreter, requirement, "mypy>=1.11") as (directory, python):
        files = []
        for package, code in SNIPPETS.items():
            files.append(directory / f"uses_{package}.py")
            files[-1].write_text(f"from __future__ import annotations\n{code}", encoding="utf-8")
        run(python, "-m", "mypy", "--strict", *files, cwd=directory)
    print(f"mypy --strict accepts a user's code for {', '.join(SNIPPETS)}", flush=True)


TESTS = """
import sys, pytest
root, *arguments = sys.argv[1:]
code = pytest.main(arguments)
checkout = (f"{root}/rankloss/", f"{root}/integrations/")
files = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
own = sorted(file for file in files if file.startswith(checkout))
sys.exit(f"imported from the checkout: {own}" if own else code)
"""


def check_tests(interpreter: str, version: str, tests: list[str]) -> None:
    """Run tests of the checkout against the wheel; the checkout's packages are not on the path."""
    with environment_with(interpreter, f"rankloss[test]=={version}") as (directory, python):
        command = [python, "-c", TESTS, ROOT, "-c", ROOT / "pyproject.toml", "-m", "not slow"]
        command += ["-p", "no:cacheprovider"]
        for pattern in tests:
            command += sorted(ROOT.glob(pattern))
        # Neither this process nor those that tests start find the checkout's packages in their folder.
        environment = {**_without_python_paths(), "PYTHONSAFEPATH": "1"}
        if subprocess.run(command, cwd=directory, env=environment).returncode:
            raise CheckError(f"tests fail against the wheel: {' '.join(tests)}")


def main() -> None:
    """Check everything, or stop at the first check that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the release's tag, which has to be v and the version")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="versions or interpreters")
    parser.add_argument("--built", action="store_true", help="check the files that dist has")
    parser.add_argument("--tests", nargs="+", metavar="PATTERN", help="run these tests against the wheel")
    options = parser.parse_args()
    source = (ROOT / "rankloss/_version.py").read_text(encoding="utf-8")
    if options.tag is not None:  # first, as nothing has to be built for it
        check_tag(options.tag, source, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    version = version_in(source)
    if not options.built:
        build()
    check_files(version)
    project = project_table()
    for interpreter in options.python:
        if options.tests is not None:
            check_tests(interpreter, version, options.tests)
            continue
        check_types(interpreter, f"rankloss=={version}")
        extras = check_installation(interpreter, version, "")
        for extra in ["", *extras]:
            if extra:
                check_installation(interpreter, version, extra)
            # Only these Pythons have wheels of the lowest NumPy.
            if extra not in OF_A_CLONE and release_of(interpreter) in ("3.10", "3.11"):
                check_installation(interpreter, version, extra, floors_of(extra, project))


if __name__ == "__main__":
    try:
        main()
    except CheckError as error:
        sys.exit(f"error: {error}")
