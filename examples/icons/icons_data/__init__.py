"""Image–name pairs from Iconify's icon sets: the parts behind ``examples/icons/build.py``."""

from pathlib import Path
from typing import Any

import yaml

SETS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_text(encoding="utf-8"))
