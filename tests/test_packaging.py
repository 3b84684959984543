"""The package: what importing it loads, the declarations of pyproject.toml, and typed extras."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rankloss
from rankloss_trainers.doctor import TRAINERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_every_typed_extra_exists_as_it_is_spelt() -> None:
    """Every ``rankloss[extra]`` and ``'.[extra]'`` in the project's own text."""
    folders = (".github", "docs", "examples", "integrations", "rankloss", "tests", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if path.suffix in {".md", ".py", ".sh", ".toml", ".yml"}]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "noxfile.py", "pyproject.toml")]
    files_of_extra: dict[str, list[str]] = {}
    for path in {*files} - {Path(__file__).resolve()}:
        for extras in re.findall(r"""(?:\brankloss|['"]\.)\[([\w.,-]+)\]""", path.read_text()):
            for extra in extras.split(","):
                files_of_extra.setdefault(extra, []).append(path.name)
    assert files_of_extra.keys() >= {"open-clip", "examples", "test"}  # the search finds some
    assert {extra: names for extra, names in files_of_extra.items() if extra not in EXTRAS} == {}


def test_citation_has_the_version_of_the_package() -> None:
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {rankloss.__version__}" in lines


PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_the_wheel_has_every_package_of_the_tree() -> None:
    integrations = [f"integrations/{file.parent.name}" for file in ROOT.glob("integrations/*/__init__.py")]
    assert sorted(PACKAGES) == sorted(["rankloss", *integrations])


def test_every_package_is_marked_as_typed() -> None:
    assert [package for package in PACKAGES if not (ROOT / package / "py.typed").exists()] == []


def test_an_installation_whose_folder_is_gone_names_the_command_that_ends_it(tmp_path: Path) -> None:
    """torch's own error, at the import of torch, has nothing of ours but the name of the entry point.

    So that name is the command. The installation is made up: metadata without a package.
    """
    (name,) = PROJECT["entry-points"]["torch.backends"]
    installed = tmp_path / "rankloss-0.1.dist-info"  # which comes before the real one on the path
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: rankloss\nVersion: 0.1\n")
    (installed / "entry_points.txt").write_text(f"[torch.backends]\n{name} = a_folder_that_is_gone:wait\n")
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "pip uninstall rankloss" in done.stderr.splitlines()[-1]


# Prints the modules that the import loads. sympy, which torch.utils.checkpoint loads in torch 2.6, takes
# longer than the package itself, so that both are an error to import.
SCRIPT = """
import sys, torch, numpy
for name in ("sympy", "torch.utils.checkpoint"):
    sys.modules[name] = None
before = set(sys.modules)
import rankloss, rankloss_triton
print(*set(sys.modules) - before)
"""


@pytest.fixture(scope="module")
def loaded_modules() -> set[str]:
    """The modules that ``import rankloss`` loads beside torch's and NumPy's."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_torch_and_numpy_and_neither_a_trainer_nor_triton(loaded_modules: set[str]) -> None:
    packages = {name.partition(".")[0] for name in loaded_modules} - sys.stdlib_module_names
    assert packages <= {"rankloss", "rankloss_triton", "torch", "numpy"}


def test_import_loads_no_compiler(loaded_modules: set[str]) -> None:
    assert loaded_modules.isdisjoint({"torch._dynamo", "torch._inductor"})


def test_the_file_of_torchs_entry_point_imports_from_pythons_own_library_alone() -> None:
    """torch calls the function at its import, which an error in any other file would break."""
    assert [*PROJECT["entry-points"]["torch.backends"].values()] == ["rankloss_open_clip:wait_for_trainer"]
    imported = imported_by(ROOT / "integrations/rankloss_open_clip/__init__.py")
    assert imported <= sys.stdlib_module_names


def table_of_nox(name: str) -> dict[str, list[str]]:
    """A table of lists in the file of nox's sessions, ``NAME = {`` to ``}``."""
    source = (ROOT / "noxfile.py").read_text()
    (literal,) = re.findall(rf"^{name} = (\{{.*?^\}})", source, re.MULTILINE | re.DOTALL)
    table: dict[str, list[str]] = ast.literal_eval(literal)
    return table


def versions_of_sessions() -> dict[str, list[str]]:
    """By trainer, the versions that nox tests."""
    return table_of_nox("TRAINERS")


def imported_by(path: Path) -> set[str]:
    """The packages that a file imports at its top."""
    modules: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(str(node.module))
    return {module.partition(".")[0] for module in modules}


def needed_by_tests_of_trainers() -> list[tuple[str, list[str]]]:
    """Patterns of files, with the packages without which the folder's conftest leaves them out."""
    source = (ROOT / "tests/rankloss_trainers/conftest.py").read_text()
    (literal,) = re.findall(r"^NEEDED \+= (\[.*?^\])", source, re.MULTILINE | re.DOTALL)
    needed: list[tuple[str, list[str]]] = ast.literal_eval(literal)
    return needed


def names_of(requirements: list[str]) -> set[str]:
    """The packages, without their versions."""
    return {Requirement(requirement).name for requirement in requirements}


@pytest.mark.parametrize("trainer", versions_of_sessions())
def test_a_session_installs_every_package_without_which_a_trainers_tests_cannot_be_collected(
    trainer: str,
) -> None:
    """A session names the files, and pytest collects those whatever the folder's conftest leaves out."""
    if trainer == "open-clip":
        files = "rankloss_open_clip/*.py"
    else:
        files = f"rankloss_trainers/test_{trainer.replace('-', '_')}*.py"
    tools = names_of(EXTRAS["test"]) - {"rankloss", "pytest", "hypothesis"}
    installed = names_of([*EXTRAS[trainer], *table_of_nox("TESTED_WITH").get(trainer, [])])
    paths = [*(ROOT / "tests").glob(files)]
    assert paths, files
    for path in paths:
        needed = imported_by(path) & tools
        for pattern, modules in needed_by_tests_of_trainers():
            if path.match(pattern):
                needed |= {"pillow" if module == "PIL" else module for module in modules}
        assert needed <= installed, f"{path.name} needs {needed - installed}"


@pytest.mark.parametrize("extra", versions_of_sessions())
def test_a_trainers_extra_ends_at_the_newest_major_version_that_a_session_tests(extra: str) -> None:
    newest = versions_of_sessions()[extra][-1]
    major, _, _ = newest.partition(".")
    requirement_of_trainer = EXTRAS[extra][0]  # "name>=lowest,<next major"
    assert requirement_of_trainer.endswith(f",<{int(major) + 1}")


def matrix_of_ci(name: str) -> list[str]:
    """A list of the workflow, ``name: [a, b]``."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (values,) = re.findall(rf"^ +{name}: \[(.*)\]$", workflow, re.MULTILINE)
    return str(values).split(", ")


TRAINER_NAMES = [trainer.name for trainer in TRAINERS]


def test_every_trainer_of_the_doctor_is_an_extra_that_the_tests_need() -> None:
    (extras_of_tests,) = re.findall(r"^rankloss\[(.*)\]$", EXTRAS["test"][0])
    assert {*TRAINER_NAMES} <= {*extras_of_tests.split(",")} & EXTRAS.keys()


def test_every_trainer_of_the_doctor_has_its_sessions_and_its_place_in_ci() -> None:
    assert [*versions_of_sessions()] == matrix_of_ci("trainer") == TRAINER_NAMES


def test_ci_installs_every_extra_for_users() -> None:
    assert {*matrix_of_ci("extra")} == EXTRAS.keys() - {"examples", "test", "docs", "dev"}


@pytest.mark.parametrize("place", [".github/ISSUE_TEMPLATE/bug.yml", "README.md"])
@pytest.mark.parametrize("trainer", TRAINER_NAMES)
def test_every_trainer_of_the_doctor_stands_in_the_list_that_users_read(place: str, trainer: str) -> None:
    """A list's items ``- name``, or a table's rows ``| [name]``."""
    text = (ROOT / place).read_text().lower().replace("_", "-")
    rows = re.findall(r"^(?: +- | *\| \[).*", text, re.MULTILINE)
    assert any(re.search(rf"(?<![\w-]){trainer}\b", row) for row in rows)
