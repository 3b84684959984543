"""From the name of a loss and its options to the loss that a Trainer trains with."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import rankloss
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry
from rankloss_trainers.clock import listeners
from rankloss_trainers.driven_loss import DrivenLoss, call_alone
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import check_criterion, reason_against
from rankloss_trainers.transformers.embeddings import REFERENCES

_logger = logging.getLogger("rankloss_trainers")


@dataclass(frozen=True)
class Choice:
    """A loss, and what a trainer has to know to feed it.

    Attributes:
        name: The name in the catalogue, or the class of a module of one's own.
        loss: The loss.
        captions: The prefix of the columns of a second caption; None for a loss without one.
        uses_teacher: Whether it ranks by a teacher, whose features are columns of the batch; None for a
            module, which takes them or not.
        unit: What its clock goes by in a run of so many epochs, ``"epoch"`` or ``"step"``.
        describe: What is trained in a run of so many epochs, for the log; empty for a module.
    """

    name: str
    loss: DrivenLoss
    captions: str | None = None
    uses_teacher: bool | None = None
    unit: Callable[[float], str] = lambda _: "step"
    describe: Callable[[float], str] = lambda _: ""

    def start(self, epochs: float, *, announce: bool) -> None:
        """Begin a run: decide what the clock goes by, and log what is trained.

        Args:
            epochs: Epochs of the run; infinity where its data have no length.
            announce: Whether this process logs what is trained.

        Raises:
            ValueError: The loss goes by epochs, and their number is not known.
        """
        clock = self.loss.clock
        clock.unit = self.unit(epochs)
        if clock.unit == "epoch" and math.isinf(epochs) and listeners(self.loss.criterion, "set_epoch"):
            raise ValueError(
                f"{self.name} goes by epochs (schedule_unit 'epoch'), but training data without a length "
                "have no known number of epochs; go by steps (schedule_unit 'step')"
            )
        text = self.describe(epochs)
        if announce and text:
            _logger.info("Loss: %s", text)

    def check_references(self, references: Collection[str], columns: Iterable[str]) -> None:
        """Raise a ValueError unless a training batch has a teacher's features just where they are ranked by.

        Args:
            references: The columns of a teacher's features that the batch has.
            columns: Its other columns.
        """
        if self.uses_teacher and not references:
            raise ValueError(
                f"{self.name} ranks by a teacher, but the batch has none of the columns "
                f"{', '.join(REFERENCES)}, got {', '.join(columns)}"
            )
        if references and self.uses_teacher is False:
            raise ValueError(
                f"the batch has {', '.join(references)}, but {self.name} does not rank by a teacher: set its "
                "option reference to 'teacher', or drop the columns"
            )


def defaults(entry: LossEntry) -> dict[str, Any]:
    """The options of a loss where none is given; a schedule goes by steps, since epochs may be a fraction."""
    options = {option.key: option.default for option in entry.options}
    return {**options, "schedule_unit": "step"} if "schedule_unit" in options else options


def base_of(*, sigmoid: bool, gather: rankloss.Gather) -> nn.Module:
    """The loss that the model was made for."""
    return rankloss.SigLipLoss(gather=gather) if sigmoid else rankloss.ClipLoss(gather=gather)


def conditions_of(*, sigmoid: bool) -> dict[str, str]:
    """What holds in a run, as :mod:`rankloss_trainers.refusals` calls it.

    Args:
        sigmoid: Whether the model's own loss is a sigmoid loss.
    """
    kind = "sigmoid" if sigmoid else "softmax"
    return {kind: "a model that has a logit_bias", "columns": " and ".join(REFERENCES)}


def own(module: nn.Module, **given: Any) -> Choice:
    """A module of one's own.

    Args:
        module: The loss.
        **given: What was given that only a named loss can have.

    Raises:
        TypeError: Something was.
        ValueError: The module has parameters.
    """
    for name, value in given.items():
        if value:
            raise TypeError(f"{name} is for a loss that is given by its name; the module has its own")
    check_criterion("loss", module)
    evaluate = RankClipLog() if isinstance(module, rankloss.RankClipLoss) else call_alone
    return Choice(type(module).__name__, DrivenLoss(module, evaluate=evaluate))


def named(
    name: str,
    given: Mapping[str, Any] | None,
    base: nn.Module,
    gather: rankloss.Gather,
    *,
    sigmoid: bool = False,
) -> Choice:
    """A loss of the catalogue.

    Args:
        name: The loss.
        given: Options by their keys; the others have their :func:`defaults`.
        base: The loss that the model was made for.
        gather: How the batches of other processes are seen.
        sigmoid: Whether the base is a sigmoid loss.

    Raises:
        TypeError: An option does not exist.
        ValueError: The loss does not exist, cannot work like this, or has parameters.
    """
    found = catalog.candidates()
    if name not in found:
        raise ValueError(f"loss must be one of {', '.join(map(repr, found))}, or a module; got {name!r}")
    entry = found[name].load()
    options = defaults(entry)
    unknown = (given or {}).keys() - options.keys()
    if unknown:
        raise TypeError(f"{name} has no option {sorted(unknown)[0]!r}; it has {', '.join(options)}")
    options.update(given or {})
    reason = reason_against(name, entry, options, gather, conditions_of(sigmoid=sigmoid))
    if reason is not None:
        raise ValueError(reason)
    criterion = check_criterion(f"loss {name!r}", entry.build(base, options, gather))
    loss = DrivenLoss(criterion, evaluate=call_alone if entry.log is None else entry.log(options))
    package = found[name].package or f"rankloss {rankloss.__version__}"

    def unit(epochs: float) -> str:
        return entry.unit if isinstance(entry.unit, str) else entry.unit(options, epochs)

    def describe(epochs: float) -> str:
        text = entry.describe(options, epochs)
        return f"{name} ({package})" + (text and f", {text}")

    return Choice(name, loss, entry.caption_key(options), entry.uses_teacher(options), unit, describe)
