"""The test files of trainers that are not installed are not collected."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from rankloss_trainers.doctor import TRAINERS

sys.path.append(str(Path(__file__).parents[1] / "rankloss_features"))  # its tiny teacher
sys.path.append(str(Path(__file__).parents[1] / "rankloss_open_clip"))  # runs of its trainer

NEEDED = [
    (f"test_{x.name}*.py".replace("-", "_"), [x.distribution.replace("-", "_")])
    for x in TRAINERS
    if x.plugin.startswith("rankloss_trainers")
]
NEEDED += [
    ("test_transformers*.py", ["accelerate", "datasets", "PIL"]),
    ("test_sentence_transformers*.py", ["datasets"]),
    ("test_*_teacher.py", ["datasets", "PIL"]),
    ("test_graded_lists.py", ["PIL"]),
]
collect_ignore_glob = [name for name, packages in NEEDED if not all(map(find_spec, packages))]
