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
from rankloss_trainers.declared import Choice, Loss, Named, replaced
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
    return {key: x for key, x in named.options.items() if key not in named.python_only and x.is_typed}


def attributes(losses: Mapping[str, Named]) -> Iterator[tuple[str, str, str]]:
    """Each option of losses and of a run: its loss, empty for the run, its key, and its :func:`dest`."""
    for key in options_of(RunOptions):
        yield "", key, dest(RUN, key)
    for name, named in losses.items():
        for key in typed_options(named):
            yield name, key, dest(prefix_of(name, named), key)


def fill_in(args: Any, choice: Choice) -> None:
    """Set every option of a run and its losses as an attribute of parsed arguments."""
    values = {"": vars(choice.options), **{loss.name: loss.values for loss in choice.losses}}
    for loss, key, where in attributes({loss.name: loss.named for loss in choice.losses}):
        setattr(args, where, values[loss][key])


def mentioned(argv: Sequence[str]) -> list[str]:
    """The losses that a command line may mean: those that it names, and those whose options it has.

    Only these have to be imported, so that another package's loss cannot affect other runs.
    """
    words = {part for word in argv for part in (word, *word.removeprefix("--loss=").split(JOIN))}
    shows_all = words & {"-h", "--help"}

    def is_meant(name: str) -> bool:
        flags = f"--{name}-", f"--{catalog.own_prefix(name)}-"
        return name in words or any(word.startswith(flags) for word in words)

    return [name for name in catalog.known() if shows_all or is_meant(name)]


def misspelt(words: Iterable[str], known: Iterable[str]) -> str:
    """A question that ends an error about unknown words of a command line; words without ``--`` are ignored.

    Example:
        >>> misspelt(["--rankclip-lamda-in=1", "x"], ["--rankclip-lambda-in", "--model"])
        '; did you mean --rankclip-lambda-in?'
    """
    flags = [option for option in known if option.startswith("--")]
    typed = (word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    return next(filter(None, (did_you_mean(word, flags, cutoff=0.75) for word in typed)), "")


def beginnings() -> tuple[str, ...]:
    """The beginnings of the options of all losses."""
    return tuple(f"--{x}-" for x in (*PREFIXES, *catalog.known()))


def with_flag(losses: Sequence[Loss], error: ValueError) -> str:
    """An error of losses or of a run that begins with the flag of an option; else with ``--loss``.

    One that begins with a flag already, of the trainer's own, stays.
    """
    if str(error).startswith("--"):
        return str(error)
    prefixes = {loss.name: prefix_of(loss.name, loss.named) for loss in losses}
    if isinstance(error, OptionError):
        prefix = prefixes.get(error.loss) or (RUN if error.key in options_of(RunOptions) else None)
        if prefix is not None:
            return f"{flag(prefix, error.key)}: {error.reason}"
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
        unusable: The reasons against those that cannot be used: another package's import fails.

    Raises:
        ValueError: There is no such loss.
        argparse.ArgumentError: The parser has an option of a loss.

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
        alike: dict[str, dict[str, Named]] = {}
        for name in names:
            catalog.names_of(name)
            try:
                named = catalog.load(name)
                named.options  # noqa: B018  # which imports its module
                alike.setdefault(prefix_of(name, named), {})[name] = named
            except Exception as error:  # another package's, say, which stops only a run that asks for it
                self._refuse(name, f"{type(error).__name__}: {error}")
        for group_of_losses in alike.values():
            try:
                add_options(parser, group_of_losses)
                self.losses.update(group_of_losses)
            except Exception as error:  # another package's, whose option the parser has, say
                for name in group_of_losses:
                    self._refuse(name, str(error))
        said = {TRAINERS_OWN: "the trainer's own loss", **{x: y.summary for x, y in self.losses.items()}}
        said.update(self.unusable)
        help_ = "; ".join(f"{name}: {text}" for name, text in said.items() if text)
        loss.help = f"{help_} (default: {default or TRAINERS_OWN})".replace("%", "%%")

    def _refuse(self, name: str, reason: str) -> None:
        self.unusable[name] = f"cannot be used ({catalog.package_of(name) or 'rankloss'}): {reason}"

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The parser's arguments of a command line, and its other words.

        With ``--loss`` a word that begins like an option of a loss is a usage error, unless it comes after
        ``--``.
        """
        args, rest = self.parser.parse_known_args(argv)
        of_run = [flag(RUN, key) for key in options_of(RunOptions)]
        for word in itertools.takewhile("--".__ne__, rest if hasattr(args, "loss") else ()):
            typed = word.partition("=")[0].replace("_", "-")
            begins = sorted(filter(typed.startswith, beginnings()), key=len)
            if begins or (word.startswith("--") and did_you_mean(typed, of_run, cutoff=0.85)):
                key = typed.removeprefix(begins[0]) if begins else ""
                hint = replaced(key.replace("-", "_"), f"--{RUN}-")
                hint = hint or misspelt([word], self.parser._option_string_actions)
                self.parser.error(f"{word.partition('=')[0]}: there is no such option{hint}")
        return args, rest

    def chosen(self, args: Any) -> Choice | None:
        """The losses that parsed arguments ask for, with their options; None for the trainer's own.

        Raises:
            ValueError: There is no such loss, it cannot be used, or an option cannot have its value or
                belongs to another loss; the error begins with the argument.
        """
        names = self._names(args)
        given = [row for row in attributes(self.losses) if hasattr(args, row[2])]
        options: dict[str, dict[str, Any]] = {loss: {} for loss in ("", *names)} if names else {}
        used = set()
        for loss, key, where in given:
            if loss in options:
                options[loss][key] = getattr(args, where)
                used.add(where)
        for _, _, where in given:
            if where not in used:
                owners = " or ".join(loss or "NAME" for loss, _, other in given if other == where)
                raise ValueError(f"--{where.replace('_', '-')}: only with --loss {owners}")
        if not names:
            return None
        with naming_flags(()):
            run = RunOptions(**options.pop(""))
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
        for each in names:
            if each in self.unusable:
                raise ValueError(f"--loss: {each} {self.unusable[each]}")
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
        defaults = {name: x.options[key].default for name, x in others if key in x.options}
        _add(
            group, prefix_of(first, named), option, {x: y for x, y in defaults.items() if y != option.default}
        )


def _add(group: Any, prefix: str, option: Option, presets: Mapping[str, Any] = MappingProxyType({})) -> None:
    default = "must be given" if option.is_required else f"default: {option.spelled(option.default)}"
    other = "".join(f"; {name}: {option.spelled(x)}" for name, x in presets.items())
    group.add_argument(
        flag(prefix, option.key),
        default=argparse.SUPPRESS,
        type=_typed(option),
        metavar=option.metavar,
        help=f"{option.help} ({default}{other})".replace("%", "%%"),
    )


def _typed(option: Option) -> Callable[[str], Any]:
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
        texts.append(parser.format_help().partition(f"--loss {loss.name}:\n")[2].rstrip())
    return "\n".join(texts)
