"""The paper in miniature: what is trained, in which order, and where its records are."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import types

import miniature_records
import pytest
from examples_common.records import Store, read_lines
from filelock import FileLock
from miniature_paper import grid, options
from miniature_paper.data import evaluation_digest
from miniature_paper.grid import EXHIBITS, LOSSES, PRESETS, Setting, plan, settings_of
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.runs import key_of
from miniature_paper.search.trials import Attempt
from rich.console import Console

presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)


# --- grid ---


@presets
def test_the_plan_holds_every_exhibit_once_and_table_1_first(preset):
    planned, seeds = plan(preset), range(preset.seeds)
    found = [settings_of(preset, exhibit, seeds) for exhibit in EXHIBITS]
    assert set(planned) == set(itertools.chain(*found))
    assert len(planned) == len(set(planned))
    first = set(settings_of(preset, "table1", seeds))
    assert {(s.loss, s.seed) for s in first} == set(itertools.product(LOSSES, seeds))
    assert set(planned[: len(first)]) == first
    for part in (planned[: len(first)], planned[len(first) :]):
        assert [s.seed for s in part] == sorted(s.seed for s in part)
    sweep = {(s.lambda_cross, s.lambda_in) for s in settings_of(preset, "figure3", seeds)}
    assert sweep == {(0, 0)} | {(x, 1) for x in preset.lambdas} | {(1, x) for x in preset.lambdas}


@presets
def test_every_setting_has_one_name_and_every_size_whole_epochs(preset):
    """A model is found again by its setting, so the weights of the terms have to say which loss it is."""
    for setting in plan(preset):
        assert setting.loss == grid.loss_name(setting.lambda_cross, setting.lambda_in, setting.loss)
        # The trainer counts in epochs and drops an incomplete last batch.
        assert setting.pairs % preset.batch_size == 0
        assert preset.steps * preset.batch_size % setting.pairs == 0


# --- keys ---


def test_the_fingerprint_of_the_data_is_that_of_the_records_whatever_wrote_the_files(tmp_path):
    """Records are found by it: files that say the same in another order must not make all of them again."""
    said = {"name": "mdi", "shift": "", "classes": ["é"], "templates": ["a {}"]}
    said |= {"index": {"test": [3]}, "label": {}}
    first = json.dumps(said) + "\n"
    expected = hashlib.sha256(f"tarball{'a,b'}{first}".encode()).hexdigest()
    (tmp_path / "labels").mkdir()
    (tmp_path / "records.csv").write_text("a,b")
    icons = types.SimpleNamespace(manifest={"tarball": "tarball", "labelled": ["mdi"]}, folder=tmp_path)
    for content, same in (
        (said, True),
        (dict(reversed(said.items())), True),
        ({**said, "classes": ["e"]}, False),
    ):
        (tmp_path / "labels" / "mdi.json").write_text(json.dumps(content, indent=1))
        assert (evaluation_digest(icons) == expected) == same


@pytest.mark.parametrize(
    ("folder", "number", "made"),
    [
        ("full", 98, lambda stored: Setting(**stored)),
        ("search", 94, Attempt.of_record),
        ("question", 38, Attempt.of_record),
    ],
    ids=("full", "search", "question"),
)
def test_the_records_of_the_repository_are_recognised(folder, number, made):
    store = Store(EXAMPLE / "results" / folder)
    lines = read_lines(store.path)
    records = [line for line in lines if "key" in line]
    assert len({line["key"] for line in records}) == len(records) >= number
    stored = store.read()
    for line in records:
        assert key_of(made(line["setting"]), line["data"]) == line["key"]
        assert stored[line["key"]]["conditions"]["torch"]
    # Versions and hardware are stated once for all records that share them.
    assert sum("conditions_id" in line for line in lines) == len({line["conditions"] for line in records})


# --- the trainer's arguments ---


def test_losses_of_a_seed_differ_in_the_loss_only():
    def rest(setting):
        found = setting.job().arguments
        pairs = list(zip(found[::2], found[1::2], strict=True))
        return [p for p in pairs if p[0] != "--loss" and not p[0].startswith(("--rankclip-", "--alip-"))]

    settings = settings_of(PRESETS["full"], "table1", [3])
    assert len({tuple(rest(setting)) for setting in settings}) == 1


def test_the_trainer_takes_every_command():
    from open_clip_train.params import parse_args

    preset = PRESETS["full"]
    for setting in {(s.loss, s.backbone, s.lambda_cross, s.lambda_in): s for s in plan(preset)}.values():
        line = setting.job().command("pairs.csv", "name", device="cpu", workers=0)
        args = parse_args(line[3:])
        assert (args.loss, args.seed) == (setting.loss, setting.seed)
        # Every data size takes the same number of steps.
        assert setting.pairs // args.batch_size * args.epochs == preset.steps
        if setting.loss.startswith("rankclip"):
            assert args.rankclip_lambda_cross == setting.lambda_cross
            assert args.rankclip_lambda_in == setting.lambda_in


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


@pytest.mark.parametrize("half", ["", '{"key":', '{"conditions_id":"x","conditions":{}}'])
def test_half_a_line_of_a_writer_that_was_killed_is_ignored(tmp_path, half):
    store = Store(tmp_path)
    store.save("a", _record(_SETTINGS[0]))
    with store.path.open("a", encoding="utf-8") as file:
        file.write(half)
    store.save("b", _record(_SETTINGS[1]))
    with pytest.raises(TypeError):
        store.save("c", _record(_SETTINGS[2], value=object()))  # no JSON: nothing is written
    assert list(store.read()) == ["a", "b"]


@pytest.mark.parametrize("line", ["", '{"setting": {', "[1]", '{"key": "x", "setting": {}}'])
def test_a_damaged_line_is_named(tmp_path, line):
    store = Store(tmp_path)
    store.save("a", _record(_SETTINGS[0]))
    with store.path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"records\.jsonl.* delete it"):
        store.read()


# --- making them ---


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    miniature_records.fake_trainings(monkeypatch, options, _record)
    return miniature_records.workshop(tmp_path, tmp_path / "results")


def test_what_is_there_is_not_made_again(workshop):
    assert workshop.do("some", _SETTINGS[:3], Console(quiet=True))
    before = workshop.store.path.read_bytes()
    assert workshop.do("more", _SETTINGS[:5], Console(quiet=True))
    assert workshop.store.path.read_bytes().startswith(before)
    assert list(workshop.find(_SETTINGS)) == _SETTINGS[:5]


def test_a_run_of_another_process_is_left_to_it(workshop):
    (workshop.output / "locks").mkdir()
    with FileLock(workshop.output / "locks" / workshop.key(_SETTINGS[1])):
        assert not workshop.do("some", _SETTINGS[:3], Console(quiet=True))
    assert list(workshop.find(_SETTINGS)) == [_SETTINGS[0], _SETTINGS[2]]
    assert workshop.do("the rest", _SETTINGS[:3], Console(quiet=True))
