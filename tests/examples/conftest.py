"""Fixtures of the examples' tests; ``make test`` keeps a smoke test of each example, the others are slow."""

from importlib.util import find_spec

import pytest

# Whoever installs the examples installs their dependencies.
collect_ignore_glob = [] if find_spec("examples_common") else ["test_*.py"]

SMOKE = {
    "test_common": ("test_plain_clip_under_another_name", "test_the_examples_use_public", "test_no_seed"),
    "test_evaluate": ("test_retrieval_with_several_captions",),
    "test_icons": ("test_shards_and_the_benchmark_hold",),
    "test_openmoji": ("test_build_is_complete",),
}


@pytest.hookimpl(tryfirst=True)  # before the slow tests are left out
def pytest_collection_modifyitems(items):
    for item in items:
        kept = SMOKE.get(item.path.stem, ("test_",))
        if item.path.parent.name == "examples" and not item.name.startswith(kept):
            item.add_marker("slow")


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
