"""The paper in miniature: what is trained, in which order, where its records are, and what interrupts it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for module in ("sklearn", "torchmetrics", "rich", "webdataset", "timm", "tensorboard"):
    pytest.importorskip(module, reason="the example's packages are not installed")
pytest.importorskip("open_clip_train", reason="the example's packages are not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from rich.console import Console  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "miniature"
PATHS = [str(EXAMPLE), *(str(EXAMPLE.parent / name) for name in ("icons", "evaluate", "openmoji"))]

from miniature_paper import board, grid, runs, schedule, store, training  # noqa: E402
from miniature_paper.grid import EXHIBITS, LOSSES, PRESETS, Setting, plan, settings_of  # noqa: E402
from openmoji_demo.train import LossNotAttachedError, TrainerLog, TrainingError  # noqa: E402

_spec = importlib.util.spec_from_file_location("miniature_run", EXAMPLE / "run.py")
command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(command)

presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)


# --- grid ---


@presets
def test_the_plan_holds_every_exhibit_once(preset):
    planned = plan(preset)
    assert len(planned) == len(set(planned))
    for exhibit in EXHIBITS:
        found = settings_of(preset, exhibit, range(preset.seeds))
        assert found
        assert set(found) <= set(planned)
    assert set(planned) == {s for e in EXHIBITS for s in settings_of(preset, e, range(preset.seeds))}


@presets
def test_table_1_has_every_loss_with_every_seed(preset):
    found = {(s.loss, s.seed) for s in settings_of(preset, "table1", range(preset.seeds))}
    assert found == {(loss, seed) for loss in LOSSES for seed in range(preset.seeds)}


@presets
def test_table_1_comes_first_and_seed_by_seed(preset):
    planned = plan(preset)
    first = set(settings_of(preset, "table1", range(preset.seeds)))
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


@presets
def test_every_size_takes_the_same_number_of_steps(preset):
    for pairs in preset.sizes:
        assert pairs // preset.batch_size * preset.epochs(pairs) == preset.steps


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "siglip"},
        {"backbone": "mlp"},
        {"preset": "huge"},
        {"lambda_in": 0.0},
        {"lambda_cross": 0.0, "lambda_in": 0.0},
        {"loss": "clip"},
    ],
    ids=str,
)
def test_a_setting_that_is_trained_by_another_name_is_refused(changes):
    good = Setting("rankclip", "resnet", 4096, 1.0, 1.0, 0, "quick")
    with pytest.raises(ValueError, match=r"^(loss|backbone|preset|lambda_cross and lambda_in): "):
        dataclasses.replace(good, **changes)


def test_steps_that_are_no_whole_number_of_epochs_are_refused():
    with pytest.raises(ValueError, match="sizes: 32 steps"):
        dataclasses.replace(PRESETS["quick"], sizes=(768,), pairs=768)


def test_the_usual_size_is_one_of_the_sizes():
    with pytest.raises(ValueError, match="pairs: must be one of the sizes, got 100"):
        dataclasses.replace(PRESETS["quick"], pairs=100)


def test_an_unknown_exhibit_is_refused():
    with pytest.raises(ValueError, match="exhibit: must be one of table1"):
        settings_of(PRESETS["quick"], "table9", [0])


# --- keys ---


@presets
def test_keys_are_unique_and_stable(preset):
    keys = [store.key_of(setting, "data") for setting in plan(preset)]
    assert len(set(keys)) == len(keys)
    script = (
        f"import sys; sys.path[:0] = {PATHS!r}\n"
        "from miniature_paper import grid, store\n"
        f"print([store.key_of(s, 'data') for s in grid.plan(grid.PRESETS[{preset.name!r}])] == {keys!r})"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("preset", "digest"), [("full", "78a84ff02a879b76"), ("quick", "f2c9f02ae5be58bc")], ids=("full", "quick")
)
def test_finished_records_keep_their_names(preset, digest):
    """Days of training are found by these: they change on purpose only, with what a model is trained by."""
    keys = [store.key_of(setting, "data") for setting in plan(PRESETS[preset])]
    assert hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16] == digest
    if preset == "full":
        assert keys[3] == "rankclip-resnet-71680-seed0-d325b64124"


def test_a_key_follows_data_architecture_and_arguments(monkeypatch):
    setting = plan(PRESETS["quick"])[0]
    keys = {store.key_of(setting, "data"), store.key_of(setting, "other data")}
    monkeypatch.setattr(store, "model_config", lambda _: {"model_cfg": {}})
    keys.add(store.key_of(setting, "data"))
    monkeypatch.undo()
    monkeypatch.setattr(store, "arguments", lambda _: ["--lr", "1"])
    keys.add(store.key_of(setting, "data"))
    assert len(keys) == 4


# --- the trainer's arguments ---


def test_losses_of_a_seed_differ_in_the_loss_only():
    def rest(setting):
        found = training.arguments(setting)
        pairs = list(zip(found[::2], found[1::2], strict=True))
        return [p for p in pairs if p[0] != "--loss" and not p[0].startswith(("--rankclip-", "--alip-"))]

    settings = settings_of(PRESETS["full"], "table1", [3])
    assert len({tuple(rest(setting)) for setting in settings}) == 1


@presets
def test_the_trainer_takes_every_command(preset):
    from open_clip_train.params import parse_args

    for setting in {(s.loss, s.backbone, s.lambda_cross, s.lambda_in): s for s in plan(preset)}.values():
        line = training.Job.of(setting).command("pairs.csv", "name", device="cpu", workers=0)
        args = parse_args(line[3:])
        assert args.loss == setting.loss
        assert args.seed == setting.seed
        assert args.epochs == preset.epochs(setting.pairs)
        if setting.loss.startswith("rankclip"):
            assert args.rankclip_lambda_cross == setting.lambda_cross
            assert args.rankclip_lambda_in == setting.lambda_in


def test_the_models_path_means_nothing_to_the_trainer():
    for backbone in grid.BACKBONES:
        name = training.model_folder(backbone).name
        assert not any(word in name for word in ("vit", "coca", "genlip", "genlap"))
        assert training.model_config(backbone)["model_cfg"]["vision_cfg"]["image_size"] == 32


def _line(epoch, seen, total, terms):
    return f"2026-01-01,00:00:00 | INFO | Train Epoch: {epoch} [{seen:>5}/{total} (1%)] Data: 0.1 {terms}"


def test_the_log_tells_progress_and_terms():
    log = TrainerLog("rankclip", epochs=4)
    assert not log.read("2026-01-01,00:00:00 | INFO | Start epoch 0")
    assert log.read(_line(1, 50, 100, "Contrastive_loss: 3.5 (3.6) Cross_modal_loss: 0.25 (0.2) Loss: 3.7"))
    assert log.done == pytest.approx(1.5 / 4)
    assert log.terms == {"contrastive_loss": 3.5, "cross_modal_loss": 0.25}
    assert len(log.tail) == 2


def test_plain_clip_under_another_name_is_noticed():
    line = _line(0, 1, 10, "Contrastive_loss: 3.5 (3.5) Loss: 3.5 (3.5)")
    TrainerLog("clip", 1).read(line)
    with pytest.raises(LossNotAttachedError, match="--loss cyclip was not honoured"):
        TrainerLog("cyclip", 1).read(line)


def test_a_trainer_that_fails_is_quoted(tmp_path):
    setting = plan(PRESETS["quick"])[0]  # neither model nor table is there
    job = training.Job.of(setting)
    with pytest.raises(TrainingError, match=r"(?s)status 1, no final checkpoint.*Error"):
        asyncio.run(training.train(job, output=tmp_path, table="none.csv", name="run", device="cpu"))


# --- store ---

_SETTINGS = plan(PRESETS["quick"])


def _record(setting, **more):
    return {"setting": dataclasses.asdict(setting), "metrics": {}, "chance": {}, "items": {}, **more}


def test_a_record_comes_back(tmp_path):
    records = store.Store(tmp_path / "results")
    assert records.load("a") is None
    records.save("a", _record(_SETTINGS[0], seconds={"training": 1.5}))
    assert records.load("a") == _record(_SETTINGS[0], seconds={"training": 1.5})
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", '{"setting": {', "[]", '{"setting": {}}'])
def test_a_damaged_record_counts_as_none(tmp_path, text):
    records = store.Store(tmp_path)
    records.path("a").write_text(text)
    assert records.load("a") is None
    found, odd = records.of(_SETTINGS)
    assert found == []
    assert odd[0].startswith("a.json is damaged")
    records.save("a", _record(_SETTINGS[0]))
    assert records.load("a") is not None


def test_a_record_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    records = store.Store(tmp_path)
    records.save("a", _record(_SETTINGS[0], value="old"))

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        records.save("a", _record(_SETTINGS[0], value="new"))
    assert records.load("a")["value"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):
        records.save("a", _record(_SETTINGS[0], value=object()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_records_are_found_by_setting_and_doubles_are_left_out(tmp_path):
    records = store.Store(tmp_path)
    first, second, stranger = _SETTINGS[0], _SETTINGS[1], plan(PRESETS["full"])[0]
    records.save("b", _record(second))
    records.save("a", _record(first))
    records.save("c", _record(stranger))
    found, odd = records.of(_SETTINGS)
    assert [r["setting"]["loss"] for r in found] == [first.loss, second.loss]
    assert odd == []
    records.save("d", _record(second))
    found, odd = records.of(_SETTINGS)
    assert [r["setting"]["loss"] for r in found] == [first.loss]
    assert "b.json and d.json are of one setting" in odd[0]


# --- schedule ---


class _Events:
    """A board that remembers."""

    def __init__(self):
        self.running, self.most = set(), 0
        self.order, self.over = [], {}

    def start(self, setting):
        self.running.add(setting)
        self.order.append(setting)
        self.most = max(self.most, len(self.running))

    def update(self, setting, stage, share):
        assert setting in self.running

    def finish(self, setting, error):
        self.running.remove(setting)
        self.over[setting] = error


def _run_all(settings, work, jobs, events=None):
    events = events or _Events()
    failed = asyncio.run(schedule.run_all(settings, work, jobs=jobs, board=events, expected=(TrainingError,)))
    return failed, events


@given(jobs=st.integers(1, 5), runs=st.integers(0, 12), bad=st.sets(st.integers(0, 11)))
def test_every_run_is_done_and_failures_stop_nothing(jobs, runs, bad):
    settings = _SETTINGS[:runs]

    async def work(setting, progress):
        progress("training", 0.5)
        await asyncio.sleep(0)
        if settings.index(setting) in bad:
            raise TrainingError("no")

    failed, events = _run_all(settings, work, jobs)
    assert events.order == settings
    assert set(events.over) == set(settings)
    assert events.most == min(jobs, runs)
    assert set(failed) == {s for number, s in enumerate(settings) if number in bad}
    assert {s for s, error in events.over.items() if error} == set(failed)


def test_a_bug_ends_everything():
    ended = []

    async def work(setting, progress):
        if setting == _SETTINGS[0]:
            await asyncio.sleep(0)
            raise ZeroDivisionError
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(setting)

    with pytest.raises(ZeroDivisionError):
        _run_all(_SETTINGS[:5], work, 2)
    assert ended == [_SETTINGS[1]]


def test_cancelling_waits_until_every_run_has_cleaned_up():
    cleaned = []

    async def work(setting, progress):
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02 * _SETTINGS.index(setting))  # each takes its time
            cleaned.append(setting)

    async def main():
        task = asyncio.create_task(
            schedule.run_all(_SETTINGS[:6], work, jobs=3, board=_Events(), expected=(TrainingError,))
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cleaned == _SETTINGS[:3]


def test_no_child_outlives_its_run(tmp_path):
    mark = tmp_path / "pid"
    script = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    async def main():
        async def use():
            async with training.child(
                [sys.executable, "-c", script], cwd=tmp_path, env=dict(os.environ)
            ) as process:
                await process.wait()

        task = asyncio.create_task(use())
        while not (mark.is_file() and mark.read_text()):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


# --- the time left ---


def _named(loss, seed=0, backbone="resnet"):
    return next(s for s in plan(PRESETS["full"]) if (s.loss, s.seed, s.backbone) == (loss, seed, backbone))


def test_the_time_left_goes_by_runs_of_the_same_kind():
    now = [0.0]
    clip, alip = [_named("clip", seed) for seed in range(3)], [_named("alip", seed) for seed in range(3)]
    left = schedule.Estimate([*clip, *alip], jobs=2, clock=lambda: now[0])
    assert left.left() is None
    left.start(clip[0])
    left.start(alip[0])
    assert left.left() is None
    now[0] = 100.0
    assert left.finish(clip[0]) == 100.0
    # Nothing is known of ALIP, so it counts like CLIP: four are waiting, and one has had its time.
    assert left.left() == pytest.approx(4 * 100 / 2)
    now[0] = 150.0
    left.finish(alip[0])
    left.start(clip[1])
    now[0] = 170.0
    assert left.left() == pytest.approx((80 + 100 + 2 * 150) / 2)


def test_earlier_runs_count_until_there_is_a_new_one_and_failures_never():
    now = [0.0]
    settings = [_named("clip", seed) for seed in range(4)]
    left = schedule.Estimate(settings[1:], 1, [(settings[0], 40.0)], clock=lambda: now[0])
    assert left.left() == pytest.approx(120)
    left.start(settings[1])
    now[0] = 1.0
    left.finish(settings[1], counts=False)
    assert left.left() == pytest.approx(80)
    left.start(settings[2])
    now[0] = 11.0
    left.finish(settings[2])
    assert left.left() == pytest.approx(10)


def test_the_board_leaves_a_line_for_every_run():
    out = io.StringIO()
    console = Console(file=out, width=200)
    with board.RichBoard(console, _SETTINGS[:2], 1) as shown:
        for setting, error in zip(_SETTINGS[:2], (None, TrainingError("it said [no]")), strict=True):
            shown.start(setting)
            shown.update(setting, "training", 0.5)
            shown.finish(setting, error)
    text = out.getvalue()
    assert f"1/2  {_SETTINGS[0].name}  0 s" in text
    assert f"2/2  {_SETTINGS[1].name}  failed: it said [no]" in text


# --- the machine ---


def test_every_core_gets_a_run_of_one_thread():
    machine = runs.Machine.of("cpu")
    assert machine.jobs >= 1
    assert (machine.workers, machine.threads) == (0, 1)
    assert runs.Machine.of("cpu", 3).jobs == 3
    conditions = machine.conditions()
    assert {"open_clip", "torch", "rankloss", "device", "cpu", "threads"} <= conditions.keys()
    json.dumps(conditions)


def test_a_gpu_is_fed_by_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    machine = runs.Machine.of("cuda")
    assert (machine.jobs, machine.workers, machine.threads) == (4, 3, None)


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "argument --seeds: must be at least 1, got 0"),
        (["--jobs", "-1"], "argument --jobs: must be at least 1, got -1"),
        (["--only", "table9"], "argument --only: invalid choice: 'table9'"),
        (["--device", "tpu"], "argument --device: must be cpu or cuda, got tpu"),
        (["--presets", "full"], "unrecognized arguments: --presets full"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_full_records_are_those_of_the_repository(tmp_path):
    args = command._parse(["--preset", "full", "--output", str(tmp_path)])
    assert args.results == EXAMPLE / "results" / "full"
    args = command._parse(["--output", str(tmp_path)])
    assert args.preset == "quick"
    assert tmp_path in args.results.parents
    assert tmp_path in args.report.parents


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    pytest.importorskip("captum", reason="the example's packages are not installed")
    pytest.importorskip("umap", reason="the example's packages are not installed")
    pytest.importorskip("resvg_py", reason="the example's packages are not installed")
    assert command.main(["--report-only", "--output", str(tmp_path)]) == 1
    assert "holds no record of the quick preset" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_the_children_and_says_how_to_go_on(tmp_path, sent):
    """The command's own path from signal to exit status, with a child that would sleep for a minute."""
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    # What a shell starts in the background ignores SIGINT, and so does everything below it.
    script = f"""
import asyncio, importlib.util, os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
spec = importlib.util.spec_from_file_location("miniature_run", {str(EXAMPLE / "run.py")!r})
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)
from miniature_paper import terminal, training

async def work():
    async with training.child([sys.executable, "-c", {child!r}], cwd=Path("."), env=dict(os.environ)) as p:
        await p.wait()

command._run = lambda args, console: asyncio.run(terminal.cancelled_by_signals(work()))
command.import_parts = lambda: None
sys.exit(command.main([]))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (mark.is_file() and mark.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted. The same command goes on" in out
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
