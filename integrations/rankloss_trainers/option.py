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
        return type(self), (self.key, self.reason, self.loss)


@contextlib.contextmanager
def naming_options(keys: Iterable[str], loss: str = "") -> Iterator[None]:
    """Turn a ValueError within the context that begins with an option into an :class:`OptionError`."""
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        text = str(error)
        match = re.match(r"(\w+)(:? |(?==))", text)  # "bins must be …", "lists: …", "diagonal=False …"
        if match is None or match[1] not in keys:
            raise
        raise OptionError(match[1], text[match.end() :] if match[2] else text, loss) from error


_WORDS = {None: "none", True: "include", False: "exclude"}
_KINDS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "N"),
    float: ("a number", "X"),
    str: ("text", "TEXT"),
}


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
        return bool(self.choices) or any(kind in _KINDS for kind in self.types)

    @functools.cached_property
    def choices(self) -> dict[str, Any]:
        """The values by their spelling; empty for numbers and texts."""
        values = [x for kind in self.types for x in _choices_of(kind)]
        none = [None] if values and type(None) in self.types else []
        return {_word(x): x for x in (*none, *values)}

    @property
    def metavar(self) -> str:
        """The value in ``--help``."""
        named = [_KINDS[kind][1] for kind in self.types if kind in _KINDS]
        return f"{{{','.join([*self.choices, *named])}}}" if self.choices else (named or ["VALUE"])[0]

    def spelled(self, value: Any) -> str:
        """A value as it is typed."""
        texts = [text for text, x in self.choices.items() if type(x) is type(value) and x == value]
        return texts[0] if texts else "none" if value is None else str(value)

    def parsed(self, text: str) -> Any:
        """The value that a command line spells; the constructor checks it.

        Raises:
            ValueError: It is none of the choices, or of another type.
        """
        if text in self.choices:
            return self.choices[text]
        if text == "none" and type(None) in self.types:
            return None
        kinds = [kind for kind in self.types if kind in _KINDS]
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(text)
        words = [f"one of {', '.join(self.choices)}"] if self.choices else []
        said = " or ".join([*words, *(_KINDS[kind][0] for kind in kinds)])
        raise ValueError(f"must be {said}; got {text!r}{did_you_mean(text.lower(), self.choices)}")


def _word(value: Any) -> str:
    return _WORDS[value] if value is None or isinstance(value, bool) else str(value)


def _choices_of(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return True, False
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)  # which are flat
    return typing.get_args(hint) if is_union else (hint,)


@functools.cache
def options_of(make: Make) -> dict[str, Option]:
    """The options of a callable, by key: its keyword-only arguments but ``base`` and ``gather``."""
    made_by: Any = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    helps = _helps(make.__doc__)
    return {
        key: Option(key, _members(_type_of(x, made_by)), x.default, helps.get(key, ""))
        for key, x in inspect.signature(make).parameters.items()
        if x.kind is x.KEYWORD_ONLY and key not in ("base", "gather")
    }


def _type_of(parameter: inspect.Parameter, function: Any) -> Any:
    """The type of an option; of one without an annotation that of its default, text without either."""
    if parameter.annotation is parameter.empty:
        return str if parameter.default is parameter.empty else type(parameter.default)
    annotated = types.SimpleNamespace(__annotations__={"x": parameter.annotation})
    try:
        return typing.get_type_hints(annotated, _globals_of(function))["x"]
    except NameError:  # imported for type checkers alone: no command line can spell it
        return object


def _globals_of(function: Any) -> dict[str, Any]:
    """The names that a callable's annotations may use: of a function, a partial one, or an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if isinstance(function, type):
        function = vars(function).get("__init__", function)
    elif not hasattr(function, "__globals__"):
        function = type(function).__call__
    found: dict[str, Any] = getattr(function, "__globals__", {})
    return found


def _helps(doc: str | None) -> dict[str, str]:
    """The first sentence of each entry of a docstring's ``Args``, as plain text."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc or ""), re.DOTALL | re.MULTILINE)
    entries = re.findall(
        r"^    (\w+): (.*?)(?=^    \S|\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE
    )
    return {
        key: plain(re.split(r"\.(?=\s|$)", " ".join(text.split()), maxsplit=1)[0]) for key, text in entries
    }


def plain(text: str) -> str:
    """Text without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("`", "")
