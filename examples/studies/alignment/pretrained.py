"""A pretrained CLIP on new pairs: as it is, its own features in closed form, heads on them, fine-tuned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import rankloss
from rankloss.precision import unit_rows
from rankloss_features import methods
from rankloss_features.folder import NAMES
from studies.data.features import Side
from studies.data.pairs import numbered, vocabulary
from studies.data.sets import SECOND
from studies.records import Record
from studies.students.measure import Metrics, measure, recorded
from studies.students.student import Student
from studies.students.train import fit
from studies.training import kept

from . import heads
from .cca import searched
from .setting import Setting
from .zero_shot import is_right, word_classes

if TYPE_CHECKING:
    from .data import Encoded

START, CLOSED, JOINED, HEADS, TUNED = "start", "start-cca", "start-joined", "start-heads", "start-tuned"
ARMS = (START, CLOSED, JOINED, HEADS, TUNED)
KEPT = "start-kept"  # as `rankloss heads --method cca --keep SHARE`; the value is the share
SHARES = {f"{KEPT} {share:g}": share for share in (1.0, 0.9, 0.8, 0.7, 0.5, 0.0)}
"""The arms of kept similarity in the plan; 1 is the CLIP as it is."""
SEEDLESS = (START, CLOSED, JOINED, *SHARES)
OLD = "old"  # the metrics on the pairs that the CLIP was trained on before
HELD_OUT = ("dev", "test", SECOND)  # sides of old pictures for the zero-shot accuracy
PRETRAINING = Setting("clip", seed=9700, side="dev", batch_size=64, epochs=8, lr=0.002)


class Pretrained:
    """A CLIP that was trained on many pairs, and new pairs.

    Args:
        old: The many pairs.
        new: The new ones.
    """

    def __init__(self, old: Encoded, new: Encoded) -> None:
        self.old, self.new = old, new
        self.fingerprint = f"{old.fingerprint}-{new.fingerprint}"
        texts = (text for data in (old, new) for of in data.source.captions["train"] for text in of)
        self.word_numbers = vocabulary(texts)

    def side(self, of: Encoded, name: str) -> Side:
        """Return a side with its captions in the words of both data sets."""
        return Side(of.sides[name].pictures, numbered(of.source.captions[name], self.word_numbers))

    @functools.cached_property
    def start(self) -> Student:
        """The CLIP before it has seen the new pairs, in evaluation mode."""

        def made() -> dict[str, Any]:
            torch.manual_seed(PRETRAINING.seed)
            model = Student(2 + len(self.word_numbers))
            seen = self.side(self.old, "train")
            return fit(model, rankloss.ClipLoss(), PRETRAINING, seen, lambda *_: {}).state_dict()

        model = Student(2 + len(self.word_numbers))
        model.load_state_dict(kept(self.new.folder / f"pretrained-{self.old.fingerprint}.pt", made))
        return model.eval()

    @functools.cache  # noqa: B019 (a data set is there as long as the process)
    def encoded(self, side: str) -> Side:
        """Return the CLIP's own features of a side of the new pairs."""
        clip, of = self.start, self.side(self.new, side)  # the CLIP may have to be trained first
        with torch.no_grad():
            return Side(clip.pictures(of.pictures), clip.sentences(of.sentences))

    def train(self, setting: Setting) -> Record:
        """Train what is trained, and measure on the new pairs and on the old ones."""
        return recorded(lambda: self._model(setting), lambda model: self._measured(model, setting))

    def _model(self, setting: Setting) -> Any:
        """Return the model of an arm, trained or fitted on the new pairs, or the CLIP as it is."""
        if setting.arm == START or (setting.arm == KEPT and setting.value == 1):
            return self.start
        if setting.arm == KEPT:
            return OfFeatures(self.start, [by_command(self.encoded("train"), setting.value)])
        if setting.arm == TUNED:
            torch.manual_seed(setting.seed)
            model, seen = copy.deepcopy(self.start), self.side(self.new, "train")
            return fit(model, rankloss.ClipLoss(), setting, seen, lambda *_: {})
        if setting.arm == HEADS:
            part: heads.Part = heads.trained(setting, self.encoded("train"), setting.seed)
            return OfFeatures(self.start, [part])
        closed, _ = searched(self)
        return OfFeatures(self.start, [closed] if setting.arm == CLOSED else [closed, Unchanged()])

    @torch.inference_mode()
    def _measured(self, model: Any, setting: Setting) -> Metrics:
        """Return the metrics on a side of the new pairs, and for the test side on that of the old ones."""
        found: dict[str, Any] = measure(model, self.side(self.new, setting.side), ())
        if setting.side == "test":
            found[OLD] = measure(model, self.side(self.old, setting.side), ())
        if setting.arm == KEPT:
            found["zero-shot"] = self._zero_shot(model)
        return found

    def _zero_shot(self, model: Any) -> dict[str, Any]:
        """Return the accuracy on held-out old pictures, whose classes are words, and a bit of each."""
        captions = self.old.source.captions
        held_out = [text for side in HELD_OUT for text, *_ in captions[side]]
        classes = word_classes(held_out, [text for text, *_ in captions["train"]])
        pictures = torch.cat([self.old.sides[side].pictures for side in HELD_OUT])
        has_class = torch.tensor([one is not None for one in classes])
        named = [one for one in classes if one is not None]
        right = is_right(model, model.pictures(pictures[has_class]), named, self.word_numbers)
        return {
            "top-1": 100 * right.double().mean().item(),
            "pictures": len(named),
            "classes": sorted(set(named)),
            "hits": np.packbits(right.numpy()).tobytes().hex(),
        }


def by_command(train: Side, keep: float) -> heads.Part:
    """Return what ``rankloss heads --method cca --keep`` makes of a CLIP's features of pairs."""
    each = train.sentences.shape[1]
    numbers = np.arange(len(train.pictures)).repeat(each)
    features = (train.pictures.repeat_interleave(each, 0), train.sentences.flatten(0, 1))
    pairs = methods.Pairs(dict(zip(NAMES, features, strict=True)), pictures=numbers, groups=numbers)
    return Modules(*map(methods.make(methods.Asked("cca", keep=keep), pairs).modules.__getitem__, NAMES))


class Modules:
    """A module of each modality as a part.

    Args:
        of_pictures: From features to those of pictures.
        of_sentences: … of sentences.
    """

    def __init__(self, of_pictures: nn.Module, of_sentences: nn.Module) -> None:
        self.of_pictures, self.of_sentences = of_pictures, of_sentences

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, K]``."""
        return unit_rows(self.of_pictures(pictures))

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, K]``."""
        return unit_rows(self.of_sentences(sentences.flatten(0, 1))).unflatten(0, sentences.shape[:2])


class Unchanged:
    """A model's own features, as a part that stands beside others."""

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        return pictures

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return the features."""
        return sentences


class OfFeatures(nn.Module):
    """Parts side by side on the features of a CLIP.

    Args:
        clip: Its features are the parts' input.
        parts: Models of features, equally weighted.
    """

    def __init__(self, clip: Student, parts: Sequence[heads.Part]) -> None:
        super().__init__()
        self.clip, self.joined = clip, heads.SideBySide(dict.fromkeys(parts, 1.0))
        self.log_scale = torch.zeros(())

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, K]``, of pixels."""
        return self.joined.pictures(self.clip.pictures(pictures))

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, K]``, of words' numbers."""
        return self.joined.sentences(self.clip.sentences(sentences))


class PretrainedSplits:
    """The pretrained CLIP on a data set, made once, when it is first needed; there is one split.

    Args:
        make: Returns it.
    """

    def __init__(self, make: Callable[[], Pretrained]) -> None:
        self.of = functools.cache(make)

    def fingerprint(self, _: Setting) -> str:
        """Return the fingerprint of all data."""
        return self.of().fingerprint

    def train(self, setting: Setting) -> Record:
        """Train and measure."""
        return self.of().train(setting)
