"""``--loss``, the options of losses and of a run on a command line, for every trainer."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rankloss_trainers import catalog
from rankloss_trainers.catalog import JOIN, PREFIXES, TRAINERS_OWN
from rankloss_trainers.declared import (
    Loss,
    Named,
    Option,
    OptionError,
    did_you_mean,
    naming_options,
    options_of,
    replaced,
)
from rankloss_trainers.run_options import Chosen, RunOptions

RUN = "loss"
"""The prefix of the options of a run."""


def flag(prefix: str, key: str) -> str:
    """An option as it is typed, by the prefix of its loss."""
    return f"--{prefix}-{key}".replace("_", "-")


def dest(prefix: str, key: str) -> str:
    """An option as an attribute of the parsed arguments."""
    return f"{prefix}_{key}".replace("-", "_")


def prefix_of(name: str, named: Named) -> str:
    """The prefix of the options of a loss."""
    return named.prefix or name


def typed_options(named: Named) -> dict[str, Option]:
    """The options of a loss that a command line has, by key."""
    return {key: x for key, x in named.options.items() if key not in named.python_only and x.is_typed}


def mentioned(argv: Sequence[str]) -> list[str]:
    """The losses that a command line may mean: those that it names, and those whose options it has.

    Only these have to be imported, so that another package's loss cannot affect other runs.
    """
    words = {part for word in argv for part in (word, *word.removeprefix("--loss=").split(JOIN))}
    shows_all = words & {"-h", "--help"}
    prefixes = {name: named.prefix for name, named in catalog.LOSSES.items()}
    begun = [x for x in (*PREFIXES, *catalog.known()) if any(w.startswith(f"--{x}-") for w in words)]
    return [
        name
        for name in catalog.known()
        if shows_all or name in words or any(x in (name, prefixes.get(name)) for x in begun)
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
    return tuple(f"--{x}-" for x in (*PREFIXES, *catalog.known()))


def with_flag(losses: Sequence[Loss], error: ValueError) -> str:
    """An error of losses or of a run that begins with the flag of an option; else with ``--loss``."""
    if isinstance(error, OptionError):
        if error.loss == "" and error.key in options_of(RunOptions):
            return f"{flag(RUN, error.key)}: {error.reason}"
        for loss in losses:
            if error.key in loss.named.options and error.loss in ("", loss.name):
                return f"{flag(prefix_of(loss.name, loss.named), error.key)}: {error.reason}"
    return f"--loss: {error}"


def chosen_by(args: Any, names: str, losses: Mapping[str, Named]) -> Chosen:
    """The losses of joined names, and the run's options, with the values that parsed arguments have.

    Raises:
        ValueError: An option cannot have its value; the error begins with its flag.
    """
    by_loss = {
        name: {
            key: getattr(args, where)
            for key, option in typed_options(losses[name]).items()
            if hasattr(args, where := dest(prefix_of(name, losses[name]), key))
            and not (getattr(args, where) is None and option.is_required)
        }
        for name in catalog.names_of(names)
    }
    run = {
        key: getattr(args, dest(RUN, key)) for key in options_of(RunOptions) if hasattr(args, dest(RUN, key))
    }
    found = catalog.choose(names, by_loss if len(by_loss) > 1 else by_loss[names])
    try:
        with naming_options(options_of(RunOptions)):
            return Chosen(found, RunOptions(**run))
    except ValueError as error:
        raise ValueError(with_flag(found, error)) from None


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
            _add(group, RUN, option, {})
        for name in names:
            try:
                self.losses[name] = catalog.load(name)
                self.losses[name].options  # noqa: B018  # which imports its module
            except Exception as error:  # another package's, say, which stops only a run that asks for it
                self.losses.pop(name, None)
                package = catalog.package_of(name) or "rankloss"
                self.unusable[name] = f"cannot be used ({package}): {type(error).__name__}: {error}"
        for alike in by_prefix(self.losses).values():
            try:
                add_options(parser, alike)
            except argparse.ArgumentError as error:  # another package's, whose option the parser has
                for name in alike:
                    del self.losses[name]
                    self.unusable[name] = f"cannot be used ({catalog.package_of(name)}): {error}"
        said = {TRAINERS_OWN: "the trainer's own loss", **{x: y.summary for x, y in self.losses.items()}}
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
            typed = unknown[0].partition("=")[0]
            word = typed.replace("_", "-")
            key = next(word[len(x) :] for x in sorted(beginnings(), key=len) if word.startswith(x))
            hint = replaced(key.replace("-", "_"), f"--{RUN}-")
            hint = hint or misspelt(unknown, self.parser._option_string_actions)
            self.parser.error(f"{typed}: there is no such option{hint}")
        return args, rest

    def chosen(self, args: Any) -> Chosen | None:
        """The losses that parsed arguments ask for, with their options; None for the trainer's own.

        Raises:
            ValueError: There is no such loss, it cannot be used, or an option cannot have its value or
                belongs to another loss; the error begins with the argument.
        """
        name = getattr(args, "loss", TRAINERS_OWN)
        try:
            names = [] if name == TRAINERS_OWN else catalog.names_of(name)
            for each in names:
                if each in self.unusable:
                    raise ValueError(f"{each} {self.unusable[each]}")
        except ValueError as error:
            raise ValueError(f"--loss: {error}") from None
        used = {prefix_of(each, self.losses[each]) for each in names}
        groups = by_prefix(self.losses)
        known = {prefix: typed_options(next(iter(alike.values()))) for prefix, alike in groups.items()}
        for prefix, options in {RUN: options_of(RunOptions), **known}.items():
            others = [flag(prefix, key) for key in options if hasattr(args, dest(prefix, key))]
            if others and not (prefix in used or (prefix == RUN and names)):
                owners = "NAME" if prefix == RUN else " or ".join(groups[prefix])
                raise ValueError(f"{', '.join(others)}: only with --loss {owners}")
        return chosen_by(args, name, self.losses) if names else None


def by_prefix(losses: Mapping[str, Named]) -> dict[str, dict[str, Named]]:
    """Losses by the prefix of their options."""
    groups: dict[str, dict[str, Named]] = {}
    for name, named in losses.items():
        groups.setdefault(prefix_of(name, named), {})[name] = named
    return groups


def add_options(
    parser: argparse.ArgumentParser, losses: Mapping[str, Named], changed: Mapping[str, Any] | None = None
) -> None:
    """Add the options that some losses share; each is absent unless it is given.

    Args:
        parser: The parser.
        losses: The losses. Those after the first may differ in defaults, which ``--help`` shows.
        changed: Defaults of the first in place of its own.

    Raises:
        argparse.ArgumentError: The parser has such an option.
    """
    (first, named), *others = losses.items()
    group = parser.add_argument_group(f"--loss {', '.join(losses)}")
    for key, option in typed_options(named).items():
        defaults = {name: x.options[key].default for name, x in others if key in x.options}
        if changed is not None and key in changed:
            defaults = {"here": changed[key]}
        _add(
            group, prefix_of(first, named), option, {x: y for x, y in defaults.items() if y != option.default}
        )


def _add(group: Any, prefix: str, option: Option, presets: Mapping[str, Any]) -> None:
    default = "must be given" if option.is_required else f"default: {option.spelled(option.default)}"
    other = "".join(f"; {name}: {option.spelled(x)}" for name, x in presets.items())
    group.add_argument(
        flag(prefix, option.key),
        dest=dest(prefix, option.key),
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
    texts, defaults = [], catalog.joint_defaults([*names])
    for name in names:
        parser = argparse.ArgumentParser(add_help=False)
        add_options(parser, {name: catalog.load(name)}, defaults[name])
        texts.append(parser.format_help().partition(f"--loss {name}:\n")[2].rstrip())
    return "\n".join(texts)
