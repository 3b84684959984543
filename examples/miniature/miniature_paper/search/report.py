"""Records → ``search.md``: every round, every trial, the confirmation, and what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from miniature_paper.findings import p_text
from miniature_paper.markdown import table
from miniature_paper.report import SEARCH
from miniature_paper.statistics import CONFIDENCE, Difference, Estimate
from miniature_paper.tables import difference_text, mark, mean_text
from miniature_paper.wording import SIGNS

from . import figure, wording
from .confirmation import WITH_CLIP, Confirmation, Declaration
from .ladder import Find, Standing, Step, tried, winner
from .objective import DEFINITION, OBJECTIVE, SCORES
from .trials import LOSS, RECIPE, Round, Search, Trial

_PICTURE = "figures/search.png"


def write(
    search: Search,
    steps: Sequence[Step],
    confirmations: Sequence[Confirmation],
    folder: Path,
    *,
    find: Find,
    command: str,
) -> Path:
    """Write the report and its picture, and return its path.

    Args:
        search: The search.
        steps: Its rounds, as far as they are.
        confirmations: The confirmations, in order.
        folder: Where to; an earlier report is replaced.
        find: Returns the records of trainings, for the hours they took.
        command: The command that makes this report.
    """
    picture = figure.draw(steps)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / _PICTURE).unlink(missing_ok=True)
    if picture is not None:
        (folder / _PICTURE).write_bytes(picture)
    path = folder / SEARCH
    path.write_text(
        page(search, steps, confirmations, find=find, command=command, picture=picture is not None),
        encoding="utf-8",
    )
    return path


def page(
    search: Search,
    steps: Sequence[Step],
    confirmations: Sequence[Confirmation],
    *,
    find: Find,
    command: str,
    picture: bool = False,
) -> str:
    """Return the report as Markdown."""
    best = winner(search, steps)
    settings = tried(steps)
    blocks = [
        f"# A stronger setting: {search.name}",
        "Is there a setting in which the rank terms help more than the recipe's? Searched for on the "
        "validation side, confirmed once on the test side.",
        *([f"> {search.note}"] if search.note else []),
        *(f"> {warning}" for warning in wording.warnings(confirmations, best)),
        "## In short",
        wording.progress(search, steps),
        *(_said(confirmation) for confirmation in confirmations),
    ]
    if best is not None and not confirmations:
        blocks.append("Nothing is confirmed yet: `--confirm` does it.")
    blocks += [
        _facts(search, steps, confirmations, find, command),
        "## What is compared, and how",
        *_method(search, settings),
        "## The settings",
        _settings(settings),
        "## The rounds",
        f"Mean difference to plain CLIP at the same batch size and of the same seeds, ± half of its "
        f"{100 * CONFIDENCE:.0f} % t-interval, in points; the best first. **The intervals are those of "
        f"single comparisons, and {len(settings)} settings were tried: with so many, some exclude zero by "
        "chance alone, and the first one leads partly by chance.** So nothing is tested here, and no "
        "difference in these tables is a result.",
    ]
    if picture:
        blocks.append(
            f"![Every trial's mean difference to plain CLIP, round by round; the tables have the same "
            f"numbers.]({_PICTURE})"
        )
        blocks.append("Coloured: goes on. Dashed: plain CLIP.")
    for number, step in enumerate(steps, start=1):
        blocks += _round(number, step)
    for confirmation in confirmations:
        blocks += _confirmation(confirmation)
    return "\n\n".join(blocks) + "\n"


def _said(confirmation: Confirmation) -> str:
    words = [wording.verdict(confirmation), wording.against_recipe(confirmation)]
    return f"**{' '.join(word for word in words if word)}**"


def _facts(
    search: Search, steps: Sequence[Step], confirmations: Sequence[Confirmation], find: Find, command: str
) -> str:
    needed = [a for step in steps for a in step.attempts]
    needed += [a for c in confirmations for a in c.declaration.attempts(search)]
    records = find(needed).values()
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    rows = [
        ["command", f"`{command}`"],
        ["settings tried", str(len(tried(steps)))],
        ["trainings", f"{len(records)}, {hours:.1f} hours summed over them"],
    ]
    names = dict.fromkeys(name for record in records for name in record["conditions"])
    for name in names:
        values = dict.fromkeys(str(record["conditions"].get(name, "not recorded")) for record in records)
        rows.append([name, ", ".join(values)])
    return table(["", ""], rows)


def _method(search: Search, settings: Sequence[Trial]) -> list[str]:
    preset = search.grid
    rounds = "; ".join(
        f"round {number}, {_budget(one)}, from which {_kept(one.keep)}"
        for number, one in enumerate(search.rounds, start=1)
    )
    return [
        f"The recipe is `--loss {LOSS}` with its defaults and λ by the step; {preset.pairs:,} pairs, batches "
        f"of {preset.batch_size}. A setting is the recipe with some arguments changed, one factor at a time "
        f"to begin with: {rounds}. After the first round, the best level of every factor that did better "
        f"than the recipe is combined with those of the others (all combinations of the best "
        f"{search.combined} factors, and all factors together). Whatever the batch size, the same pairs are "
        "seen equally often, and the learning rate is the same. The recipe goes through every round.",
        DEFINITION,
        "Seeds are never used twice: those of a later round, and of the confirmation, chose nothing.",
        f"Altogether {len(settings)} settings were tried.",
    ]


def _budget(one: Round | Declaration) -> str:
    first, last = one.seeds[0], one.seeds[-1]
    seeds = f"seeds {first} to {last}" if last > first else f"seed {first}"
    return f"{one.epochs} epoch{'s' * (one.epochs > 1)}, {seeds}"


def _kept(number: int) -> str:
    return f"the best {number} go on" if number > 1 else "the best one is the winner"


def _settings(settings: Sequence[Trial]) -> str:
    rows = [
        [f"`{trial.name}`", trial.factor, f"`{trial.command}`" if trial.changes else "nothing"]
        for trial in settings
    ]
    return table(["setting", "varies", "changes"], rows)


def _round(number: int, step: Step) -> list[str]:
    title = f"### Round {number}: {_budget(step.round)}"
    if step.missing:
        return [title, f"{len(step.missing)} of {len(step.attempts)} trainings are missing."]
    rows = [
        [
            f"`{standing.trial.name}`",
            *_differences(standing),
            mean_text(standing.reference[OBJECTIVE], standing.reference[OBJECTIVE].n),
            _goes_on(standing, step),
        ]
        for standing in step.standings
    ]
    head = ["setting", *SCORES, "CLIP's objective", "goes on" if step.round.keep > 1 else "wins"]
    return [title, table(head, rows, right=len(head) - 1)]


def _goes_on(standing: Standing, step: Step) -> str:
    if standing.trial in step.kept:
        return "yes"
    return "always" if standing.trial == RECIPE and step.round.keep > 1 else "no"


def _differences(standing: Standing) -> list[str]:
    if wording.lost(standing):
        return ["diverged", *[""] * (len(SCORES) - 1)]
    return [difference_text(standing.differences[name]) for name in SCORES]


def _confirmation(confirmation: Confirmation) -> list[str]:
    one = confirmation.declaration
    title = (
        f"## {'Confirmation' if one.number == 1 else f'Confirmation {one.number}'}: `{one.trial.name}`, "
        f"{_budget(one)}, test side"
    )
    if confirmation.missing:
        return [title, f"{confirmation.missing} trainings are missing."]
    levels = [[f"`{s.trial.name}`", *_levels(s.levels)] for s in confirmation.standings]
    levels += [[f"plain CLIP, for `{s.trial.name}`", *_levels(s.reference)] for s in confirmation.standings]
    rows = []
    if confirmation.primary is not None:
        rows.append(_tested(WITH_CLIP, OBJECTIVE, confirmation.primary, "the test"))
    rows += [_tested(pair, name, d, p_text(d.adjusted)) for (pair, name), d in confirmation.others.items()]
    blocks = [
        title,
        "The one test is that of the objective against plain CLIP; everything else is secondary and "
        "corrected together (Holm). The held-out pictures are the same for every seed: an interval says "
        "where the mean over more seeds would be.",
        table(["", *SCORES], levels, right=len(SCORES)),
        table(["compared", "score", "difference", "p", "corrected", ""], rows, right=4),
        SIGNS,
    ]
    if one.trial != RECIPE:
        blocks.append(f"As arguments: `--loss {LOSS} --rankclip-schedule-unit step {one.trial.command}`")
    return blocks


def _levels(of: Mapping[str, Estimate]) -> list[str]:
    return [mean_text(of[name], of[name].n) if of else "diverged" for name in SCORES]


def _tested(pair: str, name: str, difference: Difference, corrected: str) -> list[str]:
    return [pair, name, difference_text(difference), p_text(difference.p), corrected, mark(difference)]
