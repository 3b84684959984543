"""What is tried: the settings, the rounds they go through, and the single trainings these consist of.

A trial is the recipe with some of the trainer's arguments changed. It is compared with plain CLIP that has
the same changes as far as they concern CLIP, which is the batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import yaml
from examples_common.trainer import Job

from miniature_paper import grid
from miniature_paper.grid import BY_STEP, trained_model, training_recipe

BACKBONE = "resnet"
LOSS, REFERENCE = "rankclip", "clip"
OBJECTIVE, RECALL = "objective", "R@10, both ways"  # scores of ``objective.py``
MEASURES = 1  # raise it whenever the search measures something else: older records are then made again
_BATCH = "--batch-size"
# Releases before 0.2 took the mean of a list over all N items, also where fewer of them count, or count for
# less: with these options the rank terms weighed less there.
_COUNTING = ("--rankclip-top-k", "--rankclip-discount")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting that is tried."""

    name: str
    factor: str  # what it varies; levels of one factor exclude each other
    changes: tuple[tuple[str, str], ...] = ()  # the trainer's arguments that differ from the recipe's
    loss: str = LOSS

    @property
    def command(self) -> str:
        """The changed arguments as they are typed."""
        return " ".join(word for change in self.changes for word in change)

    @property
    def shared(self) -> tuple[tuple[str, str], ...]:
        """The changes that plain CLIP is trained with, too."""
        return tuple(change for change in self.changes if change[0] == _BATCH)

    @property
    def counts_fewer(self) -> bool:
        """Whether a list's items do not all count the same: with a top-k or a discount."""
        return any(flag in _COUNTING for flag, _ in self.changes)

    def __add__(self, other: Trial) -> Trial:
        """Both settings at once.

        Raises:
            ValueError: If they change the same argument.
        """
        if {flag for flag, _ in self.changes} & {flag for flag, _ in other.changes}:
            raise ValueError(f"{self.name} and {other.name} change the same argument")
        return Trial(
            f"{self.name}+{other.name}",
            f"{self.factor} + {other.factor}",
            tuple(sorted(self.changes + other.changes)),
        )


_CONTENT = yaml.safe_load(Path(__file__).with_name("searches.yaml").read_text(encoding="utf-8"))
TRIALS = tuple(
    Trial(name, entries.pop("factor"), tuple(entries.items()))
    for name, entries in _CONTENT.pop("trials").items()
)
RECIPE = TRIALS[0]
VALIDATION, TEST = "validation", "test"


@dataclasses.dataclass(frozen=True)
class Round:
    """One rung of the ladder."""

    epochs: int
    seeds: tuple[int, ...]  # no two rounds share one
    keep: int  # how many trials continue; after the last round, the winner alone


@dataclasses.dataclass(frozen=True)
class Size:
    """What attempts of one name have in common."""

    preset: grid.Preset  # whose pairs, batch size and limits they have
    whole: bool = False  # whether the test side is measured with everything that the grid measures
    teacher: str | None = None  # the model whose rankings the measured ones are compared with


# Studies add theirs.
SIZES = {name: Size(preset) for name, preset in grid.PRESETS.items()}


@dataclasses.dataclass(frozen=True)
class Search:
    """A size of the search."""

    name: str  # of one of the sizes
    note: str  # what the report says about it
    trials: tuple[Trial, ...]  # what the first round tries, the recipe among them
    rounds: tuple[Round, ...]
    combined: int  # after the first round, so many factors are combined
    confirmation: Round  # of the first confirmation; a second one would take the seeds after it

    def __post_init__(self) -> None:
        if self.combined and RECIPE not in self.trials:
            raise ValueError("trials: the recipe must be among them")
        if len({trial.name for trial in self.trials}) < len(self.trials):
            raise ValueError("trials: every name once")
        if len(self.trials) > 1 and not self.rounds:
            raise ValueError("rounds: several trials need at least one")
        kept = [one.keep for one in self.rounds]
        if (kept and kept[-1] != 1) or any(a < b for a, b in pairwise(kept)):
            raise ValueError("rounds: none may keep more trials than the one before, the last one keeps 1")
        seeds = [seed for one in (*self.rounds, self.confirmation) for seed in one.seeds]
        if len(set(seeds)) < len(seeds) or max(seeds) != self.confirmation.seeds[-1]:
            raise ValueError("rounds, confirmation: no seed may serve twice, the confirmation's come last")

    @property
    def recipe(self) -> tuple[Trial, ...]:
        """The recipe, where it goes through every round: a search around it combines what helped."""
        return (RECIPE,) if self.combined else ()

    @property
    def grid(self) -> grid.Preset:
        """The preset of the grid."""
        return SIZES[self.name].preset

    def confirmation_seeds(self, number: int) -> tuple[int, ...]:
        """Return the seeds of the ``number``-th confirmation, counted from 1: always fresh ones."""
        first = self.confirmation.seeds
        return tuple(seed + (number - 1) * len(first) for seed in first)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One training, and the side it is measured on."""

    trial: str  # the trial's name; plain CLIP's is "clip" with what it shares with the trial
    loss: str
    changes: tuple[tuple[str, str], ...]  # arguments that differ from the recipe's
    epochs: int
    seed: int
    side: str  # validation or test
    preset: str  # the size's name, which fixes everything else
    backbone: str = BACKBONE

    @classmethod
    def of_record(cls, stored: Mapping[str, Any]) -> Attempt:
        """Return the attempt that a record's ``setting`` describes."""
        changes = tuple((flag, value) for flag, value in stored["changes"])
        return cls(**{**stored, "changes": changes})

    @property
    def pairs(self) -> int:
        """Number of training pairs."""
        return SIZES[self.preset].preset.pairs

    @property
    def batch_size(self) -> int:
        """Pairs in a batch."""
        return int(dict(self.changes).get(_BATCH, SIZES[self.preset].preset.batch_size))

    @property
    def steps(self) -> int:
        """Optimizer steps: whatever the batch size, the same pairs are seen."""
        return self.pairs // self.batch_size * self.epochs

    @property
    def whole(self) -> bool:
        """Whether everything is measured that the grid measures."""
        return SIZES[self.preset].whole and self.side == TEST

    @property
    def name(self) -> str:
        """A short name for people and files."""
        return f"{self.side}-{self.epochs}ep-{self.trial}-seed{self.seed}"

    def job(self) -> Job:
        """Return what the trainer is started with."""
        preset = SIZES[self.preset].preset
        # The same share of the steps as in the grid.
        warmup = round(self.steps * preset.warmup / preset.steps)
        words = training_recipe(self.loss, self.epochs, self.batch_size, warmup, self.seed)
        if self.loss.startswith(LOSS):
            words += BY_STEP
        words += [word for change in self.changes if change[0] != _BATCH for word in change]
        return Job(self.loss, self.epochs, trained_model(self.backbone), tuple(words))

    def measured(self) -> dict[str, Any]:
        """Return what measuring depends on, for the fingerprint."""
        size = SIZES[self.preset]
        limits = {name: getattr(size.preset, name) for name in ("retrieval_items", "class_items")}
        if not self.whole:
            return {"version": MEASURES, **limits}
        limits |= {name: getattr(size.preset, name) for name in ("probe_items", "probe_strengths")}
        return {"version": [MEASURES, grid.MEASURES], **limits, "teacher": size.teacher}


def attempt(search: Search, trial: Trial, epochs: int, seed: int, side: str) -> Attempt:
    """Return one training of a trial."""
    return Attempt(trial.name, trial.loss, trial.changes, epochs, seed, side, search.name)


def reference(search: Search, trial: Trial, epochs: int, seed: int, side: str) -> Attempt:
    """Return the training of plain CLIP that it is compared with."""
    name = "-".join([REFERENCE, *(f"{flag.strip('-')}-{value}" for flag, value in trial.shared)])
    return Attempt(name, REFERENCE, trial.shared, epochs, seed, side, search.name)


def attempts(
    search: Search, trials: Iterable[Trial], epochs: int, seeds: Sequence[int], side: str
) -> list[Attempt]:
    """Return every training that a comparison of these trials needs, seed by seed, plain CLIP first."""
    trials = list(trials)
    made = [
        make(search, trial, epochs, seed, side)
        for seed in seeds
        for make in (reference, attempt)
        for trial in trials
    ]
    return list(dict.fromkeys(made))


def combine(helped: Sequence[Trial], limit: int) -> list[Trial]:
    """Return the combinations of what helped, each of another factor, the most helpful first.

    Every combination of two and more of the first ``limit``, and all of them together if there are more.
    """
    first = sorted(helped[:limit], key=lambda trial: trial.name)
    groups = [group for size in range(2, len(first) + 1) for group in combinations(first, size)]
    if len(helped) > limit:
        groups.append(tuple(sorted(helped, key=lambda trial: trial.name)))
    found = []
    for group in groups:
        whole = group[0]
        for trial in group[1:]:
            whole = whole + trial
        found.append(whole)
    return found


def _search(
    name: str, note: str, rounds: list[Any], confirmation: Any, combined: int, trials: Any = None
) -> Search:
    chosen = tuple(trial for trial in TRIALS if trials is None or trial.name in trials)
    *ladder, last = (Round(**{**one, "seeds": tuple(one["seeds"])}) for one in (*rounds, confirmation))
    return Search(name, note, chosen, tuple(ladder), combined, last)


SEARCHES = {name: _search(name, **entries) for name, entries in _CONTENT.items()}
