"""Records → ``report.md`` with its figures, and ``report.html``, one page that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import figures, findings, markdown, paper, statistics, tables, wording
from .collection import Collection, Record
from .figures import Picture
from .grid import Preset, Setting
from .paper import Paper
from .tables import Cell, Comparison, Exhibit, QuotedCell

SEARCH = "search.md"


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the report begins with.

    Attributes:
        preset: The preset.
        trained: How many of the planned models there are.
        planned: How many are planned.
        command: What was typed.
        hours: Hours of training and measuring, summed over the models.
        elapsed: About how many of them passed, as several models run side by side; None if that was not
            recorded.
        conditions: Versions and hardware, each with its values.
        notes: What else has to be known of these records.
        search: The report of the search for a stronger setting, if there is one beside this report.
    """

    preset: Preset
    trained: int
    planned: int
    command: str
    hours: float
    elapsed: float | None
    conditions: list[tuple[str, str]]
    notes: list[str]
    search: str | None = None

    @property
    def complete(self) -> bool:
        """Whether all of the plan is there."""
        return self.trained == self.planned

    @property
    def state(self) -> str:
        """How much of the plan there is, in words."""
        if self.complete:
            return f"All {self.planned} planned models are trained and measured."
        return (
            f"{self.trained} of {self.planned} planned models are trained and measured "
            f"({100 * self.trained / self.planned:.0f} %); the same command goes on with the rest."
        )

    @property
    def time(self) -> str:
        """How long it took, in words."""
        spent = f"{self.hours:.1f} hours of training and measuring, summed over the models"
        return spent if self.elapsed is None else f"{spent}, in about {self.elapsed:.1f} hours"

    @property
    def budget(self) -> str:
        """What every model is trained with, in words."""
        preset = self.preset
        return f"{preset.steps:,} steps of {preset.batch_size:,} pairs for every model"

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Command, budget, time and conditions by their names."""
        return [
            ("command", self.command),
            ("budget", self.budget),
            ("time", self.time),
            *self.conditions,
        ]


def write(
    records: Sequence[Record],
    folder: Path,
    *,
    preset: Preset,
    planned: Sequence[Setting],
    command: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report.

    Args:
        records: Whatever records there are; those that are not planned are left alone.
        folder: Where to; files of an earlier report are replaced.
        preset: The preset that they are of.
        planned: Every setting that is to be trained.
        command: The command that makes this report (default: the example's, with this preset).
        notes: What else the reader has to know, such as records that are damaged.

    Returns:
        The path of ``report.html``; ``report.md`` and ``figures/`` are beside it.

    Raises:
        ValueError: If nothing is planned, a planned setting is of another preset, or a record is there twice.
    """
    if not planned:
        raise ValueError("planned: at least one setting is needed, got none")
    collection = Collection(records, preset, planned)
    quoted = paper.load()
    exhibits = tables.build(collection, quoted)
    pictures = figures.draw(collection, quoted)
    outline = _outline(
        collection, command or f"python examples/miniature/run.py --preset {preset.name}", notes
    )
    _write_figures(folder / "figures", pictures)
    if (folder / SEARCH).is_file():  # written by a command of its own
        outline = dataclasses.replace(outline, search=SEARCH)
    (folder / "report.md").write_text(markdown.page(outline, exhibits, pictures, quoted), encoding="utf-8")
    html = folder / "report.html"
    html.write_text(_html(outline, exhibits, pictures, quoted), encoding="utf-8")
    return html


def _outline(collection: Collection, command: str, notes: Sequence[str]) -> Outline:
    records = collection.records
    hours = [sum(record.get("seconds", {}).values()) / 3600 for record in records]
    jobs = [record.get("conditions", {}).get("jobs") for record in records]
    said = [*([collection.preset.note] if collection.preset.note else []), *notes]
    if collection.unplanned:
        said.append(f"Left out, as they are not part of this plan: {collection.unplanned} records.")
    return Outline(
        preset=collection.preset,
        trained=len(records),
        planned=len(collection.planned),
        command=command,
        hours=sum(hours),
        elapsed=sum(h / n for h, n in zip(hours, jobs, strict=True)) if all(jobs) else None,
        conditions=_conditions(records),
        notes=said,
    )


def _conditions(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Every condition with its values, and how many records each holds for where there are several."""
    names = dict.fromkeys(name for record in records for name in record.get("conditions", {}))
    rows = []
    for name in names:
        values = Counter(str(record.get("conditions", {}).get(name, "not recorded")) for record in records)
        if len(values) == 1:
            rows.append((name, next(iter(values))))
        else:
            rows.append((name, ", ".join(f"{value} ({n} models)" for value, n in values.most_common())))
    return rows


def _write_figures(folder: Path, pictures: dict[str, Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("figure?.png"):
        old.unlink()
    for key, picture in pictures.items():
        (folder / f"{key}.png").write_bytes(picture.light)


# --- HTML ---


def _html(outline: Outline, exhibits: Sequence[Exhibit], pictures: dict[str, Picture], quoted: Paper) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        mean=lambda cell: tables.mean_text(cell.estimate, cell.planned, cell.digits),
        difference=lambda cell: tables.difference_text(cell.difference, cell.digits),
        difference_of=lambda c: tables.difference_text(c.difference, 2 if c.percent else 3),
        signed=lambda cell: tables.signed(cell.difference, cell.digits),
        quoted=tables.quoted_text,
        number=lambda value: "" if value is None else f"{value:,}",
        chance=lambda value: "" if value is None else f"{value:.2f}",
        p=findings.p_text,
        base64=lambda data: base64.b64encode(data).decode(),
    )
    environment.tests.update(
        quoted=lambda cell: isinstance(cell, QuotedCell), ours=lambda cell: isinstance(cell, Cell)
    )
    return environment.get_template("report.html").render(
        outline=outline,
        exhibits=exhibits,
        pictures=pictures,
        paper=quoted,
        wording=wording,
        summary=findings.summary(exhibits),
        summary_head=findings.SUMMARY_HEAD,
        paragraphs=findings.paragraphs,
        tests=tests,
        mark=tables.mark,
        mark_class=mark_class,
        said=said,
        groups=groups,
    )


def tests(exhibit: Exhibit) -> list[Comparison]:
    """Return what an exhibit tests, the smallest p first."""
    tested = findings.tally(exhibit.comparisons).tested
    return sorted(tested, key=lambda c: (c.difference.p is None, c.difference.p or 0.0))


def said(difference: statistics.Difference | None, percent: bool = True) -> str:
    """Return a difference's verdict with what it rests on, for those who cannot see the mark."""
    above, below = (statistics.BETTER, statistics.WORSE) if percent else ("higher", "lower")
    word = statistics.verdict(difference, above=above, below=below)
    if difference is None or difference.p is None:
        return word
    return f"{word}, p {findings.p_text(difference.p)}, corrected {findings.p_text(difference.adjusted)}"


def mark_class(difference: statistics.Difference | None) -> str:
    """Return the style of a difference: established above or below, or none of both."""
    return statistics.verdict(difference, above="above", below="below").replace(" ", "-")


def groups(columns: Sequence[tables.Column]) -> list[tuple[str, int]]:
    """Return what stands over the columns, with how many of them it spans; nothing if nothing does."""
    spans: list[tuple[str, int]] = []
    for column in columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    return spans if any(group for group, _ in spans) else []
