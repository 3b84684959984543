"""The package's description: the README, with links that also work outside the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A link or image in Markdown, and an attribute in HTML; what has a scheme or is a fragment stays.
_RELATIVE = re.compile(r"""(\]\(|(?:src|srcset|href)=")(?!\w+:|#|/)([^)"\s]+)""")


def absolute_links(markdown: str, source: str) -> str:
    """``markdown`` with relative links pointing into the repository at ``source``, pictures to its files."""

    def absolute(match: re.Match[str]) -> str:
        opening, path = match.groups()
        is_picture = path.endswith((".png", ".svg"))
        return f"{opening}{source}/{'raw' if is_picture else 'blob'}/main/{path}"

    return _RELATIVE.sub(absolute, markdown)


class ReadmeHook(MetadataHookInterface):
    """Fills in the field ``readme`` when the package is built."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read the README, and make its links absolute."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(text, metadata["urls"]["Source"]),
        }
