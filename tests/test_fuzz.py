from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given, settings

import fuzz
from rankloss.options import RankOptions


def test_two_seconds_of_it_find_nothing_and_print_the_table() -> None:
    command = [sys.executable, fuzz.__file__, "--minutes", str(2 / 60), "--seed", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "float64 gradient" in result.stdout
    assert "\nlists row " in result.stdout
    assert result.stdout.endswith("No finding.\n")


def test_a_wrong_gradient_is_found_and_ends_with_a_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fuzz.found

    def wrong(case: fuzz.Case, inputs: tuple[torch.Tensor, ...]) -> object:
        value, gradients = right(case, inputs)
        return value, tuple(g * (1.001 if case.n > 2 else 1) for g in gradients)

    monkeypatch.setattr(fuzz, "found", wrong)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--minutes", "1", "--seed", "0"])
    assert fuzz.main() == 1
    *_, message, case, _, command = capsys.readouterr().out.strip().splitlines()
    assert "the gradient is off by" in message
    assert "n=3" in case  # the smallest that is wrong
    *_, option, example = shlex.split(command)
    assert option == "--case"
    with pytest.raises(fuzz.Finding, match="the gradient is off by"):
        fuzz.check(fuzz.Case(**json.loads(example)))


def test_every_option_of_the_rank_terms_is_drawn() -> None:
    drawn: set[tuple[str, str]] = set()

    @settings(max_examples=200)
    @given(fuzz.cases())
    def draw(case: fuzz.Case) -> None:
        drawn.update((name, repr(value)) for name, value in case.options.items())

    draw()
    for option in {field.name for field in fields(RankOptions)}:
        assert len([value for name, value in drawn if name == option]) > 1, option


def test_a_case_survives_its_own_json() -> None:
    case = fuzz.Case("RankConsistency", 3, 4, 5, 10.0, "random", {"top_k": None}, {})
    assert fuzz.Case(**json.loads(json.dumps(asdict(case)))) == case
