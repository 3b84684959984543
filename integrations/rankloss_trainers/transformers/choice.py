"""From the name of a loss and its options, typed or given, to the loss that a Trainer trains with."""

from __future__ import annotations

import argparse
import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import rankloss
from rankloss_features.folder import Features
from rankloss_trainers import catalog
from rankloss_trainers.catalog import TRAINERS_OWN, LossEntry, Options, dest, option_values
from rankloss_trainers.clock import listeners
from rankloss_trainers.command_line import add_options, by_prefix, misplaced, with_flag
from rankloss_trainers.driven_loss import Evaluate, call_alone
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import check_criterion, reason_against
from rankloss_trainers.transformers.teacher import COLUMNS

_OURS = ("", "rankloss")  # the package of a loss of the catalogue itself, and of those that come with it


@dataclass(frozen=True)
class Choice:
    """A loss, and what a trainer has to know to feed it.

    Attributes:
        name: The name in the catalogue, or the class of a module of one's own.
        criterion: The loss.
        evaluate: What calls it.
        entry: Its entry in the catalogue, or what stands for one.
        options: The values of its options.
        teacher: Whether it ranks by a teacher, whose features are columns of the batch; None if it does where
            they are given.
        package: What registers it; empty for a module.
        features: The folder of the teacher's features, for data that are bound to it.
    """

    name: str
    criterion: nn.Module
    evaluate: Evaluate
    entry: LossEntry
    options: Options
    teacher: bool | None
    package: str = ""
    features: Features | None = None

    @property
    def captions(self) -> str | None:
        """The prefix of the columns of a second caption; None for a loss without one."""
        return self.entry.caption_key(self.options)

    def unit(self, epochs: float) -> str:
        """What the loss goes by in a run, ``"epoch"`` or ``"step"``.

        Args:
            epochs: Epochs of the run; infinity where its data have no length.

        Raises:
            ValueError: The loss goes by epochs, and their number is not known.
        """
        unit = self.entry.unit if isinstance(self.entry.unit, str) else self.entry.unit(self.options, epochs)
        if unit == "epoch" and math.isinf(epochs) and listeners(self.criterion, "set_epoch"):
            raise ValueError(
                f"{self.name} goes by epochs (schedule_unit 'epoch'), but training data without a length "
                "have no known number of epochs; go by steps (schedule_unit 'step')"
            )
        return unit


def by_steps(entry: LossEntry) -> LossEntry:
    """A loss as a Trainer has it: a schedule goes by steps by default, since epochs may be a fraction."""
    options = [replace(o, default="step") if o.name == "schedule-unit" else o for o in entry.options]
    return replace(entry, options=tuple(options))


def choose(loss: str | nn.Module, given: Options, base: rankloss.ClipLoss | rankloss.SigLipLoss) -> Choice:
    """A loss of the catalogue, or a module of one's own.

    Args:
        loss: The name of the loss, or the module.
        given: Options of a named loss by their keys; the others have their defaults, see :func:`by_steps`.
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
        return Choice(type(loss).__name__, loss, evaluate, entry, {}, None)
    found = catalog.candidates()
    if loss not in found:
        raise ValueError(f"loss must be one of {', '.join(map(repr, found))}, or a module; got {loss!r}")
    entry = by_steps(found[loss].load())
    options = {option.key: option.default for option in entry.options}
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
    evaluate = call_alone if entry.log is None else entry.log(options)
    package = found[loss].package or f"rankloss {rankloss.__version__}"
    ranks = _ranks_by_a_teacher(entry, options, given, criterion)
    features = None if where is None else Features(where).check()
    return Choice(loss, criterion, evaluate, entry, options, ranks, package, features)


def _ranks_by_a_teacher(
    entry: LossEntry, options: Options, given: Options, criterion: nn.Module
) -> bool | None:
    """See :class:`Choice`."""
    if entry.uses_teacher(options):
        return True
    takes_one = any(COLUMNS[0] in inspect.signature(x.forward).parameters for x in criterion.modules())
    # The batch's own ranking makes way for a teacher's, unless it was asked for.
    return None if takes_one and "reference" not in given else False


# --- on a command line ------------------------------------------------------------------------------------


class LossOptions:
    """``--loss`` and the options of losses, on a parser of one's own, such as ``HfArgumentParser``.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        *names: Losses of the catalogue, other packages' among them; the first is the default. By default
            all that come with rankloss.

    Attributes:
        beginnings: What the options of the losses begin with.

    Raises:
        ValueError: There is no such loss.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> options = LossOptions(parser)
        >>> options.keywords(parser.parse_args(["--rankclip-lambda-in", "0.5"]))
        {'loss': 'rankclip', 'loss_options': {'lambda_in': 0.5}}
    """

    def __init__(self, parser: argparse.ArgumentParser, *names: str) -> None:
        found = catalog.candidates()
        names = names or tuple(name for name, x in found.items() if x.package.partition(" ")[0] in _OURS)
        unknown = [name for name in names if name not in (TRAINERS_OWN, *found)]
        if unknown:
            raise ValueError(f"names must be among {', '.join(found)}; got {', '.join(unknown)}")
        self._entries = {name: by_steps(found[name].load()) for name in names if name != TRAINERS_OWN}
        said = [f"{name}: {entry.help}" for name, entry in self._entries.items()]
        help_ = f"{'; '.join(said)} (default: {names[0]})".replace("%", "%%")
        parser.add_argument("--loss", default=names[0], choices=names, metavar="NAME", help=help_)
        groups = by_prefix(self._entries)
        self.beginnings = tuple(f"--{prefix}-" for prefix in groups)
        for alike in groups.values():
            add_options(parser, {name: self._entries[name] for name in alike})

    def keywords(self, args: argparse.Namespace) -> dict[str, Any]:
        """What was given, as keywords of :class:`rankloss_trainers.transformers.ContrastiveTrainer`.

        Args:
            args: What the parser gives; for ``HfArgumentParser`` the namespace behind the dataclasses.

        Raises:
            ValueError: An option was given that belongs to another loss, or that cannot work.
        """
        name = None if args.loss == TRAINERS_OWN else args.loss
        wrong = misplaced(name, self._entries, args)
        if wrong:
            raise ValueError(wrong)
        if name is None:
            return {}
        entry = self._entries[name]
        values = option_values(name, entry, args)
        reason = entry.refuse(values, rankloss.Gather(rank=0, world_size=1))
        if reason is not None:
            reason = with_flag(name, entry, reason)
            raise ValueError(reason if reason.startswith("--") else f"--loss: {reason}")
        given = {o.key: values[o.key] for o in entry.options if hasattr(args, dest(name, entry, o))}
        return {"loss": name, "loss_options": given}
