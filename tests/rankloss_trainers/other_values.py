"""A value of each option of a run that is not its default."""

from __future__ import annotations

from typing import Any

from rankloss_trainers.option import Option, options_of
from rankloss_trainers.run_options import GIVEN, RunOptions


def _other_value(option: Option) -> Any:
    """A choice that is not the default; of an option without choices, a number or text of its type."""
    choices = [value for value in option.choices.values() if value != option.default]
    if choices:
        return choices[-1]
    return next(value for value in (3, 0.5, GIVEN) if type(value) in option.types)


OTHER_VALUES = {key: _other_value(option) for key, option in options_of(RunOptions).items()}
