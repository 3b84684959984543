"""The fuzz finds nothing in some examples, and what is wrong by any measure."""

from __future__ import annotations

import pytest
import torch

import fuzz


def test_some_examples_have_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "0", "--examples", "60"]) == 0
    assert "60 examples" in capsys.readouterr().out


def test_an_error_above_its_bound_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "BOUNDS", {torch.float32: (0.0, 0.0)})
    assert fuzz.main(["--seed", "3", "--minutes", "1"]) == 1
    assert "is off by" in (said := capsys.readouterr().out)
    assert "tests/fuzz.py --seed" in said
