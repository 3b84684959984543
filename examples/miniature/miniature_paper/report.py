"""Records → ``report.md`` with its figures, and ``report.html``, one page that needs nothing else."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples_common import page
from examples_common.page import Picture
from examples_common.tables import markdown as table

from . import figures, findings, paper, tables
from .collection import Collection, Record
from .grid import Preset, Setting
from .tables import Cell, Exhibit
from .wording import fill

SEARCH = "search.md"


def write(
    records: Sequence[Record],
    folder: Path,
    *,
    preset: Preset,
    planned: Sequence[Setting],
    command: str,
) -> Path:
    """Write the report and return the path of ``report.html``; ``report.md`` and ``figures/`` are beside it.

    ``command`` is what makes this report.
    """
    collection, quoted = Collection(records, preset, planned), paper.load()
    pictures = figures.draw(collection, quoted)
    exhibits, found = tables.build(collection, quoted), list(collection.records.values())
    budget = f"{preset.steps:,} steps of {preset.batch_size:,} pairs for every model"
    facts = [["command", f"`{command}`"], ["budget", budget], ["time", _time(found)]]
    anchors = [page.anchor(f"{e.number}: {e.title}") for e in exhibits]
    links = [f"[{e.number}](#{name}) {e.title}" for e, name in zip(exhibits, anchors, strict=True)]
    short = [[link, *findings.summary(e)] for link, e in zip(links, exhibits, strict=True)]
    for old in (folder / "figures").glob("figure?.png"):
        old.unlink()
    return write_page(
        folder,
        "report.md",
        f"RankCLIP in miniature: {preset.name}",
        pictures,
        preset=preset,
        paper=quoted,
        there=len(found),
        planned=len(collection.planned),
        facts=table(["", ""], [*facts, *conditions(found)]),
        short=table(["exhibit", *findings.SUMMARY_HEAD], short, right=len(findings.SUMMARY_HEAD)),
        # The search's report is written by a command of its own.
        search=SEARCH if (folder / SEARCH).is_file() else None,
        exhibits=[(e, findings.text(e), _numbers(e), _tests(e)) for e in exhibits],
    )


def write_page(
    folder: Path,
    name: str,
    title: str,
    pictures: Mapping[str, Picture],
    template: str | None = None,
    **values: Any,
) -> Path:
    """Fill in a template, by default that of the page's name, write its Markdown, its page and its figures.

    Returns:
        The page's path.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for key, picture in pictures.items():
        (folder / "figures" / f"{key}.png").write_bytes(picture.png)
    embedded = {f"figures/{key}.png": picture for key, picture in pictures.items()}
    text, longer = (fill(template or name, page=form, pictures=pictures, **values) for form in (False, True))
    (folder / name).write_text(text, encoding="utf-8")
    path = (folder / name).with_suffix(".html")
    path.write_text(page.html(longer, title=title, pictures=embedded), encoding="utf-8")
    return path


def _time(records: Sequence[Record]) -> str:
    hours = [sum(record["seconds"].values()) / 3600 for record in records]
    spent = f"{sum(hours):.1f} hours of training and measuring, summed over the models"
    jobs = [record["conditions"]["jobs"] for record in records]  # runs at a time
    return f"{spent}, in about {sum(h / n for h, n in zip(hours, jobs, strict=True)):.1f} hours"


def conditions(records: Iterable[Record]) -> list[list[str]]:
    """Return every condition with its values, and how many records each holds for where there are several."""
    records = list(records)
    rows = []
    for name in dict.fromkeys(name for record in records for name in record["conditions"]):
        values = Counter(page.plain(record["conditions"].get(name, "not recorded")) for record in records)
        counted = (v if len(values) == 1 else f"{v} ({n} models)" for v, n in values.most_common())
        rows.append([name, ", ".join(counted)])
    return rows


def _tests(exhibit: Exhibit) -> list[Cell]:
    """Return everything that is tested, the smallest p first."""
    tested = findings.Tally(exhibit.comparisons).tested
    return sorted(tested, key=lambda cell: (cell.difference.p is None, cell.difference.p or 0.0))


def _numbers(exhibit: Exhibit) -> str:
    labels = [f"{group}: {label}" if group else label for group, label in exhibit.columns]
    shown = {"chance": "{:.2f}", "items": "{:,}"}
    extra = [name for name in shown if any(getattr(row, name) is not None for row in exhibit.rows)]
    rows, width = [], len(labels) + len(extra)
    for title, of in itertools.groupby(exhibit.rows, lambda row: (row.quoted, row.section)):
        rows.append([("*The paper's: {}*" if title[0] else "**{}**").format(title[1]), *[""] * width])
        for row in of:
            cells = ["" if cell is None else str(cell) for cell in row.cells]
            known = ((shown[name], getattr(row, name)) for name in extra)
            cells += ["" if value is None else form.format(value) for form, value in known]
            rows.append([f"*{row.label}*" if row.quoted else row.label, *cells])
    return table([exhibit.corner, *labels, *extra], rows, right=width) if rows else ""
