"""Leaves this folder out where the examples are not installed: ``pip install -e '.[dev]' -e examples``."""

from importlib.util import find_spec

import pytest

# Whoever installs the examples installs their dependencies.
collect_ignore_glob = [] if find_spec("examples_common") else ["test_*.py"]


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
