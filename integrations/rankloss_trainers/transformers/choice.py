"""From the name of a loss and its options to the loss that a Trainer trains with."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

import rankloss
from rankloss_features.folder import Features
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry, Options
from rankloss_trainers.clock import listeners
from rankloss_trainers.driven_loss import DrivenLoss, call_alone
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import check_criterion, reason_against
from rankloss_trainers.transformers.teacher import COLUMNS

_logger = logging.getLogger("rankloss_trainers")


@dataclass(frozen=True)
class Choice:
    """A loss, and what a trainer has to know to feed it.

    Attributes:
        name: The name in the catalogue, or the class of a module of one's own.
        loss: The loss.
        entry: Its entry in the catalogue, or what stands for one.
        options: The values of its options.
        teacher: Whether it ranks by a teacher, whose features are columns of the batch; None if it does where
            they are given.
        package: What registers it; empty for a module.
        features: The folder of the teacher's features, for data that are bound to it.
    """

    name: str
    loss: DrivenLoss
    entry: LossEntry
    options: Options
    teacher: bool | None
    package: str = ""
    features: Features | None = None

    @property
    def captions(self) -> str | None:
        """The prefix of the columns of a second caption; None for a loss without one."""
        return self.entry.caption_key(self.options)

    def start(self, epochs: float, *, announce: bool) -> None:
        """Begin a run: decide what the clock goes by, and log what is trained.

        Args:
            epochs: Epochs of the run; infinity where its data have no length.
            announce: Whether this process logs what is trained.

        Raises:
            ValueError: The loss goes by epochs, and their number is not known.
        """
        clock, unit = self.loss.clock, self.entry.unit
        clock.unit = unit if isinstance(unit, str) else unit(self.options, epochs)
        if clock.unit == "epoch" and math.isinf(epochs) and listeners(self.loss.criterion, "set_epoch"):
            raise ValueError(
                f"{self.name} goes by epochs (schedule_unit 'epoch'), but training data without a length "
                "have no known number of epochs; go by steps (schedule_unit 'step')"
            )
        if announce and self.package:
            text = self.entry.described(self.options, epochs)
            _logger.info("Loss: %s (%s)%s", self.name, self.package, text and f", {text}")


def defaults(entry: LossEntry) -> dict[str, Any]:
    """The options of a loss where none is given; a schedule goes by steps, since epochs may be a fraction."""
    options = {option.key: option.default for option in entry.options}
    return {**options, "schedule_unit": "step"} if "schedule_unit" in options else options


def choose(loss: str | nn.Module, given: Options, base: rankloss.ClipLoss | rankloss.SigLipLoss) -> Choice:
    """A loss of the catalogue, or a module of one's own.

    Args:
        loss: The name of the loss, or the module.
        given: Options of a named loss by their keys; the others have their :func:`defaults`.
        base: The loss that the model was made for.

    Raises:
        TypeError: The loss has no such option; a module has none.
        ValueError: The loss does not exist, cannot work like this, or has parameters.
    """
    if not isinstance(loss, str):
        if given:
            raise TypeError("loss_options is for a loss that is given by its name; the module has its own")
        check_criterion("loss", loss)
        evaluate = RankClipLog() if isinstance(loss, rankloss.RankClipLoss) else call_alone
        entry = LossEntry(build=lambda *_: loss, unit="step")
        return Choice(type(loss).__name__, DrivenLoss(loss, evaluate=evaluate), entry, {}, None)
    found = catalog.candidates()
    if loss not in found:
        raise ValueError(f"loss must be one of {', '.join(map(repr, found))}, or a module; got {loss!r}")
    entry = found[loss].load()
    options = defaults(entry)
    unknown = given.keys() - options.keys()
    if unknown:
        raise TypeError(f"{loss} has no option {sorted(unknown)[0]!r}; it has {', '.join(options)}")
    options.update(given)
    kind = "sigmoid" if isinstance(base, rankloss.SigLipLoss) else "softmax"
    where = entry.reference_features(options)
    conditions = {kind: "a model that has a logit_bias"}
    if where is not None and where.partition(":")[0] == "samples":
        conditions["columns"] = where
    reason = reason_against(loss, entry, options, base.gather, conditions)
    if reason is not None:
        raise ValueError(reason)
    criterion = check_criterion(f"loss {loss!r}", entry.build(base, options, base.gather))
    driven = DrivenLoss(criterion, evaluate=call_alone if entry.log is None else entry.log(options))
    package = found[loss].package or f"rankloss {rankloss.__version__}"
    features = None if where is None else Features(where).check()
    return Choice(loss, driven, entry, options, _teacher(entry, options, given, criterion), package, features)


def _teacher(entry: LossEntry, options: Options, given: Options, criterion: nn.Module) -> bool | None:
    """See :class:`Choice`."""
    if entry.uses_teacher(options):
        return True
    takes_one = any(COLUMNS[0] in inspect.signature(x.forward).parameters for x in criterion.modules())
    # The batch's own ranking makes way for a teacher's, unless it was asked for.
    return None if takes_one and "reference" not in given else False
