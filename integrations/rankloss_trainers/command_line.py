"""``--loss`` and the options of losses on a command line, for every trainer."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.catalog import BUILT_IN, JOIN, TRAINERS_OWN, LossEntry, Option, Options, did_you_mean


def flag(name: str, entry: LossEntry, option: Option) -> str:
    """An option of the loss ``name``, as it is typed."""
    return f"--{option.prefix or entry.prefix or name}-{option.name}"


def dest(name: str, entry: LossEntry, option: Option) -> str:
    """An option of the loss ``name``, as an attribute of the parsed arguments."""
    return flag(name, entry, option)[2:].replace("-", "_")


def mentioned(argv: Sequence[str]) -> list[str]:
    """The losses that a command line may mean: rankloss's own, those named, and those whose options begin so.

    Only these have to be imported, so that another package's loss cannot affect other runs.
    """
    words = {part for word in argv for part in (word, *word.removeprefix("--loss=").split(JOIN))}
    shows_all = words & {"-h", "--help"}
    names = catalog.candidates()
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
    return tuple(f"--{x}-" for x in (*catalog.PREFIXES, *catalog.candidates()))


def with_flag(name: str, entry: LossEntry, reason: str) -> str:
    """A reason that begins with the key of an option, beginning with its flag; else with ``--loss``."""
    match = re.match(r"\w+", reason)
    for option in entry.options:
        if match is not None and match[0] == option.key:
            rest = reason[match.end() :]
            # "bins must be …" and "lists: …" lose the key; "diagonal=False does …" would lose its subject.
            text = reason if rest.startswith("=") else rest.removeprefix(":").lstrip()
            return f"{flag(name, entry, option)}: {text}"
    return f"--loss: {reason}"


class LossArguments:
    """``--loss`` and the options of losses on an argparse parser.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        names: The losses.
        default: The default of ``--loss``; None leaves the attribute out.
        defaults: Defaults of options that differ from the catalogue's in this trainer.

    Attributes:
        entries: The losses by name.
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
        self.entries: dict[str, LossEntry] = {}
        self.unusable: dict[str, str] = {}
        loss = parser.add_argument_group("loss (rankloss)").add_argument(
            "--loss", default=default or argparse.SUPPRESS, metavar="NAME"
        )
        for name in names:
            found = catalog.find(name)
            try:
                self.entries[name] = found.load().with_defaults(**defaults)
            except Exception as error:  # another package's, say, which stops only a run that asks for it
                package = found.package or "rankloss"
                self.unusable[name] = f"cannot be used ({package}): {type(error).__name__}: {error}"
        for alike in by_prefix(self.entries).values():
            add_options(parser, {name: self.entries[name] for name in alike})
        said = {TRAINERS_OWN: "the trainer's own loss", **{x: y.help for x, y in self.entries.items()}}
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
            chosen = None if name == TRAINERS_OWN else self._entry(name)
        except ValueError as error:
            raise ValueError(f"--loss: {error}") from None
        flags = {} if chosen is None else {dest(name, chosen, x): x.key for x in chosen.options}
        for names in by_prefix(self.entries).values():
            entry = self.entries[names[0]]
            given = [x for x in entry.options if hasattr(args, dest(names[0], entry, x))]
            others = [flag(names[0], entry, x) for x in given if dest(names[0], entry, x) not in flags]
            if others:
                raise ValueError(f"{', '.join(others)}: only with --loss {' or '.join(names)}")
        if chosen is None:
            return None
        return name, {key: getattr(args, x) for x, key in flags.items() if hasattr(args, x)}

    def _entry(self, name: str) -> LossEntry:
        """The entry of a loss, or of joined ones."""
        for part in name.split(JOIN):
            if part in self.unusable:
                raise ValueError(f"{part} {self.unusable[part]}")
        catalog.find(name)
        if JOIN not in name:
            return self.entries[name]
        from rankloss_trainers.joined import joined

        return joined(name, self.entries.__getitem__)

    def refuse(self, name: str, given: Options) -> None:
        """Raise a ValueError for a loss with options that work in no trainer; it begins with the argument."""
        from rankloss.distributed import Gather

        entry = self._entry(name)
        try:
            reason = entry.refuse(entry.checked(name, given), Gather(rank=0, world_size=1))
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            raise ValueError(with_flag(name, entry, reason))


def by_prefix(entries: Mapping[str, LossEntry]) -> dict[str, list[str]]:
    """The names of losses, by the prefix of their options."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.prefix or name, []).append(name)
    return groups


def add_options(parser: argparse.ArgumentParser, entries: Mapping[str, LossEntry]) -> None:
    """Add the options that some losses share; each is absent unless it is given.

    Args:
        parser: The parser.
        entries: The losses, by name. Those after the first may differ in defaults, which ``--help`` shows.

    Raises:
        argparse.ArgumentError: The parser has such an option.
    """
    first, *others = entries
    entry = entries[first]
    if not entry.options:
        return
    values = {name: {x.key: x.default for x in each.options} for name, each in entries.items()}
    group = parser.add_argument_group(f"--loss {', '.join(entries)}")
    for option in entry.options:
        default = values[first][option.key]
        presets = [
            f"; {name}: {option.text(values[name][option.key])}"
            for name in others
            if values[name].get(option.key, default) != default
        ]
        choices = option.values or option.keywords.get("choices", ())
        group.add_argument(
            flag(first, entry, option),
            dest=dest(first, entry, option),
            default=argparse.SUPPRESS,
            type=_typed(option),
            metavar=f"{{{','.join(choices)}}}" if choices else option.keywords.get("metavar"),
            help=f"{option.help} (default: {option.text(default)}{''.join(presets)})",
        )


def _typed(option: Option) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            return option.checked(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def described(entries: Mapping[str, LossEntry]) -> str:
    """The options of losses that share them, one a line, with their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, entries)
    return parser.format_help().partition(f"--loss {', '.join(entries)}:\n")[2].rstrip()
