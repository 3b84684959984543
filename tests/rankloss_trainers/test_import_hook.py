"""The import hook: what it acts on and when, and that nothing else notices it."""

from __future__ import annotations

import importlib
import inspect
import sys
import zipfile
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rankloss_trainers.import_hook import Finder, after_import, waits_for

NAME = "module_that_is_waited_for"


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Executions and actions, in order; the module is importable, and the hook goes with the test."""
    (tmp_path / f"{NAME}.py").write_text("import sys\nsys.executed.append('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    done: list[str] = []
    monkeypatch.setattr(sys, "executed", done, raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return done


def act(module: ModuleType) -> None:
    sys.executed.append(module.__name__)  # type: ignore[attr-defined]


def test_looking_for_a_module_that_is_waited_for_is_no_loading(seen: list[str]) -> None:
    assert not waits_for(NAME)
    after_import({NAME: act})
    assert waits_for(NAME)
    assert find_spec(NAME) is not None
    assert seen == []


def test_a_module_is_acted_on_once_at_each_execution_however_often_it_is_waited_for(seen: list[str]) -> None:
    after_import({NAME: act})
    after_import({NAME: act})
    module = importlib.import_module(NAME)
    assert seen == ["executed", NAME]
    importlib.reload(module)
    assert seen == ["executed", NAME] * 2


def test_a_module_that_is_loaded_is_acted_on_at_once(seen: list[str]) -> None:
    importlib.import_module(NAME)
    after_import({NAME: act})
    assert seen == ["executed", NAME]


def test_modules_of_a_zip_file_share_a_loader_and_each_has_its_own_action(
    seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["zipped_first", "zipped_second", "zipped_sibling"]
    with zipfile.ZipFile(tmp_path / "trainer.zip", "w") as archive:
        for name in names:
            archive.writestr(f"{name}.py", "x = 1\n")
            monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "trainer.zip")
    after_import({name: lambda module: seen.append(module.__name__) for name in names[:2]})
    assert find_spec("zipped_first") is not None
    assert find_spec("zipped_second") is not None
    for name in reversed(names):
        importlib.import_module(name)
    assert seen == ["zipped_second", "zipped_first"]
    assert inspect.getsource(sys.modules["zipped_first"]) == "x = 1\n"


def test_import_raises_what_the_function_raises(seen: list[str]) -> None:
    def act(module: ModuleType) -> None:
        raise OSError("sabotaged")

    after_import({NAME: act})
    with pytest.raises(OSError, match="sabotaged"):
        importlib.import_module(NAME)


def test_module_that_is_not_there_stays_missing(seen: list[str]) -> None:
    after_import({"no_such_module": lambda module: seen.append(module.__name__)})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")
    assert importlib.import_module("json") is sys.modules["json"]
    assert seen == []


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_delegating_finder_asks_back_without_an_end(seen: list[str], ours_first: bool) -> None:
    class Other:
        busy = False

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if self.busy:
                return None
            self.busy = True
            found = [f.find_spec(name, path, target) for f in sys.meta_path if f is not self]
            self.busy = False
            return next(spec for spec in found if spec is not None)

    ours: Any = Finder({NAME: lambda module: seen.append("ours")})
    finders: list[Any] = [ours, Other()] if ours_first else [Other(), ours]
    sys.meta_path[:] = [*finders, PathFinder]
    importlib.import_module(NAME)
    assert seen == ["executed", "ours"]
