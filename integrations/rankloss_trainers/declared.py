"""Declaration of a loss by its constructor, for trainers, command lines and documents.

A loss is the class of its module, or a function ``(base, *, option=default, …, gather) → module``. Its
keyword-only arguments are its options: the signature has their types and defaults, the docstring's ``Args``
has their help, and the constructor checks their values. :class:`Named` adds other defaults, and facts that a
trainer needs before it builds.

No library is imported here but the standard one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rankloss_trainers.option import (
    Make,
    Option,
    OptionError,
    did_you_mean,
    naming_options,
    options_of,
    plain,
)
from rankloss_trainers.run_options import RunOptions

Options = Mapping[str, Any]
"""Values of options by name."""


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
        beside: Other defaults of its options where another loss is joined with it, by that loss's name.
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
    beside: Mapping[str, Options] = field(default_factory=dict)
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
        """The options of ``make``, ``more`` and ``columns``, by key, with the loss's own defaults."""
        options: dict[str, Option] = {}
        for make in (self.make, self.more, self.columns):
            if make is None:
                continue
            for key, option in options_of(_loaded(make)).items():
                options.setdefault(key, option)  # the earlier callable's hides another of the same name
        return {
            key: dataclasses.replace(option, default=self.defaults.get(key, option.default))
            for key, option in options.items()
        }

    def spelled(self, values: Options) -> str:
        """Some of its options with their values, as text."""
        texts = []
        for key, value in values.items():
            texts.append(f"{key.replace('_', '-')} {self.options[key].spelled(value)}")
        return ", ".join(texts)

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
        return self.help or plain(doc.partition("\n")[0].rstrip("."))


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
                hint = hint_elsewhere(key) or did_you_mean(key, self.named.options) or f"; it has {known}"
                raise TypeError(f"{self.name} has no option {key!r}{hint}")

    @property
    def replaces(self) -> bool:
        """True if it takes the place of the trainer's loss; False if it stands on another.

        A constructor without an argument ``base`` builds a loss that stands on none. A module that was given
        is the user's, and replaces nothing.
        """
        if self.named.replaces:
            return True
        was_given = self.package is None
        takes_base = "base" in inspect.signature(self.named.constructor).parameters
        return not was_given and not takes_base

    @property
    def values(self) -> dict[str, Any]:
        """The values of its options, by key."""
        return {key: self.given.get(key, option.default) for key, option in self.named.options.items()}

    @property
    def summary(self) -> str:
        """The options that are not at their defaults, as text."""
        options = self.named.options
        changed = {key: value for key, value in self.given.items() if value != options[key].default}
        return self.named.spelled(changed)

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
        for key in self.named.column_options:
            if key in self.given:
                raise OptionError(key, f"{reason}; got {self.given[key]!r}", self.name)

    def _check_given(self, keys: Iterable[str]) -> None:
        """Raise an OptionError for one of these options that must be given and is not."""
        for key in keys:
            if self.named.options[key].is_required and key not in self.given:
                raise OptionError(key, f"must be given: {self.named.options[key].help}", self.name)

    def build(self, base: Any, gather: Any) -> Any:
        """The module on a base loss.

        Raises:
            OptionError: An option is missing or cannot have its value, or options exclude each other.
        """
        make = self.named.constructor
        parameters = inspect.signature(make).parameters
        of_columns = self.named.column_options
        self._check_given(key for key in self.named.options if key not in of_columns)
        # Options of the columns alone are not the constructor's; it may take others as **options.
        values = {**self.named.defaults, **self.given}
        options = {key: value for key, value in values.items() if key in parameters or key not in of_columns}
        if "base" in parameters:
            options["base"] = base
        if "gather" in parameters:
            options["gather"] = gather
        try:
            with naming_options(self.named.options, self.name):
                return make(**options)
        except OptionError as error:
            # The user did not type the loss's own defaults: an error that names some says whose they are.
            own_defaults = self.named.defaults.keys() - self.given
            named_in_error = sorted(key for key in own_defaults if re.search(rf"\b{key}\b", str(error)))
            if not named_in_error:
                raise
            text = f"{error.reason} ({' and '.join(named_in_error)}: by default of {self.name})"
            raise OptionError(error.key, text, error.loss) from error


_REPLACED = {"reference_features": "teacher", "reference": "teacher"}
"""Options that losses had once, and the option of the run in the place of each."""
_WITHOUT_REPLACEMENT = "distill_loss"  # an option that losses had once, in whose place there is none
OF_REFERENCE = frozenset({"lists", "worth", "ties", "discount"})
"""Options that ``rankloss.reference`` alone has: ``rankloss.options.OF_REFERENCE``, which needs torch."""


def hint_elsewhere(key: str, prefix: str = "") -> str:
    """The end of an error about an option that a loss has not: the place where it is.

    Some belong to the run or to ``rankloss.reference``, some a loss had once; empty for any other option.

    Args:
        key: The option, as Python spells it.
        prefix: The beginning of the options of a run: ``--loss-`` on a command line.
    """
    if key == _WITHOUT_REPLACEMENT:
        return "; a loss that has a teacher leaves it out"
    if key in OF_REFERENCE:
        return "; rankloss.reference.cross_modal and in_modal have it"
    of_run = _REPLACED.get(key, key)
    if of_run not in options_of(RunOptions):
        return ""
    if prefix:
        return f"; it is an option of the run, {prefix}{of_run.replace('_', '-')}"
    return f"; it is an option of a trainer's run, {of_run}"


class Choice(NamedTuple):
    """The losses and the options of a run, as a command line gives them.

    Attributes:
        losses: The losses, the innermost first.
        options: The options of the run.
    """

    losses: list[Loss]
    options: RunOptions
