"""Pictures of the rank agreement; what the trainers store of them is in the tests of each trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_wandb_takes_the_picture_where_nothing_has_imported_pyplot() -> None:
    for package in ("matplotlib", "wandb"):
        pytest.importorskip(package)
    script = """
import sys, torch, wandb
from rankloss import plots
from rankloss_trainers.charts import picture

figure = plots.slope_chart(torch.eye(4), torch.eye(4), list("abcd"), 0)
image = wandb.Image(picture(figure))
assert "matplotlib.pyplot" not in sys.modules
width, height = figure.get_size_inches() * figure.dpi
print(image.image.size == (int(width), int(height)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
