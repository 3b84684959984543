"""Who imports whom: arrows point from the trainers to the core, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "rankloss": ROOT / "rankloss",
    "rankloss_trainers": ROOT / "integrations" / "rankloss_trainers",
    "rankloss_open_clip": ROOT / "integrations" / "rankloss_open_clip",
    "rankloss_baselines": ROOT / "integrations" / "rankloss_baselines",
}
TRAINERS = ("rankloss_trainers", "rankloss_open_clip", "rankloss_baselines")

# Imports inside functions, between modules of the trainer packages. Each is here for the reason beside it.
LAZY_DOORS = {
    # Every `import torch` loads the bootstrap: it imports only what the standard library has.
    ("rankloss_open_clip.bootstrap", "rankloss_open_clip.names"),
    ("rankloss_open_clip.bootstrap", "rankloss_open_clip.patches"),
    ("rankloss_open_clip.bootstrap", "rankloss_trainers.import_hook"),
    # This package costs nothing until it is used.
    ("rankloss_open_clip", "rankloss_open_clip.patches"),
    # A run without --loss does not load what needs torch's modules.
    ("rankloss_open_clip.patches", "rankloss_open_clip.companions"),
    ("rankloss_open_clip.patches", "rankloss_open_clip.checkpoints"),
    ("rankloss_open_clip.patches", "rankloss_open_clip.training"),
    ("rankloss_open_clip.command_line", "rankloss_open_clip.captions"),
    ("rankloss_open_clip.command_line", "rankloss_open_clip.reference_features"),
    # A script without --loss runs as it is, and the script imports transformers before these do.
    ("rankloss_trainers.transformers.__main__", "rankloss_trainers.transformers.choice"),
    ("rankloss_trainers.transformers.__main__", "rankloss_trainers.transformers.trainer"),
    # The doctor reports patches that cannot be imported.
    ("rankloss_open_clip.doctor", "rankloss_open_clip.patches"),
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
    "rankloss_trainers": {"rankloss", "rankloss_trainers"},
    "rankloss_open_clip": {"rankloss", "rankloss_trainers", "rankloss_open_clip"},
    "rankloss_baselines": {"rankloss", "rankloss_trainers", "rankloss_baselines"},
}


class Imports(ast.NodeVisitor):
    """The modules of ours that a module imports: when it is loaded, and inside functions."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.at_load: set[str] = set()
        self.in_functions: set[str] = set()
        self._depth = 0

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return  # not executed
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.module} imports relatively"
        for alias in node.names:
            self._add(f"{node.module}.{alias.name}", node.module)

    def _add(self, *names: str | None) -> None:
        for name in names:
            if name in MODULES:
                (self.in_functions if self._depth else self.at_load).add(name)
                return


def imports(module: str, source: str | None = None) -> Imports:
    visitor = Imports(module)
    visitor.visit(ast.parse(MODULES[module].read_text() if source is None else source))
    return visitor


GRAPH = {module: imports(module) for module in MODULES}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield [*path[path.index(module) :], module]
        elif module not in done:
            for other in sorted(arrows[module]):
                yield from walk(other, [*path, module])
            done.add(module)

    return next((found for module in sorted(arrows) for found in walk(module, [])), [])


def test_no_circle_of_imports() -> None:
    assert circle({module: seen.at_load for module, seen in GRAPH.items()}) == []


def test_no_circle_of_imports_in_the_trainers_even_through_functions() -> None:
    trainers = {
        module: {other for other in seen.at_load | seen.in_functions if other.startswith(TRAINERS)}
        for module, seen in GRAPH.items()
        if module.startswith(TRAINERS)
    }
    assert circle(trainers) == []


def test_arrows_point_one_way() -> None:
    for module, seen in GRAPH.items():
        targets = {target.partition(".")[0] for target in seen.at_load | seen.in_functions}
        own = module.partition(".")[0]
        assert targets <= ARROWS[own], module


def test_lazy_doors_are_those_that_are_declared() -> None:
    doors = {
        (module, other)
        for module, seen in GRAPH.items()
        for other in seen.in_functions
        if module.startswith(TRAINERS) and other.startswith(TRAINERS)
    }
    assert doors == LAZY_DOORS


@pytest.mark.parametrize(
    ("source", "at_load", "in_functions"),
    [
        ("import rankloss", {"rankloss"}, set()),
        ("from rankloss import schedules, RankClipLoss", {"rankloss.schedules", "rankloss"}, set()),
        ("def f():\n    from rankloss_open_clip.names import PREFIXES", set(), {"rankloss_open_clip.names"}),
        ("if TYPE_CHECKING:\n    import rankloss", set(), set()),
        ("class A:\n    def f(self):\n        import rankloss_trainers", set(), {"rankloss_trainers"}),
    ],
)
def test_walk_sees_every_kind_of_import(source: str, at_load: set[str], in_functions: set[str]) -> None:
    seen = imports("rankloss", source)
    assert (seen.at_load, seen.in_functions) == (at_load, in_functions)


def test_walk_sees_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", [*PACKAGES, "rankloss_trainers.catalog", "rankloss_trainers.own_losses"])
def test_no_package_loads_a_trainer(package: str) -> None:
    script = (
        f"import {package}, sys; names = ('open_clip', 'open_clip_train', 'transformers', 'lightning', "
        "'sentence_transformers', 'accelerate'); print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["rankloss_open_clip", "rankloss_trainers", "rankloss_trainers.catalog"])
def test_packages_and_catalogue_load_no_torch(package: str) -> None:
    script = f"import {package}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
