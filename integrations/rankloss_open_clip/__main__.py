"""``python -m rankloss_open_clip …``: open_clip's trainer, with ``--loss`` attached by hand.

It takes the arguments of ``python -m open_clip_train.main`` and does the same. It is for environments in
which torch does not load the plug-in: ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys

from rankloss_open_clip import bootstrap


def main() -> None:
    """Attach, then run the trainer as ``python -m`` would."""
    if importlib.util.find_spec("open_clip_train") is None:
        sys.exit("open_clip_train is not installed: pip install 'rankloss[open-clip]'")
    bootstrap.attach()
    if not bootstrap.attached():
        sys.exit(f"rankloss_open_clip could not attach: {bootstrap.failures}")
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)


# Worker processes that are spawned import this module again.
if __name__ == "__main__":
    main()
