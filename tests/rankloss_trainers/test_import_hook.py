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
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which the module adds "executed" when it is executed, and a hook's action its own entry.

    The module can be imported, and has not been; a test's hooks end with the test.
    """
    (tmp_path / f"{NAME}.py").write_text("import sys\nsys.events_of_test.append('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    events: list[str] = []
    monkeypatch.setattr(sys, "events_of_test", events, raising=False)  # where the module's code finds it
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return events


def add_name(module: ModuleType) -> None:
    """The action of the hooks: adds the module's name to the events."""
    sys.events_of_test.append(module.__name__)  # type: ignore[attr-defined]


def test_looking_for_a_module_that_is_waited_for_is_no_loading(events: list[str]) -> None:
    assert not waits_for(NAME)
    after_import({NAME: add_name})
    assert waits_for(NAME)
    assert find_spec(NAME) is not None
    assert events == []


def test_a_module_is_acted_on_once_at_each_execution_however_often_it_is_waited_for(
    events: list[str],
) -> None:
    after_import({NAME: add_name})
    after_import({NAME: add_name})
    module = importlib.import_module(NAME)
    assert events == ["executed", NAME]
    importlib.reload(module)
    assert events == ["executed", NAME] * 2


def test_a_reload_by_the_same_spec_is_acted_on_once(events: list[str]) -> None:
    class Keeping:
        """A finder that gives the spec of its first search again."""

        spec = PathFinder.find_spec(NAME)

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            return self.spec if name == NAME else None

    sys.meta_path.insert(0, Keeping())
    after_import({NAME: add_name})
    importlib.reload(importlib.import_module(NAME))
    assert events == ["executed", NAME] * 2


def test_a_module_that_is_loaded_is_acted_on_at_once(events: list[str]) -> None:
    importlib.import_module(NAME)
    after_import({NAME: add_name})
    assert events == ["executed", NAME]


def test_modules_of_a_zip_file_share_a_loader_and_each_has_its_own_action(
    events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["zipped_first", "zipped_second", "zipped_sibling"]
    with zipfile.ZipFile(tmp_path / "trainer.zip", "w") as archive:
        for name in names:
            archive.writestr(f"{name}.py", "x = 1\n")
            monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "trainer.zip")
    waited_for = names[:2]
    after_import(dict.fromkeys(waited_for, add_name))
    assert find_spec("zipped_first") is not None
    assert find_spec("zipped_second") is not None
    for name in reversed(names):
        importlib.import_module(name)
    assert events == ["zipped_second", "zipped_first"]
    assert inspect.getsource(sys.modules["zipped_first"]) == "x = 1\n"


@pytest.mark.usefixtures("events")
def test_import_raises_what_the_function_raises() -> None:
    def fail(module: ModuleType) -> None:
        raise OSError("sabotaged")

    after_import({NAME: fail})
    with pytest.raises(OSError, match="sabotaged"):
        importlib.import_module(NAME)


def test_module_that_is_not_there_stays_missing(events: list[str]) -> None:
    after_import({"no_such_module": add_name})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")
    assert events == []


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "the other first"])
def test_a_search_ends_where_another_finder_asks_ours_back(events: list[str], ours_first: bool) -> None:
    class Other:
        """A finder that asks all others, as ours does; ours asks it back, which has to end."""

        is_asking = False

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if self.is_asking:
                return None
            self.is_asking = True
            specs = [finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self]
            self.is_asking = False
            return next(spec for spec in specs if spec is not None)

    ours: Any = Finder({NAME: lambda module: events.append("ours")})
    finders: list[Any] = [ours, Other()] if ours_first else [Other(), ours]
    sys.meta_path[:] = [*finders, PathFinder]
    importlib.import_module(NAME)
    assert events == ["executed", "ours"]
