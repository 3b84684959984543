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
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
SIZE_LIMIT = 1_000_000  # bytes
IMPORT_LIMIT = 0.1  # seconds of CPU time, over torch's own import

PACKAGES = (
    "rankloss",
    "rankloss_trainers",
    "rankloss_open_clip",
    "rankloss_features",
    "rankloss_baselines",
    "rankloss_triton",
)
MODULES = {  # what an installation with an extra has to be able to import
    "open-clip": ["rankloss_open_clip.arguments"],
    "transformers": ["rankloss_trainers.transformers"],
    "sentence-transformers": ["rankloss_trainers.sentence_transformers"],
    "lightning": ["rankloss_trainers.lightning"],
    "features": ["rankloss_features.command"],
}
EXTRAS = "from importlib.metadata import metadata; print(*metadata('rankloss').get_all('Provides-Extra'))"
IMPORT_TIME = """
import time, torch, numpy
start = time.process_time()
import rankloss
print(time.process_time() - start)
"""


class CheckError(Exception):
    """Defect with which a release must not be published."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command in an environment that names no Python path, and give what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    arguments = [str(argument) for argument in command]
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise CheckError(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")
    return result.stdout


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
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    run(sys.executable, "-m", "check_wheel_contents", "--toplevel", ",".join(PACKAGES), *DIST.glob("*.whl"))
    for file in sorted(DIST.iterdir()):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
        if file.stat().st_size >= SIZE_LIMIT:
            raise CheckError(f"{file.name} has {file.stat().st_size:,} bytes; the limit is {SIZE_LIMIT:,}")


def check_installation(requirement: str, modules: list[str]) -> list[str]:
    """Install the wheel into a fresh environment, import it, and uninstall it; the extras that it has."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        venv.create(directory, with_pip=True)
        python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
        run(python, "-m", "pip", "install", "--quiet", "--find-links", DIST, requirement)
        run(python, "-m", "pip", "check")
        # From another directory than the source tree, which would be imported in place of the wheel.
        for module in modules:
            where = run(python, "-c", f"import {module}; print({module}.__file__)", cwd=directory).strip()
            if not Path(where).is_relative_to(directory):
                raise CheckError(f"{module} was imported from {where}, not from {directory}")
        seconds = min(float(run(python, "-c", IMPORT_TIME, cwd=directory)) for _ in range(5))
        if seconds > IMPORT_LIMIT:
            raise CheckError(
                f"import rankloss takes {seconds:.3f} s over torch; the limit is {IMPORT_LIMIT} s"
            )
        extras = run(python, "-c", EXTRAS, cwd=directory).split()
        run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "rankloss")
        left = [path for path in directory.rglob("*") if "rankloss" in str(path.relative_to(directory))]
        if left:
            raise CheckError(f"pip uninstall rankloss left {', '.join(map(str, left))}")
    print(f"{requirement}: installs, imports {', '.join(modules)}, uninstalls")
    print(f"    import rankloss: {seconds * 1000:.0f} ms over torch", flush=True)
    return extras


def main() -> None:
    """Check everything, or stop at the first check that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the release's tag, which has to be v and the version")
    options = parser.parse_args()
    source = (ROOT / "rankloss/_version.py").read_text(encoding="utf-8")
    if options.tag is not None:  # first, as nothing has to be built for it
        check_tag(options.tag, source, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    build()
    version = version_in(source)
    for extra in check_installation(f"rankloss=={version}", ["rankloss"]):
        check_installation(f"rankloss[{extra}]=={version}", ["rankloss", *MODULES.get(extra, [])])


if __name__ == "__main__":
    try:
        main()
    except CheckError as error:
        sys.exit(f"error: {error}")
