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
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One of our numbers.

    Attributes:
        estimate: Mean over seeds; None where nothing is trained, or where the cell is a difference only.
        difference: Difference to the reference, corrected within the exhibit; None for the reference itself.
        planned: How many seeds it is to have.
        digits: Decimals to show.
        compared: Whether the cell has a difference to show, or would have one.
    """

    estimate: Estimate | None
    difference: Difference | None
    planned: int
    digits: int = 2
    compared: bool = True


@dataclasses.dataclass(frozen=True)
class QuotedCell:
    """One of the paper's numbers.

    Attributes:
        value: As printed; None if it is not available.
        difference: Difference to the paper's own reference.
        digits: Decimals to show.
        approximate: Whether it was measured on a plot.
    """

    value: float | None
    difference: float | None = None
    digits: int = 2
    approximate: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: its label, a cell for every column (None for one that has no meaning here), items and chance."""

    label: str
    cells: tuple[Cell | QuotedCell | None, ...]
    items: int | None = None
    chance: float | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows with a common title; ``quoted`` if they are the paper's."""

    title: str
    rows: tuple[Row, ...]
    quoted: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A column's label, and what stands over it and its neighbours."""

    label: str
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference that the text may speak of.

    Attributes:
        subject: What is compared, such as ``RankCLIP``.
        reference: What with, such as ``CLIP``.
        measure: In what, such as ``Image → text, R@1``.
        difference: The corrected difference; None while it cannot be formed.
        percent: Whether it is in percentage points, and more is better.
    """

    subject: str
    reference: str
    measure: str
    difference: Difference | None
    percent: bool = True


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper, and ours.

    Attributes:
        key: Its name in :data:`miniature_paper.grid.EXHIBITS`.
        number: Its name in the paper, such as ``Table 1``.
        title: What it shows.
        columns: The table's columns.
        sections: The table's rows, the paper's last.
        comparisons: Everything that is tested in it, one family.
        seeds: For every model its name, how many seeds it has, and how many are planned.
        quoted: What the paper's has.
        items: Numbers of held-out items behind its measures.
        corner: What the rows are.
    """

    key: str
    number: str
    title: str
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    comparisons: tuple[Comparison, ...]
    seeds: tuple[tuple[str, int, int], ...]
    quoted: Quoted
    items: tuple[int, ...] = ()
    corner: str = "measure"

    @property
    def empty(self) -> bool:
        """Whether none of its models is there."""
        return not any(trained for _, trained, _ in self.seeds)

    @property
    def has_chance(self) -> bool:
        """Whether a row knows what guessing scores."""
        return any(row.chance is not None for section in self.sections for row in section.rows)

    @property
    def has_items(self) -> bool:
        """Whether a row knows its number of items."""
        return any(row.items is not None for section in self.sections for row in section.rows)


class Family:
    """Every difference of an exhibit, corrected together when all are known."""

    def __init__(self) -> None:
        self._raw: dict[Key, Difference | None] = {}
        self._of: dict[Key, tuple[str, str, str, bool]] = {}

    def add(
        self, key: Key, difference: Difference | None, subject: str, reference: str, measure: Measure
    ) -> None:
        """Add a difference under a key of its own."""
        self._raw[key] = difference
        self._of[key] = (subject, reference, measure.name, measure.percent)

    def corrected(self) -> dict[Key, Difference | None]:
        """Return all of them with Holm's adjusted p."""
        known = statistics.correct({key: d for key, d in self._raw.items() if d is not None})
        return {key: known.get(key) for key in self._raw}

    def comparisons(self) -> tuple[Comparison, ...]:
        """Return all of them for the text."""
        return tuple(
            Comparison(subject, reference, measure, difference, percent)
            for (subject, reference, measure, percent), difference in zip(
                self._of.values(), self.corrected().values(), strict=True
            )
        )


def build(collection: Collection, paper: Paper) -> list[Exhibit]:
    """Make every exhibit out of whatever records there are."""
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


# --- tables of losses ---


def _table1(collection: Collection, quoted: Quoted) -> Exhibit:
    rows = [*scores.zero_shot(collection.sets("zero-shot")), *scores.retrieval()]
    return _of_losses(collection, quoted, "table1", "Table 1", "Zero-shot and retrieval", rows)


def _table2(collection: Collection, quoted: Quoted) -> Exhibit:
    rows = scores.shifts(collection.tasks)
    return _of_losses(collection, quoted, "table2", "Table 2", "Styles and vendors never trained on", rows)


def _table3(collection: Collection, quoted: Quoted) -> Exhibit:
    rows = scores.probes(collection.sets("probe"))
    return _of_losses(collection, quoted, "table3", "Table 3", "Linear probes", rows)


def _figure6(collection: Collection, quoted: Quoted) -> Exhibit:
    # The picture is of one seed; the numbers below it are of all the seeds of the same models.
    rows = scores.geometry()
    return _of_losses(
        collection, quoted, "figure6", "Figure 6", "Both modalities, and the gap between them", rows, "table1"
    )


def _of_losses(
    collection: Collection,
    quoted: Quoted,
    key: str,
    number: str,
    title: str,
    rows: Sequence[Measure],
    models_of: str | None = None,
) -> Exhibit:
    shown = collection.exhibit(models_of or key)
    columns = tuple(Column(LOSS_NAMES[model.loss]) for model in shown.models)
    names = {model: LOSS_NAMES[model.loss] for model in shown.models}
    reference = _loss(shown.models, REFERENCE)
    family, sections = _measured(shown, rows, names, lambda _: reference)
    of_paper = _quoted_rows(quoted, [m.loss for m in shown.models], lambda _: REFERENCE)
    return Exhibit(
        key,
        number,
        title,
        columns,
        (*sections, *of_paper),
        family.comparisons(),
        _seeds(shown, names),
        quoted,
        _items(shown, rows),
    )


def _table4(collection: Collection, quoted: Quoted) -> Exhibit:
    rows = [
        *scores.zero_shot(collection.sets("zero-shot")),
        *scores.retrieval(),
        *scores.mean_probe(collection.sets("probe")),
    ]
    shown = collection.exhibit("table4")
    names = {m: f"{LOSS_NAMES[m.loss]} ({BACKBONE_NAMES[m.backbone]})" for m in shown.models}
    columns = tuple(Column(LOSS_NAMES[m.loss], BACKBONE_NAMES[m.backbone]) for m in shown.models)

    def reference(model: Setting) -> Setting:
        return _loss([m for m in shown.models if m.backbone == model.backbone], REFERENCE)

    family, sections = _measured(shown, rows, names, reference)
    keys = [f"{m.backbone}/{m.loss}" for m in shown.models]
    of_paper = _quoted_rows(quoted, keys, lambda key: f"{key.partition('/')[0]}/{REFERENCE}")
    return Exhibit(
        "table4",
        "Table 4",
        "Two backbones",
        columns,
        (*sections, *of_paper),
        family.comparisons(),
        _seeds(shown, names),
        quoted,
        _items(shown, rows),
    )


def _measured(
    shown: Exhibited,
    rows: Sequence[Measure],
    names: dict[Setting, str],
    reference_of: Callable[[Setting], Setting],
) -> tuple[Family, list[Section]]:
    """Rows of measures, columns of models: the tests, and our sections."""
    family = Family()
    for measure in rows:
        for model in shown.models:
            reference = reference_of(model)
            if model != reference:
                difference = shown.difference(model, reference, measure)
                family.add((measure.name, names[model]), difference, names[model], names[reference], measure)
    corrected = family.corrected()

    def cell(measure: Measure, model: Setting) -> Cell:
        return Cell(
            shown.estimate(model, measure),
            corrected.get((measure.name, names[model])),
            shown.planned(model),
            digits=2 if measure.percent else 3,
            compared=model != reference_of(model),
        )

    sections = []
    for group in dict.fromkeys(measure.group for measure in rows):
        of_group = [measure for measure in rows if measure.group == group]
        made = tuple(
            Row(
                measure.label,
                tuple(cell(measure, model) for model in shown.models),
                shown.items(measure),
                shown.chance(measure) if measure.percent else None,
            )
            for measure in of_group
        )
        sections.append(Section(group, made))
    return family, sections


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
    return Measure(
        f"Zero-shot under shift, mean of {len(tasks)} sets", "top-1", tuple((t, "top-1") for t in tasks)
    )


TERM_NAMES = {"lambda_cross": "λ₁, of the cross-modal term", "lambda_in": "λ₂, of the in-modal term"}


def _figure3(collection: Collection, quoted: Quoted) -> Exhibit:
    shown = collection.exhibit("figure3")
    plotted = sweep_measures(collection)
    clip = _loss(shown.models, REFERENCE)
    default = next(m for m in shown.models if (m.lambda_cross, m.lambda_in) == (1.0, 1.0))
    names = {
        m: "CLIP" if m == clip else f"λ₁ = {m.lambda_cross:g}, λ₂ = {m.lambda_in:g}" for m in shown.models
    }
    family = Family()
    for measure in plotted:
        for reference in (clip, default):
            for model in shown.models:
                if model not in (clip, reference):
                    key = (f"{measure.name} − {names[reference]}", names[model])
                    difference = shown.difference(model, reference, measure)
                    name = names[clip] if reference == clip else "the recipe's λ₁ = λ₂ = 1"
                    family.add(key, difference, names[model], name, measure)
    corrected = family.corrected()

    def cells(model: Setting) -> tuple[Cell | None, ...]:
        made: list[Cell | None] = []
        for measure in plotted:
            to_clip = corrected.get((f"{measure.name} − {names[clip]}", names[model]))
            to_default = corrected.get((f"{measure.name} − {names[default]}", names[model]))
            planned = shown.planned(model)
            made.append(Cell(shown.estimate(model, measure), to_clip, planned, compared=model != clip))
            made.append(None if model in (clip, default) else Cell(None, to_default, planned))
        return tuple(made)

    sections = [
        Section(
            f"{TERM_NAMES[term]}; the other one is 1",
            tuple(Row(f"{getattr(m, term):g}", cells(m)) for m in sweep_of(shown.models, term)),
        )
        for term in TERM_NAMES
    ]
    sections.append(Section("Without rank terms", (Row("CLIP", cells(clip)),)))
    for term, name in TERM_NAMES.items():
        lines = [s for s in quoted.series if s.panel == term]
        rows = tuple(
            Row(f"{x:g}", tuple(c for line in lines for c in (_read_off(line.y[i], quoted), None)))
            for i, x in enumerate(lines[0].x)
            if x is not None
        )
        sections.append(
            Section(f"{name.partition(',')[0]}: {lines[0].name}; {lines[1].name}", rows, quoted=True)
        )
    scheduled = tuple(c for s in quoted.series if s.panel == "scheduled" for c in (QuotedCell(s.y[0]), None))
    sections.append(Section("λ by the schedule", (Row("RankCLIP", scheduled),), quoted=True))
    columns = tuple(
        Column(label, measure.name)
        for measure in plotted
        for label in ("mean, difference to CLIP", "to λ = 1")
    )
    return Exhibit(
        "figure3",
        "Figure 3",
        "How much the weights of the terms matter",
        columns,
        tuple(sections),
        family.comparisons(),
        _seeds(shown, names),
        quoted,
        _items(shown, plotted),
        corner="λ",
    )


def size_measures(collection: Collection) -> list[Measure]:
    """Return what Figure 4 is made of."""
    shift = shift_measure(collection)
    return [*sweep_measures(collection), *([shift] if shift else [])]


def _figure4(collection: Collection, quoted: Quoted) -> Exhibit:
    shown = collection.exhibit("figure4")
    sizes = sorted({m.pairs for m in shown.models})
    losses = list(dict.fromkeys(m.loss for m in shown.models))
    plotted = size_measures(collection)
    at = {(m.pairs, m.loss): m for m in shown.models}
    names = {m: f"{LOSS_NAMES[m.loss]} at {m.pairs:,} pairs" for m in shown.models}
    family = Family()
    for measure in plotted:
        for pairs in sizes:
            for loss in losses:
                if loss != REFERENCE:
                    model, clip = at[pairs, loss], at[pairs, REFERENCE]
                    difference = shown.difference(model, clip, measure)
                    family.add((measure.name, names[model]), difference, names[model], "CLIP", measure)
    corrected = family.corrected()
    rows = tuple(
        Row(
            f"{pairs:,}",
            tuple(
                Cell(
                    shown.estimate(at[pairs, loss], measure),
                    corrected.get((measure.name, names[at[pairs, loss]])),
                    shown.planned(at[pairs, loss]),
                    compared=loss != REFERENCE,
                )
                for measure in plotted
                for loss in losses
            ),
        )
        for pairs in sizes
    )
    lines = {s.name: s for s in quoted.series if s.panel == "size"}
    blank = (None,) * (len(losses) * (len(plotted) - 1))
    quoted_rows = tuple(
        Row(
            f"{x:,}",
            (
                *(
                    _read_off(lines[loss].y[i], quoted, lines[REFERENCE].y[i] if loss != REFERENCE else None)
                    for loss in losses
                ),
                *blank,
            ),
        )
        for i, x in enumerate(lines[REFERENCE].x)
    )
    return Exhibit(
        "figure4",
        "Figure 4",
        "How much the number of training pairs matters",
        tuple(Column(LOSS_NAMES[loss], measure.name) for measure in plotted for loss in losses),
        (Section("Training pairs", rows), Section("ImageNet1K top-1", quoted_rows, quoted=True)),
        family.comparisons(),
        _seeds(shown, names),
        quoted,
        _items(shown, plotted),
        corner="pairs",
    )


def _figure7(collection: Collection, quoted: Quoted) -> Exhibit:
    shown = collection.exhibit("figure7")
    names = {m: LOSS_NAMES[m.loss] for m in shown.models}
    return Exhibit("figure7", "Figure 7", "Where a text is seen", (), (), (), _seeds(shown, names), quoted)


# --- parts ---


def _loss(models: Sequence[Setting], loss: str) -> Setting:
    return next(model for model in models if model.loss == loss)


def _seeds(shown: Exhibited, names: dict[Setting, str]) -> tuple[tuple[str, int, int], ...]:
    return tuple((names[m], shown.trained(m), shown.planned(m)) for m in shown.models)


def _items(shown: Exhibited, rows: Sequence[Measure]) -> tuple[int, ...]:
    found = (shown.items(measure) for measure in rows)
    return tuple(n for n in found if n is not None)


def _read_off(value: float, quoted: Quoted, reference: float | None = None) -> QuotedCell:
    difference = None if reference is None else value - reference
    return QuotedCell(value, difference, digits=1, approximate=quoted.read_off is not None)


def _quoted_rows(
    quoted: Quoted, keys: Sequence[str], reference_of: Callable[[str], str]
) -> tuple[Section, ...]:
    """The paper's rows in our columns."""
    printed = [v for row in quoted.rows for v in row.values.values() if v is not None]
    digits = max((len(f"{v!r}".partition(".")[2]) for v in printed), default=2)

    def cell(values: dict[str, float | None], key: str) -> QuotedCell | None:
        if key not in values:  # the paper's table has no such entry
            return None
        value, reference = values.get(key), values.get(reference_of(key))
        difference = None
        if value is not None and reference is not None and key != reference_of(key):
            difference = value - reference
        return QuotedCell(value, difference, digits, approximate=quoted.read_off is not None)

    return tuple(
        Section(
            group,
            tuple(
                Row(row.measure, tuple(cell(row.values, key) for key in keys))
                for row in quoted.rows
                if row.group == group
            ),
            quoted=True,
        )
        for group in dict.fromkeys(row.group for row in quoted.rows)
    )


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
    half = "–" if estimate.half_width is None else f"{estimate.half_width:.{digits}f}"
    mean = f"{estimate.mean:.{digits}f}".replace("-", "−")
    return f"{mean} ± {half} ({seeds_text(estimate.n, planned)})"


def difference_text(difference: Difference | None, digits: int = 2) -> str:
    """Mean difference with sign, and half of its interval."""
    if difference is None:
        return "–"
    half = "–" if difference.half_width is None else f"{difference.half_width:.{digits}f}"
    return f"{signed(difference.mean, digits)} ± {half}"


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


def quoted_text(cell: QuotedCell) -> str:
    """The paper's number, with ≈ if it was measured on a plot."""
    if cell.value is None:
        return "not available to us"
    return f"{'≈ ' if cell.approximate else ''}{cell.value:.{cell.digits}f}"
