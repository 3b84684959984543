"""The losses that ``--loss`` can name: this package's own, and those that other packages register.

Another package registers a loss as an entry point. Its name is the value of ``--loss``, its object a
:class:`LossEntry`, or only the function that would be its ``build``::

    [project.entry-points."rankloss_open_clip.losses"]
    mine = "my_package.losses:MINE"

What an entry point refers to is imported when its loss is asked for, or to be shown by ``--help``, and not
otherwise: a package that is broken, or slow to import, is no concern of other runs.

Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rankloss_open_clip.bootstrap import PREFIXES

GROUP = "rankloss_open_clip.losses"
"""The group of the entry points."""

BUILT_IN = {
    "rankclip": "rankloss_open_clip.entries:RANKCLIP",
    "rankclip-cross": "rankloss_open_clip.entries:RANKCLIP_CROSS",
    "rankclip-in": "rankloss_open_clip.entries:RANKCLIP_IN",
    "cyclip": "rankloss_open_clip.entries:CYCLIP",
    "alip": "rankloss_open_clip.entries:ALIP",
}
"""This package's own losses."""

TRAINERS_OWN = "clip"
"""The value of ``--loss`` that leaves the trainer's own loss alone."""


@dataclass(frozen=True)
class Option:
    """An option of a loss; on the command line it is ``--PREFIX-NAME``, in the arguments ``PREFIX_NAME``.

    Attributes:
        name: The option without the prefix of its loss.
        default: The value of a run that does not give the option.
        help: What ``--help`` says; the default is appended.
        keywords: Further keywords of ``add_argument``.
        unset: What ``--help`` says in place of a default of None.
    """

    name: str
    default: Any
    help: str
    keywords: dict[str, Any] = field(default_factory=dict)
    unset: str = ""


@dataclass(frozen=True)
class LossEntry:
    """What the command line and the trainer need to know of a loss.

    Attributes:
        build: ``(base, args) → module``. Called on every process, with the loss that the trainer has built
            (to stand on, or to replace) and with the trainer's arguments, the options of the loss among
            them. The module is called as the trainer calls its own: with ``image_features``,
            ``text_features``, ``logit_scale`` and whatever else the model returns, all by name, and
            ``output_dict=True``. It returns a dict of scalars. Those whose names end in ``_loss`` are added
            up and trained; the others are logged. It has no parameters, which the trainer's optimizer would
            not know. Buffers are put into the trainer's checkpoints.
        help: What ``--help`` says of it.
        options: Its options.
        prefix: What the options begin with; empty for the name of the loss.
        refuse: ``args → reason`` why the loss cannot work with these arguments, or None. Called before
            anything is built, so arguments that the trainer adds later (``rank``, ``world_size``,
            ``distill``) are not there yet. A reason about one option begins with it.
        describe: ``args → text`` for the line in the log that says what a run trains with.
        unit: ``"epoch"`` or ``"step"``, or ``args →`` one of them. Every part of the module that has the
            method is told where training stands: ``set_epoch(epoch, epochs)`` at the start of each epoch,
            or ``set_progress(step, total_steps)`` before each optimizer step; both count from 1.
        first_call: The name of a keyword that the module takes: True in the first call for an optimizer
            step, False in the others, which gradient accumulation makes on the same features. Empty for
            none.
        caption_key: ``args → key`` of a second caption in the training data, or None. The module is then
            called with ``caption_features`` too.
    """

    build: Callable[[Any, Any], Any]
    help: str = ""
    options: tuple[Option, ...] = ()
    prefix: str = ""
    refuse: Callable[[Any], str | None] = lambda _: None
    describe: Callable[[Any], str] = lambda _: ""
    unit: str | Callable[[Any], str] = "epoch"
    first_call: str = ""
    caption_key: Callable[[Any], str | None] = lambda _: None


@dataclass(frozen=True)
class Candidate:
    """A loss that can be named, before anything of it is imported.

    Attributes:
        name: The value of ``--loss``.
        reference: ``module:object``.
        package: The distribution that registers it, with its version; empty for this package's own.
        clash: Why the name cannot be used, or empty.
    """

    name: str
    reference: str
    package: str = ""
    clash: str = ""

    def load(self) -> LossEntry:
        """Import the entry.

        Raises:
            ValueError: The name or the prefix is taken, or the object is neither an entry nor callable.
            Exception: Whatever the import raises.
        """
        if self.clash:
            raise ValueError(self.clash)
        loaded = importlib.metadata.EntryPoint(self.name, self.reference, GROUP).load()
        if isinstance(loaded, LossEntry):
            if self.package and loaded.prefix in PREFIXES:
                raise ValueError(f"the prefix {loaded.prefix!r} belongs to another loss")
            return loaded
        if not callable(loaded):
            raise ValueError(
                f"{self.reference} must be a LossEntry or a function (base, args) → module, got {loaded!r}"
            )
        return LossEntry(build=loaded, help=(loaded.__doc__ or "").strip().partition("\n")[0])


def candidates() -> dict[str, Candidate]:
    """All losses that can be named, this package's own first. Nothing is imported."""
    found = {name: Candidate(name, reference) for name, reference in BUILT_IN.items()}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name):
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown package"
        other = found.get(point.name)
        if point.name == TRAINERS_OWN or (other is not None and not other.package):
            continue  # see shadowed()
        clash = other.clash if other is not None else ""
        if other is not None and other.reference != point.value:
            clash = f"{point.name} is registered by both {other.package} and {package}; uninstall one"
        found[point.name] = Candidate(point.name, point.value, package, clash)
    return found


def shadowed() -> list[str]:
    """Registrations that are passed over, as sentences: they would change what an own name means."""
    return [
        f"{point.value} is registered as a loss under the name {point.name!r}, which is taken"
        for point in importlib.metadata.entry_points(group=GROUP)
        if point.name in (*BUILT_IN, TRAINERS_OWN)
    ]


def weight(text: str) -> float:
    """A finite number of at least 0, as the type of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def count(text: str) -> int:
    """A whole number of at least 1, as the type of an option."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def layout(args: Any, *, rows: bool = True) -> dict[str, Any]:
    """How a term sees the batches of other processes: as the trainer's own loss does.

    Args:
        args: The trainer's arguments.
        rows: Whether the term can be computed for a process's own rows alone.

    Returns:
        ``local_loss``, ``gather_with_grad``, ``rank`` and ``world_size``, as ``rankloss.Gather`` takes them.
    """
    given = {
        "local_loss": getattr(args, "local_loss", False),
        "gather_with_grad": getattr(args, "gather_with_grad", False),
        "rank": getattr(args, "rank", 0),
        "world_size": getattr(args, "world_size", 1),
    }
    if getattr(args, "siglip", False):
        # The sigmoid loss is exact in every layout, whatever the flags say, and so must its companions be.
        given.update(local_loss=rows, gather_with_grad=True)
    return given
