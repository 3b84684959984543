"""``python -m rankloss``: the command ``rankloss``, for environments that do not have it on the path."""

import runpy

# By name: the command belongs to the integrations, and nothing in this package imports them.
if __name__ == "__main__":
    runpy.run_module("rankloss_trainers.console", run_name="__main__", alter_sys=True)
