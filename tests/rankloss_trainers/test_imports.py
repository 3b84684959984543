"""Who imports whom: arrows point from the trainers to the core."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rankloss_trainers import catalog, doctor
from registered import OF_PACKAGES

ROOT = Path(__file__).parents[2]
CORE = {"rankloss", "rankloss.losses", "rankloss.functional"}
TRAINERS = {"rankloss_trainers", "rankloss_trainers.graded"}
FLOORS: dict[str, set[str]] = {
    "rankloss": set(),
    "rankloss.losses": {"rankloss"},
    "rankloss.functional": {"rankloss", "rankloss.losses"},
    "rankloss_triton.device": set(),
    "rankloss_triton": {"rankloss", "rankloss_triton.device"},
    "rankloss_features": CORE,
    "rankloss_trainers.graded": CORE | {"rankloss_features"},
    "rankloss_trainers": CORE | {"rankloss_features", "rankloss_trainers.graded"},
    "rankloss_trainers.loop": CORE | {"rankloss_features"} | TRAINERS,
    "rankloss_trainers.lightning": CORE | TRAINERS,
    "rankloss_trainers.transformers": CORE | {"rankloss_features"} | TRAINERS,
    "rankloss_trainers.sentence_transformers": CORE
    | {"rankloss_features", "rankloss_trainers.transformers"}  # its trainer is derived from transformers'
    | TRAINERS,
    "rankloss_open_clip.columns": CORE | {"rankloss_features"} | TRAINERS,
    "rankloss_open_clip": CORE | {"rankloss_features", "rankloss_open_clip.columns"} | TRAINERS,
}
"""Packages, and folders and files of them that stand on a floor of their own; of each the floors below it.

Losses that are declared by text, as in the catalogue, are loaded by their names and are no imports.
"""
REGISTERING = {point.module.partition(".")[0] for name in OF_PACKAGES for point in catalog.known()[name]}
"""Packages that register losses, as those of others do."""
FLOORS.update(dict.fromkeys(sorted(REGISTERING - {"tiny_losses"}), CORE | TRAINERS))
NAMES_OF_A_PACKAGE = {"rankloss/__init__.py", "integrations/rankloss_trainers/__init__.py"}
"""Files that show names of higher floors to users, and have none of their own."""


def floor_of(module: str) -> str | None:
    """The floor of a module, None for one of others."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOORS), None)


def imported(file: Path) -> set[str]:
    """The floors that a file imports from, inside functions too."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {floor for module in modules if (floor := floor_of(module)) is not None}


def files_of(floor: str) -> list[Path]:
    """The files on a floor, without those of the floors in its folder."""
    package = floor.partition(".")[0]
    root = ROOT if package == "rankloss" else ROOT / "integrations"
    files = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in root.rglob("*.py")}
    return [file for file, module in files.items() if floor_of(module) == floor]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_import_goes_up(floor: str) -> None:
    files = files_of(floor)
    assert files
    for file in files:
        place = file.relative_to(ROOT).as_posix()
        if place not in NAMES_OF_A_PACKAGE:
            assert imported(file) <= FLOORS[floor] | {floor}, place


def test_every_trainer_stands_on_a_floor_of_its_own() -> None:
    floors = [floor_of(trainer.plugin.partition(":")[0]) for trainer in doctor.TRAINERS]
    assert None not in floors
    assert {*floors}.isdisjoint(TRAINERS), "code for every trainer"
    assert len({*floors}) == len(floors)


def public_names(module: str) -> set[str]:
    """Of a module of the core, the names that it shows: in ``__all__``, or imported ``as`` themselves."""
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__all__"):
        return {*loaded.__all__}
    tree = ast.parse(Path(str(loaded.__file__)).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname for node in imports for alias in node.names if alias.asname is not None}


# On a page of the API, a module's block: its name, and indented lines, among them "- MEMBER".
BLOCK = re.compile(r"^::: (rankloss[\w.]*)\n((?: .*\n)*)", re.MULTILINE)
MEMBER = re.compile(r"^ +- (\w+)$", re.MULTILINE)


def documented_names() -> dict[str, set[str]]:
    """By module, the public names that the API's pages have: those of its block, or all."""
    names = {}
    for page in (ROOT / "docs/api").glob("*.md"):
        for module, options in BLOCK.findall(page.read_text() + "\n"):
            members = set(MEMBER.findall(options))
            assert members <= public_names(module), module
            names[module] = members or public_names(module)
    return names


def test_no_test_imports_a_baseline_but_those_of_the_baselines() -> None:
    """So a baseline goes by its own folder, its entry point and its pages."""
    own = ROOT / "tests/rankloss_baselines"
    importing = re.compile(r"^\s*(?:from|import) rankloss_baselines\b", re.MULTILINE)
    others = [path for path in (ROOT / "tests").rglob("*.py") if own not in path.parents]
    assert [path.name for path in others if importing.search(path.read_text(encoding="utf-8"))] == []


def imported_from_core(package: str) -> dict[str, set[str]]:
    """By module of the core, the names that a package imports from it, which is always ``from … import``."""
    names: dict[str, set[str]] = {}
    for file in files_of(package):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(floor_of(alias.name) in CORE for alias in node.names), file
            elif isinstance(node, ast.ImportFrom) and floor_of(str(node.module)) in CORE:
                names.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    return names


of_registering_packages = pytest.mark.parametrize("package", sorted(REGISTERING - {"tiny_losses"}))


@of_registering_packages
def test_packages_that_register_losses_import_documented_names_of_the_core_alone(package: str) -> None:
    """So another package's loss can be written as they are."""
    documented = documented_names()
    imported_names = imported_from_core(package)
    assert imported_names
    for module, names in imported_names.items():
        assert names <= documented.get(module, set()), module


@of_registering_packages
def test_the_page_on_writing_a_loss_has_what_packages_import_from_the_core(package: str) -> None:
    writing = (ROOT / "docs/writing.md").read_text()
    names = set().union(*imported_from_core(package).values())
    assert [name for name in sorted(names) if re.search(rf"`{name}\b", writing) is None] == []


def test_every_floor_stands_on_lower_ones() -> None:
    lower: set[str] = set()
    for floor, below in FLOORS.items():
        assert below <= lower, f"{floor} comes before one that it may import"
        lower.add(floor)


@pytest.mark.parametrize("name", catalog.LOSSES)
def test_the_data_of_a_loss_are_columns_of_open_clips_folder(name: str) -> None:
    columns = catalog.LOSSES[name].columns
    assert columns is None or floor_of(str(columns).partition(":")[0]) == "rankloss_open_clip.columns"


EXTRAS = "open_clip open_clip_train transformers lightning sentence_transformers accelerate datasets PIL"
WITHOUT_TORCH = """
import sys
import rankloss_open_clip, rankloss_trainers.command_line  # with the catalogue
assert "torch" not in sys.modules
"""
OF_TORCH = f"""
import sys
before = set(sys.modules)
import rankloss_open_clip
rankloss_open_clip.wait_for_trainer()
new = {{name.partition('.')[0] for name in set(sys.modules) - before}}
print(sorted(new - sys.stdlib_module_names))
import torch
print([type(finder).__name__ for finder in sys.meta_path].count('Finder'))
print(sorted(name for name in sys.modules if name.startswith(('rankloss', 'open_clip'))))

sys.modules.update(dict.fromkeys("{EXTRAS} pandas timm safetensors webdataset scipy tqdm".split()))
import rankloss_trainers
from rankloss_trainers import catalog, console
console.main(["losses"])
for name in catalog.known():
    rankloss_trainers.create(f"siglip+{{name}}" if name.startswith("siglip") else name)
rankloss_trainers.create("clip-ids+rankclip")
"""


def printed(script: str) -> str:
    """The output of a script, which has to succeed in a process where each warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_catalogue_loads_no_torch() -> None:
    printed(WITHOUT_TORCH)


def test_import_of_torch_attaches_and_loads_little_and_losses_need_it_and_numpy_alone() -> None:
    """The losses are made without the packages of the extras, of which each import is an error."""
    *attached, losses = printed(OF_TORCH).split("\n", 3)
    ours = ["rankloss_open_clip", "rankloss_open_clip.bootstrap"]
    ours += ["rankloss_trainers", "rankloss_trainers.import_hook"]
    assert attached == ["['rankloss_open_clip', 'rankloss_trainers']", "1", str(ours)]
    assert "cannot be used" not in losses


@pytest.mark.parametrize(
    ("extra", "package", "module"),
    [
        ("transformers", "accelerate", "transformers.trainer"),
        ("lightning", "lightning", "lightning"),
        ("sentence-transformers", "datasets", "sentence_transformers"),
        ("sentence-transformers", "sentence_transformers", "sentence_transformers.graded_lists"),
    ],
)
def test_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, extra: str, package: str, module: str
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # whose import is an error, then
    module = f"rankloss_trainers.{module}"
    trainer = ".".join(module.split(".")[:2])
    for name in [name for name in sys.modules if name == trainer or name.startswith(f"{trainer}.")]:
        monkeypatch.delitem(sys.modules, name)  # so that it is imported anew
    message = rf"{package}.*: pip install 'rankloss\[{extra}\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(module)
