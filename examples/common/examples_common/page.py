"""A report: Markdown out of a template, and one HTML page that needs nothing else."""

import base64
import dataclasses
import functools
import html as escaping
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from .tables import markdown


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, and what it shows, for those who cannot see it."""

    png: bytes
    alt: str


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


def html(text: str, *, title: str, pictures: Mapping[str, Picture]) -> str:
    """Return Markdown as a page that needs nothing else; ``pictures`` go by the paths that it names."""

    def embedded(image: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode(pictures[image[1]].png).decode()}"'

    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r"<h(\d)>(.*?)</h", lambda found: f'<h{found[1]} id="{_id(found[2])}">{found[2]}</h', body)
    body = re.sub(r"(<table>.*?</table>)", r'<div class="scroll">\n\1\n</div>', body, flags=re.DOTALL)
    body = re.sub(r'src="([^"]*)"', embedded, body)
    return _templates(Path(__file__).parent).get_template("page.html").render(title=title, body=body)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _id(heading: str) -> str:
    return anchor(escaping.unescape(re.sub(r"<[^>]*>", "", heading)))
