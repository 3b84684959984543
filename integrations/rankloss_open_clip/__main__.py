"""``python -m rankloss_open_clip [--trainer MODULE] …``: a trainer with ``--loss`` attached by hand.

Without ``--trainer`` it takes the arguments of ``python -m open_clip_train.main`` and does the same, also in
environments in which torch does not load the plug-in, as with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.

``--trainer training.main`` runs the ``main`` of a trainer that is laid out like open_clip's before 2.26, or
of a fork; see :func:`rankloss_open_clip.attach`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import runpy
import sys

import rankloss_open_clip
from rankloss_trainers.extras import extra


def main() -> None:
    """Attach, then run the trainer as ``python -m`` would."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer", metavar="MODULE")
    options, argv = parser.parse_known_args()
    if options.trainer is None:
        rankloss_open_clip.wait_for_trainer()
        with extra("open-clip"):
            importlib.import_module("open_clip_train")
        runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
        return
    trainer = importlib.import_module(options.trainer)
    rankloss_open_clip.attach(trainer)
    # Some read sys.argv themselves.
    sys.argv = [trainer.__file__ or options.trainer, *argv]
    if inspect.signature(trainer.main).parameters:
        trainer.main(argv)
    else:
        trainer.main()


# Spawned worker processes import this module again.
if __name__ == "__main__":
    main()
