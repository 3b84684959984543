"""The command line: ``--loss``, the options of losses and of a run.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the options' defaults are filled in, and
``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rankloss_open_clip import raise_failures
from rankloss_trainers import catalog
from rankloss_trainers.command_line import LossArguments, fill_in, mentioned, misspelt
from rankloss_trainers.declared import Choice

# --- the run that is asked for --------------------------------------------------------------------------


def _is_named(name: str) -> bool:
    """True for a loss of the catalogue, or several joined."""
    return all(part in catalog.known() for part in name.split(catalog.JOIN))


def chosen(args: Any) -> Choice:
    """The losses and the options of a run with ``--loss``, from its parsed arguments.

    Raises:
        ValueError: As :meth:`rankloss_trainers.command_line.LossArguments.chosen`.
    """
    # The losses add their options to a parser, which is not used: args are parsed already.
    unused_parser = argparse.ArgumentParser()
    losses = LossArguments(unused_parser, catalog.names_of(args.loss))
    choice = losses.chosen(args)
    assert choice is not None  # the name is of the catalogue
    return choice


class Arguments(argparse.Namespace):
    """The trainer's parsed arguments in a run with ``--loss``, and the losses that were built for them.

    The trainer logs ``vars(args)``, to which a slot does not belong. A copy has no losses, as its values may
    differ.

    Attributes:
        rankloss_run: The losses, :class:`rankloss_open_clip.trainer_loss.TrainerLoss`.
    """

    __slots__ = ("rankloss_run",)
    rankloss_run: Any

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)


# --- the parser -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    """A parser for ``--loss`` and the options of losses, beside the trainer's own."""
    return argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage="... --loss NAME [--NAME-OPTION VALUE ...]"
    )


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Let a ValueError in the context, which begins with an argument, end the command as a usage error."""
    try:
        yield
    except ValueError as error:
        _parser().error(f"argument {error}")


def _parsed_by_trainer(parse_args: Callable[[list[str]], Any], rest: list[str], parser: Any) -> Any:
    """The trainer's arguments; after an error about unknown words, a question about misspelt ones of ours.

    Args:
        parse_args: The trainer's function.
        rest: The words of the command line that are for the trainer.
        parser: The parser of the losses.
    """
    with contextlib.redirect_stderr(_Copied(sys.stderr)) as errors:
        try:
            return parse_args(rest)
        except SystemExit:
            _, _, unknown = errors.getvalue().partition("unrecognized arguments:")  # argparse's words
            flags_of_losses = parser._option_string_actions  # argparse has no public list of them
            hint = misspelt(unknown.split(), flags_of_losses)
            if hint:
                print(hint.removeprefix("; "), file=sys.stderr)
            raise


class _Copied(io.StringIO):
    """A copy of the text that is written to a stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.stream.flush()


# These two are called from patches; they stand last, so that a file that was cut has neither.


def requested(args: Any) -> str | None:
    """The loss of the catalogue that the trainer's parsed arguments ask for; None without one.

    The trainer's own losses are not of the catalogue.

    Raises:
        RuntimeError: ``--loss`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    dist_impl: Any = getattr(args, "loss_dist_impl", None)
    is_trainers_own = dist_impl in (None, "bidir", "shift", "reduce", "gather")
    if not is_trainers_own and _is_named(dist_impl):
        raise RuntimeError(
            f"--loss {dist_impl} was read as --loss-dist-impl {dist_impl}: start the training with "
            "`python -m rankloss_open_clip`, or run `rankloss doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and _is_named(name) else None


def parsed(parse_args: Callable[[list[str]], Any], argv: Sequence[str]) -> tuple[Any, Choice | None]:
    """Parse a command line: the losses and their options here, and the rest by the trainer's function.

    Args:
        parse_args: The trainer's function.
        argv: The command line.

    Returns:
        The trainer's arguments, with ``--loss`` :class:`Arguments`, which have the values of all options of
        the losses; and the losses, None for the trainer's own.

    Raises:
        SystemExit: The command line has an error, or asks for help, which is printed.
        ImportError: A loss is asked for, and a module of the trainer could not be patched.
        RuntimeError: As :func:`requested`.
    """
    parser = _parser()
    losses = LossArguments(parser, mentioned(argv))
    if "-h" in argv or "--help" in argv:
        parser.print_help()
    of_losses, rest = losses.parse(argv)
    args = _parsed_by_trainer(parse_args, rest, parser)
    vars(args).update(vars(of_losses))
    with usage_errors():
        choice = losses.chosen(of_losses)
    if choice is not None:
        raise_failures()
        args = Arguments(**vars(args))
        fill_in(args, choice)
    requested(args)  # raises where another parser has read --loss
    return args, choice
