"""Who imports whom: arrows point from the trainers to the core."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    return {name.partition(".")[0] for name in names} & ARROWS.keys()


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package: str) -> None:
    files = (ROOT / ("." if package == "rankloss" else "integrations") / package).rglob("*.py")
    found = set().union(*map(imported, files))
    assert package in found or package == "rankloss_baselines", "the walk sees the package's own"
    assert found <= ARROWS[package]


EXTRAS = "open_clip open_clip_train transformers lightning sentence_transformers accelerate datasets PIL"
WITHOUT_TORCH = """
import sys
import rankloss_open_clip, rankloss_trainers.command_line  # with the catalogue
assert "torch" not in sys.modules
"""
OF_TORCH = f"""
import sys
before = set(sys.modules)
from rankloss_open_clip import bootstrap
bootstrap.attach()
new = {{name.partition('.')[0] for name in set(sys.modules) - before}}
print(sorted(new - sys.stdlib_module_names))
import torch
print([type(finder).__name__ for finder in sys.meta_path].count('Finder'))
print(sorted(name for name in sys.modules if name.startswith(('rankloss', 'open_clip'))))

sys.modules.update(dict.fromkeys("{EXTRAS} pandas timm safetensors webdataset scipy tqdm".split()))
import rankloss_baselines, rankloss_trainers
from rankloss_trainers import catalog, console
console.main(["losses"])
for name in catalog.LOSSES:
    rankloss_trainers.create("siglip+" * name.startswith("siglip") + name)
rankloss_trainers.create("clip-ids+rankclip")
rankloss_baselines.AlipLoss(), rankloss_baselines.CyClipLoss()
"""


def printed(script: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_catalogue_loads_no_torch() -> None:
    printed(WITHOUT_TORCH)


def test_import_of_torch_attaches_and_loads_little_and_losses_need_it_and_numpy_alone() -> None:
    """The losses are made without the packages of the extras, of which each import is an error."""
    *attached, losses = printed(OF_TORCH).split("\n", 3)
    ours = ["rankloss_open_clip", "rankloss_open_clip.bootstrap", "rankloss_open_clip.failures"]
    ours += ["rankloss_trainers", "rankloss_trainers.import_hook"]
    assert attached == ["['rankloss_open_clip', 'rankloss_trainers']", "1", str(ours)]
    assert "cannot be used" not in losses


@pytest.mark.parametrize(
    ("extra", "package", "module"),
    [
        ("transformers", "accelerate", "transformers.trainer"),
        ("lightning", "lightning", "lightning"),
        ("sentence-transformers", "datasets", "sentence_transformers"),
        ("sentence-transformers", "sentence_transformers", "graded.sentence_transformers"),
    ],
)
def test_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, extra: str, package: str, module: str
) -> None:
    for name in [package, *(x for x in sys.modules if x.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    module = f"rankloss_trainers.{module}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModuleNotFoundError, match=re.escape(f": pip install 'rankloss[{extra}]'")):
        importlib.import_module(module)
