"""The catalogue's options as arguments of ``transformers.HfArgumentParser``."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any, ClassVar, Literal

from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry, Option, dest
from rankloss_trainers.command_line import misplaced
from rankloss_trainers.transformers import choice

__all__ = ["LossArguments", "loss_arguments"]


class _Arguments:
    """What :func:`loss_arguments` adds fields to."""

    loss: str
    entries: ClassVar[dict[str, LossEntry]]

    def keywords(self) -> dict[str, Any]:
        """The loss as keywords of :class:`rankloss_trainers.transformers.ContrastiveTrainer`.

        Raises:
            ValueError: An option was given that belongs to another loss, or has a value that it cannot have.
        """
        given = argparse.Namespace(**{k: v for k, v in vars(self).items() if v is not None})
        wrong = misplaced(self.loss, self.entries, given)
        if wrong:
            raise ValueError(wrong)
        entry, options = self.entries[self.loss], {}
        for option in entry.options:
            name = dest(self.loss, entry, option)
            if hasattr(given, name):
                options[option.key] = _checked(name, option, getattr(given, name))
        return {"loss": self.loss, "loss_options": options}


def loss_arguments(*names: str) -> Any:
    """A dataclass with ``loss`` and the options of the named losses, other packages' among them.

    Every option is None unless it is given.

    Args:
        *names: Losses of the catalogue; the first is the default.

    Raises:
        ValueError: There is no such loss.

    Example:
        >>> arguments = loss_arguments("rankclip", "cyclip")(rankclip_lambda_in=0.5)
        >>> arguments.keywords()
        {'loss': 'rankclip', 'loss_options': {'lambda_in': 0.5}}
    """
    found = catalog.candidates()
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        raise ValueError(f"names must be among {', '.join(found)}; got {', '.join(unknown) or 'none'}")
    entries = {name: found[name].load() for name in names}
    loss = dataclasses.field(default=names[0], metadata={"help": "the loss to train with"})
    fields: dict[str, Any] = {"loss": ("loss", Literal[names], loss)}
    for name, entry in entries.items():
        defaults = choice.defaults(entry)
        for option in entry.options:
            field = dataclasses.field(default=None, metadata={"help": _help(option, defaults[option.key])})
            key = dest(name, entry, option)
            fields.setdefault(key, (key, _type(option) | None, field))
    return dataclasses.make_dataclass(
        "LossArguments",
        fields.values(),
        bases=(_Arguments,),
        namespace={
            "__doc__": f"Options of --loss {', '.join(names)}.",
            "__module__": __name__,
            "entries": entries,
        },
    )


def _help(option: Option, default: Any) -> str:
    shown = option.unset if default is None else default
    return f"{option.help}; {shown} if not given".replace("%", "%%")


def _type(option: Option) -> Any:
    """The type of an option's values, from what argparse is told of it."""
    if "choices" in option.keywords:
        return Literal[tuple(option.keywords["choices"])]
    if str(option.keywords.get("action", "")).startswith("store_"):
        return bool
    convert = option.keywords.get("type", str)
    return convert if isinstance(convert, type) else typing.get_type_hints(convert).get("return", str)


def _checked(name: str, option: Option, value: Any) -> Any:
    convert = option.keywords.get("type")
    if convert is None:
        return value
    try:
        return convert(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{name} {error}") from error


LossArguments = loss_arguments(
    *(
        name
        for name, found in catalog.candidates().items()
        if found.package.partition(" ")[0] in ("", "rankloss")
    )
)
"""Options of rankloss's losses and baselines, for ``HfArgumentParser((LossArguments, TrainingArguments))``.

``ContrastiveTrainer(model, training_arguments, …, **loss_arguments.keywords())`` takes what was given.
"""
