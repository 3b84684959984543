"""A report as Markdown, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html as escaping
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_CSS = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG for light backgrounds, one for dark ones, and what it shows, for those who cannot see it."""

    light: bytes
    dark: bytes
    alt: str


@dataclasses.dataclass(frozen=True)
class Details:
    """Markdown that is folded up in the HTML page and left out of the Markdown."""

    summary: str
    text: str


Block = str | Details


def markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as one Markdown text."""
    return "\n\n".join(block for block in blocks if isinstance(block, str)) + "\n"


def html(
    blocks: Sequence[Block],
    *,
    title: str,
    pictures: Mapping[str, Picture] | None = None,
    marks: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Return the blocks as a page.

    Args:
        blocks: The content.
        title: The page's title.
        pictures: By the paths that the Markdown names.
        marks: Signs with their style and what they are called when the page is read aloud.
    """
    parts = []
    for block in blocks:
        if isinstance(block, str):
            parts.append(_rendered(block, pictures or {}))
        else:
            summary = f"<summary>{escaping.escape(block.summary)}</summary>"
            parts.append(f"<details>{summary}\n{_rendered(block.text, {})}</details>\n")
    body = "".join(parts)
    for sign, (style, said) in (marks or {}).items():
        body = body.replace(sign, f'<span class="{style}" role="img" aria-label="{said}">{sign}</span>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escaping.escape(title)}</title>\n<style>\n{_CSS.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _rendered(text: str, pictures: Mapping[str, Picture]) -> str:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    in_body, first = False, False
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(tokens[number + 1].content))
        elif token.type == "th_open":
            token.attrSet("scope", "col")
        elif token.type in ("tbody_open", "tbody_close"):
            in_body = token.type == "tbody_open"
        elif token.type == "tr_open":
            first = in_body
        elif token.type in ("td_open", "td_close") and first:  # the first cell is its row's heading
            token.tag = "th"
            if token.type == "td_open":
                token.attrSet("scope", "row")
            else:
                first = False
        for child in token.children or ():
            _embed(child, pictures)
    rendered: str = parser.renderer.render(tokens, parser.options, {})
    region = '<div class="scroll" role="region" aria-label="table" tabindex="0">'
    rendered = rendered.replace("<table>", f"{region}\n<table>").replace("</table>", "</table>\n</div>")
    return rendered.replace("&lt;br&gt;", "<br>")  # two lines in a cell, the only HTML that our Markdown has


def _embed(token: Token, pictures: Mapping[str, Picture]) -> None:
    """Put a picture into the page instead of a link to it."""
    if token.type != "image" or str(token.attrs["src"]) not in pictures:
        return
    picture = pictures[str(token.attrs["src"])]
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(p).decode()}" for p in (picture.light, picture.dark)
    )
    token.type, token.children = "html_inline", None
    token.content = (
        '<span class="scroll" role="region" aria-label="figure" tabindex="0"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escaping.escape(picture.alt)}"></picture></span>'
    )
