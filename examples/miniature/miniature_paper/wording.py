"""The reports' templates."""

from pathlib import Path
from typing import Any

from examples_common import wording

_TEMPLATES = Path(__file__).with_name("templates")


def fill(template: str, **values: Any) -> str:
    """Fill in one of the templates beside this file."""
    return wording.fill(_TEMPLATES / template, **values)
