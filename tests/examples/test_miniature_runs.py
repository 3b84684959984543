"""The paper in miniature: what is trained, in which order, and where its records are."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import types

import miniature_records
import pytest
from filelock import FileLock
from miniature_paper import grid, options, runs
from miniature_paper.data import evaluation_digest
from miniature_paper.grid import EXHIBITS, LOSSES, PRESETS, Setting, plan, settings_of
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.records import Store, read_lines
from miniature_paper.runs import Machine, key_of
from miniature_paper.search import trials
from miniature_paper.search.trials import Attempt
from rich.console import Console

presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)


# --- grid ---


@presets
def test_the_plan_holds_every_exhibit_once(preset):
    planned = plan(preset)
    found = [settings_of(preset, exhibit, range(preset.seeds)) for exhibit in EXHIBITS]
    assert all(found)
    assert set(planned) == set(itertools.chain(*found))
    assert len(planned) == len(set(planned))


@presets
def test_table_1_comes_first_and_seed_by_seed(preset):
    planned = plan(preset)
    first = set(settings_of(preset, "table1", range(preset.seeds)))
    assert {(s.loss, s.seed) for s in first} == set(itertools.product(LOSSES, range(preset.seeds)))
    assert set(planned[: len(first)]) == first
    for part in (planned[: len(first)], planned[len(first) :]):
        assert [s.seed for s in part] == sorted(s.seed for s in part)


def test_the_full_preset_is_what_the_paper_needs():
    full = PRESETS["full"]
    assert full.seeds >= 5
    assert len(full.sizes) >= 4
    seeds = range(full.seeds)
    sweep = settings_of(full, "figure3", seeds)
    for seed in range(3):
        weights = {(s.lambda_cross, s.lambda_in) for s in sweep if s.seed == seed}
        assert weights == {(0, 0)} | {(x, 1) for x in full.lambdas} | {(1, x) for x in full.lambdas}
    assert {s.backbone for s in settings_of(full, "table4", seeds)} == {"resnet", "vit"}
    assert {s.pairs for s in settings_of(full, "figure4", seeds)} == set(full.sizes)


_GOOD = Setting("rankclip", "resnet", 4096, 1.0, 1.0, 0, "quick")


@pytest.mark.parametrize(
    ("good", "changes", "named"),
    [
        (_GOOD, {"loss": "siglip"}, "loss"),
        (_GOOD, {"backbone": "mlp"}, "backbone"),
        (_GOOD, {"preset": "huge"}, "preset"),
        (_GOOD, {"lambda_in": 0.0}, "lambda_cross and lambda_in"),
        (_GOOD, {"lambda_cross": 0.0, "lambda_in": 0.0}, "lambda_cross and lambda_in"),
        (_GOOD, {"loss": "clip"}, "lambda_cross and lambda_in"),
        (PRESETS["quick"], {"sizes": (768,), "pairs": 768}, "sizes: 32 steps are no whole number"),
    ],
)
def test_what_cannot_be_trained_or_has_another_name_is_refused(good, changes, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        dataclasses.replace(good, **changes)


# --- keys ---


@pytest.mark.parametrize(
    ("preset", "digest"), [("full", "78a84ff02a879b76"), ("quick", "f2c9f02ae5be58bc")], ids=("full", "quick")
)
def test_finished_records_keep_their_names(preset, digest):
    """Days of training are found by these: they change on purpose only, with what a model is trained by."""
    keys = [key_of(setting, "data") for setting in plan(PRESETS[preset])]
    assert len(set(keys)) == len(keys)
    assert hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("run", "module"),
    [
        (plan(PRESETS["quick"])[0], grid),
        (Attempt("one", "rankclip", (), 1, 10, trials.TEST, "full"), trials),
    ],
    ids=("setting", "attempt"),
)
def test_a_key_follows_data_architecture_and_arguments(run, module, monkeypatch):
    keys = {key_of(run, "data"), key_of(run, "other"), key_of(dataclasses.replace(run, seed=11), "data")}
    for target, name, value in (
        (runs, "model_config", lambda _: {"model_cfg": {}}),
        (type(run), "job", lambda self: grid.Job("clip", 1, "m", ("--lr", "1"))),
        (module, "MEASURES", 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(key_of(run, "data"))
    assert len(keys) == 6


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
    [("full", 11, lambda stored: Setting(**stored)), ("search", 94, Attempt.of_record)],
    ids=("full", "search"),
)
def test_the_records_of_the_repository_are_recognised(folder, number, made):
    lines, damaged = read_lines(EXAMPLE / "results" / folder / "records.jsonl")
    records = [line for line in lines if "key" in line]
    assert not damaged
    assert len({line["key"] for line in records}) == len(records) >= number
    store = Store(EXAMPLE / "results" / folder)
    for line in records:
        assert key_of(made(line["setting"]), line["data"]) == line["key"]
        assert store.load(line["key"])["conditions"]["torch"]
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


@presets
def test_the_trainer_takes_every_command(preset):
    from open_clip_train.params import parse_args

    for setting in {(s.loss, s.backbone, s.lambda_cross, s.lambda_in): s for s in plan(preset)}.values():
        line = setting.job().command("pairs.csv", "name", device="cpu", workers=0)
        args = parse_args(line[3:])
        assert (args.loss, args.seed) == (setting.loss, setting.seed)
        # Every data size takes the same number of steps.
        assert setting.pairs // args.batch_size * args.epochs == preset.steps
        if setting.loss.startswith("rankclip"):
            assert args.rankclip_lambda_cross == setting.lambda_cross
            assert args.rankclip_lambda_in == setting.lambda_in


def test_the_models_path_means_nothing_to_the_trainer():
    for backbone in grid.BACKBONES:
        name = grid.model_folder(backbone).name
        assert not any(word in name for word in ("vit", "coca", "genlip", "genlap"))
        assert grid.model_config(backbone)["model_cfg"]["vision_cfg"]["image_size"] == 32


# --- records ---

_SETTINGS = plan(PRESETS["quick"])


def _record(setting, **more):
    found = {"metrics": {}, "chance": {}, "items": {}, "conditions": {"torch": "2.13", "jobs": 2}}
    return {"setting": dataclasses.asdict(setting), **found, **more}


def test_records_come_back_with_their_conditions(tmp_path):
    store = Store(tmp_path / "results")
    assert store.load("a") is None
    first = _record(_SETTINGS[0], seconds={"training": 1.5, "text": "λ ✓"})
    store.save("a", first)
    store.save("b", _record(_SETTINGS[1]))
    store.save("c", _record(_SETTINGS[2], conditions={"torch": "3"}))
    for reader in (store, Store(tmp_path / "results")):
        assert reader.load("a") == first
        assert reader.load("c")["conditions"] == {"torch": "3"}
    lines = store.path.read_text(encoding="utf-8").splitlines()
    assert ["key" in json.loads(line) for line in lines] == [False, True, True, False, True]
    store.save("a", _record(_SETTINGS[0], seconds={"training": 9.0}))  # of a process that was slower
    assert store.path.read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        *[
            (half, 0) for half in ("", '{"key":', '{"conditions_id":"x","conditions":{}}')
        ],  # still being written
        *[(line + "\n", 1) for line in ("", '{"setting": {', "[]", '{"key": "x", "setting": {}}')],
    ],
)
def test_a_damaged_line_is_left_out_and_named_and_harms_no_other(tmp_path, text, odd):
    store = Store(tmp_path)
    store.save("a", _record(_SETTINGS[0]))
    with store.path.open("a", encoding="utf-8") as file:
        file.write(text)
    assert store.load("a") is not None
    store.save("b", _record(_SETTINGS[1]))
    with pytest.raises(TypeError):
        store.save("c", _record(_SETTINGS[2], value=object()))  # no JSON: nothing is written
    found, named = store.of(_SETTINGS)
    assert (len(found), len(named)) == (2, odd)
    assert all("records.jsonl" in sentence for sentence in named)


def _append(path, writer, barrier):
    store = Store(path)
    barrier.wait()
    for number in range(25):
        store.save(f"{writer}-{number}", _record(_SETTINGS[0], text="x" * 5000))
        store.save(f"both-{number}", _record(_SETTINGS[0], writer=writer))


def test_processes_append_side_by_side(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_append, args=(tmp_path, writer, barrier)) for writer in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines, damaged = read_lines(tmp_path / "records.jsonl")
    assert not damaged
    assert len(lines) == 1 + 2 * 25 + 25  # the conditions, each writer's own, and those of both
    assert len({line.get("key") for line in lines}) == len(lines)


def test_records_are_found_by_setting_and_doubles_are_left_out(tmp_path):
    store = Store(tmp_path)
    first, second, stranger = _SETTINGS[0], _SETTINGS[1], plan(PRESETS["full"])[0]
    for key, setting in (("b", second), ("a", first), ("c", stranger)):
        store.save(key, _record(setting))
    found, odd = store.of(_SETTINGS)
    assert [r["setting"]["loss"] for r in found] == [first.loss, second.loss]
    assert odd == []
    store.save("d", _record(second))
    found, odd = store.of(_SETTINGS)
    assert [r["setting"]["loss"] for r in found] == [first.loss]
    assert "b and d" in odd[0]


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


def test_records_of_other_data_are_made_again_and_it_says_so(workshop, capsys):
    assert workshop.do("some", _SETTINGS[:3], Console())
    assert "of other data" not in capsys.readouterr().out
    tables = dataclasses.replace(workshop.tables, digests=dict.fromkeys(workshop.tables.digests, "other"))
    other = dataclasses.replace(workshop, tables=tables)
    assert other.do("again", _SETTINGS[:5], Console())
    assert "3 records are of other data or arguments" in capsys.readouterr().out


def test_a_run_of_another_process_is_left_to_it(workshop):
    (workshop.output / "locks").mkdir()
    with FileLock(workshop.output / "locks" / workshop.key(_SETTINGS[1])):
        assert not workshop.do("some", _SETTINGS[:3], Console(quiet=True))
    assert list(workshop.find(_SETTINGS)) == [_SETTINGS[0], _SETTINGS[2]]
    assert workshop.do("the rest", _SETTINGS[:3], Console(quiet=True))


def test_every_core_gets_a_run_of_one_thread_or_feeds_the_gpu(monkeypatch):
    conditions = Machine.of("cpu").conditions()
    assert {"open_clip", "torch", "rankloss", "device", "cpu", "threads"} <= conditions.keys()
    json.dumps(conditions)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert Machine.of("cpu") == Machine("cpu", 16, 0, 1)
    assert Machine.of("cpu", 3).jobs == 3
    assert Machine.of("cuda") == Machine("cuda", 4, 3, None)
