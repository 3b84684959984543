"""The study: whether training the towers is above heads on them, and only then the arms."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from studies.data import flickr8k
from studies.data.features import Side
from studies.plan import Find, MissingError
from studies.records import Record
from studies.report import conditions_texts, difference_text, ends_text, mean_text, test_cells
from studies.runner import Study
from studies.statistics import Arms, estimate, paired_difference
from studies.students.measure import CORRELATION, PRIMARY, Metrics, hits_of_pictures, measure, recorded
from studies.training import kept

from .activations import Activations, Packaged, Towers, activations
from .train import OnFrozen, Setting, Start, on_frozen, train

_HERE = Path(__file__).parent
NAME = "photographs"
SIDES = ("train", "dev", "test")
_PART = 250  # sentences whose features are computed at once
Tries = dict[Setting, dict[int, float]]  # R@10 by seed


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A model whose input are its features."""

    log_scale: Tensor

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        return pictures

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return the features."""
        return sentences


class Photographs:
    """Photographs as two towers see them, and the trainings on them.

    Args:
        read: The data set.
        pictures: To train on.
        folder: Of what is computed once.
        towers: Pretrained.
    """

    def __init__(self, read: flickr8k.Photographs, pictures: int, folder: Path, towers: Towers) -> None:
        self.read, self.names, self.towers = read, read.used(pictures), towers
        content = hashlib.sha256(repr([towers.name, self.names, read.sentences, read.judgements]).encode())
        for side in SIDES:
            for name in self.names[side]:
                content.update(hashlib.sha256(read.path(name).read_bytes()).digest())
        self.fingerprint = content.hexdigest()[:16]
        self.folder = folder / self.fingerprint
        self.side = functools.cache(self._side)
        self._heads = functools.cache(lambda *of: on_frozen(self.frozen, *of))

    def _side(self, side: str, depth: int) -> Activations:
        names = self.names[side]
        pictures = [self.read.path(name) for name in names]
        sentences = [self.read.sentences[name] for name in names]
        return activations(self.towers, pictures, sentences, depth, self.folder / f"{side}-{depth}.pt")

    @functools.cached_property
    def frozen(self) -> Side:
        """Features of the side to train on, from the towers as they are."""
        found = kept(self.folder / "frozen.pt", self._features)
        return Side(found["pictures"], found["sentences"])

    def heads(self, setting: Setting) -> OnFrozen:
        """Return the heads of a setting, trained once."""
        return self._heads(setting.seed, setting.head_epochs, setting.batch_size)

    @torch.inference_mode()
    def _features(self) -> dict[str, Tensor]:
        side = self.side("train", 1)
        of_pictures, of_sentences = (tail.eval() for tail in self.towers.tails(1))
        v = [of_pictures(few.float()) for few in side.maps.split(_PART)]
        n, each = side.ends.shape
        every = torch.arange(n * each).split(_PART)
        t = [of_sentences(*side.of_sentences(few // each, few % each)) for few in every]
        sentences = normalize(torch.cat(t), dim=-1).unflatten(0, (n, each))
        return {"pictures": torch.cat(v), "sentences": sentences}

    def train(self, setting: Setting) -> Record:
        """Train and measure a model."""
        start = Start(self.frozen, functools.partial(self.side, "train"), self.towers.tails, self.heads)
        return recorded(lambda: train(setting, start), lambda model: self._measure(model, setting))

    def _measure(self, model: Any, setting: Setting) -> Metrics:
        embedded = model.embed(self.side(setting.side, setting.depth))
        judgements = self.read.judgements if setting.side == "test" else None
        with torch.no_grad():
            log_scale = model.heads.log_scale.detach()
        return measure(Embedded(log_scale), embedded, self.names[setting.side], judgements)


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Photographs]:
    """Return the photographs, if their folder is given."""
    if options.data is None:
        return {}
    folder = options.output / "towers" / sizes.preset
    return {NAME: Photographs(flickr8k.read(options.data), sizes.pictures, folder, Packaged())}


def scores(find: Find, sizes: SimpleNamespace, tries: Sequence[Setting]) -> Tries:
    """Return R@10 of tries by seed.

    Raises:
        MissingError: If one has no record.
    """
    seeds = sizes.tuning_seeds
    find(dataclasses.replace(one, seed=seed) for seed in seeds for one in tries)
    return {one: _by_seed(find, sizes, one) for one in tries}


def _by_seed(find: Find, sizes: SimpleNamespace, one: Setting) -> dict[int, float]:
    records = find.there(dataclasses.replace(one, seed=seed) for seed in sizes.tuning_seeds)
    return {setting.seed: PRIMARY(record) for setting, record in records.items()}


def best(tries: Tries) -> Setting:
    """Return the try of the largest mean over the seeds."""
    return max(tries, key=lambda one: fmean(tries[one].values()))


@dataclasses.dataclass(frozen=True)
class Search:
    """The tries on the dev side: heads on frozen towers, and towers trained after the best of these."""

    heads: Tries
    towers: Tries

    @property
    def gain(self) -> float:
        """The largest mean R@10 of trained towers minus the largest of heads."""
        means = [fmean(of[best(of)].values()) for of in (self.towers, self.heads)]
        return means[0] - means[1]


def search(sizes: SimpleNamespace, find: Find) -> Search:
    """Try the heads' epochs; of the towers then the rate, the depth at the best rate, the epochs at both.

    Raises:
        MissingError: If a training has no record.
    """
    start = Setting("clip", sizes.tuning_seeds[0], "dev", head_epochs=0)
    alone = [dataclasses.replace(start, head_epochs=epochs) for epochs in sizes.heads]
    of_heads = scores(find, sizes, alone)
    first = dataclasses.replace(best(of_heads), epochs=sizes.epochs[0], depth=sizes.depths[0])
    found = scores(find, sizes, [dataclasses.replace(first, lr=lr) for lr in sizes.rates])
    for name, values in (("depth", sizes.depths[1:]), ("epochs", sizes.epochs[1:])):
        chosen = best(found)
        found |= scores(find, sizes, [dataclasses.replace(chosen, **{name: value}) for value in values])
    return Search(of_heads, found)


def settings(sizes: SimpleNamespace, find: Find, found: Search) -> dict[str, Setting]:
    """Return the test side's setting of every arm: its best number, at the rate, depth and epochs of CLIP.

    Raises:
        MissingError: If a training has no record.
    """
    chosen = best(found.towers)
    one_seed = SimpleNamespace(tuning_seeds=sizes.tuning_seeds[:1])
    arms = {"heads": best(found.heads)}
    for arm, values in sizes.tries.items():
        tries = [dataclasses.replace(chosen, arm=arm, value=value) for value in values]
        arms[arm] = best(scores(find, one_seed, tries))
    return arms


def arms_of(sizes: SimpleNamespace, find: Find) -> dict[str, dict[int, Record]]:
    """Return the records of the test side by arm and seed; none if trained towers miss the bar.

    Raises:
        MissingError: If a training has no record.
    """
    found = search(sizes, find)
    if found.gain < sizes.bar:
        return {}
    return find.arms(settings(sizes, find, found), sizes.seeds)


def ask(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> None:
    """Ask for all trainings in their order.

    Raises:
        MissingError: If a training has no record; the first.
        RuntimeError: If the photographs are not there.
    """
    if NAME not in finds:
        raise RuntimeError("the photographs are needed: --data FOLDER")
    arms_of(sizes, finds[NAME])


def results(sizes: SimpleNamespace, finds: Mapping[str, Find]) -> dict[str, Any]:
    """Return the report's values, of the records that are there."""
    find = finds[NAME]
    values: dict[str, Any] = {
        "records": len(find.records),
        "bar": f"{sizes.bar:g}",
        "tries": tries_rows(find),
        "verdict": "The tries are not whole yet.",
        "arms": [],
        "tests": [],
        "made": conditions_texts(find.records.values()),
    }
    try:
        found = search(sizes, find)
        values["verdict"] = verdict_sentence(found, sizes.bar)
        records = arms_of(sizes, find)
    except MissingError:
        return values
    if records:
        arms = Arms(records)
        pairs = [("clip", "heads"), *((arm, "clip") for arm in sizes.tries if arm != "clip")]
        tested = arms.tests(pairs, [PRIMARY])
        values["tests"] = [
            [
                *(f"`{arm}`" for arm in pair),
                *test_cells(of),
                ends_text(arms.over_pictures(pair, hits_of_pictures)),
            ]
            for (pair, _), of in tested.items()
        ]
        values["arms"] = [
            [f"`{arm}`", *(mean_text(arms.estimate(arm, one)) for one in (PRIMARY, CORRELATION))]  # type: ignore[arg-type]
            for arm in records
        ]
    return values


def tries_rows(find: Find) -> list[list[str]]:
    """Return a row for each try with a record: its mean, and the difference from the best heads."""
    tries: Tries = {}
    for one, record in find.records.items():
        if one.side == "dev" and one.arm == "clip":
            tries.setdefault(dataclasses.replace(one, seed=0), {})[one.seed] = PRIMARY(record)
    in_order = sorted(tries, key=lambda one: (one.epochs, one.depth, one.lr, one.head_epochs))
    reference = best({one: tries[one] for one in in_order if not one.epochs})
    rows = []
    for one in in_order:
        towers = f"{one.epochs} epochs, depth {one.depth}, {one.lr:g}" if one.epochs else "frozen"
        minus = "–" if one == reference else difference_text(paired_difference(tries[one], tries[reference]))
        rows.append([str(one.head_epochs), towers, mean_text(estimate(list(tries[one].values()))), minus])
    return rows


def verdict_sentence(found: Search, bar: float) -> str:
    """Say whether trained towers reach the bar."""
    reached = found.gain >= bar
    gain = f"{found.gain:+.2f}".replace("-", "−")
    then = "the arms were trained" if reached else "no arm was trained, and the test side was not used"
    return f"The best trained towers are {gain} points above the best heads ({bar:g} were asked for): {then}."


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=_HERE,
        setting=Setting,
        plan="plan.yaml",
        records={NAME: NAME},
        data=data,
        results=results,
        report="towers",
        ask=ask,
        packages=("torch", "timm", "transformers", "numpy", "scipy", "rankloss"),
    )
