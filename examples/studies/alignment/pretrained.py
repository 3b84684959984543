"""A pretrained CLIP on new pairs: as it is, its own features in closed form, heads on them, fine-tuned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import rankloss
from studies.data.features import Side
from studies.data.pairs import numbered, vocabulary
from studies.records import Record
from studies.students.measure import Metrics, measure, recorded
from studies.students.student import Student
from studies.students.train import fit
from studies.training import kept

from . import heads
from .cca import searched
from .setting import Setting

if TYPE_CHECKING:
    from .data import Encoded

START, CLOSED, JOINED, HEADS, TUNED = "start", "start-cca", "start-joined", "start-heads", "start-tuned"
ARMS = (START, CLOSED, JOINED, HEADS, TUNED)
SEEDLESS = (START, CLOSED, JOINED)
OLD = "old"  # the metrics on the pairs that the CLIP was trained on before
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
        return recorded(lambda: self._model(setting), lambda model: self._measured(model, setting.side))

    def _model(self, setting: Setting) -> Any:
        if setting.arm == START:
            return self.start
        if setting.arm == TUNED:
            torch.manual_seed(setting.seed)
            model, seen = copy.deepcopy(self.start), self.side(self.new, "train")
            return fit(model, rankloss.ClipLoss(), setting, seen, lambda *_: {})
        if setting.arm == HEADS:
            part: heads.Part = heads.trained(setting, self.encoded("train"), setting.seed)
            return OfFeatures(self.start, [part])
        closed, _ = searched(self)
        return OfFeatures(self.start, [closed] if setting.arm == CLOSED else [closed, Unchanged()])

    def _measured(self, model: Any, side: str) -> Metrics:
        with torch.inference_mode():
            found: dict[str, Any] = measure(model, self.side(self.new, side), ())
            if side == "test":
                found[OLD] = measure(model, self.side(self.old, side), ())
        return found


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
    """The pretrained CLIP on a data set, made when it is trained on; there is one split.

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
