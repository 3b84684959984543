"""A list of graded candidates as data: the rule that every trainer applies."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from rankloss_trainers.graded.lists import check_list, decode_grades, encode_grades, pool_lists


@pytest.mark.parametrize(
    ("candidates", "grades", "named"),
    [
        *((["a"], [bad], f"^grades .*{bad!r}") for bad in (math.nan, math.inf, None, "good", True)),
        (["a"], [2**53 + 1], f"{2**53 + 1}"),
        (["a", "b"], [1], "2 .*1 grades"),
        ([], [], "0 .*0 grades"),
        ("ab", [1, 2], "^candidates "),
        (["a"], None, "^candidates .*grades "),
    ],
)
def test_a_list_is_of_candidates_and_a_grade_for_each(candidates: Any, grades: Any, named: str) -> None:
    assert check_list(["a", "b"], [1, -math.inf], "row 3") == [("a", 1), ("b", -math.inf)]
    with pytest.raises(ValueError, match=f"{named}.*row 3"):
        check_list(candidates, grades, "row 3")


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_pictures_of_equal_pixels_are_one_candidate(mode: str) -> None:
    colours = (Image.new("RGB", (2, 2), colour) for colour in ("red", "red", "blue"))
    red, again, blue = (x.convert(mode, palette=Image.Palette.ADAPTIVE) for x in colours)
    assert (red.tobytes() == blue.tobytes()) == (mode == "P")  # of palettes the indices
    pool = pool_lists([[(red, 1.0), (blue, 0.0)], [(again, 2.0)]])
    assert pool.candidates == [red, blue]
    assert pool.index.tolist() == [[0, 1], [0, -1]]
    assert len(pool.ids.unique()) == 2


@pytest.mark.parametrize(
    ("candidate", "equal", "other"),
    [
        (np.eye(2), np.eye(4)[::2, ::2].copy(), np.ones((2, 2))),
        (np.eye(2), np.asfortranarray(np.eye(2)), np.eye(2, dtype=np.float32)),
        (torch.eye(2), torch.eye(2).mT, torch.eye(2).reshape(4)),
        (torch.eye(2).bfloat16(), torch.eye(2).bfloat16(), torch.eye(2).half()),
        ({"array": np.eye(2), "rate": 8}, {"rate": 8, "array": np.eye(2)}, {"array": np.eye(2), "rate": 9}),
        (["a", b"b"], ("a", b"b"), ["a", "b"]),
    ],
)
def test_other_candidates_are_told_apart_by_their_content(candidate: Any, equal: Any, other: Any) -> None:
    pool = pool_lists([[(candidate, 1.0), (other, 0.0)], [(equal, 2.0)]])
    assert pool.index.tolist() == [[0, 1], [0, -1]]
    assert len(pool.ids.unique()) == 2


@pytest.mark.parametrize("wrong", [object(), np.array([object()]), {"a": object()}])
def test_candidates_without_a_content_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^candidates .*object"):
        pool_lists([[("a", 1.0), (wrong, 0.0)]])


def test_grades_that_float32_would_tie_keep_their_order() -> None:
    grades = [1_700_000_001.0, 1_700_000_000.0]
    assert pool_lists([list(zip("ab", grades, strict=True))]).grades.tolist() == [grades]


def test_grades_reach_any_device_or_are_refused() -> None:
    grades = [[0.5, -math.inf, 2.0**24], [1.0, 1.0, 0.0]]
    bits = encode_grades(torch.tensor(grades, dtype=torch.float64))
    assert decode_grades(bits).dtype == torch.float64
    assert decode_grades(bits).tolist() == grades
    with mock.patch("rankloss_trainers.graded.lists.has_float64", return_value=False):
        assert decode_grades(bits).dtype == torch.float32
        assert decode_grades(bits).tolist() == grades


@pytest.mark.parametrize("grades", [[2.0**24 + 1, 2.0**24], [1e300, 1.0]])
def test_grades_that_float32_would_tie_or_lose_are_refused_there(
    grades: list[float],
) -> None:
    bits = encode_grades(torch.tensor([[1.0, 0.0], grades], dtype=torch.float64))
    with (
        mock.patch("rankloss_trainers.graded.lists.has_float64", return_value=False),
        pytest.raises(ValueError, match=r"^grades .*float32.*list 1 .*\["),
    ):
        decode_grades(bits)
