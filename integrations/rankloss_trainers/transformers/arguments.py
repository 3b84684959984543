"""``--loss`` and the options of the catalogue's losses, as arguments of a script."""

from __future__ import annotations

import argparse
from typing import Any

import rankloss
from rankloss_trainers import catalog
from rankloss_trainers.catalog import TRAINERS_OWN, dest
from rankloss_trainers.command_line import add_options, by_prefix, misplaced, with_flag
from rankloss_trainers.transformers.choice import defaults

__all__ = ["LossOptions"]

_OURS = ("", "rankloss")  # the package of a loss of the catalogue itself, and of those that come with it


class LossOptions:
    """``--loss`` and the options of losses, on a parser of one's own, such as ``HfArgumentParser``.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        *names: Losses of the catalogue, other packages' among them; the first is the default. By default
            all that come with rankloss.

    Attributes:
        beginnings: What the options of the losses begin with.

    Raises:
        ValueError: There is no such loss.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> options = LossOptions(parser)
        >>> options.keywords(parser.parse_args(["--rankclip-lambda-in", "0.5"]))
        {'loss': 'rankclip', 'loss_options': {'lambda_in': 0.5}}
    """

    def __init__(self, parser: argparse.ArgumentParser, *names: str) -> None:
        found = catalog.candidates()
        names = names or tuple(name for name, x in found.items() if x.package.partition(" ")[0] in _OURS)
        unknown = [name for name in names if name not in (TRAINERS_OWN, *found)]
        if unknown:
            raise ValueError(f"names must be among {', '.join(found)}; got {', '.join(unknown)}")
        self._entries = {name: found[name].load() for name in names if name != TRAINERS_OWN}
        said = [f"{name}: {entry.help}" for name, entry in self._entries.items()]
        help_ = f"{'; '.join(said)} (default: {names[0]})".replace("%", "%%")
        parser.add_argument("--loss", default=names[0], choices=names, metavar="NAME", help=help_)
        groups = by_prefix(self._entries)
        self.beginnings = tuple(f"--{prefix}-" for prefix in groups)
        for alike in groups.values():
            entry = self._entries[alike[0]]
            add_options(parser, alike, entry, defaults(entry), self._entries)

    def keywords(self, args: argparse.Namespace) -> dict[str, Any]:
        """What was given, as keywords of :class:`rankloss_trainers.transformers.ContrastiveTrainer`.

        Args:
            args: What the parser gives; for ``HfArgumentParser`` the namespace behind the dataclasses.

        Raises:
            ValueError: An option was given that belongs to another loss, or that cannot work.
        """
        name = None if args.loss == TRAINERS_OWN else args.loss
        wrong = misplaced(name, self._entries, args)
        if wrong:
            raise ValueError(wrong)
        if name is None:
            return {}
        entry = self._entries[name]
        names = {option.key: dest(name, entry, option) for option in entry.options}
        given = {
            key: getattr(args, attribute) for key, attribute in names.items() if hasattr(args, attribute)
        }
        reason = entry.refuse({**defaults(entry), **given}, rankloss.Gather(rank=0, world_size=1))
        if reason is not None:
            reason = with_flag(name, entry, reason)
            raise ValueError(reason if reason.startswith("--") else f"--loss: {reason}")
        return {"loss": name, "loss_options": given}
