"""Changes of the documents by MkDocs on the way to the site.

Documents are read in the repository, too, where links lead to files outside ``docs``, and a few documents
live at the root. Here such links lead to the repository's own site; a file that does not exist is an error.
"""

from __future__ import annotations

import logging
import mimetypes
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import notebooks

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# A link of Markdown in four parts: "](", the path of a file, its fragment if there is one, and ")".
_LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(\))")
_DOCTEST_FENCE = re.compile(r"^```python\n(?=>>>)", re.MULTILINE)
_BADGES = re.compile(r"<!-- badges -->.*?<!-- /badges -->\n", re.DOTALL)
_THEMED_PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)">\s*<img alt="(?P<alt>[^"]+)" src="(?P<light>[^"]+)"'
    r"(?P<layout>[^>]*)>\s*</picture>"
)
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_HEAD = re.compile(r"<th[ >].*?</th>", re.DOTALL)
_ROW = re.compile(r"<tr>\s*<td.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<td(?=[ >])")
_CODE_BESIDE = re.compile(r"</td>\s*<td[^>]*>(?:(?!</td>).)*<code>", re.DOTALL)  # not in the first cell
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?=[^<>]*<)")  # in text, not in a tag
_IMAGE = re.compile(r"""<img\b[^>]*?\bsrc=["']?([^"'\s>]+)""")
_BEGINNINGS = {"image/svg+xml": (b"<svg", b"<?xml"), "image/png": (b"\x89PNG",), "image/jpeg": (b"\xff\xd8",)}

log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Read what lives at the root, and turn links that leave ``docs`` into links to the repository."""
    name = page.file.src_uri
    folder = posixpath.dirname(f"docs/{name}")
    if name in FROM_ROOT:
        markdown = (ROOT / FROM_ROOT[name]).read_text(encoding="utf-8")
        folder = ""
    notebook = Path(page.file.abs_src_path).with_suffix(".ipynb")
    if notebook.exists():
        markdown = notebooks.to_markdown(notebook, notebook.name)

    markdown = _BADGES.sub("", markdown)
    markdown = _THEMED_PICTURE.sub(_themed_picture, markdown)

    def resolve(match: re.Match[str]) -> str:
        opening, target, fragment, closing = match.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", name, target)
        return f"{opening}{_address(path, name, config)}{fragment}{closing}"

    markdown = _LINK.sub(resolve, markdown)
    return _DOCTEST_FENCE.sub("```pycon\n", markdown)


def _address(path: str, page: str, config: Any) -> str:
    """The address of a file of the repository on a page of the site: on the site, or in the repository."""
    pages_of_root_files = {source: name for name, source in FROM_ROOT.items()}
    if path in pages_of_root_files:
        return posixpath.relpath(f"docs/{pages_of_root_files[path]}", posixpath.dirname(f"docs/{page}"))
    pages = {f"docs/{file}" for file in _pages(config)}
    if path in pages or path.startswith("docs/assets/"):
        return posixpath.relpath(path, posixpath.dirname(f"docs/{page}"))
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{config.extra['source']}/{kind}/main/{path}"


def on_page_content(html: str, **_: Any) -> str:
    """Let a phone show a table of commands as a list; break no line in an option, nor before an interval."""
    html = _TABLE.sub(lambda match: _stacked(match[0]), html).replace(" ± ", "&nbsp;±&nbsp;")
    return _OPTION.sub(lambda match: f'<span class="option">{match[0]}</span>', html)


def _stacked(table: str) -> str:
    """The table with each cell labelled with the head of its column, if it has commands."""
    texts = [re.sub("<[^>]*>", "", head) for head in _HEAD.findall(table)]  # without tags
    heads = [text.strip().replace('"', "&quot;") for text in texts]
    if len(heads) < 3 or not _CODE_BESIDE.search(table):
        return table

    def labelled(row: re.Match[str]) -> str:
        labels = (f"{head}: " if head else "" for head in heads)  # each cell takes the next one
        return _CELL.sub(lambda _: f'<td data-label="{next(labels)}"', row[0])

    return _ROW.sub(labelled, table).replace("<table>", "<table data-stacked>", 1)


def on_post_build(config: Any, **_: Any) -> None:
    """Look at every image of the built site: a file of the site, of the type that its name says."""
    site = Path(config.site_dir)
    for page in sorted(site.rglob("*.html")):
        for address in _IMAGE.findall(page.read_text(encoding="utf-8")):
            if address.startswith("data:image/"):
                continue
            file = page.parent / address.partition("#")[0]
            beginnings = _BEGINNINGS.get(mimetypes.guess_type(file.name)[0] or "")
            if not (beginnings and file.is_file() and file.read_bytes().startswith(beginnings)):
                log.warning("%s shows %s, which is no image of the site", page.relative_to(site), address)


def _themed_picture(match: re.Match[str]) -> str:
    """A picture of two themes follows the reader's system in the repository, and the page's theme here."""
    layout = f"{{{match['layout']} }}" if match["layout"].strip() else ""
    return "\n".join(
        f"![{match['alt']}]({match[theme]}#gh-{theme}-mode-only){layout}" for theme in ("light", "dark")
    )


def _pages(config: Any) -> set[str]:
    """The pages in the folder of documents, by their path inside."""
    docs = Path(config.docs_dir)
    return {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
