"""Records → ``search.md``: every round, every trial, the confirmation, and what they show.

The sentences are those of ``templates/search.md``; they claim nothing that an interval does not support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from examples_common.tables import markdown as table

from miniature_paper.report import conditions, write_page
from miniature_paper.statistics import Difference, Estimate
from miniature_paper.wording import difference_text, mark, mean_text, p_text

from . import figure
from .confirmation import WITH_CLIP, Confirmation
from .ladder import Find, Standing, Step, tried, winner
from .objective import OBJECTIVE, SCORES
from .trials import LOSS, RECIPE, Search, Trial


def write(
    search: Search,
    steps: Sequence[Step],
    confirmations: Sequence[Confirmation],
    folder: Path,
    *,
    find: Find,
    command: str,
) -> Path:
    """Write the report with its picture, and return the path of its HTML page.

    Args:
        search: The search.
        steps: Its rounds, as far as they are.
        confirmations: The confirmations, in order.
        folder: Where to; an earlier report is replaced.
        find: Returns the records of trainings.
        command: The command that makes this report.
    """
    settings, picture = tried(steps), figure.draw(steps)
    needed = [a for step in steps for a in step.attempts]
    needed += [a for c in confirmations for a in c.declaration.attempts(search)]
    records = list(find(needed).values())
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    facts = [
        ["command", f"`{command}`"],
        ["settings tried", str(len(settings))],
        ["trainings", f"{len(records)}, {hours:.1f} hours summed over them"],
    ]
    rows = [[f"`{s.name}`", s.factor, f"`{s.command}`" if s.changes else "nothing"] for s in settings]
    (folder / "figures" / "search.png").unlink(missing_ok=True)
    return write_page(
        folder,
        "search.md",
        f"A stronger setting: {search.name}",
        {"search": picture} if picture else {},
        search=search,
        steps=[(step, _round(step)) for step in steps],
        last=steps[-1],
        best=winner(search, steps),
        confirmations=[(c, _levels(c), _tests(c)) for c in confirmations],
        recipe=RECIPE,
        loss=LOSS,
        settings=settings,
        lighter=lighter_weights(search, steps, find),
        facts=table(["", ""], [*facts, *conditions(records)]),
        settings_table=table(["setting", "varies", "changes"], rows),
    )


def lighter_weights(search: Search, steps: Sequence[Step], find: Find) -> dict[str, float]:
    """Return Σμ/N of trials with records of releases before 0.2 in which not all items count the same.

    Those releases divided a list's loss by its N items instead of by Σμ, the number of items that count.
    """
    trials = {trial.name: trial for trial in tried(steps) if trial.counts_fewer}
    attempts = [a for step in steps for a in step.attempts if a.trial in trials]
    records = find(attempts).items()
    old = {a.trial for a, record in records if record["conditions"].get("rankloss", "").startswith("0.1.")}
    return {name: weight(search, trial) for name, trial in trials.items() if name in old}


def weight(search: Search, trial: Trial) -> float:
    """Return Σμ/N of a trial's lists: the share of the weight that a division by N leaves."""
    changes = dict(trial.changes)
    n = int(changes.get("--batch-size", search.grid.batch_size))
    rank = np.arange(1, n + 1)
    mu = 1 / np.log1p(rank) if changes.get("--rankclip-discount") == "log" else np.ones(n)
    return float(mu[: int(changes.get("--rankclip-top-k", n))].sum() / n)


def _round(step: Step) -> str:
    last = step.round.keep == 1

    def continues(trial: Trial) -> str:
        if trial in step.kept:
            return "yes"
        return "always" if trial == RECIPE and not last else "no"

    def row(one: Standing) -> list[str]:
        diverged = ["diverged", *[""] * (len(SCORES) - 1)]
        differences = [difference_text(one.differences[s]) for s in SCORES] if one.differences else diverged
        return [f"`{one.trial.name}`", *differences, _mean(one.reference[OBJECTIVE]), continues(one.trial)]

    head = ["setting", *SCORES, "CLIP's objective", "wins" if last else "continues"]
    return table(head, [row(standing) for standing in step.standings], right=len(head) - 1)


def _mean(found: Estimate) -> str:
    return mean_text(found, found.n)


def _levels(confirmation: Confirmation) -> str:
    def cells(of: Mapping[str, Estimate]) -> list[str]:
        return [_mean(of[name]) if of else "diverged" for name in SCORES]

    standings = confirmation.standings
    rows = [[f"`{s.trial.name}`", *cells(s.levels)] for s in standings]
    rows += [[f"plain CLIP, for `{s.trial.name}`", *cells(s.reference)] for s in standings]
    return table(["", *SCORES], rows, right=len(SCORES))


def _tests(confirmation: Confirmation) -> str:
    def row(pair: str, name: str, d: Difference, corrected: str) -> list[str]:
        return [pair, name, difference_text(d), p_text(d.p), corrected, mark(d)]

    primary = confirmation.primary
    rows = [] if primary is None else [row(WITH_CLIP, OBJECTIVE, primary, "the test")]
    rows += [row(*names, d, p_text(d.adjusted)) for names, d in confirmation.others.items()]
    return table(["compared", "score", "difference", "p", "corrected", ""], rows, right=4)
