from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("datasets") is None or importlib.util.find_spec("webdataset") is None:
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tables that datasets reads are cached in a temporary folder of these tests."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
