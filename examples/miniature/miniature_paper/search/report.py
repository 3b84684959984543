"""Records → a study's report: every try, every round, the confirmation, and what they show.

The sentences are those of ``templates/study.md``; they claim nothing that an interval does not support.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from statistics import median

from examples_common.figures import picture
from examples_common.page import Picture
from examples_common.statistics import Difference
from examples_common.tables import markdown as table
from examples_common.wording import difference_text, mark, mean_text, p_text
from matplotlib.figure import Figure

from miniature_paper.figures import CLIP, MUTED, RANK
from miniature_paper.report import conditions, write_page

from .confirmation import Outcome, needed, outcome
from .ladder import Find, Records, Standing, Step, progress
from .objective import SCORES
from .study import Study
from .trials import LOSS, RECIPE, REFERENCE, Trial

_WIDTH, _ROW, _HEAD = 8.4, 0.2, 0.75

Panel = Mapping[str, tuple[Difference, bool]]  # by name; whether it is coloured


def write(study: Study, folder: Path, *, find: Find, command: str) -> Path:
    """Write the report with its pictures, as far as the records reach, and return its page's path."""
    now = progress(study, find)
    study, over = now.study, now.over
    wanted = needed(study, now.winners) if over else []
    found = outcome(study, now.winners, find) if over else None
    # The rounds that have begun, each with its arms.
    rounds = [
        [of[number] for of in now.steps.values() if len(of) > number] for number in range(len(study.rounds))
    ]
    rounds = [steps for steps in rounds if steps]
    tried = (trial for step in chain(*rounds) for trial in step.trials)
    settings = list(dict.fromkeys(chain(*study.arms.values(), tried)))
    if study.grids:  # what joined a grid later stands with its arm
        settings.sort(key=lambda trial: study.names.index(trial.factor))
    records = find(list(dict.fromkeys([*(one for step in chain(*rounds) for one in step.attempts), *wanted])))
    for name in ("", "-rounds"):
        (folder / "figures" / f"{study.name}{name}.png").unlink(missing_ok=True)
    return write_page(
        folder,
        f"{study.name}.md",
        study.title,
        _pictures(study, rounds, found),
        "study.md",
        study=study,
        settings=settings,
        winners=now.winners,
        over=over,
        due=len(now.due),
        missing=len(wanted) - len(find(wanted)),
        planned=len(wanted),
        found=found,
        recipe=RECIPE,
        reference=REFERENCE,
        loss=LOSS,
        facts=table(["", ""], _facts(study, settings, records, find, command)),
        rounds=[(steps, _standings(study, steps)) for steps in rounds],
        levels=_levels(found) if found else None,
        tests=_tests(study, found) if found else None,
        secondary=_secondary(found) if found and found.measures else None,
    )


def _facts(
    study: Study, settings: Sequence[Trial], records: Records, find: Find, command: str
) -> list[list[str]]:
    hours = sum(sum(record["seconds"].values()) for record in records.values()) / 3600
    facts = [
        ["command", f"`{command}`"],
        ["settings tried", str(len(settings))],
        ["trainings", f"{len(records)}, {hours:.1f} hours summed over them"],
    ]
    if study.teacher:
        taught = {(record["teacher"], one.seed) for one, record in records.items() if record.get("teacher")}
        for name, pairs in groupby(sorted(taught), key=lambda pair: pair[0]):
            facts.append([f"taught by weights {name}", f"seeds {', '.join(str(seed) for _, seed in pairs)}"])
        for record in find([study.teacher]).values():
            own = ", ".join(f"{name} {score(record):.2f}" for name, score in SCORES.items())
            facts.append(["the teacher itself", own])
    return [*facts, *conditions(records.values())]


def _pictures(study: Study, rounds: Sequence[Sequence[Step]], found: Outcome | None) -> dict[str, Picture]:
    panels = {}
    for number, steps in enumerate(rounds, start=1):
        kept = [trial for step in steps for trial in step.kept]
        rows = {s.trial.name: s for step in steps for s in step.standings if s.differences}
        shown = {name: (s.differences[study.score], s.trial in kept) for name, s in rows.items()}
        panels[f"Round {number}: {len(rows)} settings"] = shown
    drawn = {
        f"{study.name}-rounds": draw(
            panels,
            "Every setting's mean difference to plain CLIP, round by round.",
            f"{study.score} less plain CLIP's (points, validation side)",
        )
    }
    if found:
        pairs = {**found.tests, **{pair: d for (pair, s), d in found.others.items() if s == study.score}}
        rows = {f"{_less(pair)} (n = {d.n})": (d, d.established) for pair, d in pairs.items()}
        shares = [measure.name for measure in found.measures if measure.percent and len(found.tests) == 1]
        beside = {name: (d, d.established) for (_, name), d in found.others.items() if name in shares}
        panels = {f"{study.score}, test side": rows, "What is secondary": beside}
        drawn[study.name] = draw(panels, "Every comparison with its interval.", "difference in points")
    return {name: picture for name, picture in drawn.items() if picture}


def _less(pair: tuple[str, str]) -> str:
    return f"{pair[0]} less {'plain CLIP' if pair[1] == REFERENCE else pair[1]}"


def _standings(study: Study, steps: Sequence[Step]) -> str:
    last = steps[0].round.keep == 1
    kept = [trial for step in steps for trial in step.kept]

    def continues(trial: Trial) -> str:
        return "yes" if trial in kept else "always" if trial == RECIPE and not last else "no"

    def row(one: Standing) -> list[str]:
        diverged = ["diverged", *[""] * (len(SCORES) - 1)]
        differences = [difference_text(one.differences[s]) for s in SCORES] if one.differences else diverged
        return [f"`{one.trial.name}`", *differences, mean_text(one.clip, one.clip.n), continues(one.trial)]

    head = ["setting", *SCORES, f"CLIP's {study.score}", "wins" if last else "continues"]
    rows = [row(one) for step in steps for one in step.standings]
    return table(head, rows, right=len(head) - 1) if rows else ""


def _levels(found: Outcome) -> str:
    rows, compared = [], found.comparison
    for name, records in compared.records.items():
        label = f"`{compared.trials[name].name if name in compared.trials else name}`"
        if name in compared.lost:
            rows.append([label, *["diverged"] * len(SCORES), ""])
            continue
        means = [compared.estimate(name, score) for score in SCORES.values()]
        seconds = median(record["seconds"]["training"] for record in records.values())
        rows.append([label, *(mean_text(one, len(records)) for one in means), f"{seconds:.0f}"])
    return table(["", *SCORES, "seconds"], rows, right=len(SCORES) + 1)


def _tests(study: Study, found: Outcome) -> str:
    """The primary tests and, unless everything was measured, the secondary ones."""

    def row(pair: tuple[str, str], score: str, d: Difference, corrected: str) -> list[str]:
        return [_less(pair), score, difference_text(d), str(d.n), p_text(d.p), corrected, mark(d)]

    alone = len(found.tests) == 1
    tests = [(pair, study.score, d) for pair, d in found.tests.items()]
    rows = [row(*one, "the test" if alone else p_text(one[2].adjusted)) for one in tests]
    if not found.measures:
        rows += [row(*names, d, p_text(d.adjusted)) for names, d in found.others.items()]
    return table(["compared", "score", "difference", "seeds", "p", "corrected", ""], rows, right=5)


def _secondary(found: Outcome) -> str:
    """Everything else that was measured, with the differences to plain CLIP."""
    names = [name for name in found.comparison.records if name not in found.comparison.lost]
    rows = []
    for measure in found.measures:
        digits, cells = 2 if measure.percent else 4, []
        for name in names:
            mean = found.comparison.estimate(name, measure)
            d = found.others.get(((name, REFERENCE), measure.name))
            change = "" if d is None else f"<br>{difference_text(d, digits)} {mark(d)}"
            cells.append(mean_text(mean, mean.n, digits) + change)
        rows.append([measure.name, *cells])
    return table(["measure", *names], rows, right=len(names))


def draw(panels: Mapping[str, Panel], alt: str, label: str) -> Picture | None:
    """Draw the panels that are not empty under their titles; None if all are empty."""
    panels = {title: panel for title, panel in panels.items() if panel}
    sizes = [max(len(panel), 2) for panel in panels.values()]

    def figure_of() -> Figure:
        height = sum(sizes) * _ROW + len(sizes) * _HEAD
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=sizes)[:, 0]
        for axis, (title, panel) in zip(axes, panels.items(), strict=True):
            for row, (one, coloured) in enumerate(panel.values()):
                colour = RANK if coloured else MUTED
                looks = {"fmt": "o", "markersize": 4, "lw": 1.2, "color": colour}
                axis.errorbar(one.mean, row, xerr=one.half_width or 0.0, **looks)
            axis.set_yticks(range(len(panel)), [_lines(name) for name in panel])
            for name in axis.get_yticklabels():
                name.set_fontsize(6 if "\n" in name.get_text() else None)
            axis.set_ylim(len(panel) - 0.5, -0.5)
            axis.axvline(0.0, color=CLIP, lw=1, ls="--")
            axis.grid(axis="x")
            axis.set_title(title)
        axes[-1].set_xlabel(label)
        return figure

    return picture(alt, figure_of) if panels else None


def _lines(name: str) -> str:
    """Wrap the name of a combination of factors, to leave room for the intervals."""
    lines = textwrap.wrap(name.replace("+", "+ "), width=42, break_on_hyphens=False)
    return "\n".join(line.replace("+ ", "+") for line in lines)
