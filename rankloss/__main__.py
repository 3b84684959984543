"""``python -m rankloss``: the command ``rankloss``, for environments without it on the path."""

import runpy

# By name: the command is part of the integrations, which this package must not import.
if __name__ == "__main__":
    runpy.run_module("rankloss_trainers.console", run_name="__main__", alter_sys=True)
