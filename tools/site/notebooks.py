"""Notebooks as pages: text, code and what was computed, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def to_markdown(path: Path, source: str) -> str:
    """The notebook as a page that leads to the file itself, at ``source``."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _cell(cell)]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[The notebook]({source}), to run it yourself.\n{rest}"


def _cell(cell: dict[str, Any]) -> list[str]:
    """A cell's text, or its code and outputs, as parts of a page."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [text]
    return [f"```python\n{text}\n```", *map(_output, cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    """An output in the first form of these that it has: a picture, Markdown, text."""
    if output["output_type"] == "stream":
        return _literal("".join(output["text"]))
    data = output["data"]
    if "image/png" in data:
        return f"![{_alt(output)}](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "image/svg+xml" in data:
        file = "".join(data["image/svg+xml"])
        svg = file[file.index("<svg") :].replace("\n", " ")  # without the XML declaration, as one line
        return f'<div class="picture">{svg}</div>'
    if "text/markdown" in data:
        # Headings of an output are below those of the notebook.
        return "".join(f"##{line}" if line.startswith("#") else line for line in data["text/markdown"])
    return _literal("".join(data["text/plain"]))


def _literal(text: str) -> str:
    """Text as it is."""
    return f"```text\n{text.rstrip()}\n```"


def _alt(output: dict[str, Any]) -> str:
    """The description of a picture, which its cell may give."""
    about_picture = output.get("metadata", {}).get("image/png", {})
    return str(about_picture.get("alt", "the picture that the cell draws"))
