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

_REGION = '<div class="scroll" role="region" aria-label="table" tabindex="0">'


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG for light backgrounds, one for dark ones, and what it shows, for those who cannot see it."""

    light: bytes
    dark: bytes
    alt: str


@functools.cache
def _templates(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(
        plain=plain,
        table=lambda rows, head, right=0: markdown(head, rows, right=right),
        base64=lambda png: base64.b64encode(png).decode(),
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


def html(
    text: str,
    *,
    title: str,
    pictures: Mapping[str, Picture] | None = None,
    marks: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Return Markdown as a page.

    ``pictures`` go by the paths that the Markdown names; ``marks`` are signs, their styles, and what they are
    called when the page is read aloud.
    """
    environment = _templates(Path(__file__).parent)
    figure = environment.get_template("figure.html")

    def embedded(image: re.Match[str]) -> str:
        return figure.render(picture=(pictures or {})[image["path"]], alt=image["alt"])

    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r"<h(\d)>(.*?)</h", lambda found: f'<h{found[1]} id="{_id(found[2])}">{found[2]}</h', body)
    body = re.sub(r"<th(?=[ >])", '<th scope="col"', body)
    body = re.sub(r"(<tr>\n)<td(.*?)</td>", r'\1<th scope="row"\2</th>', body)  # the first cell of a row
    body = body.replace("<table>", f"{_REGION}\n<table>").replace("</table>", "</table>\n</div>")
    for sign, (style, said) in (marks or {}).items():
        body = body.replace(sign, f'<span class="{style}" role="img" aria-label="{said}">{sign}</span>')
    body = re.sub(r'<img src="(?P<path>[^"]*)" alt="(?P<alt>[^"]*)" />', embedded, body)
    return environment.get_template("page.html").render(title=title, body=body)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _id(heading: str) -> str:
    return anchor(escaping.unescape(re.sub(r"<[^>]*>", "", heading)))
