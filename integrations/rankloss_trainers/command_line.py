"""``--loss`` and the options of losses on a command line, for every trainer."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.catalog import BUILT_IN, JOIN, TRAINERS_OWN
from rankloss_trainers.named import NamedLoss, Option, Options, did_you_mean, error_of

Loss = type[NamedLoss]


def flag(loss: Loss | NamedLoss, option: Option) -> str:
    """An option of a loss, as it is typed."""
    return f"--{loss.prefix or loss.name}-{option.name}"


def dest(loss: Loss | NamedLoss, option: Option) -> str:
    """An option of a loss, as an attribute of the parsed arguments."""
    return flag(loss, option)[2:].replace("-", "_")


def given_in(args: Any, losses: Sequence[Loss]) -> dict[str, Any]:
    """The options of losses in parsed arguments, as :func:`rankloss_trainers.catalog.choose` takes them."""
    own = {}
    for loss in losses:
        dests = {key: dest(loss, option) for key, option in loss.options().items()}
        own[loss.name] = {key: getattr(args, name) for key, name in dests.items() if hasattr(args, name)}
    return own if len(losses) > 1 else own[losses[0].name]


def mentioned(argv: Sequence[str]) -> list[str]:
    """The losses that a command line may mean: rankloss's own, those named, and those whose options begin so.

    Only these have to be imported, so that another package's loss cannot affect other runs.
    """
    words = {part for word in argv for part in (word, *word.removeprefix("--loss=").split(JOIN))}
    shows_all = words & {"-h", "--help"}
    names = catalog.known()
    begun = {name for name in names if any(word.startswith(f"--{name}-") for word in words)}
    return [name for name in names if shows_all or name in {*BUILT_IN, *words, *begun}]


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


def with_flag(losses: Iterable[Loss | NamedLoss], reason: str) -> str:
    """A reason that begins with an option, beginning with its flag; else with ``--loss``.

    Args:
        losses: The loss, or those that are joined.
        reason: ``top_k must be …``; of joined losses ``rankclip.top_k must be …``.
    """
    match = re.match(r"(?:([\w-]+)\.)?(\w+)", reason)
    for loss in losses:
        option = loss.options().get(match[2]) if match and match[1] in (None, loss.name) else None
        if match and option is not None:
            rest = reason[match.end() :]
            # "bins must be …" and "lists: …" lose the key; "diagonal=False does …" would lose its subject.
            text = reason if rest.startswith("=") else rest.removeprefix(":").lstrip()
            return f"{flag(loss, option)}: {text}"
    return f"--loss: {reason}"


class LossArguments:
    """``--loss`` and the options of losses on an argparse parser.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        names: The losses.
        default: The default of ``--loss``; None leaves the attribute out.
        defaults: Defaults of options that differ from the catalogue's in this trainer.

    Attributes:
        losses: The losses by name.
        unusable: The reasons against those that cannot be used: another package's import fails.

    Raises:
        argparse.ArgumentError: The parser has an option of a loss.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> losses = LossArguments(parser, ["rankclip"])
        >>> losses.chosen(parser.parse_args(["--loss", "rankclip", "--rankclip-diagonal", "exclude"]))
        ('rankclip', {'diagonal': False})
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        names: Iterable[str],
        default: str | None = None,
        defaults: Options = MappingProxyType({}),
    ) -> None:
        self.parser = parser
        self.losses: dict[str, Loss] = {}
        self.unusable: dict[str, str] = {}
        loss = parser.add_argument_group("loss (rankloss)").add_argument(
            "--loss", default=default or argparse.SUPPRESS, metavar="NAME"
        )
        for name in names:
            try:
                self.losses[name] = catalog.load(name).with_defaults(defaults)
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

    def chosen(self, args: Any) -> tuple[str, dict[str, Any]] | None:
        """The loss that parsed arguments ask for, and its given options; None for the trainer's own.

        Raises:
            ValueError: There is no such loss, it cannot be used, or an option was given that belongs to
                another; the error begins with the argument.
        """
        name = getattr(args, "loss", TRAINERS_OWN)
        try:
            chosen = [] if name == TRAINERS_OWN else [self._loss(part) for part in catalog.names_of(name)]
        except ValueError as error:
            raise ValueError(f"--loss: {error}") from None
        dests = {dest(loss, x) for loss in chosen for x in loss.options().values()}
        for alike in by_prefix(self.losses.values()).values():
            given = [x for x in alike[0].options().values() if hasattr(args, dest(alike[0], x))]
            others = [flag(alike[0], x) for x in given if dest(alike[0], x) not in dests]
            if others:
                names = " or ".join(loss.name for loss in alike)
                raise ValueError(f"{', '.join(others)}: only with --loss {names}")
        return (name, given_in(args, chosen)) if chosen else None

    def _loss(self, name: str) -> Loss:
        if name in self.unusable:
            raise ValueError(f"{name} {self.unusable[name]}")
        return self.losses[name]

    def choose(self, name: str, given: Options) -> NamedLoss:
        """The loss of :meth:`chosen`.

        Raises:
            ValueError: An option cannot have its value; the error begins with the flag.
        """
        try:
            return catalog.choose(name, given, self._loss)
        except ValueError as error:
            raise ValueError(with_flag([self._loss(x) for x in name.split(JOIN)], str(error))) from None

    def refuse(self, name: str, given: Options) -> None:
        """Raise a ValueError for a loss with options that work in no trainer; it begins with the argument."""
        import rankloss

        loss, alone = self.choose(name, given), rankloss.Gather(rank=0, world_size=1)
        sigmoid = any(part.only_sigmoid for part in loss.parts)
        base = rankloss.SigLipLoss if sigmoid else rankloss.ClipLoss
        reason = loss.refuse(alone) or error_of(lambda: loss.build(base(gather=False), alone))
        if reason is not None:
            raise ValueError(with_flag(loss.parts, reason))


def by_prefix(losses: Iterable[Loss]) -> dict[str, list[Loss]]:
    """Losses by the prefix of their options."""
    groups: dict[str, list[Loss]] = {}
    for loss in losses:
        groups.setdefault(loss.prefix or loss.name, []).append(loss)
    return groups


def add_options(parser: argparse.ArgumentParser, losses: Sequence[Loss]) -> None:
    """Add the options that some losses share; each is absent unless it is given.

    Args:
        parser: The parser.
        losses: The losses. Those after the first may differ in defaults, which ``--help`` shows.

    Raises:
        argparse.ArgumentError: The parser has such an option.
    """
    first, *others = losses
    group = parser.add_argument_group(f"--loss {', '.join(loss.name for loss in losses)}")
    for key, option in first.options().items():
        defaults = {loss.name: loss.options()[key].default for loss in others if key in loss.options()}
        presets = [f"; {x}: {option.text(y)}" for x, y in defaults.items() if y != option.default]
        group.add_argument(
            flag(first, option),
            dest=dest(first, option),
            default=argparse.SUPPRESS,
            type=_typed(option),
            metavar=option.metavar,
            help=f"{option.help} (default: {option.text(option.default)}{''.join(presets)})",
        )


def _typed(option: Option) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            return option.checked(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{option.key} ")) from None

    return typed


def described(losses: Iterable[Loss]) -> str:
    """The options of losses, one a line, with their defaults."""
    texts = []
    for loss in losses:
        parser = argparse.ArgumentParser(add_help=False)
        add_options(parser, [loss])
        texts.append(parser.format_help().partition(f"--loss {loss.name}:\n")[2].rstrip())
    return "\n".join(texts)
