"""Records → a study's report; the sentences are those of ``templates/study.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from examples_common.page import Picture
from examples_common.tables import markdown as table
from matplotlib.figure import Figure

from miniature_paper.figures import Theme, picture
from miniature_paper.report import conditions, write_page
from miniature_paper.scores import (
    LABELLED_SETS,
    RECALLS,
    Measure,
    geometry,
    mean_probe,
    retrieval_both_ways,
    shifts,
    zero_shot,
)
from miniature_paper.statistics import Difference, correct, estimate
from miniature_paper.wording import difference_text, mark, mean_text, p_text

from .ladder import Find
from .objective import OBJECTIVE, SCORES
from .study import Outcome, Standing, Study, compared, needed, outcome, standing
from .trials import LOSS, RECALL, REFERENCE

_AGREEMENT = tuple(
    Measure("Agreement with the teacher", label, (("teacher/test", key),), percent=False)
    for key, label in (("cross_modal_tau", "cross-modal (τ)"), ("in_modal_tau", "in-modal (τ)"))
)


def write(study: Study, folder: Path, *, find: Find, command: str) -> Path:
    """Write the report with its picture, as far as the records reach, and return its page's path."""
    now = standing(study, find)
    due, winners = list(now.due), {arm: trial for arm, trial in now.winners.items() if trial is not None}
    over = len(winners) == len(study.arms)
    wanted = needed(study, winners) if over else []
    found = outcome(study, winners, find) if over else None
    chosen = [one for steps in now.steps.values() for step in steps for one in step.attempts]
    records = list(find(list(dict.fromkeys([*chosen, *wanted]))).values())
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    facts = [
        ["command", f"`{command}`"],
        ["trainings", f"{len(records)}, {hours:.1f} hours summed over them"],
    ]
    teachers = {record["teacher"] for record in records if record.get("teacher")}
    if study.teacher:
        facts.append(["teachers", ", ".join(f"weights {name}" for name in sorted(teachers)) or "none yet"])
        for record in find([study.teacher]).values():
            own = ", ".join(f"{name} {score(record):.2f}" for name, score in SCORES.items())
            facts.append(["the teacher itself", own])
    drawing = forest(_rows(found), f"difference in {study.score} (points, test side)") if found else None
    (folder / "figures" / f"{study.name}.png").unlink(missing_ok=True)
    return write_page(
        folder,
        f"{study.name}.md",
        study.title,
        {study.name: drawing} if drawing else {},
        "study.md",
        study=study,
        steps=now.steps,
        winners=winners,
        over=over,
        due=len(due),
        missing=len(wanted) - len(find(wanted)) if over else None,
        planned=len(wanted),
        found=found,
        reference=REFERENCE,
        loss=LOSS,
        facts=table(["", ""], [*facts, *conditions(records)]),
        selection=_selection(now) if any(now.steps.values()) else None,
        levels=_levels(study, found) if found else None,
        tests=_tests(found) if found else None,
        secondary=_secondary(study, found) if found else None,
    )


def forest(rows: Mapping[str, Difference], label: str) -> Picture | None:
    """Draw every comparison with its interval and its number of seeds; None without any."""
    if not rows:
        return None

    def figure_of(theme: Theme) -> Figure:
        figure = Figure(figsize=(8.4, 0.9 + 0.3 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for row, one in enumerate(rows.values()):
            colour = theme.rank if one.established else theme.muted
            axis.errorbar(
                one.mean, row, xerr=one.half_width or 0.0, color=colour, fmt="o", markersize=4, lw=1.2
            )
        axis.set_yticks(range(len(rows)), [f"{name} (n = {one.n})" for name, one in rows.items()])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.axvline(0.0, color=theme.clip, lw=1, ls="--")
        axis.grid(axis="x")
        axis.set_xlabel(label)
        return figure

    return picture("Every comparison's mean difference with its interval.", figure_of)


def _rows(found: Outcome) -> dict[str, Difference]:
    return {f"{arm} less {other}": d for (arm, other), d in found.tests.items()}


def _selection(now: Standing) -> str:
    rows = []
    for arm, steps in now.steps.items():
        for number, step in enumerate(steps, start=1):
            for one in step.standings:
                shown = difference_text(one.differences[OBJECTIVE]) if one.differences else "diverged"
                kept = "yes" if one.trial in step.kept else ""
                rows.append([arm, f"`{one.trial.name}`", str(number), shown, kept])
    return table(["arm", "try", "round", "objective less plain CLIP's", "kept"], rows, right=1)


def _levels(study: Study, found: Outcome) -> str:
    rows = []
    for arm, records in found.values.items():
        if arm in found.lost:
            rows.append([arm, *["diverged"] * len(SCORES), ""])
            continue
        means = [estimate([score(record) for record in records.values()]) for score in SCORES.values()]
        seconds = median(record["seconds"]["training"] for record in records.values())
        rows.append(
            [arm, *(mean_text(one, len(study.confirmation.seeds)) for one in means), f"{seconds:.0f}"]
        )
    return table(["", *SCORES, "seconds"], rows, right=len(SCORES) + 1)


def _tests(found: Outcome) -> str:
    rows = [
        [pair, difference_text(d), str(d.n), p_text(d.p), p_text(d.adjusted), mark(d)]
        for pair, d in _rows(found).items()
    ]
    return table(["compared", "difference", "seeds", "p", "corrected", ""], rows, right=5)


def _secondary(study: Study, found: Outcome) -> str:
    """Everything else, against plain CLIP, corrected together."""
    records = [r for arm, of in found.values.items() if arm not in found.lost for r in of.values()]
    tasks = set.intersection(*(set(record["metrics"]) for record in records))
    sets = [name for name in LABELLED_SETS if f"zero-shot/{name}" in tasks]
    probed = [name for name in LABELLED_SETS if f"probe/{name}" in tasks]
    measures = [*map(retrieval_both_ways, RECALLS), *zero_shot(sets), *shifts(sorted(tasks))]
    measures += [*mean_probe(probed), *geometry(), *_AGREEMENT]
    # The score of the tests that count is none of the rest.
    tested = retrieval_both_ways("R@10") if study.score == RECALL else None
    shown = [m for m in measures if m != tested and all(m.of(r["metrics"]) is not None for r in records)]
    arms = [arm for arm in found.values if arm not in found.lost]

    def value(measure: Measure) -> Any:
        return lambda record: measure.of(record["metrics"])

    against_clip = [arm for arm in arms if arm != REFERENCE and REFERENCE in arms]
    differences = {
        (m, arm): compared(found.values, (arm, REFERENCE), value(m)) for m in shown for arm in against_clip
    }
    family = correct({key: d for key, d in differences.items() if d is not None})

    def cell(m: Measure, arm: str) -> str:
        digits = 2 if m.percent else 4
        mean = estimate([value(m)(record) for record in found.values[arm].values()])
        text = mean_text(mean, len(study.confirmation.seeds), digits)
        d = family.get((m, arm))
        return text if d is None else f"{text}<br>{difference_text(d, digits)} {mark(d)}"

    rows = [[m.name, *(cell(m, arm) for arm in arms)] for m in shown]
    return table(["measure", *arms], rows, right=len(arms))
