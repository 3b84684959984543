"""The exhibits' numbers: every cell with its interval, its paired difference, and the paper's beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from . import grid, scores, statistics
from .collection import Collection, Exhibited
from .grid import Setting
from .paper import Paper, Quoted
from .scores import BACKBONE_NAMES, LOSS_NAMES, Measure
from .statistics import Difference, Estimate

REFERENCE = "clip"
TERM_NAMES = {"lambda_cross": "λ₁, of the cross-modal term", "lambda_in": "λ₂, of the in-modal term"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One of our numbers."""

    estimate: Estimate | None  # None where nothing is trained, or the cell shows a difference only
    difference: Difference | None  # to the reference, corrected within the exhibit
    planned: int  # number of seeds
    digits: int = 2
    compared: bool = True  # False for the reference itself


@dataclasses.dataclass(frozen=True)
class QuotedCell:
    """One of the paper's numbers."""

    value: float | None  # None where it could not be read
    difference: float | None = None  # to the paper's own reference
    digits: int = 2
    approximate: bool = False  # measured on a plot


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: a cell for every column, None where it has no meaning."""

    label: str
    cells: tuple[Cell | QuotedCell | None, ...]
    items: int | None = None  # number of held-out items
    chance: float | None = None  # what guessing scores


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows with a common title."""

    title: str
    rows: tuple[Row, ...]
    quoted: bool = False  # whether they are the paper's


@dataclasses.dataclass(frozen=True)
class Column:
    """A column's label, and the label it shares with its neighbours."""

    label: str
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference that the text may speak of."""

    subject: str  # such as RankCLIP
    reference: str  # such as CLIP
    measure: str  # such as "Image → text, R@1"
    difference: Difference | None  # corrected; None while it cannot be formed
    percent: bool = True  # in percentage points, where more is better


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper, and ours."""

    key: str  # in grid.EXHIBITS
    number: str  # its name in the paper
    title: str
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]  # the paper's last
    comparisons: tuple[Comparison, ...]  # everything that is tested: one family
    seeds: tuple[tuple[str, int, int], ...]  # name, trained seeds and planned seeds of every model
    quoted: Quoted
    items: tuple[int, ...] = ()  # numbers of held-out items behind its measures
    corner: str = "measure"  # what the rows are

    @property
    def empty(self) -> bool:
        """Whether none of its models is there."""
        return not any(trained for _, trained, _ in self.seeds)

    def has(self, name: str) -> bool:
        """Say whether a row knows its ``chance`` or its ``items``."""
        return any(getattr(row, name) is not None for section in self.sections for row in section.rows)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A cell to fill in."""

    model: Setting
    measure: Measure
    reference: Setting | None  # what the difference is taken to
    mean: bool = True  # show the mean beside the difference


_Rows = Sequence[tuple[str, Sequence[_Wanted | None]]]  # label and cells of each


def build(collection: Collection, paper: Paper) -> list[Exhibit]:
    """Make every exhibit out of the records there are."""
    builders: dict[str, Callable[[Collection, Quoted], Exhibit]] = {
        "table1": _table1,
        "table2": _table2,
        "table3": _table3,
        "table4": _table4,
        "figure3": _figure3,
        "figure4": _figure4,
        "figure6": _figure6,
        "figure7": _figure7,
    }
    return [builders[key](collection, paper.exhibits[key]) for key in grid.EXHIBITS]


def _exhibit(
    shown: Exhibited,
    quoted: Quoted,
    heading: tuple[str, str],
    names: dict[Setting, str],
    columns: Sequence[Column],
    ours: Sequence[tuple[str, _Rows]],
    papers: Sequence[Section],
    *,
    called: Callable[[Setting], str] | None = None,
    corner: str = "measure",
) -> Exhibit:
    """Fill in the cells and correct their differences together.

    Args:
        shown: The models.
        quoted: The paper's exhibit.
        heading: Number and title.
        names: What the models are called.
        columns: The columns.
        ours: Title and rows of each section.
        papers: The paper's sections.
        called: What a reference is called, if not by its name.
        corner: What the rows are.
    """
    called = called or names.__getitem__
    wanted = [cell for _, rows in ours for _, cells in rows for cell in cells if cell is not None]
    compared = {
        (cell.model, cell.reference, cell.measure): shown.difference(cell.model, cell.reference, cell.measure)
        for cell in wanted
        if cell.reference is not None
    }
    corrected = statistics.correct({key: d for key, d in compared.items() if d is not None})

    def fill(cell: _Wanted | None) -> Cell | None:
        if cell is None:
            return None
        return Cell(
            shown.estimate(cell.model, cell.measure) if cell.mean else None,
            corrected.get((cell.model, cell.reference, cell.measure)),
            shown.planned(cell.model),
            digits=2 if cell.measure.percent else 3,
            compared=cell.reference is not None,
        )

    def row(label: str, cells: Sequence[_Wanted | None]) -> Row:
        measure, *others = dict.fromkeys(cell.measure for cell in cells if cell is not None)
        filled = tuple(fill(cell) for cell in cells)
        if others:
            return Row(label, filled)
        return Row(label, filled, shown.items(measure), shown.chance(measure) if measure.percent else None)

    sections = [Section(title, tuple(row(label, cells) for label, cells in rows)) for title, rows in ours]
    items = (shown.items(measure) for measure in dict.fromkeys(cell.measure for cell in wanted))
    number, title = heading
    return Exhibit(
        key=number.lower().replace(" ", ""),
        number=number,
        title=title,
        columns=tuple(columns),
        sections=(*sections, *papers),
        comparisons=tuple(
            Comparison(
                names[model],
                called(reference),
                measure.name,
                corrected.get((model, reference, measure)),
                measure.percent,
            )
            for model, reference, measure in compared
        ),
        seeds=tuple((names[m], shown.trained(m), shown.planned(m)) for m in shown.models),
        quoted=quoted,
        items=tuple(n for n in items if n is not None),
        corner=corner,
    )


# --- rows of measures, columns of models ---


def _table1(collection: Collection, quoted: Quoted) -> Exhibit:
    rows = [*scores.zero_shot(collection.sets("zero-shot")), *scores.retrieval()]
    return _of_losses(collection.exhibit("table1"), quoted, ("Table 1", "Zero-shot and retrieval"), rows)


def _table2(collection: Collection, quoted: Quoted) -> Exhibit:
    heading = ("Table 2", "Styles and vendors never trained on")
    return _of_losses(collection.exhibit("table2"), quoted, heading, scores.shifts(collection.tasks))


def _table3(collection: Collection, quoted: Quoted) -> Exhibit:
    rows = scores.probes(collection.sets("probe"))
    return _of_losses(collection.exhibit("table3"), quoted, ("Table 3", "Linear probes"), rows)


def _figure6(collection: Collection, quoted: Quoted) -> Exhibit:
    # The picture shows one seed; the numbers below it are of all seeds of the same models.
    heading = ("Figure 6", "Both modalities, and the gap between them")
    return _of_losses(collection.exhibit("table1"), quoted, heading, scores.geometry())


def _of_losses(
    shown: Exhibited, quoted: Quoted, heading: tuple[str, str], measures: Sequence[Measure]
) -> Exhibit:
    names = {model: LOSS_NAMES[model.loss] for model in shown.models}
    reference = _loss(shown.models, REFERENCE)
    papers = _quoted_rows(quoted, [m.loss for m in shown.models], lambda _: REFERENCE)
    ours = _measured(shown.models, measures, lambda _: reference)
    return _exhibit(shown, quoted, heading, names, [Column(name) for name in names.values()], ours, papers)


def _table4(collection: Collection, quoted: Quoted) -> Exhibit:
    measures = [
        *scores.zero_shot(collection.sets("zero-shot")),
        *scores.retrieval(),
        *scores.mean_probe(collection.sets("probe")),
    ]
    shown = collection.exhibit("table4")
    names = {m: f"{LOSS_NAMES[m.loss]} ({BACKBONE_NAMES[m.backbone]})" for m in shown.models}
    columns = [Column(LOSS_NAMES[m.loss], BACKBONE_NAMES[m.backbone]) for m in shown.models]
    keys = [f"{m.backbone}/{m.loss}" for m in shown.models]
    papers = _quoted_rows(quoted, keys, lambda key: f"{key.partition('/')[0]}/{REFERENCE}")

    def reference(model: Setting) -> Setting:
        return _loss([m for m in shown.models if m.backbone == model.backbone], REFERENCE)

    ours = _measured(shown.models, measures, reference)
    return _exhibit(shown, quoted, ("Table 4", "Two backbones"), names, columns, ours, papers)


def _measured(
    models: Sequence[Setting], measures: Sequence[Measure], reference_of: Callable[[Setting], Setting]
) -> list[tuple[str, _Rows]]:
    def row(measure: Measure) -> tuple[str, Sequence[_Wanted]]:
        references = {model: reference_of(model) for model in models}
        return measure.label, [
            _Wanted(model, measure, reference if reference != model else None)
            for model, reference in references.items()
        ]

    groups = dict.fromkeys(measure.group for measure in measures)
    return [(group, [row(measure) for measure in measures if measure.group == group]) for group in groups]


# --- figures with axes ---


def sweep_of(models: Iterable[Setting], term: str) -> list[Setting]:
    """Return the models in which one term's λ varies and the other's is 1, by λ.

    Args:
        models: The models of Figure 3.
        term: ``lambda_cross`` or ``lambda_in``.
    """
    other = {"lambda_cross": "lambda_in", "lambda_in": "lambda_cross"}[term]
    swept = [m for m in models if m.loss != REFERENCE and getattr(m, other) == 1.0]
    return sorted(swept, key=lambda m: getattr(m, term))


def sweep_measures(collection: Collection) -> list[Measure]:
    """Return what Figure 3 and Figure 4 plot: zero-shot top-1, and R@1 in both directions."""
    return [scores.zero_shot(collection.sets("zero-shot"))[0], scores.retrieval_both_ways("R@1")]


def shift_measure(collection: Collection) -> Measure | None:
    """Return zero-shot top-1 averaged over the shifts that have classes; None if none was measured."""
    tasks = [f"zero-shot/{s}" for s in scores.SHIFTS.values() if s and f"zero-shot/{s}" in collection.tasks]
    if not tasks:
        return None
    group = f"Zero-shot under shift, mean of {len(tasks)} sets"
    return Measure(group, "top-1", tuple((task, "top-1") for task in tasks))


def size_measures(collection: Collection) -> list[Measure]:
    """Return what Figure 4 consists of."""
    shift = shift_measure(collection)
    return [*sweep_measures(collection), *([shift] if shift else [])]


def _figure3(collection: Collection, quoted: Quoted) -> Exhibit:
    shown = collection.exhibit("figure3")
    plotted = sweep_measures(collection)
    clip = _loss(shown.models, REFERENCE)
    default = next(m for m in shown.models if (m.lambda_cross, m.lambda_in) == (1.0, 1.0))
    names = {
        m: "CLIP" if m == clip else f"λ₁ = {m.lambda_cross:g}, λ₂ = {m.lambda_in:g}" for m in shown.models
    }

    def cells(model: Setting) -> list[_Wanted | None]:
        found: list[_Wanted | None] = []
        for measure in plotted:
            found.append(_Wanted(model, measure, clip if model != clip else None))
            other = model not in (clip, default)
            found.append(_Wanted(model, measure, default, mean=False) if other else None)
        return found

    ours: list[tuple[str, _Rows]] = [
        (
            f"{name}; the other one is 1",
            [(f"{getattr(m, term):g}", cells(m)) for m in sweep_of(shown.models, term)],
        )
        for term, name in TERM_NAMES.items()
    ]
    ours.append(("Without rank terms", [("CLIP", cells(clip))]))
    papers = []
    for term, name in TERM_NAMES.items():
        lines = [s for s in quoted.series if s.panel == term]
        rows = tuple(
            Row(f"{x:g}", tuple(c for line in lines for c in (_read_off(line.y[i], quoted), None)))
            for i, x in enumerate(lines[0].x)
            if x is not None
        )
        title = f"{name.partition(',')[0]}: {lines[0].name}; {lines[1].name}"
        papers.append(Section(title, rows, quoted=True))
    scheduled = tuple(c for s in quoted.series if s.panel == "scheduled" for c in (QuotedCell(s.y[0]), None))
    papers.append(Section("λ by the schedule", (Row("RankCLIP", scheduled),), quoted=True))
    heads = ("mean, difference to CLIP", "to λ = 1")
    return _exhibit(
        shown,
        quoted,
        ("Figure 3", "How much the weights of the terms matter"),
        names,
        [Column(label, measure.name) for measure in plotted for label in heads],
        ours,
        papers,
        called=lambda reference: names[clip] if reference == clip else "the recipe's λ₁ = λ₂ = 1",
        corner="λ",
    )


def _figure4(collection: Collection, quoted: Quoted) -> Exhibit:
    shown = collection.exhibit("figure4")
    losses = list(dict.fromkeys(m.loss for m in shown.models))
    plotted = size_measures(collection)
    at = {(m.pairs, m.loss): m for m in shown.models}

    def cells(pairs: int) -> list[_Wanted | None]:
        clip = at[pairs, REFERENCE]
        return [
            _Wanted(at[pairs, loss], measure, clip if loss != REFERENCE else None)
            for measure in plotted
            for loss in losses
        ]

    lines = {s.name: s for s in quoted.series if s.panel == "size"}
    clips = lines[REFERENCE]
    blank = (None,) * (len(losses) * (len(plotted) - 1))

    def quoted_cells(i: int) -> list[QuotedCell]:
        base = clips.y[i]
        return [_read_off(lines[loss].y[i], quoted, base if loss != REFERENCE else None) for loss in losses]

    papers = tuple(Row(f"{x:,}", (*quoted_cells(i), *blank)) for i, x in enumerate(clips.x))
    return _exhibit(
        shown,
        quoted,
        ("Figure 4", "How much the number of training pairs matters"),
        {m: f"{LOSS_NAMES[m.loss]} at {m.pairs:,} pairs" for m in shown.models},
        [Column(LOSS_NAMES[loss], measure.name) for measure in plotted for loss in losses],
        [
            (
                "Training pairs",
                [(f"{pairs:,}", cells(pairs)) for pairs in sorted({m.pairs for m in shown.models})],
            )
        ],
        [Section("ImageNet1K top-1", papers, quoted=True)],
        called=lambda _: "CLIP",
        corner="pairs",
    )


def _figure7(collection: Collection, quoted: Quoted) -> Exhibit:
    shown = collection.exhibit("figure7")
    names = {m: LOSS_NAMES[m.loss] for m in shown.models}
    return _exhibit(shown, quoted, ("Figure 7", "Where a text is seen"), names, [], [], [])


# --- parts ---


def _loss(models: Sequence[Setting], loss: str) -> Setting:
    return next(model for model in models if model.loss == loss)


def _read_off(value: float, quoted: Quoted, reference: float | None = None) -> QuotedCell:
    difference = None if reference is None else value - reference
    return QuotedCell(value, difference, digits=1, approximate=quoted.read_off is not None)


def _quoted_rows(
    quoted: Quoted, keys: Sequence[str], reference_of: Callable[[str], str]
) -> tuple[Section, ...]:
    """Return the paper's rows in our columns."""
    printed = [v for row in quoted.rows for v in row.values.values() if v is not None]
    digits = max((len(f"{v!r}".partition(".")[2]) for v in printed), default=2)

    def cell(values: dict[str, float | None], key: str) -> QuotedCell | None:
        if key not in values:  # the paper's table has no such entry
            return None
        value, reference = values.get(key), values.get(reference_of(key))
        compared = value is not None and reference is not None and key != reference_of(key)
        difference = value - reference if compared else None
        return QuotedCell(value, difference, digits, approximate=quoted.read_off is not None)

    def rows(group: str) -> tuple[Row, ...]:
        own = [row for row in quoted.rows if row.group == group]
        return tuple(Row(row.measure, tuple(cell(row.values, key) for key in keys)) for row in own)

    groups = dict.fromkeys(row.group for row in quoted.rows)
    return tuple(Section(group, rows(group), quoted=True) for group in groups)


# --- how a cell reads ---


def seeds_text(n: int, planned: int) -> str:
    """``5`` where all are there, else ``3 of 5``."""
    return f"{n}" if n == planned else f"{n} of {planned}"


def mean_text(estimate: Estimate | None, planned: int, digits: int = 2) -> str:
    """Mean, half of the interval, seeds; a dash for what is not there.

    Example:
        >>> mean_text(Estimate(12.34, 0.5, 3), 5), mean_text(Estimate(12.34, None, 1), 1), mean_text(None, 5)
        ('12.34 ± 0.50 (3 of 5)', '12.34 ± – (1)', '–')
    """
    if estimate is None:
        return "–"
    mean = f"{estimate.mean:.{digits}f}".replace("-", "−")
    return f"{mean} ± {_half(estimate, digits)} ({seeds_text(estimate.n, planned)})"


def difference_text(difference: Difference | None, digits: int = 2) -> str:
    """Mean difference with sign, and half of its interval."""
    if difference is None:
        return "–"
    return f"{signed(difference.mean, digits)} ± {_half(difference, digits)}"


def _half(estimate: Estimate, digits: int) -> str:
    return "–" if estimate.half_width is None else f"{estimate.half_width:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """Show a number with its sign, a true minus, and no sign for what rounds to nothing.

    Example:
        >>> signed(-0.126), signed(0.4, 1), signed(-0.001)
        ('−0.13', '+0.4', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


MARKS = {
    "above": "▲",
    "below": "▼",
    "above before": "△",
    "below before": "▽",
    statistics.NOT_TOLD_APART: "≈",
    statistics.TOO_FEW_SEEDS: "·",
}


def mark(difference: Difference | None) -> str:
    """The sign of what may be said: filled after the correction, open only before it."""
    if difference is None:
        return ""
    said = statistics.verdict(difference, above="above", below="below")
    if said == statistics.NOT_TOLD_APART and difference.nominal:
        said = "above before" if difference.mean > 0 else "below before"
    return MARKS[said]


def cell_text(cell: Cell | QuotedCell | None) -> str:
    """A cell in Markdown: the paper's in italics, ours as the mean and, below it, the marked difference."""
    if cell is None:
        return ""
    if isinstance(cell, QuotedCell):
        if cell.value is None:
            return "*not available to us*"
        change = "" if cell.difference is None else f" ({signed(cell.difference, cell.digits)})"
        return f"*{'≈ ' if cell.approximate else ''}{cell.value:.{cell.digits}f}{change}*"
    mean = mean_text(cell.estimate, cell.planned, cell.digits)
    if not cell.compared or (cell.difference is None and cell.estimate is None):
        return mean
    change = f"{difference_text(cell.difference, cell.digits)} {mark(cell.difference)}".strip()
    return change if cell.estimate is None else f"{mean}<br>{change}"
