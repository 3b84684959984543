"""Acts on modules of other packages once they have been imported, however early or late that is.

torch imports this in every program of an environment in which rankloss is installed (see
:mod:`rankloss_open_clip.bootstrap`). It therefore imports next to nothing, from the standard library only.
"""

from __future__ import annotations

import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def waits_for(name: str) -> bool:
    """True if :func:`after_import` acts on a module of this name in this process."""
    return any(isinstance(finder, Finder) and name in finder.actions for finder in sys.meta_path)


class Finder:
    """A meta path finder that finds nothing itself, and has the loaders that the others find act afterwards.

    Args:
        actions: See :func:`after_import`.
    """

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.actions = dict(actions)
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Ask the other finders for a module that is waited for, and extend the loader they name."""
        search = (get_ident(), fullname)
        if fullname not in self.actions or search in self._searching:
            return None  # the second case: another delegating finder, called from here, asks back
        self._searching.add(search)
        try:
            spec = self._find_by_others(fullname, path, target)
        finally:
            self._searching.remove(search)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _acting(spec.loader, self.actions[fullname])
        return spec

    def _find_by_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """The module's spec by the first of the other finders that has one; None without any."""
        for finder in list(sys.meta_path):  # which a finder may change
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


def _acting(loader: Any, act: Callable[[ModuleType], None]) -> Any:
    """Copy a loader, so that it acts on the one module that it executes, once."""
    from copy import copy

    loader = copy(loader)  # all modules of a zip file share one
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        loader.exec_module = execute  # its own again: for a reload a finder may give the same spec
        execute(module)
        act(module)

    loader.exec_module = exec_module
    return loader


def after_import(actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """Call functions with modules: now for those that are loaded, and whenever one has been executed.

    The import raises the errors of a function. Calling this twice with the same functions waits once.

    Args:
        actions: The functions, by the full name of the module.
    """
    is_waiting = any(isinstance(finder, Finder) and finder.actions == actions for finder in sys.meta_path)
    if not is_waiting:
        sys.meta_path.insert(0, Finder(actions))
    for name, act in actions.items():
        module = sys.modules.get(name)
        # One that is still being executed is complete only when its loader has returned.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            act(module)
