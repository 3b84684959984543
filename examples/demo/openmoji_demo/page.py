"""Markdown out of a template."""

import functools
import html as escaping
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .tables import markdown


@functools.cache
def _templates(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(
        plain=plain,
        table=lambda rows, head, right=0: markdown(head, rows, right=right),
    )
    return environment


def fill(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill in a Jinja template of Markdown; every paragraph and list item of it becomes one line.

    ``rows | table(head, right)`` is a table. Texts from elsewhere have to be escaped by ``plain``, which is
    :func:`plain`: Markdown may contain HTML.
    """
    environment = _templates(template.parent)
    environment.filters.update(filters)
    text = environment.get_template(template.name).render(values)
    blocks = (block.strip() for block in re.split(r"\n\s*\n", text))
    lines = (b if b.startswith(("|", "<")) else re.sub(r"\s*\n\s*(?!- )| {2,}", " ", b) for b in blocks if b)
    return "\n\n".join(lines) + "\n"


def plain(text: object) -> str:
    """Escape what would be HTML."""
    return escaping.escape(str(text), quote=False)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")
