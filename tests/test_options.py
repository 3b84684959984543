"""Every option of the rank terms has one place, is checked there, and survives its encoding."""

from __future__ import annotations

import typing
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankloss.kernels import why_not_options
from rankloss.options import RankOptions, RankOptionsDict, choices_of

COUNTS = [f.name for f in fields(RankOptions) if not choices_of(f.name)]
CHOICES = [f.name for f in fields(RankOptions) if choices_of(f.name)]


def values_of(name: str) -> st.SearchStrategy:
    if choices_of(name):
        return st.sampled_from(choices_of(name))
    field = RankOptions.__dataclass_fields__[name]
    bounds = field.metadata["bounds"]
    counts = st.integers(bounds["at_least"], bounds["at_most"])
    return counts | st.none() if field.default is None else counts


@given(st.fixed_dictionaries({}, optional={f.name: values_of(f.name) for f in fields(RankOptions)}))
def test_encoding_keeps_every_option(given_options) -> None:
    binned = given_options.get("method") == "bin"
    shuffled = given_options.get("ties") == "random"
    assume(not (binned and (shuffled or given_options.get("lists") == "batch")))
    assume(not (shuffled and given_options.get("diagonal") is False))
    in_kernel = given_options.get("kernel") == "triton"
    assume(not (in_kernel and why_not_options(RankOptions(**{**given_options, "kernel": "torch"}))))
    options = RankOptions(**given_options)
    assert RankOptions.decode(options.encoded) == options
    assert {**{f.name: f.default for f in fields(options)}, **given_options} == {
        f.name: getattr(options, f.name) for f in fields(options)
    }
    assert RankOptions(**options.changed) == options


def test_dict_for_type_checkers_has_the_fields_and_their_types() -> None:
    assert typing.get_type_hints(RankOptionsDict) == typing.get_type_hints(RankOptions)


def test_every_field_is_documented() -> None:
    assert RankOptions.__doc__ is not None
    for option in fields(RankOptions):
        assert f"    {option.name}: " in RankOptions.__doc__
        assert option.metadata["help"]
        assert bool(option.metadata["none"]) == (option.default is None)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["x", 0, 1, 1.0, "Row"])
def test_unknown_choice_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be one of .*; got {value!r}$"):
        RankOptions(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, 2.0, True, "8", 2**70, float("nan")])
def test_what_is_no_count_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        RankOptions(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_numpy_integers_are_taken(name: str) -> None:
    value = getattr(RankOptions(**{name: np.int64(64)}), name)
    assert value == 64
    assert type(value) is int


def test_misspelt_option_is_refused() -> None:
    with pytest.raises(TypeError, match="metod"):
        RankOptions(metod="bin")
