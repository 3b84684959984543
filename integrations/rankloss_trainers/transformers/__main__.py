"""``python -m rankloss_trainers.transformers SCRIPT … --loss rankclip``: an unmodified script with a loss.

The script builds ``transformers.Trainer``, or a class derived from it. It finds a
:class:`~rankloss_trainers.transformers.ContrastiveTrainer` under that name, and sees its command line without
``--loss`` and the options that belong to it. ``torchrun`` and ``accelerate launch`` start it as
``-m rankloss_trainers.transformers SCRIPT …``.

With ``--loss`` a misspelt option of a loss (``--rankclip-lamda-in``) is an error, as the script might ignore
it; the rest after ``--`` is the script's. Without ``--loss`` the script runs as it is, and only the options
that a loss has are refused.

With ``--loss`` torch is loaded before the script, but transformers is not: environment variables that the
script sets for it (``HF_HOME``, ``HF_ENDPOINT``) still count.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rankloss_trainers.command_line import LossArguments, beginnings, mentioned, naming_flags
from rankloss_trainers.declared import Loss
from rankloss_trainers.import_hook import after_import
from rankloss_trainers.run_options import RunOptions


def main() -> None:
    """Run the script with the loss of the command line."""
    script, *given = sys.argv[1:] or ["--help"]
    if script.startswith("-"):
        parser = _losses([script]).parser
        if script not in ("-h", "--help"):
            parser.error(f"the script comes first, got {script}")
        parser.print_help()
        return
    run, rest = parse(given)
    # As Python sets both for a script that it runs itself.
    sys.argv = [script, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    attached = None if run is None else Attached(run)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        # After an exit without an error, too, the loss has to have been used.
        if attached is None or end.code not in (None, 0):
            raise
    if attached is not None and not attached.built:
        sys.exit(attached.missed)


def parse(argv: list[str]) -> tuple[Any, list[str]]:
    """Take ``--loss`` and the options of losses out of a script's arguments.

    Returns:
        The losses as a :class:`~rankloss_trainers.runtime.Runtime`, None for the script's own; and the
        script's arguments.
    """
    if not any(argument.startswith(("--loss", *beginnings())) for argument in argv):
        return None, argv
    arguments = _losses(argv)
    args, rest = arguments.parse(argv)
    try:
        choice = arguments.chosen(args)
        run = None if choice is None else _built(*choice)
        return run, rest
    except ValueError as error:
        arguments.parser.error(f"argument {error}")


def _built(losses: Sequence[Loss], options: RunOptions) -> Any:
    """Losses for any model; a ValueError, which begins with the argument, where no model could be trained."""
    from rankloss_trainers.runtime import Runtime
    from rankloss_trainers.transformers.host import HOST

    with naming_flags(losses):
        return Runtime(HOST, losses, options)


def _losses(argv: list[str]) -> LossArguments:
    """The losses that a command line may mean, on a parser."""
    prog = "python -m rankloss_trainers.transformers SCRIPT ..."
    text = "Run a script that builds transformers.Trainer, with a loss of rankloss."
    parser = argparse.ArgumentParser(prog, description=text, allow_abbrev=False, add_help=False)
    return LossArguments(parser, mentioned(argv))


class Attached:
    """Replaces ``transformers.Trainer`` once it is loaded, and stops a script that trains without one.

    Args:
        run: The losses, a :class:`~rankloss_trainers.runtime.Runtime`.
    """

    def __init__(self, run: Any) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self.run = run
        self.built: list[Any] = []
        self.missed = f"--loss {run.name} was not used: {sys.argv[0]} built no transformers.Trainer"
        after_import({"transformers.trainer": self.replace})
        register_optimizer_step_pre_hook(self._guard)

    def take(self) -> Any:
        """The losses for a Trainer; each but the first gets losses of its own."""
        return self.run if not self.built else _built(self.run.losses, self.run.options)

    def _guard(self, *_: Any) -> None:
        """Stop a script that takes an optimizer's step without a Trainer of ours."""
        if not self.built:
            raise RuntimeError(self.missed)

    def replace(self, module: ModuleType) -> None:
        """Put a ContrastiveTrainer in the place of ``module.Trainer``."""
        from rankloss_trainers.transformers.trainer import ContrastiveTrainer

        attached, replaced = self, module.Trainer

        class Trainer(ContrastiveTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, loss=attached.take(), **kwargs)
                attached.built.append(self)

        # Shown, and pickled, by the name that it is put under.
        Trainer.__module__, Trainer.__qualname__ = replaced.__module__, replaced.__qualname__
        sys.modules["transformers"].Trainer = module.Trainer = Trainer  # type: ignore[attr-defined]


# Spawned worker processes import the script again, not this module.
if __name__ == "__main__":
    main()
