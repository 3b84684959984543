"""Builds the package and checks what a release would publish: ``make release-check``.

The files are built into ``dist``: a source distribution, and the wheel from it. Then, for the core alone and
for every extra, the wheel is installed into a fresh environment with ``dist`` as a local index, imported, and
uninstalled. The first check that fails ends the run with an error.
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
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
SOURCE_LIMIT = 1_000_000  # bytes
IMPORT_LIMIT = 0.1  # seconds of CPU time, over torch's own import

IMPORT_TIME = """
import time, torch, numpy
start = time.process_time()
import rankloss
print(time.process_time() - start)
"""


class CheckError(Exception):
    """What a release must not be published with."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command in an environment that names no Python path, and give what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    arguments = [str(argument) for argument in command]
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise CheckError(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")
    return result.stdout


def check_tag(tag: str, source: str, changelog: str) -> None:
    """Compare a tag with the version's source and with the headings of the change log."""
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]  # type: ignore[index]
    if tag != f"v{version}":
        raise CheckError(
            f"the tag is {tag}, but rankloss/_version.py is {version}: tag v{version}, or change the file"
        )
    if not re.search(rf"^## \[{re.escape(version)}\], \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        raise CheckError(
            f"CHANGELOG.md has no section for {version} with a date: turn its heading `## [Unreleased]` into "
            f"`## [{version}], {datetime.date.today()}` (CONTRIBUTING.md, How to release)"
        )


def build() -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (source,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    if source.stat().st_size >= SOURCE_LIMIT:
        raise CheckError(f"{source.name} has {source.stat().st_size:,} bytes; the limit is {SOURCE_LIMIT:,}")
    print(f"{source.name}: {source.stat().st_size:,} bytes; {wheel.name}: {wheel.stat().st_size:,} bytes")
    return source, wheel


def contents(wheel: Path) -> tuple[str, list[str], set[str]]:
    """The wheel's version, its extras, and its files."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    return headers["Version"], headers.get_all("Provides-Extra", []), set(names)


def modules_of(extra: str | None, files: set[str]) -> list[str]:
    """What an installation with that extra has to be able to import."""
    if extra is None:
        return ["rankloss"]
    name = extra.replace("-", "_")
    candidates = (f"rankloss/{name}", f"rankloss_trainers/{name}", f"rankloss_{name}/diagnosis")
    return ["rankloss"] + [path.replace("/", ".") for path in candidates if f"{path}.py" in files]


def check_installation(version: str, files: set[str], extra: str | None, directory: Path) -> None:
    """Install the wheel and one extra into a fresh environment, import it, and uninstall it."""
    venv.create(directory, with_pip=True)
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    requirement = f"rankloss=={version}" if extra is None else f"rankloss[{extra}]=={version}"
    run(python, "-m", "pip", "install", "--quiet", "--find-links", DIST, requirement)
    run(python, "-m", "pip", "check")
    # From another directory than the source tree, which would be imported in place of the wheel.
    modules = modules_of(extra, files)
    for module in modules:
        where = run(python, "-c", f"import {module}; print({module}.__file__)", cwd=directory).strip()
        if not Path(where).is_relative_to(directory):
            raise CheckError(f"{module} was imported from {where}, not from {directory}")
    seconds = min(float(run(python, "-c", IMPORT_TIME, cwd=directory)) for _ in range(5))
    if seconds > IMPORT_LIMIT:
        raise CheckError(f"import rankloss takes {seconds:.3f} s over torch; the limit is {IMPORT_LIMIT} s")
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "rankloss")
    left = [path for path in directory.rglob("*") if "rankloss" in str(path.relative_to(directory))]
    if left:
        raise CheckError(f"pip uninstall rankloss left {', '.join(map(str, left))}")
    print(f"{requirement}: installs, imports {', '.join(modules)}, uninstalls")
    print(f"    import rankloss: {seconds * 1000:.0f} ms over torch", flush=True)


def main() -> None:
    """Check everything, or stop at the first check that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the release's tag, which has to be v and the version")
    parser.add_argument("--extras", nargs="*", help="extras to install, in place of all of them")
    options = parser.parse_args()

    if options.tag is not None:  # first, as nothing has to be built for it
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        check_tag(options.tag, (ROOT / "rankloss/_version.py").read_text(encoding="utf-8"), changelog)
    _, wheel = build()
    version, extras, files = contents(wheel)
    for extra in (None, *(extras if options.extras is None else options.extras)):
        with tempfile.TemporaryDirectory() as directory:
            check_installation(version, files, extra, Path(directory).resolve() / "environment")


if __name__ == "__main__":
    try:
        main()
    except CheckError as error:
        sys.exit(f"error: {error}")
