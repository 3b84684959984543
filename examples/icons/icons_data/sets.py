"""What is known of the icon sets: ``sets.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SETS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_text(encoding="utf-8"))
