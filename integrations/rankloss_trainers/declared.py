"""Declaration of a loss by its constructor, for trainers, command lines and documents.

A loss is the class of its module, or a function ``(base, *, option=default, …, gather) → module``. Its
keyword-only arguments are its options: the signature has their types and defaults, the docstring's ``Args``
has their help, and the constructor checks their values. :class:`Named` adds other defaults, and facts that a
trainer needs before it builds.

Only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Make = Callable[..., Any]
Options = Mapping[str, Any]
"""Values of options by name."""


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


# --- options --------------------------------------------------------------------------------------------

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
        key: _plain(re.split(r"\.(?=\s|$)", " ".join(text.split()), maxsplit=1)[0]) for key, text in entries
    }


def _plain(text: str) -> str:
    """Text without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("`", "")


# --- losses ---------------------------------------------------------------------------------------------


def _loaded(make: Make | str | None) -> Any:
    """A callable, or the object that ``module:name`` stands for; None for none."""
    if not isinstance(make, str):
        return make
    module, _, name = make.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Named:
    """A loss that can be named.

    Attributes:
        make: The class of its module, a function that builds it, or either as ``"module:name"``.
        defaults: The options in which it differs from ``make``.
        more: A callable whose options ``make`` takes, too, as its ``**options``.
        columns: A class of columns of the training data that the loss is called with, whose keyword-only
            arguments are options as well; see :class:`rankloss_open_clip.columns.text_columns.TextColumn`.
        teacher: ``"required"`` if the loss needs a teacher, or the teacher of a run that names none; None:
            the signature of the module's ``forward`` decides.
        prefix: The prefix of its options on a command line; empty for its name.
        kind: ``"softmax"`` or ``"sigmoid"`` if it works on no other loss of pairs.
        replaces: True if ``make`` takes the trainer's loss as ``base`` and returns one for its place.
        log: A callable without arguments that makes ``(module, entries, step, inputs) → entries`` to log.
        python_only: Options that no command line has.
        help: Its line in ``--help``; empty for the first line of the docstring.
        citation: The BibTeX entry of its paper.
    """

    make: Make | str
    defaults: Options = field(default_factory=dict)
    more: Make | str | None = None
    columns: Make | str | None = None
    teacher: str | None = None
    prefix: str = ""
    kind: Literal["softmax", "sigmoid"] | None = None
    replaces: bool = False
    log: Make | str | None = None
    python_only: frozenset[str] = frozenset()
    help: str = ""
    citation: str = ""

    @functools.cached_property
    def constructor(self) -> Any:
        """The callable of ``make``."""
        return _loaded(self.make)

    @functools.cached_property
    def columns_class(self) -> Any:
        """The callable of ``columns``, or None."""
        return _loaded(self.columns)

    @property
    def column_options(self) -> dict[str, Option]:
        """The options of its columns, by key."""
        return options_of(self.columns_class) if self.columns else {}

    @functools.cached_property
    def options(self) -> dict[str, Option]:
        """Its options, by key, with its own defaults."""
        found: dict[str, Option] = {}
        for make in (self.make, self.more, self.columns):
            if make is not None:  # its own come first, and hide those of the same name
                found = found | options_of(_loaded(make)) | found
        return {
            key: dataclasses.replace(x, default=self.defaults.get(key, x.default)) for key, x in found.items()
        }

    def with_defaults(self, defaults: Options) -> Named:
        """The same with some other defaults."""
        return dataclasses.replace(self, defaults={**self.defaults, **defaults})

    @functools.cached_property
    def log_maker(self) -> Any:
        """The callable of ``log``, or None."""
        return _loaded(self.log)

    @property
    def summary(self) -> str:
        """Its line in ``--help`` and in ``rankloss losses``."""
        doc = inspect.cleandoc(self.constructor.__doc__ or "")
        return self.help or _plain(doc.partition("\n")[0].rstrip("."))


@dataclass(frozen=True)
class Loss:
    """A named loss with options: a choice, which is checked where its module is built.

    Attributes:
        name: Its name.
        named: Its declaration.
        given: The options that were given.
        package: The distribution that registers it, with its version; empty for rankloss, None for a module
            that was given in place of a name.

    Raises:
        TypeError: There is no such option.
    """

    name: str
    named: Named
    given: Options = field(default_factory=dict)
    package: str | None = ""

    def __post_init__(self) -> None:
        for key in self.given:
            if key not in self.named.options:
                known = ", ".join(self.named.options) or "none"
                hint = replaced(key) or did_you_mean(key, self.named.options) or f"; it has {known}"
                raise TypeError(f"{self.name} has no option {key!r}{hint}")

    @property
    def replaces(self) -> bool:
        """True if it takes the place of the trainer's loss; False if it stands on another."""
        if self.named.replaces:
            return True
        return self.package is not None and "base" not in inspect.signature(self.named.constructor).parameters

    @property
    def values(self) -> dict[str, Any]:
        """The values of its options, by key."""
        return {key: self.given.get(key, x.default) for key, x in self.named.options.items()}

    @property
    def summary(self) -> str:
        """The options that are not at their defaults, as text."""
        options = self.named.options
        shown = {key: x for key, x in self.given.items() if x != options[key].default}
        return ", ".join(f"{key.replace('_', '-')} {options[key].spelled(x)}" for key, x in shown.items())

    @functools.cached_property
    def columns(self) -> Any:
        """The columns of the training data that it is called with, or None.

        Raises:
            OptionError: An option of them is missing, or cannot have its value.
        """
        make = self.named.columns_class
        if make is None:
            return None
        values = {key: self.values[key] for key in self.named.column_options}
        self._check_given(values)
        with naming_options(values, self.name):
            return make(**values)

    def refuse_column_options(self, reason: str) -> None:
        """Raise an OptionError for an option of the columns that was given."""
        for key in (key for key in self.named.column_options if key in self.given):
            raise OptionError(key, f"{reason}; got {self.given[key]!r}", self.name)

    def _check_given(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.named.options[key].is_required and key not in self.given:
                raise OptionError(key, f"must be given: {self.named.options[key].help}", self.name)

    def build(self, base: Any, gather: Any) -> Any:
        """The module on a base loss.

        Raises:
            OptionError: An option cannot have its value, or options exclude each other.
            TypeError: The result is no module.
        """
        make = self.named.constructor
        names = inspect.signature(make).parameters
        of_columns = self.named.column_options
        chosen = {**self.named.defaults, **self.given}
        self._check_given(key for key in self.named.options if key not in of_columns)
        own = {key: x for key, x in chosen.items() if key in names or key not in of_columns}
        run = {key: x for key, x in (("base", base), ("gather", gather)) if key in names}
        try:
            with naming_options(self.named.options, self.name):
                return make(**run, **own)
        except OptionError as error:
            presets = self.named.defaults.keys() - self.given
            named = sorted(x for x in presets if re.search(rf"\b{x}\b", str(error)))
            if not named:
                raise
            text = f"{error.reason} ({' and '.join(named)}: by default of {self.name})"
            raise OptionError(error.key, text, error.loss) from error


_REPLACED = {"reference_features": "teacher", "reference": "teacher"}
"""Options that losses had once, and the option of the run in the place of each."""
_WITHOUT_REPLACEMENT = "distill_loss"


def replaced(key: str, prefix: str = "") -> str:
    """The end of an error about an option that belongs to the run, or that a loss had once; else empty.

    Args:
        key: The option, as Python spells it.
        prefix: The beginning of the options of a run: ``--loss-`` on a command line.
    """
    from rankloss_trainers.run_options import RunOptions  # which imports this module

    if key == _WITHOUT_REPLACEMENT:
        return "; a loss that has a teacher leaves it out"
    of_run = _REPLACED.get(key, key)
    if of_run not in options_of(RunOptions):
        return ""
    if prefix:
        return f"; it is an option of the run, {prefix}{of_run.replace('_', '-')}"
    return f"; it is an option of a trainer's run, {of_run}"
