"""``--loss``, the options of losses and of a run on a command line, for every trainer."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.catalog import JOIN, PREFIXES, TRAINERS_OWN, prefix_of
from rankloss_trainers.declared import Choice, Loss, Named, hint_elsewhere
from rankloss_trainers.option import Option, OptionError, did_you_mean, options_of
from rankloss_trainers.run_options import RunOptions

RUN = "loss"
"""The prefix of the options of a run."""


def flag(prefix: str, key: str) -> str:
    """An option as it is typed, by the prefix of its loss."""
    return f"--{prefix}-{key}".replace("_", "-")


def dest(prefix: str, key: str) -> str:
    """An option as an attribute of the parsed arguments."""
    return f"{prefix}_{key}".replace("-", "_")


def typed_options(named: Named) -> dict[str, Option]:
    """The options of a loss that a command line has, by key."""
    return {
        key: option
        for key, option in named.options.items()
        if key not in named.python_only and option.is_typed
    }


def attributes(losses: Mapping[str, Named]) -> Iterator[tuple[str, str, str]]:
    """Each option of losses and of a run: its loss, empty for the run, its key, and its :func:`dest`."""
    for key in options_of(RunOptions):
        yield "", key, dest(RUN, key)
    for name, named in losses.items():
        for key in typed_options(named):
            yield name, key, dest(prefix_of(name, named), key)


def fill_in(args: Any, choice: Choice) -> None:
    """Set every option of a run and its losses as an attribute of parsed arguments."""
    values = {loss.name: loss.values for loss in choice.losses}
    values[""] = vars(choice.options)  # those of the run have the empty name in attributes()
    declarations = {loss.name: loss.named for loss in choice.losses}
    for name, key, attribute in attributes(declarations):
        setattr(args, attribute, values[name][key])


def mentioned(argv: Sequence[str]) -> list[str]:
    """The losses that a command line may mean: those that it names, and those whose options it has.

    With ``--help`` it may mean all. Only these have to be imported, so that another package's loss cannot
    affect other runs.
    """
    if "-h" in argv or "--help" in argv:
        return list(catalog.known())
    # Any word may be the value of --loss, and "a+b" names two losses.
    possible_names = set()
    for word in argv:
        possible_names.update(word.removeprefix("--loss=").split(JOIN))

    def is_meant(name: str) -> bool:
        flags = f"--{name}-", f"--{catalog.own_prefix(name)}-"
        return name in possible_names or any(word.startswith(flags) for word in argv)

    return [name for name in catalog.known() if is_meant(name)]


def misspelt(words: Iterable[str], known: Iterable[str]) -> str:
    """A question that ends an error about unknown words of a command line; empty without a similar flag.

    Words without ``--`` are ignored.

    Example:
        >>> misspelt(["--rankclip-lamda-in=1", "x"], ["--rankclip-lambda-in", "--model"])
        '; did you mean --rankclip-lambda-in?'
    """
    flags = [option for option in known if option.startswith("--")]
    for word in words:
        if word.startswith("--"):
            hint = did_you_mean(_flag_of(word), flags, cutoff=0.75)
            if hint:
                return hint
    return ""


def _flag_of(word: str) -> str:
    """The flag in a word of a command line: without a value, with hyphens for underscores."""
    return word.partition("=")[0].replace("_", "-")


def beginnings() -> tuple[str, ...]:
    """The beginnings of the options of all losses."""
    return tuple(f"--{prefix}-" for prefix in (*PREFIXES, *catalog.known()))


def with_flag(losses: Sequence[Loss], error: ValueError) -> str:
    """An error of losses or of a run that begins with the flag of an option; else with ``--loss``.

    One that begins with a flag already, of the trainer's own, stays.
    """
    if str(error).startswith("--"):
        return str(error)
    if isinstance(error, OptionError):
        for loss in losses:
            if loss.name == error.loss:
                return f"{flag(prefix_of(loss.name, loss.named), error.key)}: {error.reason}"
        if error.key in options_of(RunOptions):
            return f"{flag(RUN, error.key)}: {error.reason}"
    return f"--loss: {error}"


@contextlib.contextmanager
def naming_flags(losses: Sequence[Loss]) -> Iterator[None]:
    """Let a ValueError within the context begin with a flag; see :func:`with_flag`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(with_flag(losses, error)) from error


class LossArguments:
    """``--loss``, the options of losses and of a run on an argparse parser.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        names: The losses.
        default: The default of ``--loss``; None leaves the attribute out.

    Attributes:
        losses: The losses by name.
        unusable: The reasons against those that cannot be used, by name: another package's import fails, or
            the parser has one of their options already.

    Raises:
        ValueError: There is no such loss.
        argparse.ArgumentError: The parser has ``--loss``, or an option of a run, already.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> arguments = LossArguments(parser, ["rankclip"])
        >>> typed = ["--loss", "rankclip", "--rankclip-diagonal", "exclude"]
        >>> losses, run = arguments.chosen(parser.parse_args(typed))
        >>> losses[0].given, run.schedule_unit
        ({'diagonal': False}, 'auto')
    """

    def __init__(
        self, parser: argparse.ArgumentParser, names: Iterable[str], default: str | None = None
    ) -> None:
        self.parser = parser
        self.losses: dict[str, Named] = {}
        self.unusable: dict[str, str] = {}
        group = parser.add_argument_group("loss (rankloss)")
        loss = group.add_argument("--loss", default=default or argparse.SUPPRESS, metavar="NAME")
        for option in options_of(RunOptions).values():
            _add(group, RUN, option)
        for with_one_prefix in self._by_prefix(names).values():
            try:
                add_options(parser, with_one_prefix)
                self.losses.update(with_one_prefix)
            except Exception as error:  # another package's, whose option the parser has, say
                for name in with_one_prefix:
                    self._refuse(name, str(error))
        text = f"{self._summaries()} (default: {default or TRAINERS_OWN})"
        loss.help = text.replace("%", "%%")  # argparse formats a help by %

    def _by_prefix(self, names: Iterable[str]) -> dict[str, dict[str, Named]]:
        """The losses of these names by the prefix of their options; one that cannot be used is refused."""
        by_prefix: dict[str, dict[str, Named]] = {}
        for name in names:
            catalog.names_of(name)  # raises for an unknown one
            try:
                named = catalog.load(name)
                named.options  # noqa: B018  # which imports its module
                by_prefix.setdefault(prefix_of(name, named), {})[name] = named
            except Exception as error:  # another package's, say, which stops only a run that asks for it
                self._refuse(name, f"{type(error).__name__}: {error}")
        return by_prefix

    def _summaries(self) -> str:
        """A line about each loss, for the help of ``--loss``."""
        summaries = {TRAINERS_OWN: "the trainer's own loss"}
        summaries.update({name: named.summary for name, named in self.losses.items()})
        summaries.update(self.unusable)
        return "; ".join(f"{name}: {text}" for name, text in summaries.items() if text)

    def _refuse(self, name: str, reason: str) -> None:
        """Keep the reason against a loss for a run that asks for it."""
        self.unusable[name] = f"cannot be used ({catalog.package_of(name) or 'rankloss'}): {reason}"

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The parser's arguments of a command line, and its other words.

        With ``--loss`` an unknown word that begins like an option of a loss, or is close to one of a run, is
        a usage error, unless it comes after ``--``.
        """
        args, rest = self.parser.parse_known_args(argv)
        if hasattr(args, "loss"):
            for word in itertools.takewhile(lambda word: word != "--", rest):
                self._check_is_no_option(word)
        return args, rest

    def _check_is_no_option(self, word: str) -> None:
        """End the command for an unknown word that is like an option of a loss or of a run."""
        typed = _flag_of(word)
        matching = [beginning for beginning in beginnings() if typed.startswith(beginning)]
        flags_of_run = [flag(RUN, key) for key in options_of(RunOptions)]
        is_close = word.startswith("--") and did_you_mean(typed, flags_of_run, cutoff=0.85) != ""
        if not matching and not is_close:
            return
        hint = ""
        if matching:
            shortest = min(matching, key=len)  # options of rankclip-distill, too, begin with --rankclip-
            key = typed.removeprefix(shortest)
            hint = hint_elsewhere(key.replace("-", "_"), f"--{RUN}-")
        hint = hint or misspelt([word], self.parser._option_string_actions)
        self.parser.error(f"{word.partition('=')[0]}: there is no such option{hint}")

    def chosen(self, args: Any) -> Choice | None:
        """The losses that parsed arguments ask for, with their options; None for the trainer's own.

        Raises:
            ValueError: There is no such loss, it cannot be used, or an option cannot have its value or
                belongs to another loss; the error begins with the argument.
        """
        names = self._names(args)
        of_run = ""  # in place of a loss's name, see attributes
        options: dict[str, dict[str, Any]] = {}  # by loss; none where the trainer's own loss is asked for
        if names:
            options = {loss: {} for loss in (of_run, *names)}
        given = [
            (loss, key, attribute)
            for loss, key, attribute in attributes(self.losses)
            if hasattr(args, attribute)
        ]
        # Losses of one prefix share an attribute, which one of those that are asked for has to use.
        used_attributes = set()
        for loss, key, attribute in given:
            if loss in options:
                options[loss][key] = getattr(args, attribute)
                used_attributes.add(attribute)
        for _, _, attribute in given:
            if attribute not in used_attributes:
                # An option of the run, whose loss is empty, is for a loss of any NAME.
                owners = [loss or "NAME" for loss, _, other in given if other == attribute]
                raise ValueError(f"--{attribute.replace('_', '-')}: only with --loss {' or '.join(owners)}")
        if not names:
            return None
        with naming_flags(()):
            run = RunOptions(**options.pop(of_run))
        return Choice(catalog.choose_each(names, options), run)

    def _names(self, args: Any) -> list[str]:
        """The names of the losses that parsed arguments ask for; none for the trainer's own."""
        name = getattr(args, "loss", TRAINERS_OWN)
        if name == TRAINERS_OWN:
            return []
        try:
            names = catalog.names_of(name)
        except ValueError as error:
            raise ValueError(f"--loss: {error}; {TRAINERS_OWN} is the trainer's own") from None
        for loss in names:
            if loss in self.unusable:
                raise ValueError(f"--loss: {loss} {self.unusable[loss]}")
        return names


def add_options(parser: argparse.ArgumentParser, losses: Mapping[str, Named]) -> None:
    """Add the options that some losses share; each is absent unless it is given.

    Args:
        parser: The parser.
        losses: The losses. Those after the first may differ in defaults, which ``--help`` shows.

    Raises:
        argparse.ArgumentError: The parser has such an option.
    """
    (first, named), *others = losses.items()
    group = parser.add_argument_group(f"--loss {', '.join(losses)}")
    for key, option in typed_options(named).items():
        presets = {}
        for name, other in others:
            if key in other.options and other.options[key].default != option.default:
                presets[name] = other.options[key].default
        _add(group, prefix_of(first, named), option, presets)


def _add(group: Any, prefix: str, option: Option, presets: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Add an option to a group of a parser.

    Args:
        group: The group.
        prefix: The prefix of the option.
        option: The option.
        presets: Other defaults of it, by the loss that has them, for the help.
    """
    defaults = "must be given" if option.is_required else f"default: {option.spelled(option.default)}"
    for name, value in presets.items():
        defaults += f"; {name}: {option.spelled(value)}"
    group.add_argument(
        flag(prefix, option.key),
        default=argparse.SUPPRESS,
        type=_typed(option),
        metavar=option.metavar,
        help=f"{option.help} ({defaults})".replace("%", "%%"),  # argparse formats it by %
    )


def _typed(option: Option) -> Callable[[str], Any]:
    """The function by which argparse reads an option, and whose error it shows."""

    def typed(text: str) -> Any:
        try:
            return option.parsed(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def described(names: Sequence[str]) -> str:
    """The options of a loss or of joined ones, one a line, with their defaults."""
    texts = []
    for loss in catalog.choose_each(names, {}):
        parser = argparse.ArgumentParser(add_help=False)
        add_options(parser, {loss.name: loss.named})
        title = f"--loss {loss.name}:\n"  # of the group, below the parser's usage
        _, _, options = parser.format_help().partition(title)
        texts.append(options.rstrip())
    return "\n".join(texts)
