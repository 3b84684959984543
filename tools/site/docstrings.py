"""Docstrings for the site: roles become cross references, indented formulas become mathematics."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from formulas import to_tex

# A role such as :class:`~rankloss.ClipLoss`, where ~ hides all of the name but its last part.
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(?P<hidden>~?)(?P<name>[\w.]+)`")
# Lines that are indented by four, after an empty one; empty lines between them belong to the block.
_BLOCK = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}\S.*(?:\n|\Z)(?:\n(?= {4}\S))?)+", re.MULTILINE)
_SECTION = re.compile(
    r"^(Args|Returns|Raises|Example|Examples|References|Shapes|Note|Yields):$", re.MULTILINE
)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # the parser knows the plural


class ReadableDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package, once all names in it can be resolved."""
        for obj in _objects(pkg):
            if obj.docstring is not None:
                text = _EXAMPLE.sub("Examples:", obj.docstring.value)
                obj.docstring.value = _roles(_formulas(text), obj)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    """An object, and all that is defined in it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _formulas(text: str) -> str:
    """Indented blocks in front of the first section are formulas, or literal text after a ``::``."""
    section = _SECTION.search(text)
    end = section.start() if section else len(text)
    head = text[:end]

    def formula(match: re.Match[str]) -> str:
        is_literal = head[: match.start()].rstrip().endswith("::")
        if is_literal:
            return match[0]
        return "$$\n" + to_tex(textwrap.dedent(match[0])) + "\n$$\n"

    return _BLOCK.sub(formula, head) + text[end:]


def _roles(text: str, obj: griffe.Object) -> str:
    """A role becomes a link where the name is on a page of the site, and code elsewhere."""

    def reference(match: re.Match[str]) -> str:
        name = match["name"]
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            path = name
        shown = name.rpartition(".")[2] if match["hidden"] else name
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(reference, text)
