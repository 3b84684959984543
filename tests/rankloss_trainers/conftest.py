"""The test files of trainers that are not installed are not collected."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {
    "test_transformers*.py": ("transformers", "accelerate"),
    "test_trainers_document.py": ("transformers", "accelerate"),
    "test_sentence_transformers.py": ("sentence_transformers", "datasets"),
    "test_lightning.py": ("lightning",),
}
collect_ignore_glob = [name for name, packages in NEEDED.items() if not all(map(find_spec, packages))]
