"""The catalogue of losses: rankloss's own, and those that other packages register.

Another package registers a loss as an entry point. Its name is the value of ``--loss``, its object a
:class:`LossEntry`, or only the function that would be its ``build``::

    [project.entry-points."rankloss.losses"]
    mine = "my_package.losses:MINE"

Entry points are imported lazily, when their loss is asked for or described, so a broken or slow package
cannot affect other runs. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import math
import os
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
    "mimicry": "rankloss_trainers.own_losses:MIMICRY",
    "clip-streamed": "rankloss_trainers.own_losses:CLIP_STREAMED",
    "siglip-streamed": "rankloss_trainers.own_losses:SIGLIP_STREAMED",
    "ranked-lists": "rankloss_trainers.ranked_lists:RANKED_LISTS",
}
"""rankloss's own losses."""

PREFIXES = ("rankclip", "mimicry", "streamed", "ranked-lists")
"""The prefixes of the options of rankloss's own losses."""

TRAINERS_OWN = "clip"
"""The value of ``--loss`` that leaves the trainer's own loss alone."""

JOIN = "+"
"""The sign between the names of losses that are trained together, the innermost first."""

Options = Mapping[str, Any]
"""The values of a loss's options, by :attr:`Option.key`."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question that ends an error about a misspelt word; empty where nothing known is close to it.

    Example:
        >>> did_you_mean("rankclap", ["rankclip", "cyclip"])
        '; did you mean rankclip?'
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def weight(text: Any) -> float:
    """The type of an option that is a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def error_of(build: Callable[[], Any]) -> str | None:
    """The ValueError of a trial, as a reason against the options that it was built with; None without one."""
    try:
        build()
    except ValueError as error:
        return str(error)
    return None


def prefixed(prefix: str, key: str) -> str:
    """The key of an option of joined losses, from its loss's prefix and its own key.

    Example:
        >>> prefixed("my-loss", "weight")
        'my_loss_weight'
    """
    return f"{prefix.replace('-', '_')}_{key}"


# --- the description of a loss --------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of a loss: ``--PREFIX-NAME`` on a command line, a keyword in Python.

    Attributes:
        name: The option without the prefix of its loss, as it is typed.
        default: The value of a run that does not give the option.
        help: Its line in ``--help``; the default is appended.
        keywords: ``type``, a function that takes text or a value that it returned; ``choices``; ``metavar``.
        unset: The text for None in ``--help``. An option with such a text, or with the default None, may be
            None.
        values: The values in Python of choices that are no texts, by their spelling: ``{"none": None}``.
        for_trainer: True if the trainer's plug-in acts on the option, and not the loss.
        prefix: The loss of joined losses that the option belongs to; empty for the option of one loss.
    """

    name: str
    default: Any
    help: str
    keywords: dict[str, Any] = field(default_factory=dict)
    unset: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    for_trainer: bool = False
    prefix: str = ""

    @property
    def own_key(self) -> str:
        """The name as the key of the options that the functions of an entry are given."""
        return self.name.replace("-", "_")

    @property
    def key(self) -> str:
        """The same, beginning with the prefix of joined losses."""
        return prefixed(self.prefix, self.own_key) if self.prefix else self.own_key

    def text(self, value: Any) -> Any:
        """The value as it is typed, or the text for None."""
        spelled = [text for text, x in self.values.items() if type(x) is type(value) and x == value]
        return spelled[0] if spelled else self.unset if value is None else value

    def checked(self, value: Any) -> Any:
        """The value as the loss takes it, from text or from Python.

        Raises:
            ValueError: It is of another type, out of bounds, or not among the choices.

        Example:
            >>> Option("diagonal", True, "", values={"include": True, "exclude": False}).checked("exclude")
            False
        """
        choices = self.values or {text: text for text in self.keywords.get("choices", ())}
        for spelling, meant in choices.items():
            if any(type(value) is type(x) and value == x for x in (spelling, meant)):
                return meant
        type_ = self.keywords.get("type", os.fspath)
        if value is None and not choices and (self.unset or self.default is None):
            return None
        with contextlib.suppress(TypeError, ValueError, OverflowError, argparse.ArgumentTypeError):
            converted = None if choices or isinstance(value, bool) else type_(value)
            if converted is not None and (isinstance(value, str | os.PathLike) or converted == value):
                return converted
        wanted = f"one of {', '.join(choices)}" if choices else _KINDS.get(type_, f"of type {type_.__name__}")
        raise ValueError(f"must be {wanted}; got {value!r}{did_you_mean(str(value).lower(), choices)}")


_KINDS = {int: "an integer", float: "a number", weight: "a finite number of at least 0", os.fspath: "text"}


@dataclass(frozen=True)
class LossEntry:
    """A loss as the trainers' plug-ins know it.

    Attributes:
        build: ``(base, options, gather) → module``. Called on every process, with the loss that the trainer
            would train with (to stand on, or to replace; CLIP's is :class:`rankloss.ClipLoss`), the values of
            the options, and the :class:`rankloss.Gather` of the run. The module is called with
            ``image_features``, ``text_features``, ``logit_scale`` and whatever else the model returns, all by
            name, and ``output_dict=True``. It returns a dict of scalars. Those whose names end in ``_loss``
            are added up and trained; the others are logged. A module whose ``forward``, or that of a part,
            names ``reference_image_features`` or ``reference_text_features`` is given a teacher's; one
            without a default needs them. Persistent buffers are put into the checkpoints.
        help: Its line in ``--help`` and in ``rankloss losses``.
        options: Its options.
        prefix: The prefix of the options; empty for the name of the loss.
        refuse: ``(options, gather) → reason`` against the options, or None. Called before anything is built.
            A reason about one option begins with its key.
        describe: ``(options, epochs) → text`` for the line in the log that describes a run; None names the
            options that are not at their defaults. The epochs of a run are infinity, here and for ``unit``,
            where its data have no length.
        unit: ``"epoch"``, ``"step"``, None for either, or ``(options, epochs) →`` one of them. A part of the
            module that has both methods is told where training stands by ``set_epoch(epoch, epochs)`` at the
            start of each epoch, or by ``set_progress(step, total_steps)`` once before each optimizer step,
            for which gradient accumulation may make several calls. A part with one of them is told by that
            one. Both count from 1.
        caption_key: ``options → key`` of a second caption in the training data, or None. The module is then
            called with ``caption_features`` too.
        companions: ``options →`` companions of each text that open_clip's trainer reads for the loss, see
            :class:`rankloss_open_clip.companions.Companion`.
        uses_teacher: ``options →`` True where the loss needs a teacher, False where it takes none, and None
            where its signature decides.
        in_separate_spaces: ``options → options`` that take other values where the teacher's images and texts
            have separate spaces, as those of two encoders have; given are the options that were given. It
            raises a ValueError, which begins with a key, where the loss cannot use such a teacher.
        reference_features: ``options →`` the folder of the teacher's features, or None for a teacher that the
            trainer has.
        keeps_distillation: ``options → bool``: the distillation term of a trainer that has a teacher stays in
            the base.
        no_sigmoid: The reason why the loss does not work where the trainer's own is a sigmoid loss; or empty.
        only_sigmoid: The reason why it works only there; or empty.
        log: ``options → (module, entries, step, inputs) → entries``: entries to log beside those of a call,
            see :mod:`rankloss_trainers.logging`. The module is the whole loss, of which the own one may be a
            part. None logs the module's own.
        citation: The BibTeX entry of its paper.
    """

    build: Callable[..., Any]
    help: str = ""
    options: tuple[Option, ...] = ()
    prefix: str = ""
    refuse: Callable[..., str | None] = lambda *_: None
    describe: Callable[..., str] | None = None
    unit: str | Callable[..., str | None] | None = None
    caption_key: Callable[..., str | None] = lambda *_: None
    companions: Callable[..., Iterable[Any]] = lambda *_: ()
    uses_teacher: Callable[..., bool | None] = lambda *_: None
    in_separate_spaces: Callable[..., Options] = lambda *_: {}
    reference_features: Callable[..., str | None] = lambda *_: None
    keeps_distillation: Callable[..., bool] = lambda *_: True
    no_sigmoid: str = ""
    only_sigmoid: str = ""
    log: Callable[[Options], Callable[..., Any]] | None = None
    citation: str = ""

    def described(self, options: Options, epochs: float) -> str:
        """The part of the log's line about a run with these options."""
        return changed(self.options, options) if self.describe is None else self.describe(options, epochs)

    def unit_of(self, options: Options, epochs: float) -> str | None:
        """The unit of a run with these options."""
        return self.unit(options, epochs) if callable(self.unit) else self.unit

    def with_defaults(self, **defaults: Any) -> LossEntry:
        """The same loss with other defaults for the options that it has."""
        options = (dataclasses.replace(o, default=defaults.get(o.own_key, o.default)) for o in self.options)
        return dataclasses.replace(self, options=tuple(options))

    def checked(self, name: str, given: Options) -> dict[str, Any]:
        """The values of all options, from those that were given; the only check of options.

        Args:
            name: The loss, for the errors.
            given: Values by key, as text or as Python has them.

        Raises:
            TypeError: There is no such option, or it is given twice.
            ValueError: A value is none that the option can have; the error begins with its key.
        """
        known = {option.key: option for option in self.options}
        values = {key: option.default for key, option in known.items()}
        found: dict[str, Any] = {}
        for typed, value in given.items():
            key = self._key(name, typed)
            if key in found:
                raise TypeError(f"{key} is given twice, with and without its prefix")
            found[key] = value
            try:
                values[key] = known[key].checked(value)
            except ValueError as error:
                raise ValueError(f"{key} {error}") from None
        shared = [key for key, option in known.items() if option.own_key == "reference_features"]
        folders = {values[key] for key in shared} - {None}
        if len(folders) == 1:  # given once, it serves all
            values.update(dict.fromkeys(shared, *folders))
        if _has_separate_spaces(self.reference_features(values)):
            in_them = self.in_separate_spaces({key: values[key] for key in found})
            values.update({key: value for key, value in in_them.items() if key not in found})
        return values

    def _key(self, name: str, given: str) -> str:
        """The key of an option; in joined losses the prefix may be missing where one loss has the option."""
        keys = [option.key for option in self.options]
        alike = [option.key for option in self.options if option.own_key == given]
        if given in keys:
            return given
        if len(alike) > 1 and given != "reference_features":  # which all of them share
            raise TypeError(f"{given} is an option of several losses; give {' or '.join(alike)}")
        if not alike:
            close = did_you_mean(str(given), [*keys, *(option.own_key for option in self.options)])
            hint = close or f"; it has {', '.join(keys) or 'none'}"
            raise TypeError(f"{name} has no option {given!r}{hint}")
        return alike[0]


def _has_separate_spaces(folder: str | None) -> bool:
    """True for a folder of features whose images and texts have separate spaces."""
    if folder is None or not os.path.isdir(folder):  # no folder, which the reader of features says
        return False
    from rankloss_features.folder import Features

    try:
        return not Features(folder).common_space
    except ValueError as error:
        raise ValueError(f"reference_features: {error}") from error


def changed(options: Iterable[Option], values: Options) -> str:
    """The options that are not at their defaults, and their values."""
    return ", ".join(f"{o.name} {o.text(values[o.key])}" for o in options if values[o.key] != o.default)


# --- finding losses by name -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A loss that can be named, before anything of it is imported.

    Attributes:
        name: The value of ``--loss``.
        reference: ``module:object``.
        package: The distribution that registers it, with its version; empty for rankloss's own.
        clash: The reason why the name cannot be used, or empty.
    """

    name: str
    reference: str
    package: str = ""
    clash: str = ""

    def load(self) -> LossEntry:
        """Import the entry.

        Raises:
            ValueError: The name or the prefix is taken.
            Exception: Any error of the import.
        """
        if self.clash:
            raise ValueError(self.clash)
        if JOIN in self.name:
            from rankloss_trainers.joined import joined

            return joined(self.name, lambda part: find(part).load())
        loaded = importlib.metadata.EntryPoint(self.name, self.reference, GROUP).load()
        if callable(loaded):
            loaded = LossEntry(build=loaded, help=(loaded.__doc__ or "").strip().partition("\n")[0])
        entry: LossEntry = loaded
        if self.package and entry.prefix in PREFIXES:
            raise ValueError(f"the prefix {entry.prefix!r} belongs to another loss")
        return entry


@functools.cache  # a run asks some ten times, and each time every installed package would be read
def candidates() -> Mapping[str, Candidate]:
    """All losses that can be named, rankloss's own first. Nothing is imported."""
    found = {name: Candidate(name, reference) for name, reference in BUILT_IN.items()}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name):
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown package"
        other = found.get(point.name)
        if point.name in (TRAINERS_OWN, *BUILT_IN):
            continue  # an own name means the same whatever is installed
        clash = other.clash if other is not None else ""
        if other is not None and other.reference != point.value:
            clash = f"{point.name} is registered by both {other.package} and {package}; uninstall one"
        found[point.name] = Candidate(point.name, point.value, package, clash)
    return found


def find(name: str) -> Candidate:
    """The loss of this name, or of several names joined by :data:`JOIN`.

    Raises:
        ValueError: There is none.

    Example:
        >>> find("rankclp")
        Traceback (most recent call last):
        ValueError: loss must be one of rankclip, ...; got 'rankclp'; did you mean rankclip?
    """
    found, parts = candidates(), name.split(JOIN)
    for part in parts:
        if part not in found:
            known = ", ".join(found)
            raise ValueError(f"loss must be one of {known}; got {part!r}{did_you_mean(part, found)}")
    if len(parts) == 1:
        return found[name]
    packages = dict.fromkeys(found[part].package for part in parts)
    return Candidate(name, "", ", ".join(filter(None, packages)))
