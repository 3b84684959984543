"""An option of a loss or of a run: its types, its spelling on a command line, its help, and its errors.

Options are the keyword-only arguments of a callable. No library is imported here but the standard one.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Make = Callable[..., Any]


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question that ends an error about a misspelt word; empty where nothing known is close to it.

    Example:
        >>> did_you_mean("rankclap", ["rankclip", "mimicry"])
        '; did you mean rankclip?'
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


class OptionError(ValueError):
    """An option that cannot have its value, alone or beside others.

    Attributes:
        key: The option, as Python spells it.
        reason: The reason, without the option where it begins with "must".
        loss: The loss of the option; empty for an option of the run.

    Example:
        >>> OptionError("top_k", "must be an integer; got 'x'", loss="rankclip")
        OptionError("rankclip.top_k must be an integer; got 'x'")
    """

    def __init__(self, key: str, reason: str, loss: str = "") -> None:
        self.key, self.reason, self.loss = key, reason, loss
        name = f"{loss}.{key}" if loss else key
        super().__init__(f"{name} {reason}" if reason.startswith("must ") else f"{name}: {reason}")

    def __reduce__(self) -> Any:
        # By default an exception is pickled with its message as the only argument.
        return type(self), (self.key, self.reason, self.loss)


@contextlib.contextmanager
def naming_options(keys: Iterable[str], loss: str = "") -> Iterator[None]:
    """Turn a ValueError whose message begins with the name of an option into an :class:`OptionError`.

    Args:
        keys: The options, as Python spells them.
        loss: Their loss; empty for options of the run.
    """
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        text = str(error)
        # "bins must be …", "lists: …" and "diagonal=False …" begin with an option.
        match = re.match(r"(?P<key>\w+)(?P<between>: | |(?==))", text)
        if match is None or match["key"] not in keys:
            raise
        shows_value = match["between"] == ""  # the reason then is the whole text
        reason = text if shows_value else text[match.end() :]
        raise OptionError(match["key"], reason, loss) from error


_WORDS = {None: "none", True: "include", False: "exclude"}
_NOUNS: dict[Any, str] = {int: "an integer", float: "a number", str: "text"}
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Option:
    """An option: its name in Python, the types that it may have, its default and its help.

    Attributes:
        key: The keyword.
        types: The members of its annotation, which may be a union.
        default: The default; ``inspect.Parameter.empty`` of an option that must be given.
        help: The first sentence of its entry in ``Args``.
    """

    key: str
    types: tuple[Any, ...]
    default: Any
    help: str

    @property
    def is_required(self) -> bool:
        """True if it must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def is_typed(self) -> bool:
        """True if a command line can spell its values."""
        return bool(self.choices) or bool(self._parsed_types)

    @property
    def _parsed_types(self) -> list[Any]:
        """The types whose values are parsed from a text."""
        return [kind for kind in self.types if kind in _NOUNS]

    @functools.cached_property
    def choices(self) -> dict[str, Any]:
        """The values by their spelling; empty for numbers and texts."""
        values = [value for kind in self.types for value in _choices_of(kind)]
        if values and type(None) in self.types:
            values = [None, *values]
        return {_word(value): value for value in values}

    @property
    def metavar(self) -> str:
        """The value in ``--help``."""
        of_types = [_METAVARS[kind] for kind in self._parsed_types]
        if self.choices:
            alternatives = ",".join([*self.choices, *of_types])
            return f"{{{alternatives}}}"
        return of_types[0] if of_types else "VALUE"

    def spelled(self, value: Any) -> str:
        """A value as it is typed."""
        for text, choice in self.choices.items():
            if type(choice) is type(value) and choice == value:  # 1 is no True
                return text
        return "none" if value is None else str(value)

    def parsed(self, text: str) -> Any:
        """The value that a command line spells; the constructor checks it.

        Raises:
            ValueError: It is none of the choices, or of another type.
        """
        if text in self.choices:
            return self.choices[text]
        if text == "none" and type(None) in self.types:
            return None
        for kind in self._parsed_types:
            with contextlib.suppress(ValueError):
                return kind(text)
        alternatives = [f"one of {', '.join(self.choices)}"] if self.choices else []
        alternatives += [_NOUNS[kind] for kind in self._parsed_types]
        hint = did_you_mean(text.lower(), self.choices)
        raise ValueError(f"must be {' or '.join(alternatives)}; got {text!r}{hint}")


def _word(value: Any) -> str:
    """A choice as it is typed."""
    return _WORDS[value] if value is None or isinstance(value, bool) else str(value)


def _choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a type that has a few; none of any other."""
    if hint is bool:
        return True, False
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)  # a union of unions is one
    return typing.get_args(hint) if is_union else (hint,)


@functools.cache
def options_of(make: Make) -> dict[str, Option]:
    """The options of a callable, by key: its keyword-only arguments without those that the trainer gives.

    The trainer gives ``base`` and ``gather``.
    """
    helps = _helps(make.__doc__)
    options = {}
    for key, parameter in inspect.signature(make).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and key not in ("base", "gather"):
            types_of_option = _members(_type_of(parameter, make))
            options[key] = Option(key, types_of_option, parameter.default, helps.get(key, ""))
    return options


def _type_of(parameter: inspect.Parameter, make: Make) -> Any:
    """The type of an option: its annotation, else the type of its default, else text.

    ``object`` where the annotation cannot be evaluated.
    """
    if parameter.annotation is parameter.empty:
        return str if parameter.default is parameter.empty else type(parameter.default)
    # The callable's other annotations need not be evaluated, and might fail.
    annotated_alone = types.SimpleNamespace(__annotations__={"option": parameter.annotation})
    try:
        return typing.get_type_hints(annotated_alone, _globals_of(make))["option"]
    except NameError:  # imported for type checkers alone: no command line can spell it
        return object


def _globals_of(make: Any) -> dict[str, Any]:
    """The names that a callable's annotations may use: those of the module that defines its function.

    The function of a class is its constructor, which it may inherit from a class of another module; that of a
    callable object is its class's ``__call__``.
    """
    while isinstance(make, functools.partial):
        make = make.func
    function = inspect.unwrap(make)
    if isinstance(function, type):
        function = inspect.unwrap(function.__init__)  # type: ignore[misc]
    elif not hasattr(function, "__globals__"):
        function = inspect.unwrap(type(function).__call__)
    # A function that is written in C has no module of Python, and no annotations that would need its names.
    names: dict[str, Any] = getattr(function, "__globals__", {})
    return names


# ``Args:`` and the lines until one that is not indented; an entry and the lines until the next one.
_ARGS = re.compile(r"^Args:\n(?P<entries>.*?)(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^    (?P<key>\w+): (?P<text>.*?)(?=^    \S|\Z)", re.DOTALL | re.MULTILINE)
_END_OF_SENTENCE = re.compile(r"\.(?=\s|$)")  # and not the point of 0.5
_ROLE = re.compile(r":\w+:`~?(?P<name>[^`]*)`")  # :class:`Name`


def _helps(doc: str | None) -> dict[str, str]:
    """The first sentence of each entry of a docstring's ``Args``, as plain text."""
    section = _ARGS.search(inspect.cleandoc(doc or ""))
    if section is None:
        return {}
    helps = {}
    for entry in _ENTRY.finditer(section["entries"]):
        on_one_line = " ".join(entry["text"].split())
        first_sentence = _END_OF_SENTENCE.split(on_one_line, maxsplit=1)[0]
        helps[entry["key"]] = plain(first_sentence)
    return helps


def plain(text: str) -> str:
    """Text without the marks of reStructuredText."""
    return _ROLE.sub(r"\g<name>", text).replace("`", "")
