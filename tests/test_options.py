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

NUMBERS = ["reference_scale"]
COUNTS = [f.name for f in fields(RankOptions) if not choices_of(f.name) and f.name not in NUMBERS]
CHOICES = [f.name for f in fields(RankOptions) if choices_of(f.name)]


def values_of(name: str) -> st.SearchStrategy:
    if choices_of(name):
        return st.sampled_from(choices_of(name))
    field = RankOptions.__dataclass_fields__[name]
    bounds = field.metadata["bounds"]
    if name in NUMBERS:
        return st.none() | st.floats(bounds["above"], exclude_min=True, allow_infinity=False)
    counts = st.integers(bounds["at_least"], bounds["at_most"])
    return counts | st.none() if field.default is None else counts


@given(st.fixed_dictionaries({}, optional={f.name: values_of(f.name) for f in fields(RankOptions)}))
def test_encoding_keeps_every_option(given_options) -> None:
    binned = given_options.get("method") == "bin"
    shuffled = given_options.get("ties") == "random"
    assume(not (binned and (shuffled or given_options.get("lists") == "batch")))
    assume(not (given_options.get("precision") == "exact-order" and given_options.get("lists") == "batch"))
    assume(not (shuffled and given_options.get("diagonal") is False))
    if given_options.get("model") == "top_one":
        for name in ("worth", "ties", "discount", "top_k", "method"):
            given_options.pop(name, None)
    else:
        given_options.pop("reference_scale", None)
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


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1.0, True, "8", float("nan"), float("inf"), [1.0]])
def test_what_is_no_positive_number_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a positive number; got "):
        RankOptions(model="top_one", **{name: value})
    for number in (np.float32(2.5), 3, np.int64(3)):
        assert type(getattr(RankOptions(model="top_one", **{name: number}), name)) is float


@pytest.mark.parametrize(
    "options",
    [
        {"worth": "shifted"},
        {"ties": "random"},
        {"discount": "log"},
        {"top_k": 4},
        {"method": "bin"},
    ],
)
def test_options_of_a_ranking_are_refused_under_top_one_by_name(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"model='top_one' .* {name}={value!r} needs model='plackett_luce'"):
        RankOptions(model="top_one", **options)
    with pytest.raises(ValueError, match=r"reference_scale=2.0 .* needs model='top_one'"):
        RankOptions(reference_scale=2.0)


@pytest.mark.parametrize("name", COUNTS)
def test_numpy_integers_are_taken(name: str) -> None:
    value = getattr(RankOptions(**{name: np.int64(64)}), name)
    assert value == 64
    assert type(value) is int


def test_misspelt_option_is_refused() -> None:
    with pytest.raises(TypeError, match="metod"):
        RankOptions(metod="bin")
