"""Called by torch when it is imported: waits for open_clip's trainer, and attaches to it once it is loaded.

torch loads the entry points of the group ``torch.backends`` each time it is imported, in every program of the
environment. This module therefore imports the standard library only, does next to nothing, and never raises.
:func:`attach` puts a finder at the front of ``sys.meta_path``; the finder lets the others find the
modules named in :data:`SEAMS`, and :mod:`rankloss_open_clip.patches` patches each after it has been executed.

A patch that fails must not stop a run that did not ask for it, and must not let a run that did ask train
something else: the trainer's parser would take ``--loss rankclip`` for an abbreviation of
``--loss-dist-impl`` and train plain CLIP. So failures are kept in :data:`failures`, and a guard around the
trainer's ``parse_args``, which does not need the patches, raises when the command line asks for a loss.
"""

from __future__ import annotations

import sys
from _thread import get_ident

# Other imports are inside the functions that need them, since every `import torch` runs this module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_PARAMS = "open_clip_train.params"

SEAMS = {
    "open_clip.factory": "patch_factory",
    _PARAMS: "patch_params",
    "open_clip_train.train": "patch_train",
    "open_clip_train.legacy_train": "patch_train",
    "open_clip_train.data": "patch_data",
    "open_clip_train.file_utils": "patch_file_utils",
}
"""The modules to patch, and the function of :mod:`rankloss_open_clip.patches` that patches each."""

failures: dict[str, Exception] = {}
"""Modules that were loaded but could not be patched, with what went wrong."""

_GUARDED = "_rankloss_open_clip_guarded"


def attach() -> None:
    """Install the finder, and patch what is loaded already. Safe to call twice; never raises."""
    try:
        if not attached():
            sys.meta_path.insert(0, SeamFinder())
        for name in SEAMS:
            module = sys.modules.get(name)
            # A module that is still being executed is patched by its loader once it is complete.
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                patch(module)
    except Exception as error:
        failures["rankloss_open_clip"] = error


def attached() -> bool:
    """Whether the finder is installed in this process."""
    return any(isinstance(finder, SeamFinder) for finder in sys.meta_path)


class SeamFinder:
    """A meta path finder that finds nothing itself and wraps the loaders of :data:`SEAMS`."""

    def __init__(self) -> None:
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Ask the other finders for a module of :data:`SEAMS`, and wrap the loader they name."""
        search = (get_ident(), fullname)
        if fullname not in SEAMS or search in self._searching:
            return None  # the second case: another delegating finder, called from here, asks back
        self._searching.add(search)
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._searching.remove(search)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            # A loader is whatever has these methods; deriving from importlib.abc would cost its import.
            spec.loader = SeamLoader(spec.loader)  # type: ignore[assignment]
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


class SeamLoader:
    """The loader that would have been used, followed by the module's patch."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not set yet (copy, pickle): do not look it up in itself
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put the wrapped loader back, so that nothing sees this one, then execute and patch."""
        loader: Any = self
        if module.__spec__ is not None and module.__spec__.loader is loader:
            module.__spec__.loader = self._loader
        if module.__loader__ is loader:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        patch(module)


def patch(module: ModuleType) -> None:
    """Run the patch of a loaded module, and keep what went wrong instead of raising it."""
    name = module.__name__
    try:
        from rankloss_open_clip import patches

        getattr(patches, SEAMS[name])(module)
    except Exception as error:
        failures[name] = error
    else:
        failures.pop(name, None)
    if name == _PARAMS:
        _guard(module)


def _guard(module: ModuleType) -> None:
    """Let the trainer's ``parse_args`` refuse ``--loss`` when a patch failed."""
    import functools

    original: Callable[..., Any] | None = getattr(module, "parse_args", None)
    if original is None:
        # There is no function to guard, so check here. Only the trainer itself loads this module.
        _report(sys.argv[1:])
        return
    if getattr(original, _GUARDED, False):
        return

    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        argv = args[0] if args else next(iter(kwargs.values()), None)
        _report(sys.argv[1:] if argv is None else argv)
        return original(*args, **kwargs)

    setattr(parse_args, _GUARDED, True)
    module.parse_args = parse_args  # type: ignore[attr-defined]


def _report(argv: Iterable[str]) -> None:
    if not failures:
        return
    from rankloss_open_clip.names import asks_for_loss

    reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures.items())
    if asks_for_loss(argv):
        raise ImportError(
            f"--loss was given, but rankloss_open_clip could not attach to open_clip's trainer ({reasons}). "
            "Run `python -m rankloss_open_clip.doctor` for advice, or leave --loss away to train without it."
        ) from next(iter(failures.values()))
    import logging

    logging.getLogger("rankloss_open_clip").warning(
        "--loss is not available in this run: rankloss_open_clip could not attach (%s)", reasons
    )
