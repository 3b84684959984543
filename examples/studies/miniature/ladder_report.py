"""The values of a comparison's report: every try, every round, the confirmation.

The sentences are those of ``templates/study.md``; they claim nothing that an interval does not support.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from studies.report import Picture, difference_text, mark, mean_text, p_text, picture
from studies.statistics import Difference, Pair

from . import ladder
from .exhibits import conditions

if TYPE_CHECKING:
    from .ladder import Outcome, Standing, Step

_WIDTH, _ROW, _HEAD = 8.4, 0.2, 0.75
CLIP, RANK, MUTED = "C0", "C1", "C2"  # the style's colours

Panel = Mapping[str, tuple[Difference, bool]]  # by name; whether it is coloured


def values(
    plan: Any,
    steps: Mapping[str, list[Step]],
    winners: Mapping[str, Any],
    found: Outcome,
    find: Any,
    teacher: Any,
) -> dict[str, Any]:
    """Return the values of the report's template."""
    rounds = [[of[number] for of in steps.values()] for number in range(len(plan.rounds))]
    tried = (trial for step in chain(*rounds) for trial in step.trials)
    settings = list(dict.fromkeys(chain(*plan.tries_of.values(), tried)))
    if plan.grids:  # what joined a grid later stands with its arm
        settings.sort(key=lambda trial: list(plan.tries_of).index(trial.factor))
    needed = [
        one
        for step in chain(*rounds)
        for one in ladder.attempts(plan, step.trials, step.round, ladder.VALIDATION)
    ]
    needed += ladder.attempts(plan, found.comparison.trials.values(), plan.confirmation, ladder.TEST)
    records = find(dict.fromkeys(needed))
    return {
        "study": plan,
        "pictures": _pictures(plan, rounds, found),
        "settings": settings,
        "winners": winners,
        "best": rounds[-1][0].standings[0] if rounds else None,
        "found": found,
        "recipe": ladder.RECIPE,
        "reference": ladder.REFERENCE,
        "loss": ladder.LOSS,
        "facts": _facts(plan, settings, records, teacher),
        "rounds": [(of, _standings(of)) for of in rounds],
        "standings_head": ["setting", *ladder.SCORES, f"CLIP's {plan.score}"],
        "levels": _levels(found),
        "levels_head": ["", *ladder.SCORES, "seconds"],
        "tests": _tests(plan, found),
        "secondary": _secondary(found),
        "secondary_head": ["measure", *_kept(found)],
    }


def _facts(
    plan: Any, settings: Sequence[Any], records: Mapping[Any, Any], teacher: Iterable[Any]
) -> list[list[str]]:
    hours = sum(sum(record["seconds"].values()) for record in records.values()) / 3600
    facts = [
        ["command", f"`python -m studies miniature-{plan.name} --preset {plan.preset}`"],
        ["settings tried", str(len(settings))],
        ["trainings", f"{len(records)}, {hours:.1f} hours summed over them"],
    ]
    taught = {(record["teacher"], one.seed) for one, record in records.items() if record.get("teacher")}
    for name, pairs in groupby(sorted(taught), key=lambda pair: pair[0]):
        facts.append([f"taught by weights {name}", f"seeds {', '.join(str(seed) for _, seed in pairs)}"])
    for record in teacher:
        own = ", ".join(f"{name} {score(record):.2f}" for name, score in ladder.SCORES.items())
        facts.append(["the teacher itself", own])
    return [*facts, *conditions(records.values())]


def _pictures(plan: Any, rounds: Sequence[Sequence[Step]], found: Outcome) -> dict[str, Picture]:
    panels = {}
    for number, steps in enumerate(rounds, start=1):
        kept = [trial for step in steps for trial in step.kept]
        rows = {s.trial.name: s for step in steps for s in step.standings if s.differences}
        shown = {name: (s.differences[plan.score], s.trial in kept) for name, s in rows.items()}
        panels[f"Round {number}: {len(rows)} settings"] = shown
    alt = "Every setting's mean difference to plain CLIP, round by round."
    label = f"{plan.score} less plain CLIP's (points, validation side)"
    drawn = {"-rounds": draw(panels, alt, label)}
    pairs = {**found.tests, **{pair: d for (pair, s), d in found.others.items() if s == plan.score}}
    rows = {f"{_less(pair)} (n = {d.n})": (d, d.established) for pair, d in pairs.items()}
    shares = [measure.name for measure in found.measures if measure.percent and len(found.tests) == 1]
    beside = {name: (d, d.established) for (_, name), d in found.others.items() if name in shares}
    panels = {f"{plan.score}, test side": rows, "What is secondary": beside}
    drawn[""] = draw(panels, "Every comparison with its interval.", "difference in points")
    return {f"figures/{plan.name}{end}.png": one for end, one in drawn.items() if one}


def _less(pair: Pair) -> str:
    return f"{pair[0]} less {'plain CLIP' if pair[1] == ladder.REFERENCE else pair[1]}"


def _standings(steps: Sequence[Step]) -> list[list[str]]:
    last = steps[0].round["keep"] == 1
    kept = [trial for step in steps for trial in step.kept]

    def continues(trial: Any) -> str:
        return "yes" if trial in kept else "always" if trial == ladder.RECIPE and not last else "no"

    def row(one: Standing) -> list[str]:
        diverged = ["diverged", *[""] * (len(ladder.SCORES) - 1)]
        ds = [difference_text(one.differences[s]) for s in ladder.SCORES] if one.differences else diverged
        return [f"`{one.trial.name}`", *ds, mean_text(one.clip), continues(one.trial)]

    return [row(one) for step in steps for one in step.standings]


def _kept(found: Outcome) -> list[str]:
    return [name for name in found.comparison.records if name not in found.comparison.lost]


def _levels(found: Outcome) -> list[list[str]]:
    rows, compared = [], found.comparison
    for name, records in compared.records.items():
        label = f"`{compared.trials[name].name if name in compared.trials else name}`"
        if name in compared.lost:
            rows.append([label, *["diverged"] * len(ladder.SCORES), ""])
            continue
        means = [compared.estimate(name, score) for score in ladder.SCORES.values()]
        seconds = median(record["seconds"]["training"] for record in records.values())
        rows.append([label, *map(mean_text, means), f"{seconds:.0f}"])
    return rows


def _tests(plan: Any, found: Outcome) -> list[list[str]]:
    """Return the primary tests and, unless everything was measured, the secondary ones."""

    def row(pair: Pair, score: str, d: Difference, corrected: str) -> list[str]:
        return [_less(pair), score, difference_text(d), str(d.n), p_text(d.p), corrected, mark(d)]

    alone = len(found.tests) == 1
    tests = [(pair, plan.score, d) for pair, d in found.tests.items()]
    rows = [row(*one, "the test" if alone else p_text(one[2].adjusted)) for one in tests]
    if not found.measures:
        rows += [row(*names, d, p_text(d.adjusted)) for names, d in found.others.items()]
    return rows


def _secondary(found: Outcome) -> list[list[str]]:
    """Return everything else that was measured, with the differences to plain CLIP."""
    rows = []
    for measure in found.measures:
        digits, cells = 2 if measure.percent else 4, []
        for name in _kept(found):
            d = found.others.get(((name, ladder.REFERENCE), measure.name))
            change = "" if d is None else f"<br>{difference_text(d, digits)} {mark(d)}"
            cells.append(mean_text(found.comparison.estimate(name, measure), digits) + change)
        rows.append([measure.name, *cells])
    return rows


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
