from __future__ import annotations

import subprocess
import sys

import rankloss


def test_import_loads_no_trainer_and_nothing_but_torch_and_numpy() -> None:
    script = (
        "import sys, torch, numpy; before = set(sys.modules); import rankloss; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) - set(sys.stdlib_module_names) <= {"rankloss", "torch", "numpy"}
    assert "torch._dynamo" not in result.stdout


def test_import_after_torch_loads_no_compiler() -> None:
    script = (
        "import torch, sys; before = 'torch._dynamo' in sys.modules; import rankloss; "
        "print(before, 'torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_every_public_name_exists() -> None:
    for name in rankloss.__all__:
        assert getattr(rankloss, name) is not None
