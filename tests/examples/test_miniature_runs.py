"""The paper in miniature: what is trained, in which order, and where its records are."""

from __future__ import annotations

import dataclasses
import json

import pytest
from examples_common.records import Store, read_lines
from miniature_paper.grid import PRESETS, Setting, plan
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.runs import key_of
from miniature_paper.search.trials import Attempt

# --- keys ---


@pytest.mark.parametrize("folder", ["full", "search", "question"])
def test_the_records_of_the_repository_are_recognised(folder):
    """Under the keys that the present code gives their settings, so that nothing is trained again."""
    store = Store(EXAMPLE / "results" / folder)
    records = [line for line in read_lines(store.path) if "key" in line]
    assert len({line["key"] for line in records}) == len(records) > 30
    for line in records:
        stored = line["setting"]
        setting = Setting(**stored) if folder == "full" else Attempt.of_record(stored)
        assert key_of(setting, line["data"]) == line["key"]


# --- records ---

_SETTINGS = plan(PRESETS["quick"])


def _record(setting, **more):
    found = {"metrics": {}, "chance": {}, "items": {}, "conditions": {"torch": "2.13", "jobs": 2}}
    return {"setting": dataclasses.asdict(setting), **found, **more}


def test_records_come_back_with_their_conditions_and_are_found_by_setting(tmp_path):
    store = Store(tmp_path / "results")
    assert store.read() == {}
    first = _record(_SETTINGS[0], seconds={"training": 1.5, "text": "λ ✓"})
    store.save("a", first)
    store.save("b", _record(_SETTINGS[1]))
    store.save("c", _record(_SETTINGS[2], conditions={"torch": "3"}))
    found = Store(tmp_path / "results").read()
    assert found["a"] == first
    assert found["c"]["conditions"] == {"torch": "3"}
    lines = store.path.read_text(encoding="utf-8").splitlines()
    assert ["key" in json.loads(line) for line in lines] == [False, True, True, False, True]
    store.save("a", _record(_SETTINGS[0], seconds={"training": 9.0}))  # of a process that was slower
    assert store.path.read_text(encoding="utf-8").splitlines() == lines
    assert [r["setting"]["loss"] for r in store.of(_SETTINGS[1::-1])] == [s.loss for s in _SETTINGS[1::-1]]
    store.save("d", _record(_SETTINGS[1]))
    with pytest.raises(ValueError, match="b and d are of one setting"):
        store.of(_SETTINGS)
