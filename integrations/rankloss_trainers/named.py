"""A loss that can be named is a class, its options are dataclass fields, an object of it is a choice.

::

    class Uniform(NamedLoss):
        \"\"\"The trainer's own plus a uniformity term.\"\"\"       # the first line is its help

        weight: float = option(0.1, "weight of the term", at_least=0)

        def build(self, base, gather):
            return UniformLoss(base, weight=self.weight)

Its fields become ``--uniform-weight`` on a command line and ``{"weight": 0.2}`` in Python. Only the standard
library is imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

if typing.TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        """The decorator of typing, which Python 3.10 lacks and only a type checker reads."""
        return lambda x: x


Options = Mapping[str, Any]
"""Values of options by name."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question that ends an error about a misspelt word; empty where nothing known is close to it.

    Example:
        >>> did_you_mean("rankclap", ["rankclip", "cyclip"])
        '; did you mean rankclip?'
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


class OptionError(ValueError):
    """An option that cannot have its value, alone or beside others.

    Attributes:
        key: The option, as Python spells it.
        reason: The reason, without the option where it begins with "must".
        loss: The loss of the option, in an error about joined losses; or empty.

    Example:
        >>> OptionError("top_k", "must be an integer; got 'x'", loss="rankclip")
        OptionError("rankclip.top_k must be an integer; got 'x'")
    """

    def __init__(self, key: str, reason: str, loss: str = "") -> None:
        self.key, self.reason, self.loss = key, reason, loss
        name = f"{loss}.{key}" if loss else key
        super().__init__(f"{name} {reason}" if reason.startswith("must ") else f"{name}: {reason}")

    def __reduce__(self) -> Any:
        return type(self), (self.key, self.reason, self.loss)


@contextlib.contextmanager
def naming_options(loss: NamedLoss, name: str = "") -> Iterator[None]:
    """Turn a ValueError within the context that begins with an option into an :class:`OptionError`.

    Args:
        loss: The loss that has the options.
        name: Its name among joined losses; or empty.
    """
    try:
        yield
    except OptionError as error:
        raise OptionError(error.key, error.reason, error.loss or name) from error.__cause__
    except ValueError as error:
        text = str(error)
        match = re.match(r"(\w+)(:? |(?==))", text)  # "bins must be …", "lists: …", "diagonal=False …"
        if match is None or match[1] not in loss.options():
            raise
        raise OptionError(match[1], text[match.end() :] if match[2] else text, name) from error


# --- options --------------------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *,
    none: str = "",
    choices: Iterable[str] = (),
    metavar: str = "",
    for_trainer: bool = False,
    **bounds: float,
) -> Any:
    """A field of a :class:`NamedLoss`; its annotation is the type: a number, text, a Literal, or a bool.

    Args:
        default: The value of a run that does not give the option.
        help: Its line in ``--help``; the default is appended.
        none: The text for None in ``--help``.
        choices: The values of text, where the annotation is no Literal.
        metavar: The value in ``--help``; N or X for numbers.
        for_trainer: True if the trainer's plug-in acts on the option, and not the loss.
        **bounds: ``at_least``, ``above``, ``at_most`` of a number.
    """
    own = {"choices": tuple(choices), "metavar": metavar, "for_trainer": for_trainer}
    return dataclasses.field(default=default, metadata={"help": help, "none": none, "bounds": bounds, **own})


_SAME = object()


def option_of(options: type, name: str, default: Any = _SAME) -> Any:
    """The option of another dataclass, with its help and bounds, and its default unless another is given."""
    (found,) = (x for x in dataclasses.fields(options) if x.name == name)
    default = found.default if default is _SAME else default
    return dataclasses.field(default=default, metadata=found.metadata)


_WORDS = {None: "none", True: "include", False: "exclude"}
_KINDS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "N"),
    float: ("a number", "X"),
    str: ("text", "TEXT"),
}


class Option:
    """An option of a loss, as a field describes it.

    Attributes:
        key: The keyword in Python.
        default, help, none: Those of the field.
        type: The type of its annotation, without None.
        choices: The values by their spelling; empty for numbers and texts.
        for_trainer: True if the trainer's plug-in acts on the option.
    """

    def __init__(self, field: dataclasses.Field[Any], hint: Any) -> None:
        self.key, self.default, self._of = field.name, field.default, field.metadata
        self.name = self.key.replace("_", "-")
        self.help, self.none = self._of["help"], self._of["none"]
        self.for_trainer = self._of.get("for_trainer", False)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if is_union else (hint,)
        self._may_be_none = type(None) in kinds
        self.type = next(x for x in kinds if x is not type(None))
        of_literal = typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()
        values = (True, False) if self.type is bool else of_literal or self._of.get("choices", ())
        none = (None,) if values and self._may_be_none else ()
        self.choices = {_WORDS.get(x, x): x for x in (*none, *values)}

    @property
    def metavar(self) -> str:
        """The value in ``--help``."""
        named = self._of.get("metavar") or _KINDS.get(self.type, ("", "VALUE"))[1]
        return f"{{{','.join(self.choices)}}}" if self.choices else named

    def text(self, value: Any) -> Any:
        """The value as it is typed, or the text for None."""
        spelled = [text for text, x in self.choices.items() if type(x) is type(value) and x == value]
        return spelled[0] if spelled else self.none if value is None else value

    def checked(self, value: Any) -> Any:
        """The value as the loss takes it, from text or from Python.

        Raises:
            OptionError: It is of another type, out of bounds, or not among the choices.
        """
        for spelling, meant in self.choices.items():
            if any(type(value) is type(x) and value == x for x in (spelling, meant)):
                return meant
        if value is None and self._may_be_none and not self.choices:
            return None
        bounds, convert = self._of["bounds"], os.fspath if self.type is str else self.type
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            converted = None if self.choices or isinstance(value, bool) else convert(value)
            is_same = isinstance(value, str | os.PathLike) or converted == value
            if converted is not None and is_same and (not bounds or _is_within(converted, **bounds)):
                return converted
        wanted = f"one of {', '.join(self.choices)}" if self.choices else self._wanted(**bounds)
        close = did_you_mean(str(value).lower(), self.choices)
        raise OptionError(self.key, f"must be {wanted}; got {value!r}{close}")

    def _wanted(self, **bounds: float) -> str:
        kind = _KINDS.get(self.type, (f"of type {getattr(self.type, '__name__', self.type)}", ""))[0]
        kind = kind.replace("a number", "a finite number") if bounds else kind
        if {"at_least", "at_most"} <= bounds.keys():
            return f"{kind} from {bounds['at_least']} to {bounds['at_most']}"
        words = {"at_least": "of at least", "above": "above", "at_most": "of at most"}
        return kind + "".join(f" {words[name]} {x:g}" for name, x in bounds.items())


def _is_within(value: float, at_least: float = -math.inf, at_most: float = math.inf, **more: float) -> bool:
    return at_least <= value <= at_most and abs(value) < math.inf and value > more.get("above", -math.inf)


@functools.cache
def options_of(cls: type) -> dict[str, Option]:
    """The options that the fields of a dataclass describe, by key."""
    hints = typing.get_type_hints(cls)
    return {x.name: Option(x, hints[x.name]) for x in dataclasses.fields(cls) if "help" in x.metadata}


# --- losses ---------------------------------------------------------------------------------------------


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, option_of))
class NamedLoss:
    """A loss that ``--loss NAME`` chooses; derive a class from it, whose objects are choices.

    A derived class is a frozen dataclass, without a decorator. Its fields of :func:`option` are its options;
    its help is the first line of its docstring. Facts that follow from the options are class attributes or
    properties:

    Attributes:
        name: The value of ``--loss``, which the catalogue sets.
        package: The distribution that registers it.
        prefix: The prefix of its options on a command line; empty for the name.
        beside: Its defaults beside other losses that it is joined with, by their names.
        use_of_teacher: ``"required"``, ``"none"``, or None where the signature of its module decides.
        reference_features: The folder of the teacher's features, usually an option.
        teacher: The teacher whose features a trainer computes before its first step, usually an option, see
            :class:`rankloss_features.caching.Spec`.
        caption_key: The key of a second caption in the training data, usually an option. The module is then
            called with ``caption_features`` too.
        pair_key: The key of the pairs' ids in the training data, usually an option. The module is then called
            with ``pair_ids`` too.
        keeps_distillation: The distillation term of a trainer that has a teacher stays in the base.
        no_sigmoid: The reason why it does not work where the trainer's own is a sigmoid loss; or empty.
        only_sigmoid: The reason why it works only there; or empty.
        citation: The BibTeX entry of its paper.

    Raises:
        OptionError: A value is none that the option can have, or options exclude each other.
    """

    name: ClassVar[str] = ""
    package: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    beside: ClassVar[Mapping[str, Options]] = MappingProxyType({})
    use_of_teacher: Any = None
    reference_features: Any = None
    teacher: Any = None
    caption_key: Any = None
    pair_key: Any = None
    keeps_distillation: Any = True
    no_sigmoid: Any = ""
    only_sigmoid: Any = ""
    citation: Any = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        doc = cls.__doc__
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.__doc__ = doc  # a dataclass without one would be given its signature

    def __post_init__(self) -> None:
        for key, option in self.options().items():
            object.__setattr__(self, key, option.checked(getattr(self, key)))
        with naming_options(self):
            self.check()

    @classmethod
    def options(cls) -> Mapping[str, Option]:
        """Its options, by key."""
        return options_of(cls)  # type: ignore[arg-type]  # mypy takes the class for an object of it

    @classmethod
    def help(cls) -> str:
        """Its line in ``--help`` and in ``rankloss losses``."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0].rstrip(".")

    @classmethod
    def of(cls, given: Options) -> Self:
        """The loss with the options that were given; the others have their defaults.

        Raises:
            TypeError: There is no such option.
            OptionError: As the class.
        """
        known = cls.options()
        for key in given:
            if key not in known:
                hint = did_you_mean(str(key), known) or f"; it has {', '.join(known) or 'none'}"
                raise TypeError(f"{cls.name} has no option {key!r}{hint}")
        return cls(**given)

    @property
    def parts(self) -> tuple[NamedLoss, ...]:
        """The losses of joined ones; else the loss itself."""
        return (self,)

    @property
    def values(self) -> dict[str, Any]:
        """The values of its options, by key."""
        return {key: getattr(self, key) for key in self.options()}

    @property
    def changed(self) -> dict[str, Any]:
        """The options with other values than their defaults."""
        options = self.options()
        return {key: x for key, x in self.values.items() if x != options[key].default}

    def told(self, *leaving_out: str) -> str:
        """The options that are not at their defaults, as text."""
        shown = [(self.options()[key], x) for key, x in self.changed.items() if key not in leaving_out]
        return ", ".join(f"{option.name} {option.text(x)}" for option, x in shown)

    # --- what a loss may define ---

    def check(self) -> None:
        """Raise an :class:`OptionError` for options that exclude each other; each alone has been checked."""

    def build(self, base: Any, gather: Any) -> Any:
        """The module, on every process.

        Args:
            base: The loss that the trainer would train with, to stand on or to replace.
            gather: The :class:`rankloss.Gather` of the run.

        Returns:
            A module that is called with ``image_features``, ``text_features``, ``logit_scale`` and whatever
            else the model returns, all by name, and ``output_dict=True``. It returns a dict of scalars: those
            whose names end in ``_loss`` are added up and trained, the others are logged.
        """
        raise NotImplementedError(f"{type(self).__name__} builds nothing")

    def describe(self, epochs: float) -> str:  # noqa: ARG002
        """The part of the log's line about a run of so many epochs, infinity for data without a length."""
        return self.told()

    def unit(self, epochs: float) -> str | None:  # noqa: ARG002
        """``"epoch"`` or ``"step"``: by which a part of the module that has both methods is told; or None."""
        return None

    def companions(self) -> Iterable[Any]:
        """Companions of each text, see :class:`rankloss_open_clip.companions.Companion`."""
        return ()

    def log(self) -> Callable[..., Any] | None:
        """``(module, entries, step, inputs) → entries`` to log beside those of a call; None without any.

        An entry without a value in this call is None.
        """
        return None
