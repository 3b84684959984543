"""Photographs as frozen encoders see them, with a hard negative of each caption; trainings, and measures."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rankloss
from studies.data.features import Encoders, FrozenEncoders, Side, cached, standardised
from studies.data.flickr8k import SENTENCES_PER_PICTURE, read
from studies.records import Record
from studies.students import heads
from studies.students.losses import TEACHER
from studies.students.measure import BOTH_WAYS, Metrics, Model, measure, recorded
from studies.training import kept

from .losses import CLIP, HardNegatives
from .rules import KINDS, Negative, negatives, words_of

START = "start"
_DOGS = 3  # captions that name a dog


@dataclasses.dataclass(frozen=True)
class Setting(heads.Setting):
    """All that determines a training, beside its data."""

    start_lr: float = 0.0  # of the heads that are fine-tuned on dogs; 0: trained from initial weights
    mimicry: float = 0.0  # weight of the distance from these heads' features


@dataclasses.dataclass(frozen=True)
class Part:
    """Photographs with captions and hard negatives."""

    seen: Side
    negatives: Tensor  # [N, 5, D']
    kinds: Tensor  # [N, 5], a place in KINDS; -1 where no rule applies

    def __getitem__(self, rows: Tensor) -> Part:
        """Return some of them."""
        side = Side(self.seen.pictures[rows], self.seen.sentences[rows])
        return Part(side, self.negatives[rows], self.kinds[rows])


class Photographs:
    """The photographs, all and by dogs, and the trainings on them.

    Args:
        sides: By name: all photographs.
        captions: Of each photograph, by side.
        start: Sizes of the training of heads that are fine-tuned.
        content: All that the features depend on.
    """

    def __init__(
        self, sides: Mapping[str, Part], captions: Mapping[str, list[list[str]]], start: Mapping[str, int],
        content: str,
    ) -> None:  # fmt: skip
        self.sides = sides
        named = {side: torch.tensor(list(map(_naming_dogs, of))) for side, of in captions.items()}
        self.dogs = {side: sides[side][count >= _DOGS] for side, count in named.items()}
        self.others = {side: sides[side][count == 0] for side, count in named.items()}
        self.fingerprint = hashlib.sha256(f"{content}{start}".encode()).hexdigest()[:16]
        self.start = functools.cache(
            lambda seed, lr: _train(Setting(CLIP, seed, "", lr=lr, **start), sides["train"])
        )

    def train(self, setting: Setting) -> Record:
        """Train heads and measure them: on all photographs, or fine-tuned, on dogs and on others."""

        def measured(model: Model) -> Metrics:
            kept, learned = (
                of[setting.side]
                for of in ((self.others, self.dogs) if setting.start_lr else (self.sides, self.sides))
            )
            dogs = measure(model, self.dogs[setting.side].seen, ())["retrieval"][BOTH_WAYS]
            found = measure(model, kept.seen, ())
            return {**found, "told": told(model, learned), "dogs": {"R@10": dogs}}

        return recorded(lambda: self._trained(setting), measured)

    def _trained(self, setting: Setting) -> heads.Heads:
        if not setting.start_lr:
            return _train(setting, self.sides["train"])
        start = self.start(setting.seed, setting.start_lr)
        return start if setting.arm == START else _train(setting, self.dogs["train"], start)


def _train(setting: Setting, part: Part, start: heads.Heads | None = None) -> heads.Heads:
    """Train heads by a setting, from other heads if they are given."""
    loss: nn.Module = HardNegatives(setting.arm, setting.weight)
    frozen = None if start is None else encoded(start, part)
    if setting.mimicry:
        loss = rankloss.MimicryLoss(loss, weight=setting.mimicry)

    def given(model: heads.Heads, rows: Tensor, drawn: Tensor) -> dict[str, Any]:
        own = model.sentences(part.negatives[rows, drawn])
        found = {"negatives": own, "has_negative": part.kinds[rows, drawn] >= 0}
        if setting.mimicry and frozen is not None:
            found |= zip(TEACHER, (frozen[0][rows], frozen[1][rows, drawn]), strict=True)
        return found

    return heads.train(setting, part.seen, loss=loss, seen=given, start=start)


@torch.no_grad()
def encoded(model: Model, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Return a model's features of pictures, captions and hard negatives."""
    texts = map(model.sentences, (part.seen.sentences, part.negatives))
    return model.pictures(part.seen.pictures), *texts


def told(model: Model, part: Part) -> dict[str, Any]:
    """Return how often a caption is nearer to a picture than its hard negative is, in percent.

    The accuracy is the mean over pictures of the share of their captions; "blind" is that with the picture
    of the row before, where only the texts can tell, "seen" the difference of both; then that of each rule.
    The digits of "right" and "blind right" are numbers of captions by picture, those of "of" how many count.
    """
    (v, t, n), has = encoded(model, part), part.kinds >= 0
    right = [((t - n) * of.unsqueeze(1)).sum(-1).gt(0) & has for of in (v, v.roll(1, 0))]
    own, blind = (_mean(of.sum(1), has.sum(1)) for of in right)
    return {
        **{"accuracy": own, "blind": blind, "seen": own - blind},
        **{kind: _mean(right[0][part.kinds == k].float()) for k, kind in enumerate(KINDS)},
        **dict(zip(("right", "blind right", "of"), map(_digits, (*right, has)), strict=True)),
    }


def _naming_dogs(captions: Sequence[str]) -> int:
    return sum(not {"dog", "dogs"}.isdisjoint(words_of(text)) for text in captions)


def _digits(found: Tensor) -> str:
    return "".join(map(str, found.sum(1).tolist()))


def _mean(right: Tensor, of: Tensor | None = None) -> float:
    shares = right if of is None else right[of > 0] / of[of > 0]
    return 100 * shares.double().mean().item()


def told_of_pictures(record: Record, right: str = "right") -> np.ndarray:
    """Return the accuracy of each picture that has a hard negative, in percent."""
    found, of = (np.array([*map(int, record["metrics"]["told"][name])]) for name in (right, "of"))
    return 100 * found[of > 0] / of[of > 0]


def data(
    sizes: SimpleNamespace, options: argparse.Namespace, kind: type[Encoders] = FrozenEncoders
) -> dict[str, Photographs]:
    """Return the photographs, whose missing features are computed.

    Raises:
        RuntimeError: Without their folder.
    """
    if options.data is None:
        raise RuntimeError("--data FOLDER of Flickr8k is needed, see examples/studies/photographs/README.md")
    every = read(options.data)
    names = {side: every.splits[side][:count] for side, count in sizes.pictures.items()}
    photographs = dataclasses.replace(every, splits=names)
    cache = cached(photographs, len(names["train"]), kind)
    captions = {side: [photographs.sentences[name] for name in of] for side, of in names.items()}
    counts = Counter(word for of in captions["train"] for text in of for word in words_of(text))
    rules = {side: negatives(of, counts) for side, of in captions.items()}
    blocks = [path.stem for of in names.values() for path in cache.blocks(of)]
    content = repr([blocks, rules])
    path = options.output / "negatives" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.pt"
    features = kept(path, lambda: _encoded(rules, kind()))
    seen = standardised({side: cache.side(of) for side, of in names.items()})
    numbers = {kind: number for number, kind in enumerate(("", *KINDS), start=-1)}
    sides = {
        side: Part(seen[side], features[side], torch.tensor([[numbers[one.kind] for one in x] for x in of]))
        for side, of in rules.items()
    }
    return {"photographs": Photographs(sides, captions, sizes.all, content)}


def _encoded(rules: Mapping[str, list[list[Negative]]], encoders: Encoders) -> dict[str, Tensor]:
    texts = {side: [one.text for of in found for one in of] for side, found in rules.items()}
    return {
        side: torch.from_numpy(encoders.sentences(of)).unflatten(0, (-1, SENTENCES_PER_PICTURE))
        for side, of in texts.items()
    }
