"""Options of a run, whichever losses it trains: its teacher, the unit of schedules, the logged agreement.

An option is a field of :class:`RunOptions` and of :class:`RunKeywords`, and nothing else names it but the
code that acts on it: command lines and the constructors of trainers read the fields.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

from rankloss_trainers.extras import extra
from rankloss_trainers.option import OptionError, naming_options, options_of

GIVEN = "given"
"""The teacher that the trainer or its data have: columns of features, or open_clip's --distill-model."""

_SHORT_RAMP = 10  # epochs, below which λ would rise in a few large steps


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run.

    Args:
        teacher: Folder of `rankloss features`; or a teacher to compute before the first step,
            MODEL:PRETRAINED of open_clip or image=A,text=B; or "given", that of the trainer or the data.
            image=A,text=B,align brings two encoders into one space; image=A or text=B is one alone. None is
            a loss's own teacher, or "given" for a loss that needs one.
        schedule_unit: Evaluate schedules per epoch or per optimizer step; auto is per epoch in a run of ten
            or more.
        agreement_every: Log the batch's rank agreement, Kendall's tau, at every so many optimizer steps.

    Raises:
        OptionError: An option cannot have its value.

    Example:
        >>> RunOptions(agreement_every=0)
        Traceback (most recent call last):
        rankloss_trainers.option.OptionError: agreement_every must be an integer of at least 1; got 0
    """

    teacher: str | None = None
    schedule_unit: Literal["auto", "epoch", "step"] = "auto"
    agreement_every: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.teacher, os.PathLike):
            object.__setattr__(self, "teacher", os.fspath(self.teacher))
        if not isinstance(self.teacher, str | None) or self.teacher == "":
            raise OptionError("teacher", f"must be a folder or the name of a teacher; got {self.teacher!r}")
        from rankloss.options import check_choice, check_count  # which imports torch

        with naming_options(options_of(RunOptions)):
            check_choice("schedule_unit", self.schedule_unit, ("auto", "epoch", "step"))
            if self.agreement_every is not None:
                check_count("agreement_every", self.agreement_every)

    @classmethod
    def taken_from(cls, keywords: dict[str, Any]) -> RunOptions:
        """The options among the keywords of a trainer, which are taken out of them.

        Example:
            >>> keywords = {"agreement_every": 8, "model": None}
            >>> RunOptions.taken_from(keywords).agreement_every, keywords
            (8, {'model': None})
        """
        return cls(**{key: keywords.pop(key) for key in options_of(RunOptions) if key in keywords})

    def unit(self, epochs: float) -> Literal["epoch", "step"]:
        """The unit of schedules in a run of so many epochs, infinity where their number is unknown.

        One epoch has no ramp over epochs.
        """
        if self.schedule_unit == "auto":
            return "epoch" if _SHORT_RAMP <= epochs < math.inf else "step"
        return "step" if epochs == 1 else self.schedule_unit


class RunKeywords(TypedDict, total=False):
    """The options of a run as keywords, for type checkers and editors; see :class:`RunOptions`."""

    teacher: str | None
    schedule_unit: Literal["auto", "epoch", "step"]
    agreement_every: int | None


_Init = TypeVar("_Init", bound=Callable[..., None])


def takes_run_options(init: _Init) -> _Init:
    """Show the options of a run in the signature of a constructor that takes them as ``**keywords``.

    ``help()``, notebooks and ``inspect.signature`` name them then.
    """
    shown = inspect.signature(init)
    *others, keywords = shown.parameters.values()
    options = inspect.signature(RunOptions).parameters.values()
    function: Any = init
    function.__signature__ = shown.replace(parameters=[*others, *options, keywords])
    return init


class Teacher:
    """A teacher of a run by the text that names it.

    Args:
        text: As the option ``teacher`` of :class:`RunOptions`, but for "given".

    Attributes:
        text: The text that names it.
        folder: The folder of its features, which exists or has to; None while they are to be computed.
        spec: The teacher to compute, of :class:`rankloss_features.caching.Spec`; or None.

    Raises:
        OptionError: No teacher has this name.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.spec: Any = None
        if not os.path.isdir(text):
            with extra("features"):
                from rankloss_features.caching import Spec
            try:
                self.spec = Spec.of(text)
            except ValueError as error:
                is_spelled_as_a_model = any(sign in text for sign in "=:")
                # Otherwise it is the path of a folder; an error says that it is missing where it is opened.
                if is_spelled_as_a_model:
                    raise OptionError("teacher", f"{error}; nor is there a folder of this name") from error
        self.folder = text if self.spec is None else None

    def check(self) -> None:
        """Look up a teacher to compute, as far as it is known before anything is loaded.

        Raises:
            OptionError: There is no such model or encoder, or its package is not installed.
        """
        try:
            if self.spec is not None:
                self.spec.check()
        except ValueError as error:
            raise OptionError("teacher", str(error)) from error

    @property
    def are_encoders(self) -> bool:
        """True for a teacher to compute whose images and texts have no common space."""
        return self.spec is not None and self.spec.model is None and not self.spec.align

    @property
    def is_one_encoder(self) -> bool:
        """True for a teacher to compute that has images or texts alone."""
        return self.are_encoders and None in (self.spec.image_encoder, self.spec.text_encoder)
