"""The command line: ``--loss``, the options of each loss, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the defaults of that loss's options are
filled in, and ``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankloss.distributed import Gather
from rankloss_open_clip.companions import Companion, SecondCaption
from rankloss_open_clip.reference_features import ReferenceFeatures, refuse
from rankloss_open_clip.two_companions import TwoCompanions
from rankloss_trainers import catalog
from rankloss_trainers.catalog import BUILT_IN, TRAINERS_OWN, Candidate, LossEntry, dest
from rankloss_trainers.command_line import add_options, by_prefix, did_you_mean, misplaced, with_flag
from rankloss_trainers.refusals import reason_against

# --- what a run asks for --------------------------------------------------------------------------------


def requested(args: Any) -> str | None:
    """The loss of the catalogue that the trainer's parsed arguments ask for.

    Raises:
        RuntimeError: ``--loss`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    swallowed = getattr(args, "loss_dist_impl", None)
    # The option's own values come first.
    if swallowed not in (None, "bidir", "shift", "reduce", "gather") and swallowed in catalog.candidates():
        raise RuntimeError(
            f"--loss {swallowed} was read as --loss-dist-impl {swallowed}, by a parser that "
            "rankloss_open_clip did not reach; start the training with `python -m rankloss_open_clip`, "
            "or run `rankloss doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and name in catalog.candidates() else None


def chosen(args: Any) -> tuple[Candidate, LossEntry, dict[str, Any]]:
    """The loss that a run with ``--loss`` asks for, its entry, and the values of its options."""
    candidate = catalog.candidates()[args.loss]
    entry = candidate.load()
    return candidate, entry, catalog.option_values(candidate.name, entry, args)


def companion_of(args: Any) -> Companion | None:
    """What has to come with every training text in a run with ``--loss``; None for a loss of pairs alone."""
    _, entry, options = chosen(args)
    caption, features = entry.caption_key(options), entry.reference_features(options)
    second = None if caption is None else SecondCaption(caption)
    if features is None:
        return second
    taught = ReferenceFeatures(features, two_widths=options.get("lambda_cross") == 0)
    return taught if second is None else TwoCompanions(second, taught)


def gather_of(args: Any) -> Gather:
    """How the trainer's arguments let a loss see the batches of other processes.

    Args:
        args: The trainer's arguments. Until the trainer has completed them there is one process.
    """
    # The sigmoid loss is exact in every layout, whatever the flags say, and so must its companions be.
    exact = getattr(args, "siglip", False)
    flags = {name: exact or getattr(args, name, False) for name in ("local_loss", "gather_with_grad")}
    return Gather(**flags, rank=getattr(args, "rank", 0), world_size=getattr(args, "world_size", 1))


def distils(args: Any) -> bool:
    """Whether the trainer hands a teacher's features to its loss.

    It has a teacher where both of its arguments name one. MobileCLIP's patch adds an option by which it reads
    the features with the data.
    """
    named = getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None)
    return getattr(args, "dataset_reinforcement", False) or None not in named


# --- the parser -----------------------------------------------------------------------------------------


class TrainerParser(argparse.ArgumentParser):
    """The trainer's parser, with the groups of the plug-in added just before it parses."""

    _entries: dict[str, LossEntry] | None = None  # of the losses that the command line may mean
    _unusable: dict[str, str]  # why the others cannot be used

    # Signatures as wide as the overloads of the base class.
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and suggest what a misspelt option was meant to be."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            hint = did_you_mean(rest, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Add the groups, parse, then fill in the defaults and refuse what cannot work."""
        argv = sys.argv[1:] if args is None else list(args)
        if self._entries is None:  # a parser may parse twice
            self._entries, self._unusable = {}, {}
            self._add_groups(argv, self._entries)
        parsed, rest = super().parse_known_args(argv, namespace)
        self._complete(parsed, self._entries)
        return parsed, rest

    def _add_groups(self, argv: list[str], entries: dict[str, LossEntry]) -> None:
        known = catalog.candidates()
        if "--loss" in self._option_string_actions:
            self._unusable = dict.fromkeys(known, "cannot be used: this trainer has a --loss of its own")
            return
        # Another package is imported only where a word of the command line may mean its loss.
        words = {word for argument in argv for word in (argument, argument.removeprefix("--loss="))}
        showing = words & {"-h", "--help"}
        for name in [x for x in known if showing or x in BUILT_IN or x in words]:
            try:
                entries[name] = known[name].load()
            except Exception as error:  # another package's, say, which stops only a run that asks for it
                package = known[name].package or "rankloss"
                self._unusable[name] = f"cannot be used ({package}): {type(error).__name__}: {error}"
        said = {TRAINERS_OWN: "the trainer's own loss (default)"}
        said.update({name: entry.help for name, entry in entries.items() if entry.help})
        said.update(self._unusable)
        self.add_argument_group("loss (rankloss)").add_argument(
            "--loss",
            choices=[TRAINERS_OWN, *known],
            default=argparse.SUPPRESS,
            help="; ".join(f"{name}: {text}" for name, text in said.items()).replace("%", "%%"),
        )
        for group in by_prefix(entries).values():
            try:
                add_options(self, {name: entries[name] for name in group})
            except argparse.ArgumentError as error:  # the trainer, or another loss, has this option
                for name in group:
                    del entries[name]
                    self._unusable[name] = f"cannot be used: {error}"

    def _complete(self, args: Any, entries: dict[str, LossEntry]) -> None:
        name: str | None = getattr(args, "loss", None)
        if name in self._unusable:
            self.error(f"argument --loss: {name} {self._unusable[name]}")
        if name not in entries:
            name = None  # the trainer's own
        wrong = misplaced(name, entries, args) or (name and _reason_against(args))
        if wrong:
            self.error(wrong)
        if name is not None:
            for option in entries[name].options:
                vars(args).setdefault(dest(name, entries[name], option), option.default)


def _reason_against(args: Any) -> str:
    """Why the loss cannot work with what was typed; empty if it can."""
    candidate, entry, options = chosen(args)
    reason = reason_against(candidate.name, entry, options, gather_of(args), conditions_of(args))
    features = entry.reference_features(options)
    if reason is None and features is not None:
        # The default of `reference` makes way for features, what was typed does not.
        if getattr(args, f"{entry.prefix or candidate.name}_reference", None) == "own":
            reason = "reference: own excludes reference_features, which are a teacher's"
        else:
            reason = refuse(features, two_widths=options.get("lambda_cross") == 0)
            reason = reason and f"reference_features: {reason}"
    reason = "" if reason is None else with_flag(candidate.name, entry, reason)
    return reason and f"argument {reason if reason.startswith('--') else f'--loss: {reason}'}"


def conditions_of(args: Any) -> dict[str, str]:
    """The conditions of :mod:`rankloss_trainers.refusals` that hold in a run, in the command line's words."""

    def given(*names: str) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None))

    model, data_type = getattr(args, "model", ""), getattr(args, "dataset_type", None) or ""
    words = {
        "horovod": given("horovod"),
        "audio": f"--dataset-type {data_type}" if "audio" in data_type else "",
        # By its name, as open_clip's main branch knows one.
        "generative": model if any(kind in model.lower() for kind in ("genlip", "genlap")) else "",
        "sigmoid" if given("siglip") else "softmax": "--siglip",
        "distills": given("distill_model", "dataset_reinforcement") if distils(args) else "",
        "no_teacher": "" if distils(args) else "--distill-model and --distill-pretrained",
        "synthetic": "--dataset-type synthetic" if data_type == "synthetic" else "",
        "coca": model if "coca" in model.lower() else "",
        "torchscript": given("torchscript"),
        "other_texts": given("json_text_key", "variable_text", "use_naflex"),  # of open_clip's later trainer
    }
    return {condition: said for condition, said in words.items() if said}
