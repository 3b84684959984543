"""Records → ``report.md`` with its figures, and ``report.html``, one page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from examples_common import page
from examples_common.page import Block, Details, Picture
from examples_common.tables import markdown as table

from . import figures, findings, paper, statistics, tables
from .collection import Collection, Record
from .grid import Preset, Setting
from .paper import Paper
from .tables import MARKS, Exhibit

SEARCH = "search.md"
_CONFIDENCE = f"{100 * statistics.CONFIDENCE:.0f} %"
_POINTS = (
    f"Points are means over seeds with their {_CONFIDENCE} intervals, hollow where seeds are missing; the "
    "small ones beside them are the seeds."
)
SIGNS = (
    f"{MARKS['above']} {MARKS['below']} differ from the reference after Holm's correction within the exhibit "
    f"(paired t-test, two-sided); {MARKS['above before']} {MARKS['below before']} only before it; "
    f"{MARKS[statistics.NOT_TOLD_APART]} not told apart; {MARKS[statistics.TOO_FEW_SEEDS]} fewer than "
    f"{statistics.MIN_SEEDS} seeds, not tested."
)
LEGEND = (
    f"A cell is the mean over seeds ± half of its {_CONFIDENCE} t-interval (number of seeds), percentages in "
    "points; below it the mean difference to the reference of the same seeds, ± the same. Intervals are "
    "about seeds: the held-out items are the same ones throughout. A dash is a model that is not there, or "
    "an interval that one seed does not have.",
    SIGNS,
    "Rows in italics are the paper's, for its full-size data, with the difference to the paper's own CLIP: "
    "beside ours to see what was claimed, not to compare levels.",
)
SUMMARY = (
    "Paired comparisons with CLIP, in Figure 3 also with the recipe's λ. Better and worse: after Holm's "
    "correction within the exhibit; in Figure 6 they read higher and lower."
)
CAPTIONS = {
    "figure3": f"{_POINTS} The dashed line and its band are CLIP's. The grey panels are redrawn from what "
    "could be read off the paper's figure; dotted is its RankCLIP with the scheduled λ.",
    "figure4": f"{_POINTS} Every model is trained for the same number of steps, so fewer pairs are seen more "
    "often. The grey panel is redrawn from what could be read off the paper's figure.",
    "figure6": "One seed. UMAP is fitted to each model by itself, to both modalities together, so distances "
    "can only be compared within a panel; lines join pairs, contours hold a quarter, half and three quarters "
    "of the points, dashed are the medians of the first dimension. The gap is that of the embeddings.",
    "figure7": "Red: covering the place lowers the cosine of picture and text; blue: it raises it. Each map "
    "is scaled by its own largest change, the number below it: colours cannot be compared between maps.",
}
_SAID = {  # the marks, read aloud
    MARKS["above"]: ("above", "above the reference after the correction"),
    MARKS["below"]: ("below", "below the reference after the correction"),
    MARKS["above before"]: ("before", "above the reference only before the correction"),
    MARKS["below before"]: ("before", "below the reference only before the correction"),
}


def write(
    records: Sequence[Record],
    folder: Path,
    *,
    preset: Preset,
    planned: Sequence[Setting],
    command: str,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report and return the path of ``report.html``; ``report.md`` and ``figures/`` are beside it.

    Args:
        records: The records there are; those that are not planned are left alone.
        folder: Where to; an earlier report is replaced.
        preset: The preset that they are of.
        planned: Every setting that is to be trained.
        command: The command that makes this report.
        notes: What else the reader has to know, such as records that are damaged.

    Raises:
        ValueError: If nothing is planned, a planned setting is of another preset, or a record is there twice.
    """
    if not planned:
        raise ValueError("planned: at least one setting is needed, got none")
    collection = Collection(records, preset, planned)
    quoted = paper.load()
    pictures = figures.draw(collection, quoted)
    for old in (folder / "figures").glob("figure?.png"):
        old.unlink()
    # The search's report is written by a command of its own.
    search = SEARCH if (folder / SEARCH).is_file() else None
    blocks = _blocks(collection, tables.build(collection, quoted), pictures, quoted, command, notes, search)
    title = f"RankCLIP in miniature: {preset.name}"
    return write_page(folder, "report", blocks, title, {f"{key}.png": p for key, p in pictures.items()})


def write_page(
    folder: Path, name: str, blocks: Sequence[Block], title: str, pictures: Mapping[str, Picture]
) -> Path:
    """Write a report's Markdown, its page and its figures, and return the page's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for file, picture in pictures.items():
        (folder / "figures" / file).write_bytes(picture.light)
    (folder / f"{name}.md").write_text(page.markdown(blocks), encoding="utf-8")
    embedded = {f"figures/{file}": picture for file, picture in pictures.items()}
    path = folder / f"{name}.html"
    path.write_text(page.html(blocks, title=title, pictures=embedded, marks=_SAID), encoding="utf-8")
    return path


def _blocks(
    collection: Collection,
    exhibits: Sequence[Exhibit],
    pictures: Mapping[str, Picture],
    quoted: Paper,
    command: str,
    notes: Sequence[str],
    search: str | None,
) -> list[Block]:
    preset, there, planned = collection.preset, len(collection.records), len(collection.planned)
    if there == planned:
        state = f"Finished: all {planned} planned models are trained and measured."
    else:
        share = 100 * there / planned
        state = (
            f"{there} of {planned} planned models are trained and measured ({share:.0f} %); the same command "
            "continues with the rest."
        )
    said = [*([preset.note] if preset.note else []), *notes]
    if collection.unplanned:
        said.append(f"Left out, as they are not part of this plan: {collection.unplanned} records.")
    budget = f"{preset.steps:,} steps of {preset.batch_size:,} pairs for every model"
    facts = [["command", f"`{command}`"], ["budget", budget], ["time", _time(collection.records)]]
    links = (f"[{e.number}](#{page.anchor(_heading(e))}) {e.title}" for e in exhibits)
    short = [[link, *findings.summary(e)] for link, e in zip(links, exhibits, strict=True)]
    blocks: list[Block] = [
        f"# The paper in miniature: {preset.name}",
        f"[{quoted.title}](https://arxiv.org/abs/{quoted.arxiv}) ({quoted.venue}), its tables and figures "
        "with small models on icons. The command also writes `report.html`, one page that needs nothing "
        "else.",
        f"**{state}**",
        *([">\n".join(f"> {note}\n" for note in said).rstrip()] if said else []),
        table(["", ""], [*facts, *conditions(collection.records)]),
        "## In short",
        SUMMARY,
        table(["exhibit", *findings.SUMMARY_HEAD], short, right=len(findings.SUMMARY_HEAD)),
    ]
    if search is not None:
        blocks.append(
            f"Whether another setting does better than the recipe is the subject of a search of its own: "
            f"[{search}]({search})."
        )
    blocks += ["## How to read it", *LEGEND]
    for exhibit in exhibits:
        blocks += _exhibit(exhibit, pictures.get(exhibit.key))
    return [*blocks, "## The paper's numbers", quoted.reading]


def _time(records: Sequence[Record]) -> str:
    hours = [sum(record["seconds"].values()) / 3600 for record in records]
    spent = f"{sum(hours):.1f} hours of training and measuring, summed over the models"
    jobs = [record["conditions"].get("jobs") for record in records]
    if not all(jobs):
        return spent
    # Several models run side by side.
    return f"{spent}, in about {sum(h / n for h, n in zip(hours, jobs, strict=True)):.1f} hours"


def conditions(records: Iterable[Record]) -> list[list[str]]:
    """Return every condition with its values, and how many records each holds for where there are several."""
    records = list(records)
    names = dict.fromkeys(name for record in records for name in record["conditions"])
    rows = []
    for name in names:
        values = Counter(str(record["conditions"].get(name, "not recorded")) for record in records)
        one = len(values) == 1
        counted = (value if one else f"{value} ({n} models)" for value, n in values.most_common())
        rows.append([name, ", ".join(counted)])
    return rows


def _heading(exhibit: Exhibit) -> str:
    return f"{exhibit.number}: {exhibit.title}"


def _exhibit(exhibit: Exhibit, picture: Picture | None) -> list[Block]:
    blocks: list[Block] = [f"## {_heading(exhibit)}", *findings.paragraphs(exhibit)]
    if picture is not None:
        blocks += [f"![{picture.alt}](figures/{exhibit.key}.png)", CAPTIONS[exhibit.key]]
    if exhibit.columns:
        blocks.append(_numbers(exhibit))
    tested = findings.tally(exhibit.comparisons).tested
    if tested:
        by_p = sorted(tested, key=lambda c: (c.difference.p is None, c.difference.p or 0.0))
        rows = [
            [
                c.measure,
                c.subject,
                c.reference,
                f"{tables.difference_text(c.difference, 2 if c.percent else 3)} {tables.mark(c.difference)}",
                f"{c.difference.n}",
                findings.p_text(c.difference.p),
                findings.p_text(c.difference.adjusted),
            ]
            for c in by_p
        ]
        head = ["measure", "model", "against", "difference", "seeds", "p", "corrected"]
        summary = f"All {len(tested)} tests of {exhibit.number}, the smallest p first"
        blocks.append(Details(summary, table(head, rows, right=4)))
    return blocks


def _numbers(exhibit: Exhibit) -> str:
    labels = [f"{c.group}: {c.label}" if c.group else c.label for c in exhibit.columns]
    extra = [name for name in ("chance", "items") if exhibit.has(name)]
    texts = {"chance": "{:.2f}", "items": "{:,}"}
    width = len(labels) + len(extra)
    rows = []
    for section in exhibit.sections:
        title = f"*The paper's: {section.title}*" if section.quoted else f"**{section.title}**"
        rows.append([title, *[""] * width])
        for row in section.rows:
            label = f"*{row.label}*" if section.quoted else row.label
            known = {name: getattr(row, name) for name in extra}
            more = ("" if value is None else texts[name].format(value) for name, value in known.items())
            rows.append([label, *(tables.cell_text(cell) for cell in row.cells), *more])
    return table([exhibit.corner, *labels, *extra], rows, right=width)
