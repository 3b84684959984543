"""The exhibits' numbers: every cell with its interval, its paired difference, and the paper's beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from studies import statistics
from studies.report import difference_text, mark, mean_text, signed
from studies.statistics import Arms, Difference, Estimate, verdict

from . import scores
from .scores import BACKBONE_NAMES, LOSS_NAMES, NAMES, Measure
from .settings import Setting

if TYPE_CHECKING:
    from .exhibits import Collection

Value = TypeVar("Value")
Quoted = Mapping[str, Any]  # the paper's numbers of an exhibit, as paper.json has them
REFERENCE = "clip"
TERM_NAMES = {"lambda_cross": "λ₁, of the cross-modal term", "lambda_in": "λ₂, of the in-modal term"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One of our numbers, and its difference to a reference."""

    subject: str  # the model, such as RankCLIP
    measure: Measure
    estimate: Estimate | None = None  # None where only the difference is shown
    reference: str = ""  # what it is compared with, such as CLIP; nothing for the reference itself
    difference: Difference | None = None  # corrected within the exhibit

    @property
    def digits(self) -> int:
        """Number of decimal places."""
        return 2 if self.measure.percent else 3

    def __str__(self) -> str:
        """The mean and, below it, the marked difference."""
        mean = "" if self.estimate is None else mean_text(self.estimate, self.digits)
        if not self.reference:
            return mean
        change = f"{difference_text(self.difference, self.digits)} {mark(self.difference)}".strip()
        return f"{mean}<br>{change}" if mean else change


@dataclasses.dataclass(frozen=True)
class QuotedCell:
    """One of the paper's numbers."""

    value: float | None  # None where it could not be read
    difference: float | None = None  # to the paper's own reference
    digits: int = 2
    approximate: bool = False  # measured on a plot

    def __str__(self) -> str:
        """The number and the change, in italics."""
        if self.value is None:
            return "*not available to us*"
        change = "" if self.difference is None else f" ({signed(self.difference, self.digits)})"
        return f"*{'≈ ' if self.approximate else ''}{self.value:.{self.digits}f}{change}*"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: a cell for every column, None where it has no meaning."""

    section: str
    label: str
    cells: tuple[Cell | QuotedCell | None, ...]
    quoted: bool = False  # whether it is the paper's
    items: int | None = None  # number of held-out items
    chance: float | None = None  # what guessing scores


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper, and ours."""

    key: str  # in exhibits.EXHIBITS
    quoted: Quoted
    shown: Arms  # its models, each by its setting with seed 0
    names: Mapping[Setting, str]  # of its models
    columns: Sequence[tuple[str, str]]  # a label shared with neighbours, or nothing, and each one's own
    corner: str = "measure"  # what the rows are
    called: Mapping[Setting, str] = dataclasses.field(default_factory=dict)  # references with other names
    rows: list[Row] = dataclasses.field(default_factory=list)  # the paper's last

    @property
    def title(self) -> str:
        """Title of the table."""
        return str(NAMES["exhibits"][self.key])

    @property
    def number(self) -> str:
        """Its name in the paper."""
        return f"{self.key[:-1].title()} {self.key[-1]}"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Our numbers."""
        return tuple(dict.fromkeys(c for row in self.rows for c in row.cells if isinstance(c, Cell)))

    @property
    def comparisons(self) -> tuple[Cell, ...]:
        """Everything that is tested: one family."""
        return tuple(cell for cell in self.cells if cell.reference)

    @property
    def seeds(self) -> list[int]:
        """Number of seeds of every model."""
        return [len(of) for of in self.shown.records.values()]

    @property
    def items(self) -> list[int]:
        """Numbers of held-out items behind its measures."""
        found = (self.first(m.items) for m in dict.fromkeys(cell.measure for cell in self.cells))
        return [n for n in found if n is not None]

    def first(self, read: Callable[[Mapping[str, Any]], Value | None]) -> Value | None:
        """Return a value that all records agree on, such as chance or items; None if no record has it."""
        return next((value for record in self.shown.all if (value := read(record)) is not None), None)

    def cell(self, model: Setting, measure: Measure, reference: Setting, *, mean: bool = True) -> Cell:
        """Return one number; ``mean`` says whether it is shown beside its difference."""
        estimate = self.shown.estimate(model, measure) if mean else None
        found = Cell(self.names[model], measure, estimate)
        if reference == model:
            return found
        difference = self.shown.difference((model, reference), measure)
        called = self.called.get(reference, self.names[reference])
        return dataclasses.replace(found, reference=called, difference=difference)

    def add(self, section: str, label: str, cells: Iterable[Cell | None]) -> None:
        """Add one of our rows."""
        cells = tuple(cells)
        measure, *others = dict.fromkeys(cell.measure for cell in cells if cell is not None)
        items = None if others else self.first(measure.items)
        chance = None if others or not measure.percent else self.first(lambda r: measure(r, "chance"))
        self.rows.append(Row(section, label, cells, items=items, chance=chance))

    def quote(self, section: str, label: str, cells: Iterable[QuotedCell | None]) -> None:
        """Add one of the paper's rows."""
        self.rows.append(Row(section, label, tuple(cells), quoted=True))

    def corrected(self) -> Exhibit:
        """Return it with its differences corrected together."""
        family = statistics.correct({c: c.difference for c in self.cells if c.difference is not None})
        done = {c: dataclasses.replace(c, difference=difference) for c, difference in family.items()}
        rows = (dataclasses.replace(r, cells=tuple(done.get(c, c) for c in r.cells)) for r in self.rows)
        return dataclasses.replace(self, rows=list(rows))


class Tally:
    """Outcomes of comparisons."""

    def __init__(self, comparisons: Sequence[Cell]) -> None:
        self.all = comparisons
        self.above, self.below, self.undecided, self.untested = (
            [cell for cell in comparisons if verdict(cell.difference) == said]
            for said in (
                statistics.BETTER,
                statistics.WORSE,
                statistics.NOT_SIGNIFICANT,
                statistics.TOO_FEW_SEEDS,
            )
        )
        self.established = self.above + self.below
        self.tested = [cell for cell in comparisons if cell not in self.untested]
        # Significant before the correction.
        self.nominal = [cell for cell in self.tested if cell.difference.nominal]
        # The expected number of these if nothing differed; dependence between the tests does not change it.
        self.expected = statistics.ALPHA * len(self.tested)
        # The median half width of the intervals that decide nothing, in points.
        widths = (c.difference.half_width for c in self.undecided if c.measure.percent)
        self.width = median(known) if (known := [width for width in widths if width]) else None

    def claims(self) -> Iterator[tuple[str, int, list[Cell]]]:
        """Yield every model's established differences of one sign, the largest first.

        Beside them are what they say, and how many of its differences were tested.
        """
        for pair in dict.fromkeys((c.subject, c.reference) for c in self.established):
            tested = sum((c.subject, c.reference) == pair for c in self.tested)
            for cells, of_percent, word in ((self.above, "better", "higher"), (self.below, "worse", "lower")):
                own = [c for c in cells if (c.subject, c.reference) == pair]
                own.sort(key=lambda c: -abs(c.difference.mean))
                if own:
                    yield of_percent if own[0].measure.percent else word, tested, own


def build(collection: Collection, quoted: Mapping[str, Quoted]) -> list[Exhibit]:
    """Make every exhibit out of the records."""
    builders = {"figure3": _figure3, "figure4": _figure4}
    return [builders.get(key, _measured)(collection, key, of).corrected() for key, of in quoted.items()]


# --- rows of measures, columns of models ---


def _sets(collection: Collection, task: str) -> list[str]:
    """Return the labelled sets that were measured in ``zero-shot`` or ``probe``, by name."""
    return [name for name in scores.LABELLED_SETS if f"{task}/{name}" in collection.tasks]


_MEASURES: dict[str, Callable[[Any], list[Measure]]] = {
    "table1": lambda found: [*scores.zero_shot(_sets(found, "zero-shot")), *scores.retrieval()],
    "table2": lambda found: scores.shifts(found.tasks),
    "table3": lambda found: scores.probes(_sets(found, "probe")),
    "table4": lambda found: [*_MEASURES["table1"](found), *scores.mean_probe(_sets(found, "probe"))],
    "figure6": lambda _: scores.geometry(),
    "figure7": lambda _: [],
}


def _measured(collection: Collection, key: str, quoted: Quoted) -> Exhibit:
    # Figure 6 shows one seed; the numbers below it are of all seeds of the same models.
    shown = collection.arms("table1" if key == "figure6" else key)
    models, both = list(shown.records), key == "table4"
    columns = [(BACKBONE_NAMES[m.backbone] if both else "", LOSS_NAMES[m.loss]) for m in models]
    names = {
        m: f"{label} ({group})" if group else label for m, (group, label) in zip(models, columns, strict=True)
    }
    clips = {m.backbone: m for m in models if m.loss == REFERENCE}
    made = Exhibit(key, quoted, shown, names, columns)
    for measure in _MEASURES[key](collection):
        made.add(measure.group, measure.label, (made.cell(m, measure, clips[m.backbone]) for m in models))

    printed = [value for row in quoted["rows"] for value in row["values"].values() if value is not None]
    digits = max((len(f"{value!r}".partition(".")[2]) for value in printed), default=2)

    def quoted_cell(values: Mapping[str, float | None], model: Setting) -> QuotedCell | None:
        prefix = f"{model.backbone}/" if both else ""
        if prefix + model.loss not in values:  # the paper's table has no such entry
            return None
        value = values[prefix + model.loss]
        reference = None if model.loss == REFERENCE else values.get(prefix + REFERENCE)
        return _quoted(value, quoted, reference, digits)

    for row in quoted["rows"]:
        made.quote(row["group"], row["measure"], (quoted_cell(row["values"], model) for model in models))
    return made


# --- figures with axes ---


def sweep_of(models: Iterable[Setting], term: str) -> list[Setting]:
    """Return the models of Figure 3 in which the λ of ``term`` varies and the other one is 1, by λ."""
    other = {"lambda_cross": "lambda_in", "lambda_in": "lambda_cross"}[term]
    swept = [m for m in models if m.loss != REFERENCE and getattr(m, other) == 1.0]
    return sorted(swept, key=lambda m: getattr(m, term))


def sweep_measures(collection: Collection) -> list[Measure]:
    """Return what Figure 3 and Figure 4 plot: zero-shot top-1, and R@1 in both directions."""
    return [scores.zero_shot(_sets(collection, "zero-shot"))[0], scores.retrieval_both_ways("R@1")]


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


def _figure3(collection: Collection, key: str, quoted: Quoted) -> Exhibit:
    shown, plotted = collection.arms(key), sweep_measures(collection)
    models = list(shown.records)
    clip = next(m for m in models if m.loss == REFERENCE)
    recipe = next(m for m in models if (m.lambda_cross, m.lambda_in) == (1.0, 1.0))
    names = {m: f"λ₁ = {m.lambda_cross:g}, λ₂ = {m.lambda_in:g}" for m in models} | {clip: "CLIP"}
    columns = [(m.name, label) for m in plotted for label in ("mean, difference to CLIP", "to λ = 1")]
    made = Exhibit(key, quoted, shown, names, columns, "λ", {recipe: "the recipe's λ₁ = λ₂ = 1"})

    def add(section: str, label: str, model: Setting) -> None:
        cells: list[Cell | None] = []
        for measure in plotted:
            other = model not in (clip, recipe)
            cells.append(made.cell(model, measure, clip))
            cells.append(made.cell(model, measure, recipe, mean=False) if other else None)
        made.add(section, label, cells)

    for term, name in TERM_NAMES.items():
        for model in sweep_of(models, term):
            add(f"{name}; the other one is 1", f"{getattr(model, term):g}", model)
    add("Without rank terms", "CLIP", clip)
    for term, name in TERM_NAMES.items():
        lines = [line for line in quoted["series"] if line["panel"] == term]
        section = f"{name.partition(',')[0]}: {lines[0]['name']}; {lines[1]['name']}"
        for x, *ys in zip(lines[0]["x"], *(line["y"] for line in lines), strict=True):
            made.quote(section, f"{x:g}", (c for y in ys for c in (_quoted(y, quoted), None)))
    levels = [line["y"][0] for line in quoted["series"] if line["panel"] == "scheduled"]
    made.quote("λ by the schedule", "RankCLIP", (c for y in levels for c in (QuotedCell(y), None)))
    return made


def _figure4(collection: Collection, key: str, quoted: Quoted) -> Exhibit:
    shown, plotted = collection.arms(key), size_measures(collection)
    models = list(shown.records)
    losses = list(dict.fromkeys(m.loss for m in models))
    at = {(m.pairs, m.loss): m for m in models}
    names = {m: f"{LOSS_NAMES[m.loss]} at {m.pairs:,} pairs" for m in models}
    columns = [(measure.name, LOSS_NAMES[loss]) for measure in plotted for loss in losses]
    called = {m: "CLIP" for m in models if m.loss == REFERENCE}
    made = Exhibit(key, quoted, shown, names, columns, "pairs", called)
    for pairs in sorted({m.pairs for m in models}):
        clip = at[pairs, REFERENCE]
        cells = (made.cell(at[pairs, loss], measure, clip) for measure in plotted for loss in losses)
        made.add("Training pairs", f"{pairs:,}", cells)
    lines = {line["name"]: line for line in quoted["series"] if line["panel"] == "size"}
    for i, x in enumerate(lines[REFERENCE]["x"]):
        base = lines[REFERENCE]["y"][i]
        read = (_quoted(lines[s]["y"][i], quoted, base if s != REFERENCE else None) for s in losses)
        blank = [None] * (len(columns) - len(losses))
        made.quote("ImageNet1K top-1", f"{x:,}", [*read, *blank])
    return made


def _quoted(
    value: float | None, quoted: Quoted, reference: float | None = None, digits: int = 1
) -> QuotedCell:
    difference = None if value is None or reference is None else value - reference
    return QuotedCell(value, difference, digits, approximate=quoted["read_off"] is not None)
