"""The command line: ``--loss``, the options of each loss, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the defaults of that loss's options are
filled in, and ``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from rankloss.distributed import Gather
from rankloss_open_clip.companions import Companion, SecondCaption
from rankloss_open_clip.reference_features import ReferenceFeatures, refuse
from rankloss_open_clip.two_companions import TwoCompanions
from rankloss_trainers import catalog
from rankloss_trainers.catalog import BUILT_IN, TRAINERS_OWN, LossEntry, Options, dest
from rankloss_trainers.command_line import add_options, by_prefix, misplaced, with_flag
from rankloss_trainers.refusals import reason_against

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
"""The values that the trainer's ``--loss-dist-impl`` is meant to have."""

_logger = logging.getLogger("rankloss_open_clip")


def requested(args: Any) -> str | None:
    """The loss of the catalogue that the trainer's parsed arguments ask for.

    Raises:
        RuntimeError: ``--loss`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    swallowed = getattr(args, "loss_dist_impl", None)
    if swallowed not in (None, *DIST_IMPLS) and _known(swallowed):
        raise RuntimeError(
            f"--loss {swallowed} was read as --loss-dist-impl {swallowed}, by a parser that "
            "rankloss_open_clip did not reach; run `rankloss doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and _known(name) else None


def companion_of(args: Any) -> Companion | None:
    """What has to come with every training text for the loss asked for; None for a loss of pairs alone."""
    name = requested(args)
    if name is None:
        return None
    entry = catalog.candidates()[name].load()
    options = catalog.option_values(name, entry, args)
    caption, features = entry.caption_key(options), entry.reference_features(options)
    second = None if caption is None else SecondCaption(caption)
    if features is None:
        return second
    taught = ReferenceFeatures(features, two_widths=_has_no_cross_term(options))
    return taught if second is None else TwoCompanions(second, taught)


def _has_no_cross_term(options: Options) -> bool:
    return options.get("lambda_cross") == 0


def gather_of(args: Any) -> Gather:
    """How the trainer's arguments let a loss see the batches of other processes.

    Args:
        args: The trainer's arguments. Until the trainer has completed them there is one process.
    """
    # The sigmoid loss is exact in every layout, whatever the flags say, and so must its companions be.
    sigmoid = getattr(args, "siglip", False)
    return Gather(
        local_loss=sigmoid or getattr(args, "local_loss", False),
        gather_with_grad=sigmoid or getattr(args, "gather_with_grad", False),
        rank=getattr(args, "rank", 0),
        world_size=getattr(args, "world_size", 1),
    )


def _known(name: str) -> bool:
    return name in BUILT_IN or name in catalog.candidates()


class TrainerParser(argparse.ArgumentParser):
    """The trainer's parser, with the groups of the plug-in added just before it parses."""

    unpatched: Callable[..., list[str]] = staticmethod(lambda **_: [])
    """``(*, data) → names`` of the trainer's functions that the loss depends on and that are not patched."""

    _is_extended = False

    # Signature as wide as the overloads of the base class.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Add the groups, parse, then fill in the defaults and refuse what cannot work."""
        argv = sys.argv[1:] if args is None else list(args)
        asked, showing = _asked(argv)
        known = catalog.candidates()
        wanted = [name for name in known if showing or name in BUILT_IN or name == asked]
        entries = {name: self._loaded(known[name], asked) for name in wanted}
        if not self._is_extended:  # a parser may parse twice
            self._is_extended = True
            self._add_groups(list(known), entries, asked)
        parsed, rest = super().parse_known_args(argv, namespace)
        self._complete(parsed, entries)
        return parsed, rest

    def _loaded(self, candidate: catalog.Candidate, asked: str | None) -> LossEntry:
        try:
            return candidate.load()
        except Exception as error:  # another package's, say, which stops only a run that asks for it
            reason = f"cannot be used: {type(error).__name__}: {error}"
            if candidate.name == asked:
                self.error(f"argument --loss: {asked} ({candidate.package or 'rankloss'}) {reason}")
            return LossEntry(build=lambda *_: None, help=reason)

    def _add_groups(self, names: list[str], entries: dict[str, LossEntry], asked: str | None) -> None:
        if "--loss" in self._option_string_actions:
            if asked in names:
                self.error(f"argument --loss: this trainer has one of its own, {asked} cannot be used")
            return
        said = {TRAINERS_OWN: "the trainer's own loss (default)"}
        said.update({name: entries[name].help for name in names if name in entries and entries[name].help})
        self.add_argument_group("loss (rankloss)").add_argument(
            "--loss",
            choices=[TRAINERS_OWN, *names],
            default=argparse.SUPPRESS,
            help="; ".join(f"{name}: {text}" for name, text in said.items()).replace("%", "%%"),
        )
        for group in by_prefix(entries).values():
            try:
                add_options(self, group, entries[group[0]], presets=entries)
            except argparse.ArgumentError as error:  # the trainer, or another loss, has this option
                if asked in group:
                    self.error(f"argument --loss: {asked} cannot be used: {error}")

    def _complete(self, args: Any, entries: dict[str, LossEntry]) -> None:
        name: str | None = getattr(args, "loss", None)
        if name not in entries:
            name = None  # the trainer's own
        wrong = misplaced(name, entries, args)
        if wrong:
            self.error(wrong)
        if name is None:
            return
        entry = entries[name]
        given = {option.key for option in entry.options if hasattr(args, dest(name, entry, option))}
        for option in entry.options:
            if option.key not in given:
                setattr(args, dest(name, entry, option), option.default)
        reason = _reason_against(name, entry, args, given)
        if reason is not None:
            self.error(f"argument {reason if reason.startswith('--') else f'--loss: {reason}'}")
        options = catalog.option_values(name, entry, args)
        data = entry.caption_key(options) is not None or entry.reference_features(options) is not None
        missing = self.unpatched(data=data)
        if missing:
            self.error(f"argument --loss: rankloss_open_clip did not reach {', '.join(missing)}")


def _asked(argv: list[str]) -> tuple[str | None, bool]:
    """The value of ``--loss``, and whether help is asked for, which the groups of options depend on."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--loss")
    peek.add_argument("-h", "--help", action="store_true")
    try:
        seen, _ = peek.parse_known_args(argv)
    except argparse.ArgumentError:  # --loss without a value, which the trainer's parser will say
        return None, False
    return seen.loss, seen.help


def _reason_against(name: str, entry: LossEntry, args: Any, given: set[str]) -> str | None:
    """Why the loss cannot work with the trainer's arguments; a reason about one option begins with it.

    ``given`` are the options that were typed: features make way for nothing, but the default of ``reference``
    makes way for them.
    """
    options = catalog.option_values(name, entry, args)
    reason = reason_against(name, entry, options, gather_of(args), conditions_of(args))
    features = entry.reference_features(options)
    if reason is None and features is not None:
        if "reference" in given and options["reference"] == "own":
            reason = "reference: own excludes reference_features, which are a teacher's"
        else:
            reason = refuse(features, two_widths=_has_no_cross_term(options))
            reason = reason and f"reference_features: {reason}"
    return None if reason is None else with_flag(name, entry, reason)


def conditions_of(args: Any) -> dict[str, str]:
    """The conditions of :mod:`rankloss_trainers.refusals` that hold in a run, in the command line's words."""
    model, sigmoid = getattr(args, "model", ""), getattr(args, "siglip", False)
    # Options of open_clip's later trainer.
    texts = [f"--{x.replace('_', '-')}" for x in ("json_text_key", "variable_text") if getattr(args, x, None)]
    synthetic = getattr(args, "dataset_type", None) == "synthetic"
    words = {
        "horovod": "--horovod" if getattr(args, "horovod", False) else "",
        "sigmoid": "--siglip" if sigmoid else "",
        "softmax": "" if sigmoid else "--siglip",
        "distills": "--dataset-reinforcement"
        if reinforced(args)
        else "--distill-model"
        if distils(args)
        else "",
        "no_teacher": "" if distils(args) else "--distill-model and --distill-pretrained",
        "synthetic": "--dataset-type synthetic" if synthetic else "",
        "coca": model if "coca" in model.lower() else "",
        "torchscript": "--torchscript" if getattr(args, "torchscript", False) else "",
        "other_texts": ", ".join(texts),
    }
    return {condition: said for condition, said in words.items() if said}


def distils(args: Any) -> bool:
    """Whether the trainer hands a teacher's features to its loss.

    It has a teacher where both of its arguments name one, or reads the features with the data.
    """
    named = getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None)
    return reinforced(args) or None not in named


def reinforced(args: Any) -> bool:
    """Whether the data hold a teacher's features, as MobileCLIP's do, whose patch adds this option."""
    return bool(getattr(args, "dataset_reinforcement", False))
