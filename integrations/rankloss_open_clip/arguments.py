"""The command line: ``--loss``, the ``--rankclip-*`` options, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss rankclip`` the defaults are filled in, and
``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from rankloss_open_clip import bootstrap, versions

BASE_LOSS = "rankclip_base_loss"
"""Where the trainer's own ``--loss`` default is kept, should a trainer have such an option."""

_LOSSES = ("clip", "rankclip")
_logger = logging.getLogger("rankloss_open_clip")


@dataclass(frozen=True)
class Option:
    """One ``--rankclip-*`` option.

    Attributes:
        name: What follows ``--rankclip-``.
        default: The value of a run that does not give the option.
        help: What ``--help`` says; the default is appended.
        keywords: Further keywords of ``add_argument``.
        unset: What ``--help`` says in place of a default of None.
    """

    name: str
    default: Any
    help: str
    keywords: dict[str, Any] = field(default_factory=dict)
    unset: str = ""

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--rankclip-{self.name}"

    @property
    def dest(self) -> str:
        """The attribute of the parsed arguments."""
        return f"rankclip_{self.name}".replace("-", "_")


def options() -> tuple[Option, ...]:
    """All ``--rankclip-*`` options."""
    from rankloss import schedules  # imports torch: not before a command line is parsed

    return (
        Option("schedule", "rankclip", "course of lambda over training", {"choices": schedules.NAMES}),
        Option(
            "schedule-unit",
            "epoch",
            "evaluate the schedule once per epoch or at each optimizer step; a run of one epoch has no ramp "
            "over epochs and goes by steps",
            {"choices": ("epoch", "step")},
        ),
        Option(
            "lambda-cross",
            1.0,
            "multiplies lambda in the cross-modal term",
            {"type": _weight, "metavar": "X"},
        ),
        Option("lambda-in", 1.0, "multiplies lambda in the in-modal term", {"type": _weight, "metavar": "X"}),
        Option(
            "lists",
            "row",
            "one list per anchor, or one of all pairs of the batch",
            {"choices": ("row", "batch")},
        ),
        Option(
            "worth",
            "exp",
            "worth of an item: exp of the logit, (1 + cosine)/2, or the cosine",
            {"choices": ("exp", "shifted", "identity")},
        ),
        Option(
            "ties",
            "shared",
            "equal reference scores share one denominator, or are shuffled at each step",
            {"choices": ("shared", "random")},
        ),
        Option("discount", "none", "weight of a rank: 1, or 1/log(1 + rank)", {"choices": ("none", "log")}),
        Option(
            "top-k", None, "count only the best ranks of each list", {"type": _count, "metavar": "K"}, "all"
        ),
        Option(
            "chunk-size",
            None,
            "rows computed at a time: less memory, same result",
            {"type": _count, "metavar": "ROWS"},
            "from the sizes and the device",
        ),
        Option(
            "agreement-every",
            None,
            "log the batch's rank agreement, Kendall's tau, measured at every so many optimizer steps",
            {"type": _count, "metavar": "STEPS"},
            "never",
        ),
    )


def requested(args: Any) -> bool:
    """Whether the trainer's parsed arguments ask for the ranking loss.

    Raises:
        RuntimeError: ``--loss rankclip`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    if getattr(args, "loss_dist_impl", None) == "rankclip":
        raise RuntimeError(
            "--loss rankclip was read as --loss-dist-impl rankclip, by a parser that rankloss_open_clip did "
            "not reach; run `python -m rankloss_open_clip.doctor` for advice"
        )
    return getattr(args, "loss", None) == "rankclip"


class TrainerParser(argparse.ArgumentParser):
    """The trainer's parser, with the group of the plug-in added just before it parses."""

    # Signature as wide as the overloads of the base class.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Add the group, parse, then fill in the defaults and refuse what cannot work."""
        argv = sys.argv[1:] if args is None else list(args)
        try:
            known = options()
        except Exception as error:
            if bootstrap.asks_for_loss(argv):
                self.error(f"argument --loss: rankloss cannot be imported ({type(error).__name__}: {error})")
            _logger.warning("--loss is not available in this run: rankloss cannot be imported (%s)", error)
            return super().parse_known_args(argv, namespace)
        _add_group(self, known)
        parsed, rest = super().parse_known_args(argv, namespace)
        _complete(self, parsed, known)
        return parsed, rest


def _add_group(parser: argparse.ArgumentParser, known: tuple[Option, ...]) -> None:
    taken = parser._option_string_actions
    if known[0].flag in taken:
        return
    group = parser.add_argument_group(
        "ranking loss (rankloss)",
        "RankCLIP's ranking-consistency terms, added to the loss the trainer builds",
    )
    own = taken.get("--loss")
    if own is None:
        group.add_argument(
            "--loss",
            choices=_LOSSES,
            default=argparse.SUPPRESS,
            help="clip: the trainer's own loss (default); rankclip: the same plus the ranking terms",
        )
    else:
        if own.choices is not None:
            own.choices = [*own.choices, "rankclip"]
        parser.set_defaults(**{BASE_LOSS: own.default})
    for option in known:
        default = option.unset if option.default is None else option.default
        group.add_argument(
            option.flag,
            dest=option.dest,
            default=argparse.SUPPRESS,
            help=f"{option.help} (default: {default})",
            **option.keywords,
        )


def _complete(parser: argparse.ArgumentParser, args: Any, known: tuple[Option, ...]) -> None:
    if getattr(args, "loss", None) != "rankclip":
        given = [option.flag for option in known if hasattr(args, option.dest)]
        if given:
            parser.error(f"{', '.join(given)}: only with --loss rankclip")
        if hasattr(args, BASE_LOSS):
            delattr(args, BASE_LOSS)
        return
    for option in known:
        if not hasattr(args, option.dest):
            setattr(args, option.dest, option.default)

    import open_clip

    verdict = versions.judge(getattr(open_clip, "__version__", "of unknown version"))
    if not verdict.usable:
        parser.error(f"argument --loss: {verdict.remark}")
    if getattr(args, "horovod", False):
        parser.error("argument --loss: rankclip does not work with --horovod, use torchrun")
    if _is_generative(args):
        parser.error(
            f"argument --loss: rankclip compares images with texts, but {args.model} is trained to generate"
        )
    if args.rankclip_lists == "batch" and getattr(args, "local_loss", False):
        parser.error(
            "argument --rankclip-lists: batch needs the whole batch on every process, not --local-loss"
        )

    from rankloss_open_clip import seams

    missing = seams.unpatched()
    if missing:
        parser.error(f"argument --loss: rankloss_open_clip did not reach {', '.join(missing)}")
    from rankloss_open_clip.loss import check_options

    try:
        check_options(args)
    except ValueError as error:  # what the library itself refuses, before a model is built
        parser.error(f"argument --loss: {error}")


def _is_generative(args: Any) -> bool:
    """Whether open_clip builds a task that compares nothing, which it decides by the model's name."""
    from open_clip import factory

    name = getattr(args, "model", "").lower()
    # Releases without tasks have no such models: there the name means nothing.
    return hasattr(factory, "create_task") and ("genlip" in name or "genlap" in name)


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
