"""The command line: ``--loss``, the options of losses and of a run, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the options' defaults are filled in, and
``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rankloss.distributed import Gather
from rankloss_open_clip import raise_failures
from rankloss_trainers import catalog
from rankloss_trainers.command_line import (
    RUN,
    LossArguments,
    attributes,
    flag,
    mentioned,
    misspelt,
)
from rankloss_trainers.declared import Choice, Loss
from rankloss_trainers.host import Host
from rankloss_trainers.option import OptionError
from rankloss_trainers.run_options import GIVEN, RunOptions
from rankloss_trainers.runtime import Runtime

HOST = Host(
    name="open_clip's trainer",
    biased="--siglip",
    teacher="name it with --distill-model and --distill-pretrained",
    progress="run `rankloss doctor` for advice",
    serves=("columns", "ids", "lists", "folder", "state", "teacher"),
)
Start = Callable[[Any, Sequence[Loss], RunOptions], Any]
"""A function that builds and checks the losses of parsed arguments."""

# --- the run that is asked for --------------------------------------------------------------------------


def _is_named(name: str) -> bool:
    """True for a loss of the catalogue, or several joined."""
    return all(part in catalog.known() for part in name.split(catalog.JOIN))


def chosen(args: Any) -> Choice:
    """The losses and the options of a run with ``--loss``, from its parsed arguments.

    Raises:
        ValueError: As :meth:`rankloss_trainers.command_line.LossArguments.chosen`.
    """
    choice = LossArguments(argparse.ArgumentParser(), catalog.names_of(args.loss)).chosen(args)
    assert choice is not None  # the name is of the catalogue
    return choice


def gather_of(args: Any) -> Gather:
    """The gathering that the trainer's arguments ask for; the processes are those of the first call."""
    # The sigmoid loss is exact in every layout, whatever the flags say, and so must the losses beside it be.
    exact = getattr(args, "siglip", False)
    flags = {name: exact or getattr(args, name, False) for name in ("local_loss", "gather_with_grad")}
    return Gather(**flags)


def distils(args: Any) -> bool:
    """True if the trainer hands a teacher's features to its loss.

    It has a teacher where both of its arguments name one. MobileCLIP's patch adds an option by which it reads
    the features with the data.
    """
    named = getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None)
    return getattr(args, "dataset_reinforcement", False) or None not in named


# --- the parser -----------------------------------------------------------------------------------------


def _parsed_by_trainer(parse_args: Callable[[list[str]], Any], rest: list[str], parser: Any) -> Any:
    """The trainer's arguments; after an error about unknown words, a question about misspelt ones of ours."""
    with contextlib.redirect_stderr(_Copied(sys.stderr)) as errors:
        try:
            return parse_args(rest)
        except SystemExit:
            unknown = errors.getvalue().partition("unrecognized arguments:")[2].split()
            hint = misspelt(unknown, parser._option_string_actions)
            if hint:
                print(hint.removeprefix("; "), file=sys.stderr)
            raise


class _Copied(io.StringIO):
    """A copy of what is written to a stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.stream.flush()


def _fill_in(args: Any, losses: Sequence[Loss], options: RunOptions) -> None:
    """Set every option of the losses and of the run as an attribute of the arguments."""
    values = {"": vars(options), **{loss.name: loss.values for loss in losses}}
    for loss, key, where in attributes({x.name: x.named for x in losses}):
        setattr(args, where, values[loss][key])


def check_run(run: Runtime, args: Any) -> None:
    """Raise a ValueError for a reason against losses that lies in this trainer and its arguments."""
    for reason, holds in _exclusions(run, args):
        if holds:
            raise ValueError(f"{run.name} does not work with {reason}")
    teaching, teacher = run.teaching, _flags_of_teacher(args)
    if teaching.teacher is not None and teacher:
        raise OptionError("teacher", f"excludes {teacher}, which is a teacher too")
    if run.options.teacher == GIVEN and not teacher:
        raise OptionError("teacher", f"must not be {GIVEN} where the trainer has none: {HOST.teacher}")
    if teaching.use == "required" and teaching.teacher is None and not teacher:
        raise ValueError(f"{run.name} needs a teacher: {HOST.teacher}, or give {flag(RUN, 'teacher')}")
    if teacher and getattr(args, "siglip", False) and teaching.use != "required":
        raise ValueError(f"{run.name} does not work with --siglip and {teacher}, whose loss takes no bias")


def _exclusions(run: Runtime, args: Any) -> list[tuple[str, bool]]:
    """Parts of the trainer that losses may exclude, with True where these do."""
    model, data_type = getattr(args, "model", "").lower(), getattr(args, "dataset_type", None) or ""
    teacher = _flags_of_teacher(args)
    takes_more_texts = any(loss.columns is not None for loss in run.losses)
    takes_columns = takes_more_texts or run.teaching.teacher is not None
    replaces = any(loss.replaces for loss in run.losses)
    keeps_distillation = bool(teacher) and run.teaching.use != "required"
    other_texts = _flags(args, "torchscript", "json_text_key", "variable_text", "use_naflex")
    is_generative = "genlip" in model or "genlap" in model  # as open_clip's main branch names them
    has_no_pairs = "audio" in data_type or (takes_columns and data_type == "synthetic")
    return [
        ("--horovod", bool(_flags(args, "horovod"))),
        (model, is_generative),
        (f"--dataset-type {data_type}", has_no_pairs),
        (other_texts, takes_columns and bool(other_texts)),
        ("CoCa", (takes_columns or replaces) and "coca" in model),
        (f"{teacher}, whose loss it would replace", replaces and keeps_distillation),
        (f"{teacher}, whose teacher takes one caption per image", takes_more_texts and bool(teacher)),
    ]


def _flags_of_teacher(args: Any) -> str:
    """The flags of a teacher of the trainer's; empty without one."""
    return _flags(args, "distill_model", "dataset_reinforcement") if distils(args) else ""


def _flags(args: Any, *names: str) -> str:
    """The flags, of these arguments, that are given."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None))


# These two are called from patches; they stand last, so that a file that was cut has neither.


def requested(args: Any) -> str | None:
    """The loss of the catalogue that the trainer's parsed arguments ask for.

    Raises:
        RuntimeError: ``--loss`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    swallowed = getattr(args, "loss_dist_impl", None)
    # The option's own values come first.
    if swallowed not in (None, "bidir", "shift", "reduce", "gather") and _is_named(swallowed):
        raise RuntimeError(
            f"--loss {swallowed} was read as --loss-dist-impl {swallowed}: start the training with "
            "`python -m rankloss_open_clip`, or run `rankloss doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and _is_named(name) else None


def parsed(parse_args: Callable[[list[str]], Any], argv: Sequence[str], start: Start) -> Any:
    """Parse a command line: the losses and their options here, and the rest by the trainer's function.

    With a loss the arguments gain its name and the values of all its options.

    Args:
        parse_args: The trainer's function.
        argv: The command line.
        start: Builds the losses, and checks them and their data.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage="... --loss NAME [--NAME-OPTION VALUE ...]"
    )
    losses = LossArguments(parser, mentioned(argv))
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
    own, rest = losses.parse(argv)
    args = _parsed_by_trainer(parse_args, rest, parser)
    vars(args).update(vars(own))
    try:
        found = losses.chosen(own)
        if found is not None:
            raise_failures()
            start(args, *found)
            _fill_in(args, *found)
    except ValueError as error:
        parser.error(f"argument {error}")
    requested(args)
    return args
