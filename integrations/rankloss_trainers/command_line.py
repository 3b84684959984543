"""The options of the catalogue's losses, on anybody's command line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rankloss_trainers.catalog import LossEntry, Option, dest, flag


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
            f"; {name}: {_shown(option, values[name][option.key])}"
            for name in others
            if values[name].get(option.key, default) != default
        ]
        group.add_argument(
            flag(first, entry, option),
            dest=dest(first, entry, option),
            default=argparse.SUPPRESS,
            help=f"{option.help} (default: {_shown(option, default)}{''.join(presets)})",
            **option.keywords,
        )


def _shown(option: Option, value: Any) -> Any:
    return option.unset if value is None else value


def did_you_mean(given: Iterable[str], known: Iterable[str]) -> str:
    """A question that ends an error about misspelt options; empty where nothing known is close to them.

    Args:
        given: The words of the command line that no option took; those that are no options are passed over.
        known: The options that there are.

    Example:
        >>> did_you_mean(["--rankclip-lamda-in=1", "x"], ["--rankclip-lambda-in", "--model"])
        '; did you mean --rankclip-lambda-in?'
    """
    known = [option for option in known if option.startswith("--")]
    typed = [word.partition("=")[0].replace("_", "-") for word in given if word.startswith("--")]
    close = [match for word in typed for match in difflib.get_close_matches(word, known, n=1, cutoff=0.75)]
    return f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""


def by_prefix(entries: Mapping[str, LossEntry]) -> dict[str, list[str]]:
    """The names of losses, by what their options begin with."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.prefix or name, []).append(name)
    return groups


def misplaced(name: str | None, entries: Mapping[str, LossEntry], args: Any) -> str:
    """What is wrong with options that belong to another loss than ``name``; empty if there are none."""
    prefix = None if name is None else entries[name].prefix or name
    groups = by_prefix(entries)
    for other, entry in entries.items():
        given = [flag(other, entry, o) for o in entry.options if hasattr(args, dest(other, entry, o))]
        if given and (entry.prefix or other) != prefix:
            return f"{', '.join(given)}: only with --loss {' or '.join(groups[entry.prefix or other])}"
    return ""


def with_flag(name: str, entry: LossEntry, reason: str) -> str:
    """A reason that begins with the key of an option, beginning with its flag."""
    match = re.match(r"\w+", reason)
    for option in entry.options:
        if match is not None and match[0] == option.key:
            rest = reason[match.end() :]
            # "bins must be …" and "lists: …" lose the key; "diagonal=False does …" would lose its subject.
            text = reason if rest.startswith("=") else rest.removeprefix(":").lstrip()
            return f"{flag(name, entry, option)}: {text}"
    return reason
