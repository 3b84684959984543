"""The test files of trainers that are not installed are not collected."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Bert, which its first user writes."""
    return tmp_path_factory.mktemp("bert")


sys.path.append(str(Path(__file__).parents[1] / "rankloss_features"))  # its tiny teacher

NEEDED = {
    "test_transformers*.py": ("transformers", "accelerate", "datasets", "PIL"),
    "test_*sentence_transformers*.py": ("sentence_transformers", "datasets"),
    "test_*_teacher.py": ("datasets", "PIL"),
    "test_lightning.py": ("lightning",),
    "test_graded_lists.py": ("PIL",),
}
collect_ignore_glob = [name for name, packages in NEEDED.items() if not all(map(find_spec, packages))]
