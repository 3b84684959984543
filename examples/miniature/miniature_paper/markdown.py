"""The report as Markdown, for reading it where the repository is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import findings, tables, wording
from .figures import Picture
from .paper import Paper
from .tables import Cell, Exhibit, QuotedCell, Row

if TYPE_CHECKING:
    from .report import Outline


def page(
    outline: Outline,
    exhibits: Sequence[Exhibit],
    pictures: Mapping[str, Picture],
    paper: Paper,
) -> str:
    """Return the whole report."""
    blocks = [
        f"# The paper in miniature: {outline.preset.name}",
        f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}) ({paper.venue}), its tables and figures with "
        "small models on icons. The same content is in `report.html`, one page that needs nothing else.",
        *_opening(outline),
        "## In short",
        wording.SUMMARY,
        _short(exhibits),
        *([f"{wording.SEARCH}: [{outline.search}]({outline.search})."] if outline.search else []),
        "## How to read it",
        *wording.LEGEND,
    ]
    for exhibit in exhibits:
        blocks += _exhibit(exhibit, pictures.get(exhibit.key))
    blocks += ["## The paper's numbers", paper.reading]
    return "\n\n".join(blocks) + "\n"


def _opening(outline: Outline) -> list[str]:
    notes = "\n>\n".join(f"> {note}" for note in outline.notes)
    rows = [[name, f"`{value}`" if name == "command" else value] for name, value in outline.rows]
    return [f"**{outline.state}**", *([notes] if notes else []), table(["", ""], rows)]


def _short(exhibits: Sequence[Exhibit]) -> str:
    names = (f"[{e.number}](#{_anchor(e)}) {e.title}" for e in exhibits)
    rows = [[name, *row] for name, row in zip(names, findings.summary(exhibits), strict=True)]
    return table(["exhibit", *findings.SUMMARY_HEAD], rows, right=len(findings.SUMMARY_HEAD))


def _exhibit(exhibit: Exhibit, picture: Picture | None) -> list[str]:
    blocks = [f"## {exhibit.number}: {exhibit.title}", *findings.paragraphs(exhibit)]
    if picture is not None:
        blocks += [f"![{_text(picture.alt)}](figures/{exhibit.key}.png)", wording.CAPTIONS[exhibit.key]]
    if exhibit.columns:
        blocks.append(_numbers(exhibit))
    return blocks


def _numbers(exhibit: Exhibit) -> str:
    labels = [f"{c.group}: {c.label}" if c.group else c.label for c in exhibit.columns]
    extra = [*(["chance"] if exhibit.has_chance else []), *(["items"] if exhibit.has_items else [])]
    width = len(labels) + len(extra)
    rows = []
    for section in exhibit.sections:
        title = f"*The paper's: {section.title}*" if section.quoted else f"**{section.title}**"
        rows.append([title, *[""] * width])
        for row in section.rows:
            label = f"*{row.label}*" if section.quoted else row.label
            rows.append([label, *(_cell(cell) for cell in row.cells), *_extra(exhibit, row)])
    return table([exhibit.corner, *labels, *extra], rows, right=width)


def _extra(exhibit: Exhibit, row: Row) -> list[str]:
    found = []
    if exhibit.has_chance:
        found.append("" if row.chance is None else f"{row.chance:.2f}")
    if exhibit.has_items:
        found.append("" if row.items is None else f"{row.items:,}")
    return found


def _cell(cell: Cell | QuotedCell | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, QuotedCell):
        change = "" if cell.difference is None else f" ({tables.signed(cell.difference, cell.digits)})"
        return f"*{tables.quoted_text(cell)}{change}*"
    mean = tables.mean_text(cell.estimate, cell.planned, cell.digits)
    if not cell.compared or (cell.difference is None and cell.estimate is None):
        return mean
    change = tables.difference_text(cell.difference, cell.digits)
    change = f"{change} {tables.mark(cell.difference)}".strip()
    return change if cell.estimate is None else f"{mean}<br>{change}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """Return a table, the last ``right`` columns to the right."""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    lines = [head, rule, *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _anchor(exhibit: Exhibit) -> str:
    """The anchor that GitHub gives to the exhibit's heading."""
    title = f"{exhibit.number}: {exhibit.title}".lower()
    return "".join(c for c in title if c.isalnum() or c in " -_").replace(" ", "-")
