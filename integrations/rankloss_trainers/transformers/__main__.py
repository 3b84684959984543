"""``python -m rankloss_trainers.transformers SCRIPT … --loss rankclip``: an unmodified script with a loss.

The script builds ``transformers.Trainer``, or a class derived from it. It finds a
:class:`~rankloss_trainers.transformers.ContrastiveTrainer` under that name, and sees its command line without
``--loss`` and the options that belong to it. ``torchrun`` and ``accelerate launch`` start it as
``-m rankloss_trainers.transformers SCRIPT …``.

With ``--loss`` a misspelt option of a loss (``--rankclip-lamda-in``) is an error, as the script might ignore
it; what comes after ``--`` is the script's. Without ``--loss`` the script runs as it is, and only the options
that a loss has are refused.

With ``--loss`` torch is loaded before the script, but transformers is not: what the script puts into the
environment for it (``HF_HOME``, ``HF_ENDPOINT``) still counts.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.catalog import TRAINERS_OWN, LossEntry, dest, flag
from rankloss_trainers.command_line import add_options, by_prefix, misplaced, with_flag


def main() -> None:
    """Run the script with what the command line says of the loss."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        _parser(_entries(None)).parse_args(sys.argv[1:] or ["--help"])
        raise SystemExit(2)
    script, *given = sys.argv[1:]
    name, options, rest = parse(given)
    sys.argv = [script, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    if name is None:
        runpy.run_path(script, run_name="__main__")
        return
    attached = Attached(name, options)
    attached.wait()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    attached.check()


def parse(argv: list[str]) -> tuple[str | None, dict[str, Any], list[str]]:
    """Take ``--loss`` and what belongs to it out of a script's arguments.

    Returns:
        The name of the loss, None for the script's own; the options that were given, by their keys; and the
        script's arguments.
    """
    ours = tuple(f"--{prefix}-" for prefix in catalog.PREFIXES)
    if not any(argument.startswith(("--loss", *ours)) for argument in argv):
        return None, {}, argv
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--loss")
    asked, _ = peek.parse_known_args(argv)
    entries = _entries(asked.loss)
    parser = _parser(entries)
    args, rest = parser.parse_known_args(argv)
    name: str | None = None if args.loss == TRAINERS_OWN else args.loss
    if name is not None and name not in entries:
        known = ", ".join((TRAINERS_OWN, *catalog.candidates()))
        parser.error(f"argument --loss: must be one of {known}, got {name!r}")
    wrong = misplaced(name, entries, args)
    if not wrong and args.loss is not None:
        wrong = _misspelt(rest, entries)
    if wrong:
        parser.error(wrong)
    if name is None:
        return None, {}, rest
    entry = entries[name]
    keys = {option.key: dest(name, entry, option) for option in entry.options}
    options = {key: getattr(args, attribute) for key, attribute in keys.items() if hasattr(args, attribute)}
    reason = _reason_against(entry, options)
    if reason is not None:
        reason = with_flag(name, entry, reason)
        parser.error(f"argument {reason if reason.startswith('--') else f'--loss: {reason}'}")
    return name, options, rest


def _entries(asked: str | None) -> dict[str, LossEntry]:
    """The losses of rankloss, and the one of another package that is asked for."""
    known = catalog.candidates()
    names = dict.fromkeys((*catalog.BUILT_IN, asked))
    return {name: known[name].load() for name in names if name in known}


def _parser(entries: Mapping[str, LossEntry]) -> argparse.ArgumentParser:
    from rankloss_trainers.transformers import choice

    parser = argparse.ArgumentParser(
        prog="python -m rankloss_trainers.transformers",
        usage="%(prog)s SCRIPT [the script's arguments] [--loss NAME [its options]]",
        description="Run a script that builds transformers.Trainer, with a loss of rankloss.",
        allow_abbrev=False,
        add_help=len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"),
    )
    said = [f"{TRAINERS_OWN}: the model's own (default)"]
    said += [f"{name}: {entry.help}" for name, entry in entries.items()]
    parser.add_argument("--loss", help="; ".join(said).replace("%", "%%"))
    for names in by_prefix(entries).values():
        entry = entries[names[0]]
        add_options(parser, names, entry, choice.defaults(entry))
    return parser


def _misspelt(rest: list[str], entries: Mapping[str, LossEntry]) -> str:
    """What is wrong with arguments that are left over and look like options of a loss; empty if none does."""
    known = [flag(name, entry, option) for name, entry in entries.items() for option in entry.options]
    ours = tuple(f"--{prefix}-" for prefix in by_prefix(entries))
    for argument in itertools.takewhile(lambda argument: argument != "--", rest):
        typed = argument.partition("=")[0]
        spelt = typed.replace("_", "-")  # as HfArgumentParser would take it, too
        if spelt.startswith(ours):
            near = difflib.get_close_matches(spelt, known, n=1)
            return f"{typed}: there is no such option" + (f", did you mean {near[0]}?" if near else "")
    return ""


def _reason_against(entry: LossEntry, given: Mapping[str, Any]) -> str | None:
    import rankloss
    from rankloss_trainers.transformers import choice

    return entry.refuse({**choice.defaults(entry), **given}, rankloss.Gather(rank=0, world_size=1))


# --- attaching ------------------------------------------------------------------------------------------


class Attached:
    """Replaces ``transformers.Trainer`` once it is loaded, and stops a script that trains without it.

    Args:
        name: The loss.
        options: Its options.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.options = options
        self.built = False

    def wait(self) -> None:
        """Act as soon as the script loads transformers' Trainer, or an optimizer takes a step."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        _after_import("transformers.trainer", self.replace)

        def guard(*_: Any) -> None:
            if not self.built:
                raise RuntimeError(self._missed())
            handle.remove()

        handle = register_optimizer_step_pre_hook(guard)

    def replace(self, module: ModuleType) -> None:
        """Put a ContrastiveTrainer in the place of ``module.Trainer``."""
        from rankloss_trainers.transformers.trainer import ContrastiveTrainerMixin

        attached, own = self, ContrastiveTrainerMixin.compute_loss

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if type(self).compute_loss is not own:
                raise TypeError(
                    f"{type(self).__name__} computes its own loss, which --loss {attached.name} would not "
                    "reach; derive it from rankloss_trainers.transformers.ContrastiveTrainer"
                )
            ContrastiveTrainerMixin.__init__(
                self, *args, loss=attached.name, loss_options=attached.options, **kwargs
            )
            attached.built = True

        former: Any = module.Trainer
        names = {"__module__": former.__module__, "__doc__": former.__doc__, "__init__": __init__}
        trainer = type(former.__name__, (ContrastiveTrainerMixin, former), names)
        module.Trainer = trainer  # type: ignore[attr-defined]
        sys.modules["transformers"].Trainer = trainer  # type: ignore[attr-defined]

    def check(self) -> None:
        """Exit with an error if the script has ended without a Trainer."""
        if not self.built:
            sys.exit(self._missed())

    def _missed(self) -> str:
        return f"--loss {self.name} was not used: {sys.argv[0]} has built no transformers.Trainer"


def _after_import(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call a function with a module, now or once it has been imported."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.act = act

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.act(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# Spawned worker processes import the script again, not this module.
if __name__ == "__main__":
    main()
