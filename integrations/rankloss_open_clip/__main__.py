"""``python -m rankloss_open_clip …``: open_clip's trainer, with ``--loss`` attached by hand.

It takes the arguments of ``python -m open_clip_train.main`` and does the same, also in environments in which
torch does not load the plug-in: ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

import runpy
import sys

from rankloss_open_clip import bootstrap
from rankloss_open_clip.versions import missing_trainer


def main() -> None:
    """Attach, then run the trainer as ``python -m`` would."""
    missing = missing_trainer()
    if missing:
        sys.exit(missing)
    bootstrap.attach()
    if not bootstrap.attached():
        sys.exit(f"rankloss_open_clip could not attach: {bootstrap.failures}")
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)


# Spawned worker processes import this module again.
if __name__ == "__main__":
    main()
