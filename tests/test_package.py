"""The package: its names, and what importing it loads."""

from __future__ import annotations

import subprocess
import sys

import rankloss

SCRIPT = """
import importlib.util, sys, torch, numpy
before = set(sys.modules)
import rankloss, rankloss_triton
print(*set(sys.modules) - before)
if importlib.util.find_spec("matplotlib"):
    import rankloss.plots
    v = torch.eye(3)
    rankloss.plots.slope_chart(v, v, list("abc"), 0).draw_without_rendering()
print(*set(sys.modules) - before)
"""


def test_import_loads_torch_and_numpy_alone_no_compiler_and_no_pyplot() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded, of_a_chart = (set(line.split()) for line in result.stdout.splitlines())
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert packages <= {
        "rankloss",
        "rankloss_triton",
        "torch",
        "numpy",
    }  # neither a trainer, Triton nor matplotlib
    assert "torch._dynamo" not in loaded
    assert "matplotlib.pyplot" not in of_a_chart


def test_every_public_name_exists() -> None:
    for name in rankloss.__all__:
        assert getattr(rankloss, name) is not None
