"""Fixtures of the examples' tests; ``make test`` keeps a smoke test of each example, the others are slow."""

from importlib.util import find_spec

import pytest

# Whoever installs the examples installs their dependencies.
collect_ignore_glob = [] if find_spec("studies") else ["test_*.py"]

SMOKE = {
    "test_common": ("test_plain_clip", "test_the_log", "test_the_examples_use_public"),
    "test_evaluate": ("test_retrieval_with_several_captions",),
    "test_icons": ("test_shards_hold",),
    "test_openmoji": ("test_a_built_folder", "test_the_end_"),
    "test_studies": (
        "test_finished",
        "test_a_finished",
        "test_the_report_of_a_finished",
        "test_the_runner_prints",
        "test_without_a_name",
    ),
}


@pytest.hookimpl(tryfirst=True)  # before the slow tests are left out
def pytest_collection_modifyitems(items):
    """Mark as slow all tests of this folder but those of a file's entry in SMOKE; other files keep all."""
    for item in items:
        kept = SMOKE.get(item.path.stem, ("test_",))
        if item.path.parent.name == "examples" and not item.name.startswith(kept):
            item.add_marker("slow")
