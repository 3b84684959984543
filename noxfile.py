"""The project's tests in other environments than that of ``make test``; ``nox -l`` lists the sessions.

    nox -s lowest                            the core on the lowest torch and NumPy
    nox -s lowest_of_extra                   every requirement of an extra at its lower bound
    nox -t transformers                      a trainer in its lowest and its newest supported version
    nox -s "trainer(lightning-2.4.0)"        one version of it

What stands after ``--`` is handed to pytest. Every session has an environment of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from release_check import MODULES, floors_of, project_table

nox.options.sessions = []  # of a plain `nox`: all of them would install many gigabytes
ROOT = Path(__file__).parent

# The lower bounds of pyproject.toml's dependencies. Only Python 3.10 and 3.11 have wheels of this NumPy.
LOWEST = floors_of("", project_table())

# The lowest and the newest supported version of each trainer, under the name of its extra.
TRAINERS = {
    "open-clip": ["3.0.0", "3.3.0"],
    "transformers": ["4.51.3", "5.24.0"],
    "sentence-transformers": ["6.2.0"],
    "lightning": ["2.4.0", "2.6.6"],
}
PACKAGES = {name: name for name in TRAINERS} | {"open-clip": "open_clip_torch[training]"}
TESTS = {name: [f"rankloss_trainers/test_{name.replace('-', '_')}*.py"] for name in TRAINERS} | {
    "open-clip": ["rankloss_open_clip", "test_losses.py", "test_distributed.py"],
    "features": ["rankloss_features"],
    "encoders": ["rankloss_features/test_encoders.py"],
    "gpu": ["rankloss_triton"],
}
# What the tests of an extra need beside it. From 26 on the pyarrow of datasets refuses NumPy 1.
TESTED_WITH = {
    "open-clip": ["scipy"],
    "transformers": ["datasets>=4", "pyarrow<26", "pillow"],
    "sentence-transformers": ["datasets>=4", "pillow"],
}
VERSIONS = [nox.param(name, version, id=f"{name}-{version}", tags=[name])
            for name, versions in TRAINERS.items() for version in versions]  # fmt: skip


def tests(*patterns: str) -> list[str]:
    """The tests that match."""
    return [str(path) for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]


@nox.session
def lowest(session: nox.Session) -> None:
    """The core on the lowest torch and NumPy."""
    # The extra "test" needs NumPy 2, for what the tests of features import.
    tools = (
        "pytest",
        "pytest-xdist",
        "pytest-benchmark",
        "hypothesis",
        "scipy",
        "scikit-learn",
        "statsmodels",
    )
    session.install("--editable", ".[open-clip]", *tools, "hatchling", *LOWEST)
    core = [*tests("test_*.py", "conditions"), "rankloss"]
    workers = ["-m", "not slow", "-n", "auto", "--dist", "loadfile"]
    session.run("pytest", *core, *workers, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="uv")
@nox.parametrize("extra", list(MODULES))
def lowest_of_extra(session: nox.Session, extra: str) -> None:
    """Every requirement of an extra at its lower bound: an import of what it is for, and its tests."""
    floors = floors_of(extra, project_table())
    tools = ["pytest", "hypothesis", *TESTED_WITH.get(extra, [])]
    session.install("--editable", f".[{extra}]", *tools, *floors)
    for module in MODULES[extra]:
        session.run("python", "-c", f"import {module}")
    chosen = tests(*TESTS[extra]) if extra in TESTS else []
    if chosen:  # older releases warn of what newer ones of torch and NumPy deprecate
        session.run("pytest", "-W", "default", "-m", "not slow", *chosen, *session.posargs)


@nox.session
@nox.parametrize(["name", "version"], VERSIONS)
def trainer(session: nox.Session, name: str, version: str) -> None:
    """An integration in the lowest and the newest supported version of its trainer."""
    extra = "test" if name == "open-clip" else name  # the others without each other's dependencies
    tools = ["pytest", "hypothesis", *TESTED_WITH.get(name, [])]
    session.install("--editable", f".[{extra}]", *tools, f"{PACKAGES[name]}=={version}")
    # Older releases warn of what newer ones of torch and NumPy deprecate.
    session.run("pytest", "-W", "default", *tests(*TESTS[name]), *session.posargs)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Trainings of two processes under DeepSpeed, whose build needs this environment's torch."""
    session.install("--editable", ".[test]", "setuptools", "wheel")
    session.install("--no-build-isolation", "deepspeed>=0.19", env={"DS_BUILD_OPS": "0"})
    engines = tests("rankloss_trainers/test_transformers_engines.py")
    session.run("pytest", *engines, "-m", "slow", "-k", "zero_2", *session.posargs)


@nox.session
def links(session: nox.Session) -> None:
    """Request every external link of the site that `make docs` built; needs the public web."""
    session.install("linkchecker>=10.5")
    # Addresses of this project's own that do not exist before it is published.
    own = ["--ignore-url=github.com/rankloss", "--ignore-url=rankloss.github.io"]
    session.run("linkchecker", "--check-extern", *own, "outputs/site/index.html")
