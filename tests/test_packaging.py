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
    typed = set()
    for path in {*files} - {Path(__file__).resolve()}:
        for names in re.findall(r"""(?:\brankloss|['"]\.)\[([\w.,-]+)\]""", path.read_text()):
            typed |= {(path.name, extra) for extra in names.split(",")}
    assert {extra for _, extra in typed} >= {"open-clip", "examples", "test"}
    assert [(path, extra) for path, extra in typed if extra not in EXTRAS] == []


def test_citation_has_the_version_of_the_package() -> None:
    version = (ROOT / "rankloss/_version.py").read_text().split('"')[-2]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_every_package_has_its_types() -> None:
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    in_the_tree = [
        "rankloss",
        *(f"integrations/{x.parent.name}" for x in ROOT.glob("integrations/*/__init__.py")),
    ]
    assert sorted(packages) == sorted(in_the_tree)
    assert [package for package in packages if not (ROOT / package / "py.typed").exists()] == []


def test_an_installation_whose_folder_is_gone_names_the_command_that_ends_it(tmp_path: Path) -> None:
    """torch's own error, at the import of torch, has nothing of ours but the name of the entry point."""
    (name,) = PROJECT["entry-points"]["torch.backends"]
    installed = tmp_path / "rankloss-0.1.dist-info"  # which comes before the real one on the path
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: rankloss\nVersion: 0.1\n")
    (installed / "entry_points.txt").write_text(f"[torch.backends]\n{name} = a_folder_that_is_gone:wait\n")
    found = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode != 0
    assert "pip uninstall rankloss" in found.stderr.splitlines()[-1]


# In torch 2.6 the second of the two loads the first, which takes longer than the package itself.
SCRIPT = """
import sys, torch, numpy
for name in ("sympy", "torch.utils.checkpoint"):
    sys.modules[name] = None  # an error to import
before = set(sys.modules)
import rankloss, rankloss_triton
print(*set(sys.modules) - before)
"""


def test_import_loads_torch_and_numpy_alone_and_no_compiler() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert packages <= {"rankloss", "rankloss_triton", "torch", "numpy"}  # neither a trainer nor Triton
    assert "torch._dynamo" not in loaded


def test_torchs_entry_point_is_the_function_that_no_other_file_can_break() -> None:
    assert [*PROJECT["entry-points"]["torch.backends"].values()] == ["rankloss_open_clip:wait_for_trainer"]
    tree = ast.parse((ROOT / "integrations/rankloss_open_clip/__init__.py").read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def table_of_nox(name: str) -> dict[str, list[str]]:
    """A table of lists in the file of nox's sessions."""
    source = (ROOT / "noxfile.py").read_text()
    (text,) = re.findall(rf"^{name} = (\{{.*?^\}})", source, re.MULTILINE | re.DOTALL)
    table: dict[str, list[str]] = ast.literal_eval(text)
    return table


def versions_of_sessions() -> dict[str, list[str]]:
    """By trainer, the versions that nox tests."""
    return table_of_nox("TRAINERS")


def imported_by(path: Path) -> set[str]:
    """The packages that a file imports at its top."""
    nodes = ast.parse(path.read_text()).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_sessions_install_every_package_without_which_a_trainers_tests_cannot_be_collected() -> None:
    """A session names the files, and pytest collects those whatever the folder's conftest leaves out."""
    source = (ROOT / "tests/rankloss_trainers/conftest.py").read_text()
    (text,) = re.findall(r"^NEEDED \+= (\[.*?^\])", source, re.MULTILINE | re.DOTALL)
    needed: list[tuple[str, list[str]]] = ast.literal_eval(text)
    tools = {Requirement(text).name for text in EXTRAS["test"]} - {"rankloss", "pytest", "hypothesis"}
    for trainer in versions_of_sessions():
        requirements = [*EXTRAS[trainer], *table_of_nox("TESTED_WITH").get(trainer, [])]
        installed = {Requirement(text).name for text in requirements}
        files = f"rankloss_trainers/test_{trainer.replace('-', '_')}*.py"
        for path in (ROOT / "tests").glob("rankloss_open_clip/*.py" if trainer == "open-clip" else files):
            packages = {x for pattern, names in needed if path.match(pattern) for x in names}
            packages = {"pillow" if x == "PIL" else x for x in packages} | (imported_by(path) & tools)
            assert packages <= installed, f"{path.name} needs {packages - installed}"


def test_no_extra_claims_a_major_version_that_no_session_tests() -> None:
    for extra, versions in versions_of_sessions().items():
        major = int(versions[-1].partition(".")[0])
        assert re.search(rf",<{major + 1}$", EXTRAS[extra][0]), EXTRAS[extra][0]


def matrix_of_ci(name: str) -> list[str]:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (values,) = re.findall(rf"^ +{name}: \[(.*)\]$", workflow, re.MULTILINE)
    return str(values).split(", ")


def test_every_trainer_of_the_doctor_is_installed_and_tested() -> None:
    names = [trainer.name for trainer in TRAINERS]
    of_users = EXTRAS.keys() - {"examples", "test", "docs", "dev"}
    of_tests = EXTRAS["test"][0].removeprefix("rankloss[").removesuffix("]").split(",")
    assert {*names} <= {*of_tests}
    assert [*versions_of_sessions()] == matrix_of_ci("trainer") == names
    assert {*matrix_of_ci("extra")} == of_users >= {*names}


@pytest.mark.parametrize("place", [".github/ISSUE_TEMPLATE/bug.yml", "README.md"])
def test_every_trainer_of_the_doctor_stands_in_the_list_that_users_read(place: str) -> None:
    text = (ROOT / place).read_text().lower().replace("_", "-")
    rows = "\n".join(re.findall(r"^(?: +- | *\| \[).*", text, re.MULTILINE))
    for trainer in TRAINERS:
        assert re.search(rf"(?<![\w-]){trainer.name}\b", rows), trainer.name
