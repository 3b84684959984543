"""``--loss`` and the options of losses on a command line, for every trainer."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.catalog import JOIN, PREFIXES, TRAINERS_OWN
from rankloss_trainers.named import NamedLoss, Option, OptionError, did_you_mean

Loss = type[NamedLoss]


def flag(loss: Loss | NamedLoss, option: Option) -> str:
    """An option of a loss, as it is typed."""
    return f"--{loss.prefix or loss.name}-{option.name}"


def dest(loss: Loss | NamedLoss, option: Option) -> str:
    """An option of a loss, as an attribute of the parsed arguments."""
    return flag(loss, option)[2:].replace("-", "_")


def chosen_by(args: Any, losses: Sequence[Loss]) -> NamedLoss:
    """The loss of classes that parsed arguments name, with the options that they give.

    Raises:
        ValueError: An option cannot have its value; the error begins with its flag.
    """
    own = {}
    for loss in losses:
        dests = {key: dest(loss, option) for key, option in loss.options().items()}
        own[loss.name] = {key: getattr(args, name) for key, name in dests.items() if hasattr(args, name)}
    try:
        return catalog.chosen(losses, own if len(losses) > 1 else own[losses[0].name])
    except ValueError as error:
        raise ValueError(with_flag(losses, error)) from None


def mentioned(argv: Sequence[str]) -> list[str]:
    """The losses that a command line may mean: those that it names, and those whose options it has.

    Only these have to be imported, so that another package's loss cannot affect other runs.
    """
    words = {part for word in argv for part in (word, *word.removeprefix("--loss=").split(JOIN))}
    shows_all = words & {"-h", "--help"}
    begun = [x for x in (*catalog.PREFIXES, *catalog.known()) if any(w.startswith(f"--{x}-") for w in words)]
    return [
        name
        for name in catalog.known()
        if shows_all or name in words or any(x == name or (x in PREFIXES and x in name) for x in begun)
    ]


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
    return tuple(f"--{x}-" for x in (*catalog.PREFIXES, *catalog.known()))


def with_flag(losses: Iterable[Loss | NamedLoss], error: ValueError) -> str:
    """An error of a loss, or of joined ones, that begins with the flag of an option; else with ``--loss``."""
    if isinstance(error, OptionError):
        for loss in losses:
            if error.key in loss.options() and error.loss in ("", loss.name):
                return f"{flag(loss, loss.options()[error.key])}: {error.reason}"
    return f"--loss: {error}"


class LossArguments:
    """``--loss`` and the options of losses on an argparse parser.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        names: The losses.
        default: The default of ``--loss``; None leaves the attribute out.

    Attributes:
        losses: The losses by name.
        unusable: The reasons against those that cannot be used: another package's import fails.

    Raises:
        argparse.ArgumentError: The parser has an option of a loss.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> losses = LossArguments(parser, ["rankclip"])
        >>> losses.chosen(parser.parse_args(["--loss", "rankclip", "--rankclip-diagonal", "exclude"])).changed
        {'diagonal': False}
    """

    def __init__(
        self, parser: argparse.ArgumentParser, names: Iterable[str], default: str | None = None
    ) -> None:
        self.parser = parser
        self.losses: dict[str, Loss] = {}
        self.unusable: dict[str, str] = {}
        loss = parser.add_argument_group("loss (rankloss)").add_argument(
            "--loss", default=default or argparse.SUPPRESS, metavar="NAME"
        )
        for name in names:
            try:
                self.losses[name] = catalog.load(name)
            except Exception as error:  # another package's, say, which stops only a run that asks for it
                package = catalog.package_of(name) or "rankloss"
                self.unusable[name] = f"cannot be used ({package}): {type(error).__name__}: {error}"
        for alike in by_prefix(self.losses.values()).values():
            add_options(parser, alike)
        said = {TRAINERS_OWN: "the trainer's own loss", **{x: y.help() for x, y in self.losses.items()}}
        said.update(self.unusable)
        help_ = "; ".join(f"{name}: {text}" for name, text in said.items() if text)
        loss.help = f"{help_} (default: {default or TRAINERS_OWN})".replace("%", "%%")

    def parsed(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The parser's arguments of a command line, and its other words.

        With ``--loss`` a word that begins like an option of a loss is a usage error, unless it comes after
        ``--``.
        """
        args, rest = self.parser.parse_known_args(argv)
        before = itertools.takewhile("--".__ne__, rest)
        unknown = [x for x in before if x.replace("_", "-").startswith(beginnings())]
        if unknown and hasattr(args, "loss"):
            hint = misspelt(unknown, self.parser._option_string_actions)
            self.parser.error(f"{unknown[0].partition('=')[0]}: there is no such option{hint}")
        return args, rest

    def chosen(self, args: Any) -> NamedLoss | None:
        """The loss that parsed arguments ask for, with its options; None for the trainer's own.

        Raises:
            ValueError: There is no such loss, it cannot be used, or an option cannot have its value or
                belongs to another loss; the error begins with the argument.
        """
        name = getattr(args, "loss", TRAINERS_OWN)
        try:
            losses = [] if name == TRAINERS_OWN else [self._loss(part) for part in catalog.names_of(name)]
        except ValueError as error:
            raise ValueError(f"--loss: {error}") from None
        dests = {dest(loss, x) for loss in losses for x in loss.options().values()}
        for alike in by_prefix(self.losses.values()).values():
            given = [x for x in alike[0].options().values() if hasattr(args, dest(alike[0], x))]
            others = [flag(alike[0], x) for x in given if dest(alike[0], x) not in dests]
            if others:
                names = " or ".join(loss.name for loss in alike)
                raise ValueError(f"{', '.join(others)}: only with --loss {names}")
        return chosen_by(args, losses) if losses else None

    def _loss(self, name: str) -> Loss:
        if name in self.unusable:
            raise ValueError(f"{name} {self.unusable[name]}")
        return self.losses[name]


def by_prefix(losses: Iterable[Loss]) -> dict[str, list[Loss]]:
    """Losses by the prefix of their options."""
    groups: dict[str, list[Loss]] = {}
    for loss in losses:
        groups.setdefault(loss.prefix or loss.name, []).append(loss)
    return groups


def add_options(
    parser: argparse.ArgumentParser, losses: Sequence[Loss], changed: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Add the options that some losses share; each is absent unless it is given.

    Args:
        parser: The parser.
        losses: The losses. Those after the first may differ in defaults, which ``--help`` shows.
        changed: Defaults of the first in place of its own.

    Raises:
        argparse.ArgumentError: The parser has such an option.
    """
    first, *others = losses
    group = parser.add_argument_group(f"--loss {', '.join(loss.name for loss in losses)}")
    for key, option in first.options().items():
        defaults = {loss.name: loss.options()[key].default for loss in others if key in loss.options()}
        default = option.text(changed.get(key, option.default))
        presets = [f"; {x}: {option.text(y)}" for x, y in defaults.items() if y != option.default]
        group.add_argument(
            flag(first, option),
            dest=dest(first, option),
            default=argparse.SUPPRESS,
            type=_typed(option),
            metavar=option.metavar,
            help=f"{option.help} (default: {default}{''.join(presets)})",
        )


def _typed(option: Option) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            return option.checked(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(error.reason) from None

    return typed


def described(losses: Iterable[Loss]) -> str:
    """The options of a loss or of joined ones, one a line, with their defaults."""
    losses, texts = [*losses], []
    names = [loss.name for loss in losses]
    for loss in losses:
        parser = argparse.ArgumentParser(add_help=False)
        add_options(parser, [loss], catalog.beside(loss, names))
        texts.append(parser.format_help().partition(f"--loss {loss.name}:\n")[2].rstrip())
    return "\n".join(texts)
