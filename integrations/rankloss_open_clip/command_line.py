"""The command line: ``--loss``, the options of each loss, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the defaults of that loss's options are
filled in, and ``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from rankloss_open_clip import versions
from rankloss_open_clip.names import BASE_LOSS, DIST_IMPLS, asks_for_loss
from rankloss_trainers import catalog
from rankloss_trainers.catalog import BUILT_IN, TRAINERS_OWN, LossEntry, dest, flag
from rankloss_trainers.command_line import add_options, by_prefix, misplaced, with_flag
from rankloss_trainers.refusals import reason_against

if TYPE_CHECKING:
    from rankloss.distributed import Gather
    from rankloss_open_clip.companions import Companion

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
            "rankloss_open_clip did not reach; run `python -m rankloss_open_clip.doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and _known(name) else None


def companion_of(args: Any) -> Companion | None:
    """What has to come with every training text for the loss asked for; None for a loss of pairs alone."""
    name = requested(args)
    if name is None:
        return None
    caption, features = _in_the_data(name, catalog.candidates()[name].load(), args)
    if caption is not None:
        from rankloss_open_clip.captions import SecondCaption

        return SecondCaption(caption)
    if features is not None:
        from rankloss_open_clip.reference_features import ReferenceFeatures

        return ReferenceFeatures(features)
    return None


def _in_the_data(name: str, entry: LossEntry, args: Any) -> tuple[str | None, str | None]:
    """Where the second caption and a teacher's features are in the training data; None where not needed."""
    options = catalog.option_values(name, entry, args)
    return entry.caption_key(options), entry.reference_features(options)


def gather_of(args: Any, *, rows: bool = True) -> Gather:
    """How the trainer's arguments let a loss see the batches of other processes.

    Args:
        args: The trainer's arguments. Until the trainer has completed them there is one process.
        rows: Whether the loss can be computed for a process's own rows alone.
    """
    from rankloss.distributed import Gather

    # The sigmoid loss is exact in every layout, whatever the flags say, and so must its companions be.
    sigmoid = getattr(args, "siglip", False)
    return Gather(
        local_loss=rows if sigmoid else getattr(args, "local_loss", False),
        gather_with_grad=sigmoid or getattr(args, "gather_with_grad", False),
        rank=getattr(args, "rank", 0),
        world_size=getattr(args, "world_size", 1),
    )


def _known(name: str) -> bool:
    return name in BUILT_IN or name in catalog.candidates()


class TrainerParser(argparse.ArgumentParser):
    """The trainer's parser, with the groups of the plug-in added just before it parses."""

    def unpatched(self, *, data: bool) -> list[str]:
        """The trainer's functions that the loss depends on, its data too or not, and that are not patched."""
        raise NotImplementedError

    def verdict(self, version: str) -> versions.Verdict:
        """The support status of a version of open_clip."""
        return versions.judge(version)

    # Signature as wide as the overloads of the base class.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Add the groups, parse, then fill in the defaults and refuse what cannot work."""
        argv = sys.argv[1:] if args is None else list(args)
        asked, showing = _asked(argv)
        try:
            entries = _own_entries()
        except Exception as error:
            if asks_for_loss(argv):
                self.error(f"argument --loss: rankloss cannot be imported ({_said(error)})")
            _logger.warning("--loss is not available in this run: rankloss cannot be imported (%s)", error)
            return super().parse_known_args(argv, namespace)
        known = catalog.candidates()
        for name in (asked, *known) if showing else (asked,):
            if name not in known or name in entries:
                continue
            try:
                entries[name] = known[name].load()
            except Exception as error:  # another package's, which stops only a run that asks for it
                if name == asked:
                    self.error(
                        f"argument --loss: {name} ({known[name].package}) cannot be used: {_said(error)}"
                    )
                entries[name] = LossEntry(build=_never, help=f"cannot be used ({_said(error)})")
        if asked is not None:
            for sentence in catalog.shadowed():
                _logger.warning("%s", sentence)
        _add_groups(self, known, entries, asked)
        parsed, rest = super().parse_known_args(argv, namespace)
        _complete(self, parsed, entries)
        return parsed, rest


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


def _own_entries() -> dict[str, LossEntry]:
    known = catalog.candidates()
    return {name: known[name].load() for name in BUILT_IN}


def _never(*_: Any) -> Any:
    raise AssertionError("a loss that only --help has seen")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _add_groups(
    parser: argparse.ArgumentParser,
    known: dict[str, catalog.Candidate],
    entries: dict[str, LossEntry],
    asked: str | None,
) -> None:
    taken = parser._option_string_actions
    if flag("rankclip", entries["rankclip"], entries["rankclip"].options[0]) in taken:
        return  # a parser that parses twice
    own = taken.get("--loss")
    names = [TRAINERS_OWN, *known]
    if own is None:
        said = {TRAINERS_OWN: "the trainer's own loss (default)"}
        said.update({name: entries[name].help for name in known if name in entries and entries[name].help})
        parser.add_argument_group("loss (rankloss)").add_argument(
            "--loss",
            choices=names,
            default=argparse.SUPPRESS,
            help="; ".join(f"{name}: {text}" for name, text in said.items()).replace("%", "%%"),
        )
    else:
        if own.choices is not None:
            own.choices = [*own.choices, *(name for name in known if name not in own.choices)]
        parser.set_defaults(**{BASE_LOSS: own.default})
    for names in by_prefix(entries).values():
        try:
            add_options(parser, names, entries[names[0]])
        except argparse.ArgumentError as error:  # the trainer, or another loss, has this option
            if asked in names:
                parser.error(f"argument --loss: {asked} cannot be used: {error}")


def _complete(parser: TrainerParser, args: Any, entries: dict[str, LossEntry]) -> None:
    name: str | None = getattr(args, "loss", None)
    if name not in entries:
        name = None  # the trainer's own
    wrong = misplaced(name, entries, args)
    if wrong:
        parser.error(wrong)
    if name is None:
        if hasattr(args, BASE_LOSS):
            delattr(args, BASE_LOSS)
        return
    wanted = entries[name]
    for option in wanted.options:
        if not hasattr(args, dest(name, wanted, option)):
            setattr(args, dest(name, wanted, option), option.default)

    verdict = parser.verdict(versions.imported())
    if not verdict.usable:
        parser.error(f"argument --loss: {verdict.remark}")
    reason = _reason_against(name, wanted, args)
    if reason is not None:
        parser.error(f"argument {reason if reason.startswith('--') else f'--loss: {reason}'}")
    missing = parser.unpatched(data=_in_the_data(name, wanted, args) != (None, None))
    if missing:
        parser.error(f"argument --loss: rankloss_open_clip did not reach {', '.join(missing)}")


def _reason_against(name: str, entry: LossEntry, args: Any) -> str | None:
    """Why the loss cannot work with the trainer's arguments; a reason about one option begins with it."""
    options = catalog.option_values(name, entry, args)
    reason = reason_against(name, entry, options, gather_of(args), conditions_of(args))
    features = entry.reference_features(options)
    if reason is None and features is not None:
        from rankloss_open_clip import reference_features

        reason = reference_features.refuse(features, args)
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
        "generative": model if _is_generative(args) else "",
        "sigmoid": "--siglip" if sigmoid else "",
        "softmax": "" if sigmoid else "--siglip",
        "distills": "--distill-model" if distils(args) else "",
        "no_teacher": "" if distils(args) else "--distill-model and --distill-pretrained",
        "synthetic": "--dataset-type synthetic" if synthetic else "",
        "coca": model if "coca" in model.lower() else "",
        "torchscript": "--torchscript" if getattr(args, "torchscript", False) else "",
        "other_texts": ", ".join(texts),
    }
    return {condition: said for condition, said in words.items() if said}


def distils(args: Any) -> bool:
    """Whether the trainer has a teacher, which it decides by both of its arguments."""
    return None not in (getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None))


def _is_generative(args: Any) -> bool:
    """Whether open_clip builds a generative task, which it decides by the model's name."""
    from open_clip import factory

    name = getattr(args, "model", "").lower()
    # Releases without tasks have no such models.
    return hasattr(factory, "create_task") and ("genlip" in name or "genlap" in name)
