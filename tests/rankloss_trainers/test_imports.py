"""Who imports whom: arrows point from the trainers to the core, and never in a circle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "rankloss": ROOT / "rankloss",
    "rankloss_trainers": ROOT / "integrations" / "rankloss_trainers",
    "rankloss_open_clip": ROOT / "integrations" / "rankloss_open_clip",
    "rankloss_features": ROOT / "integrations" / "rankloss_features",
    "rankloss_baselines": ROOT / "integrations" / "rankloss_baselines",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*.py"):
            parts = (package, *path.relative_to(directory).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
ARROWS = {
    "rankloss": {"rankloss"},
    "rankloss_features": {"rankloss", "rankloss_features"},
    "rankloss_trainers": {"rankloss", "rankloss_features", "rankloss_trainers"},
    "rankloss_open_clip": {"rankloss", "rankloss_features", "rankloss_trainers", "rankloss_open_clip"},
    "rankloss_baselines": {"rankloss", "rankloss_trainers", "rankloss_baselines"},
}


def imported(node: ast.AST, *, in_functions: bool) -> set[str]:
    """The modules of ours that a module imports when it is loaded, and if asked for, inside functions."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(child, ast.If)
            and isinstance(child.test, ast.Name)
            and child.test.id == "TYPE_CHECKING"
        ):
            continue  # not executed
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            found |= {name if name in MODULES else str(child.module) for name in names}
        elif in_functions or not isinstance(child, ast.FunctionDef):
            found |= imported(child, in_functions=in_functions)
    return found & MODULES.keys()


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
AT_LOAD = {module: imported(tree, in_functions=False) for module, tree in TREES.items()}


def test_no_circle_of_imports() -> None:
    graph = TopologicalSorter({module: others - {module} for module, others in AT_LOAD.items()})
    graph.prepare()  # raises a CycleError


def test_arrows_point_one_way() -> None:
    for module, tree in TREES.items():
        own = module.partition(".")[0]
        targets = {name.partition(".")[0] for name in imported(tree, in_functions=True)}
        assert targets <= ARROWS[own], module
    # The walk sees them.
    assert "rankloss.options" in AT_LOAD["rankloss_trainers.own_losses"]
    assert "rankloss_trainers.catalog" in AT_LOAD["rankloss_baselines.entries"]


LIGHT = ("rankloss_open_clip", "rankloss_trainers.refusals")  # with the catalogue
HEAVY = ("rankloss", "rankloss_trainers.own_losses", "rankloss_baselines.entries")
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
