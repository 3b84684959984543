"""The package: its names, and what importing it loads."""

from __future__ import annotations

import subprocess
import sys

# In torch 2.6 the second of the two loads the first, which takes longer than the package itself.
SCRIPT = """
import sys, torch, numpy
for name in ("sympy", "torch.utils.checkpoint"):
    sys.modules[name] = None  # an error to import
before = set(sys.modules)
import rankloss, rankloss_triton
print(*set(sys.modules) - before)
"""


def test_import_loads_torch_and_numpy_alone_and_no_compiler() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert packages <= {
        "rankloss",
        "rankloss_triton",
        "torch",
        "numpy",
    }  # neither a trainer nor Triton
    assert "torch._dynamo" not in loaded
