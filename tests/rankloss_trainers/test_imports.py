"""Who imports whom: arrows point from the trainers to the core."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "rankloss": ROOT / "rankloss",
    "rankloss_trainers": ROOT / "integrations" / "rankloss_trainers",
    "rankloss_open_clip": ROOT / "integrations" / "rankloss_open_clip",
    "rankloss_features": ROOT / "integrations" / "rankloss_features",
    "rankloss_baselines": ROOT / "integrations" / "rankloss_baselines",
    "rankloss_triton": ROOT / "integrations" / "rankloss_triton",
}


ARROWS = {
    "rankloss": {"rankloss"},
    "rankloss_features": {"rankloss", "rankloss_features"},
    "rankloss_trainers": {"rankloss", "rankloss_features", "rankloss_trainers", "rankloss_triton"},
    "rankloss_open_clip": {"rankloss", "rankloss_features", "rankloss_trainers", "rankloss_open_clip"},
    "rankloss_baselines": {"rankloss", "rankloss_trainers", "rankloss_baselines"},
    "rankloss_triton": {"rankloss", "rankloss_triton"},
}


def imported(file: Path) -> set[str]:
    """The packages of ours that a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    return {name.partition(".")[0] for name in names} & PACKAGES.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package: str) -> None:
    files = [*PACKAGES[package].rglob("*.py")]
    found = set().union(*map(imported, files))
    assert package in found or package == "rankloss_baselines", "the walk sees the package's own"
    assert found <= ARROWS[package]


LIGHT = ("rankloss_open_clip", "rankloss_trainers.command_line")  # with the catalogue
HEAVY = ("rankloss", "rankloss_trainers.loop", "rankloss_baselines.alip")
SCRIPT = f"""
import importlib, json, sys
names = "torch open_clip open_clip_train transformers lightning sentence_transformers accelerate".split()
seen = []
for packages in ({LIGHT}, {HEAVY}):
    for package in packages:
        importlib.import_module(package)
    seen.append([name for name in names if name in sys.modules])
from rankloss_trainers import console
console.main(["losses"])
seen.append([name for name in names if name in sys.modules])
print(json.dumps(seen))
"""


def test_catalogue_loads_no_torch_and_no_loss_a_trainer() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], ["torch"], ["torch"]]


MISSING = """
import importlib, sys

for extra, package, call, module in (
    ("transformers", "accelerate", importlib.import_module, "rankloss_trainers.transformers.trainer"),
    ("lightning", "lightning", importlib.import_module, "rankloss_trainers.lightning"),
    ("sentence-transformers", "datasets", importlib.import_module, "rankloss_trainers.sentence_transformers"),
    ("sentence-transformers", "sentence_transformers", importlib.import_module,
     "rankloss_trainers.graded.sentence_transformers"),
):
    sys.modules[package] = None
    try:
        call(module)
    except ModuleNotFoundError as error:
        assert str(error).endswith(f": pip install 'rankloss[{extra}]'"), error
    else:
        raise AssertionError(extra)
"""


def test_package_that_is_missing_is_named_with_its_extra() -> None:
    subprocess.run([sys.executable, "-c", MISSING], check=True)


BARE = """
import importlib.metadata, re, sys

def needed(name, seen):
    if name not in seen:
        seen.add(name)
        for text in importlib.metadata.requires(name) or []:
            if "extra ==" not in text:
                try:
                    needed(re.match(r"[\\w.-]+", text)[0].lower().replace("_", "-"), seen)
                except importlib.metadata.PackageNotFoundError:
                    pass  # of another platform
    return seen

there = needed("rankloss", set())
for module, names in importlib.metadata.packages_distributions().items():
    if not there & {name.lower().replace("_", "-") for name in names}:
        sys.modules.setdefault(module, None)

import rankloss_baselines, rankloss_trainers
from rankloss_trainers import catalog
for name in catalog.LOSSES:
    rankloss_trainers.create("siglip+" * name.startswith("siglip") + name)
rankloss_trainers.create("clip-ids+rankclip")
rankloss_baselines.AlipLoss(), rankloss_baselines.CyClipLoss()
"""


def test_losses_are_built_where_torch_and_numpy_alone_are_installed() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
