"""The command line: ``--loss``, the options of each loss, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the defaults of that loss's options are
filled in, and ``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from rankloss_open_clip import bootstrap, registry, versions
from rankloss_open_clip.registry import BUILT_IN, TRAINERS_OWN, LossEntry, Option

BASE_LOSS = "rankclip_base_loss"
"""Where the trainer's own ``--loss`` default is kept, should a trainer have such an option."""

_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")  # the values that --loss-dist-impl is meant to have
_logger = logging.getLogger("rankloss_open_clip")


def flag(name: str, entry: LossEntry, option: Option) -> str:
    """An option of the loss ``name``, as it is typed."""
    return f"--{entry.prefix or name}-{option.name}"


def dest(name: str, entry: LossEntry, option: Option) -> str:
    """An option of the loss ``name``, as an attribute of the parsed arguments."""
    return flag(name, entry, option)[2:].replace("-", "_")


def requested(args: Any) -> str | None:
    """The loss of the registry that the trainer's parsed arguments ask for.

    Raises:
        RuntimeError: ``--loss`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    swallowed = getattr(args, "loss_dist_impl", None)
    if swallowed not in (None, *_DIST_IMPLS) and _known(swallowed):
        raise RuntimeError(
            f"--loss {swallowed} was read as --loss-dist-impl {swallowed}, by a parser that "
            "rankloss_open_clip did not reach; run `python -m rankloss_open_clip.doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and _known(name) else None


def caption_key(args: Any) -> str | None:
    """The key of the second caption that the loss asked for needs; None for a loss without one."""
    name = requested(args)
    return None if name is None else registry.candidates()[name].load().caption_key(args)


def _known(name: str) -> bool:
    return name in BUILT_IN or name in registry.candidates()


class TrainerParser(argparse.ArgumentParser):
    """The trainer's parser, with the groups of the plug-in added just before it parses."""

    # Signature as wide as the overloads of the base class.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Add the groups, parse, then fill in the defaults and refuse what cannot work."""
        argv = sys.argv[1:] if args is None else list(args)
        asked, showing = _asked(argv)
        try:
            entries = _own_entries()
        except Exception as error:
            if bootstrap.asks_for_loss(argv):
                self.error(f"argument --loss: rankloss cannot be imported ({_said(error)})")
            _logger.warning("--loss is not available in this run: rankloss cannot be imported (%s)", error)
            return super().parse_known_args(argv, namespace)
        known = registry.candidates()
        for name in (asked, *known) if showing else (asked,):
            if name not in known or name in entries:
                continue
            try:
                entries[name] = known[name].load()
            except Exception as error:  # another package's: it concerns those who ask for it
                if name == asked:
                    self.error(
                        f"argument --loss: {name} ({known[name].package}) cannot be used: {_said(error)}"
                    )
                entries[name] = LossEntry(build=_never, help=f"cannot be used ({_said(error)})")
        if asked is not None:
            for sentence in registry.shadowed():
                _logger.warning("%s", sentence)
        _add_groups(self, known, entries, asked)
        parsed, rest = super().parse_known_args(argv, namespace)
        _complete(self, parsed, entries)
        return parsed, rest


def _asked(argv: list[str]) -> tuple[str | None, bool]:
    """The value of ``--loss``, and whether help is asked for: what must be known before parsing."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--loss")
    peek.add_argument("-h", "--help", action="store_true")
    try:
        seen, _ = peek.parse_known_args(argv)
    except argparse.ArgumentError:  # --loss without a value, which the trainer's parser will say
        return None, False
    return seen.loss, seen.help


def _own_entries() -> dict[str, LossEntry]:
    known = registry.candidates()
    return {name: known[name].load() for name in BUILT_IN}


def _never(*_: Any) -> Any:
    raise AssertionError("a loss that only --help has seen")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _add_groups(
    parser: argparse.ArgumentParser,
    known: dict[str, registry.Candidate],
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
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.prefix or name, []).append(name)
    for names in groups.values():
        try:
            _add_options(parser, names, entries[names[0]])
        except argparse.ArgumentError as error:  # the trainer, or another loss, has this option
            if asked in names:
                parser.error(f"argument --loss: {asked} cannot be used: {error}")


def _add_options(parser: argparse.ArgumentParser, names: list[str], entry: LossEntry) -> None:
    if not entry.options:
        return
    group = parser.add_argument_group(f"--loss {', '.join(names)}")
    for option in entry.options:
        default = option.unset if option.default is None else option.default
        group.add_argument(
            flag(names[0], entry, option),
            dest=dest(names[0], entry, option),
            default=argparse.SUPPRESS,
            help=f"{option.help} (default: {default})",
            **option.keywords,
        )


def _complete(parser: argparse.ArgumentParser, args: Any, entries: dict[str, LossEntry]) -> None:
    name: str | None = getattr(args, "loss", None)
    if name not in entries:
        name = None  # the trainer's own
    prefix = None if name is None else entries[name].prefix or name
    for other, entry in entries.items():
        given = [flag(other, entry, o) for o in entry.options if hasattr(args, dest(other, entry, o))]
        if given and (entry.prefix or other) != prefix:
            takers = [x for x in entries if (entries[x].prefix or x) == (entry.prefix or other)]
            parser.error(f"{', '.join(given)}: only with --loss {' or '.join(takers)}")
    if name is None:
        if hasattr(args, BASE_LOSS):
            delattr(args, BASE_LOSS)
        return
    wanted = entries[name]
    for option in wanted.options:
        if not hasattr(args, dest(name, wanted, option)):
            setattr(args, dest(name, wanted, option), option.default)

    import open_clip

    verdict = versions.judge(getattr(open_clip, "__version__", "of unknown version"))
    if not verdict.usable:
        parser.error(f"argument --loss: {verdict.remark}")
    if getattr(args, "horovod", False):
        parser.error(f"argument --loss: {name} does not work with --horovod, use torchrun")
    if _is_generative(args):
        parser.error(
            f"argument --loss: {name} compares images with texts, but {args.model} is trained to generate"
        )
    reason = wanted.refuse(args)
    needs_caption = reason is None and wanted.caption_key(args) is not None
    if needs_caption:
        from rankloss_open_clip import captions

        reason = captions.refuse(args)
    if reason is not None:
        parser.error(f"argument {reason if reason.startswith('--') else f'--loss: {reason}'}")

    from rankloss_open_clip import seams

    missing = seams.unpatched(captions=needs_caption)
    if missing:
        parser.error(f"argument --loss: rankloss_open_clip did not reach {', '.join(missing)}")


def _is_generative(args: Any) -> bool:
    """Whether open_clip builds a task that compares nothing, which it decides by the model's name."""
    from open_clip import factory

    name = getattr(args, "model", "").lower()
    # Releases without tasks have no such models: there the name means nothing.
    return hasattr(factory, "create_task") and ("genlip" in name or "genlap" in name)
