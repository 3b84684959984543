"""The options of the catalogue's losses, on anybody's command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from rankloss_trainers.catalog import LossEntry, Options, dest, flag


def add_options(
    parser: argparse.ArgumentParser,
    names: list[str],
    entry: LossEntry,
    defaults: Options | None = None,
    presets: Mapping[str, LossEntry] | None = None,
) -> None:
    """Add the options that the losses ``names`` share; each is absent unless it is given.

    Args:
        parser: The parser.
        names: The losses.
        entry: The entry of the first of them.
        defaults: The trainer's defaults, for ``--help``; None for those of the entry.
        presets: The entries of all of them, of which ``--help`` says other defaults.

    Raises:
        argparse.ArgumentError: The parser has such an option.
    """
    if not entry.options:
        return
    group = parser.add_argument_group(f"--loss {', '.join(names)}")
    for option in entry.options:
        default = option.default if defaults is None else defaults[option.key]
        shown = [str(option.unset if default is None else default)]
        for name in names[1:] if presets else ():
            own = next(x.default for x in (presets or {})[name].options if x.name == option.name)
            shown += [f"{name}: {own}"] if own != option.default else []
        group.add_argument(
            flag(names[0], entry, option),
            dest=dest(names[0], entry, option),
            default=argparse.SUPPRESS,
            help=f"{option.help} (default: {'; '.join(shown)})",
            **option.keywords,
        )


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
