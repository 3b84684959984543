"""``--loss`` and the options of losses on the parser of a script of one's own."""

from __future__ import annotations

import argparse
from typing import Any

import rankloss
from rankloss_trainers import catalog
from rankloss_trainers.catalog import TRAINERS_OWN
from rankloss_trainers.command_line import LossArguments, with_flag
from rankloss_trainers.runtime import TEACHER, Host


HOST = Host(
    name="transformers' Trainer",
    biased="a model that has a logit_bias",
    teacher=f"give the data the columns {' and '.join(TEACHER)}, or one of them, or give loss_options "
    "{'reference_features': FOLDER}",
    progress="train with trainer.train()",
    serves=("caption", "folder", "state"),
    defaults={"schedule_unit": "step"},  # epochs may be a fraction
)


class LossOptions(LossArguments):
    """``--loss`` and the options of losses, on a parser of one's own, such as ``HfArgumentParser``.

    Args:
        parser: The parser. An option that is not given is no attribute of what it parses.
        *names: Losses of the catalogue, other packages' among them, or ``clip``; the first is the default. By
            default all that come with rankloss.

    Raises:
        ValueError: There is no such loss.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> options = LossOptions(parser)
        >>> options.keywords(parser.parse_args(["--rankclip-lambda-in", "0.5"]))
        {'loss': 'rankclip', 'loss_options': {'lambda_in': 0.5}}
    """

    def __init__(self, parser: argparse.ArgumentParser, *names: str) -> None:
        ours = ("", "rankloss")  # the packages of the catalogue's own losses, and of those that come with it
        found = catalog.candidates().items()
        names = names or tuple(name for name, x in found if x.package.partition(" ")[0] in ours)
        losses = [name for name in names if name != TRAINERS_OWN]
        super().__init__(parser, losses, names[0], lambda entry: entry.with_defaults(**HOST.defaults))

    def keywords(self, args: argparse.Namespace) -> dict[str, Any]:
        """The keywords of :class:`rankloss_trainers.transformers.ContrastiveTrainer`; none for ``clip``.

        Args:
            args: The parsed arguments; for ``HfArgumentParser`` the namespace behind the dataclasses.

        Raises:
            ValueError: An option was given that belongs to another loss, or that cannot work.
        """
        chosen = self.chosen(args)
        if chosen is None:
            return {}
        name, given = chosen
        entry = self.entries[name]
        reason = entry.refuse(entry.checked(name, given), rankloss.Gather(rank=0, world_size=1))
        if reason is not None:
            raise ValueError(with_flag(name, entry, reason))
        return {"loss": name, "loss_options": given}
