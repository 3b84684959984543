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


def after_import(actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """Call functions with modules: now for those that are loaded, and whenever one has been executed.

    What a function raises is raised by the import. Calling this twice with the same functions waits once.

    Args:
        actions: What to call, by the full name of the module.
    """
    if not any(isinstance(finder, Finder) and finder.actions == actions for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(actions))
    for name, act in actions.items():
        module = sys.modules.get(name)
        # One that is still being executed is complete only when its loader has returned.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            act(module)


def waits_for(name: str) -> bool:
    """Whether :func:`after_import` acts on a module of this name in this process."""
    return any(isinstance(finder, Finder) and name in finder.actions for finder in sys.meta_path)


class Finder:
    """A meta path finder that finds nothing itself, and wraps the loaders that the others find.

    Args:
        actions: See :func:`after_import`.
    """

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.actions = dict(actions)
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Ask the other finders for a module that is waited for, and wrap the loader they name."""
        search = (get_ident(), fullname)
        if fullname not in self.actions or search in self._searching:
            return None  # the second case: another delegating finder, called from here, asks back
        self._searching.add(search)
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._searching.remove(search)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            # A loader is whatever has these methods; deriving from importlib.abc would cost its import.
            spec.loader = Loader(spec.loader, self.actions[fullname])  # type: ignore[assignment]
        return spec

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                return spec
        return None


class Loader:
    """The loader that would have been used, followed by a function.

    Args:
        loader: The loader.
        act: The function, which is called with the module.
    """

    def __init__(self, loader: Any, act: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._act = act

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not set yet (copy, pickle): do not look it up in itself
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put the wrapped loader back, so that nothing sees this one, then execute the module and act."""
        loader: Any = self
        if module.__spec__ is not None and module.__spec__.loader is loader:
            module.__spec__.loader = self._loader
        if module.__loader__ is loader:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._act(module)
