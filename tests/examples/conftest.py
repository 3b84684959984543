"""Puts the examples' packages on the path, also for the helper modules beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

sys.path[:0] = [str(EXAMPLES / name) for name in ("miniature", "icons", "evaluate", "openmoji")]
