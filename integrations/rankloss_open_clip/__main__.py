"""``python -m rankloss_open_clip [--trainer MODULE] …``: a trainer with ``--loss`` attached by hand.

Without ``--trainer`` it takes the arguments of ``python -m open_clip_train.main`` and does the same, also in
environments in which torch does not load the plug-in: ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.

``--trainer training.main``, which has to come first, runs the ``main`` of a trainer that is laid out like
open_clip's before 2.26, or of a fork; see :func:`rankloss_open_clip.attach`.
"""

from __future__ import annotations

import importlib
import inspect
import runpy
import sys

import rankloss_open_clip
from rankloss_open_clip import bootstrap
from rankloss_open_clip.versions import missing_trainer


def main() -> None:
    """Attach, then run the trainer as ``python -m`` would."""
    option, _, name = sys.argv[1].partition("=") if len(sys.argv) > 1 else ("", "", "")
    if option == "--trainer":
        rest = sys.argv[2:] if name else sys.argv[3:]
        name = name or "".join(sys.argv[2:3])
        if not name:
            sys.exit("--trainer needs the name of a module, as training.main")
        _run(name, rest)
        return
    missing = missing_trainer()
    if missing:
        sys.exit(missing)
    bootstrap.attach()
    if not bootstrap.attached():
        sys.exit(f"rankloss_open_clip could not attach: {bootstrap.failures}")
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)


def _run(name: str, argv: list[str]) -> None:
    try:
        trainer = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        sys.exit(f"--trainer {name}: there is no module {error.name} here")
    try:
        rankloss_open_clip.attach(trainer)
        run = trainer.main
    except (AttributeError, TypeError) as error:
        sys.exit(f"--trainer {name} is not laid out like open_clip's trainer: {error}")
    sys.argv = [trainer.__file__ or name, *argv]
    # Some read sys.argv themselves.
    run(*([argv] if inspect.signature(run).parameters else []))


# Spawned worker processes import this module again.
if __name__ == "__main__":
    main()
