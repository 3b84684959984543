"""The losses that ``--loss`` can name: rankloss's own, and those that other packages register.

Another package registers a loss as an entry point. Its name is the value of ``--loss``, its object a
:class:`LossEntry`, or only the function that would be its ``build``::

    [project.entry-points."rankloss.losses"]
    mine = "my_package.losses:MINE"

Entry points are imported lazily, when their loss is asked for or listed, so a broken or slow package cannot
affect other runs. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

GROUP = "rankloss.losses"
"""The group of the entry points."""

BUILT_IN = {
    "rankclip": "rankloss_trainers.own_losses:RANKCLIP",
    "rankclip-cross": "rankloss_trainers.own_losses:RANKCLIP_CROSS",
    "rankclip-in": "rankloss_trainers.own_losses:RANKCLIP_IN",
    "rankclip-distill": "rankloss_trainers.own_losses:RANKCLIP_DISTILL",
    "clip-streamed": "rankloss_trainers.own_losses:CLIP_STREAMED",
    "siglip-streamed": "rankloss_trainers.own_losses:SIGLIP_STREAMED",
}
"""rankloss's own losses."""

PREFIXES = ("rankclip", "streamed")
"""What the options of rankloss's own losses begin with."""

TRAINERS_OWN = "clip"
"""The value of ``--loss`` that leaves the trainer's own loss alone."""


# --- types of options -----------------------------------------------------------------------------------


def weight(text: str) -> float:
    """The type of an option that is a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


# --- the description of a loss --------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of a loss: ``--PREFIX-NAME`` on a command line.

    Attributes:
        name: The option without the prefix of its loss, as it is typed.
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

    @property
    def key(self) -> str:
        """The name as the key of the options that the functions of an entry are given."""
        return self.name.replace("-", "_")


Options = Mapping[str, Any]
"""The values of a loss's options, by :attr:`Option.key`."""


@dataclass(frozen=True)
class LossEntry:
    """What a trainer's plug-in needs to know of a loss.

    Attributes:
        build: ``(base, options, gather) → module``. Called on every process, with the loss that the trainer
            would train with (to stand on, or to replace; CLIP's is :class:`rankloss.ClipLoss`), the values of
            the options, and the :class:`rankloss.Gather` of the run. The module is called with
            ``image_features``, ``text_features``, ``logit_scale`` and whatever else the model returns, all by
            name, and ``output_dict=True``. It returns a dict of scalars. Those whose names end in ``_loss``
            are added up and trained; the others are logged. It has no parameters, which no optimizer would
            know. Its persistent buffers are put into the trainer's checkpoints.
        help: What ``--help`` says of it.
        options: Its options.
        prefix: What the options begin with; empty for the name of the loss.
        refuse: ``(options, gather) → reason`` why the loss cannot work with these, or None. Called before
            anything is built. A reason about one option begins with its key.
        describe: ``(options, epochs) → text`` for the line in the log that says what a run trains with; None
            names the options that are not at their defaults. The epochs of a run are infinity, here and for
            ``unit``, where its data have no length.
        unit: ``"epoch"`` or ``"step"``, or ``(options, epochs) →`` one of them. Every part of the module that
            has the method is told where training stands: ``set_epoch(epoch, epochs)`` at the start of each
            epoch, or ``set_progress(step, total_steps)`` once before each optimizer step, for which gradient
            accumulation may make several calls; both count from 1.
        caption_key: ``options → key`` of a second caption in the training data, or None. The module is then
            called with ``caption_features`` too.
        uses_teacher: ``options →`` whether it ranks by a teacher. The module is then called with
            ``reference_image_features`` and ``reference_text_features`` too, or with one of the two.
        reference_features: ``options →`` where the teacher's features are read from, or None for those of the
            teacher that the trainer has.
        keeps_distillation: ``options →`` whether the distillation term of a trainer that has a teacher stays
            in the base.
        no_sigmoid: Why the loss does not work where the trainer's own is a sigmoid loss; empty if it does.
        only_sigmoid: Why the loss works only where the trainer's own is a sigmoid loss; empty if it does not
            depend on that.
        log: ``options → evaluate``, what calls the module and adds to its entries what is logged beside
            them; see :mod:`rankloss_trainers.logging`. None calls the module alone.
    """

    build: Callable[..., Any]
    help: str = ""
    options: tuple[Option, ...] = ()
    prefix: str = ""
    refuse: Callable[..., str | None] = lambda *_: None
    describe: Callable[..., str] | None = None
    unit: str | Callable[..., str] = "epoch"
    caption_key: Callable[..., str | None] = lambda *_: None
    uses_teacher: Callable[..., bool] = lambda *_: False
    reference_features: Callable[..., str | None] = lambda *_: None
    keeps_distillation: Callable[..., bool] = lambda *_: True
    no_sigmoid: str = ""
    only_sigmoid: str = ""
    log: Callable[[Options], Callable[..., Any]] | None = None

    def described(self, options: Options, epochs: float) -> str:
        """What the log says of a run with these options."""
        return changed(self.options, options) if self.describe is None else self.describe(options, epochs)


def changed(options: Iterable[Option], values: Options) -> str:
    """The options that are not at their defaults, and their values."""
    return ", ".join(f"{o.name} {values[o.key]}" for o in options if values[o.key] != o.default)


def flag(name: str, entry: LossEntry, option: Option) -> str:
    """An option of the loss ``name``, as it is typed."""
    return f"--{entry.prefix or name}-{option.name}"


def dest(name: str, entry: LossEntry, option: Option) -> str:
    """An option of the loss ``name``, as an attribute of the parsed arguments."""
    return flag(name, entry, option)[2:].replace("-", "_")


def option_values(name: str, entry: LossEntry, args: Any) -> dict[str, Any]:
    """The values of the loss's options in parsed arguments, or their defaults."""
    return {o.key: getattr(args, dest(name, entry, o), o.default) for o in entry.options}


# --- finding losses by name -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A loss that can be named, before anything of it is imported.

    Attributes:
        name: The value of ``--loss``.
        reference: ``module:object``.
        package: The distribution that registers it, with its version; empty for rankloss's own.
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
        if callable(loaded):
            loaded = LossEntry(build=loaded, help=(loaded.__doc__ or "").strip().partition("\n")[0])
        if not isinstance(loaded, LossEntry):
            raise ValueError(f"{self.reference} must be a LossEntry or a function, its build; got {loaded!r}")
        if self.package and loaded.prefix in PREFIXES:
            raise ValueError(f"the prefix {loaded.prefix!r} belongs to another loss")
        return loaded


@functools.cache  # a run asks some ten times, and each time every installed package would be read
def candidates() -> Mapping[str, Candidate]:
    """All losses that can be named, rankloss's own first. Nothing is imported."""
    found = {name: Candidate(name, reference) for name, reference in BUILT_IN.items()}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name):
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown package"
        other = found.get(point.name)
        if point.name in (TRAINERS_OWN, *BUILT_IN):
            continue  # what an own name means does not change with what is installed
        clash = other.clash if other is not None else ""
        if other is not None and other.reference != point.value:
            clash = f"{point.name} is registered by both {other.package} and {package}; uninstall one"
        found[point.name] = Candidate(point.name, point.value, package, clash)
    return found
