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
    """Return the templates of a folder, with the filters that all have."""
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
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text)]
    return "\n\n".join(_joined(block) for block in blocks if block) + "\n"


def _joined(block: str) -> str:
    """Return a paragraph or a list with one line for each item; tables and HTML as they are."""
    if block.startswith(("|", "<")):
        return block
    return re.sub(r"\s*\n\s*(?!- )| {2,}", " ", block)  # line breaks but those before an item


def plain(text: object) -> str:
    """Escape what would be HTML."""
    return escaping.escape(str(text), quote=False)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    kept = [character for character in heading.lower() if character.isalnum() or character in " -_"]
    return "".join(kept).replace(" ", "-")
