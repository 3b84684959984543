"""Each training run happens once per session; many tests assert on it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("open_clip_train") is None:
    collect_ignore_glob = ["*.py"]
else:
    from trainer_runs import (
        LOCKS_TEXT,
        OFF,
        OFFICIAL,
        PRECISIONS,
        SAMPLES,
        WHOLE_SET,
        Processes,
        Runs,
        Trainer,
    )


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="session")
def broken_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the plug-in's patches cannot even be imported."""
    import rankloss_open_clip

    source = Path(rankloss_open_clip.__file__).parent
    directory = tmp_path_factory.mktemp("broken")
    package = directory / source.name
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_text(file.read_text())
    (package / "patches.py").write_text("raise OSError('sabotaged')\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="session")
def runs(trainer: Trainer, broken_plugin: dict[str, str]) -> Iterator[Runs]:
    """Every training run that ends well."""
    import open_clip_train

    main = str(Path(open_clip_train.__file__).parent / "main.py")
    spawning = (
        "import multiprocessing, runpy; multiprocessing.set_start_method('spawn')\n"
        "runpy.run_module('open_clip_train.main', run_name='__main__', alter_sys=True)"
    )
    official, three = OFFICIAL, ["--epochs", "3"]
    rankclip, two = ["--loss", "rankclip"], ["--epochs", "2"]
    table = Runs()

    def command(name: str, *options: str, **keywords: object) -> None:
        table.add(name, trainer.run, name, *options, **keywords)

    def call(name: str, *options: str) -> None:
        table.add(name, trainer.call, name, *options)

    command("stock", *three, **OFF)
    command("no --loss", *three)
    command("--loss rankclip", *three, *official)
    command("runner", *three, "--loss=rankclip", *official[2:], command=("-m", "rankloss_open_clip"), **OFF)
    command("file path", *three, *official, command=(main,))
    command("broken plug-in", "--epochs", "1", **broken_plugin)
    command("spawned worker", "--epochs", "1", *rankclip, "--workers", "1", command=("-c", spawning))

    agreement = ["--rankclip-agreement-every", "3", "--report-to", "wandb,tensorboard"]
    command("agreement", *three, *official, *agreement, WANDB_MODE="offline", WANDB_SILENT="true")

    call("in process", *three, *official)
    call("--loss clip", *three, "--loss", "clip")
    call("forked worker", "--epochs", "1", *rankclip, "--workers", "1")
    call("one epoch", "--epochs", "1", *rankclip)
    steps = [*two, *rankclip, "--rankclip-schedule", "linear", "--rankclip-schedule-unit", "step"]
    call("steps with accumulation", *steps, "--accum-freq", "2")
    for precision in PRECISIONS:
        call(precision, *two, *rankclip, "--precision", precision)
    call("siglip", *two, *rankclip, "--siglip")
    call("coca", *two, *rankclip, "--model", f"local-dir:{trainer.directory}/tiny-coca")
    teacher = ["--distill-model", f"local-dir:{trainer.directory}/tiny", "--distill-pretrained", "none"]
    call("distill", *two, *rankclip, *teacher)
    by_teacher = [*teacher, "--rankclip-reference", "teacher"]
    call("ranked by the teacher", *two, *rankclip, *by_teacher)
    call("ranked by the teacher alone", *two, *rankclip, *by_teacher, "--rankclip-distill-loss", "exclude")
    call("rankclip-distill", *two, "--loss", "rankclip-distill", *teacher)
    call("grad checkpointing", *two, *rankclip, "--grad-checkpointing")
    call("lock image", *two, *rankclip, "--lock-image")
    if LOCKS_TEXT:
        call("lock text", *two, *rankclip, "--lock-text", "--lock-text-freeze-layer-norm")
    call("skip scheduler", *three, *official, "--skip-scheduler")
    call("synthetic", *two, *rankclip, "--dataset-type", "synthetic", "--train-num-samples", str(SAMPLES))
    call("csv, whole set", *WHOLE_SET, "--val-data", str(trainer.directory / "data.csv"))
    call("webdataset, whole set", *WHOLE_SET, *trainer.webdataset)
    yield table
    table.close()


@pytest.fixture(scope="session")
def processes(trainer: Trainer, broken_plugin: dict[str, str]) -> Iterator[Processes]:
    """Everything else that needs a process of its own."""
    table = Processes()
    doctor = ("-m", "rankloss_open_clip.doctor")
    table.add("doctor", trainer.python, *doctor)
    table.add("doctor, plug-in off", trainer.python, *doctor, **OFF)
    table.add("doctor, plug-in broken", trainer.python, *doctor, **broken_plugin)
    table.add("bad value", trainer.run, "bad value", "--loss", "siglip")
    table.add("plug-in broken", trainer.run, "plug-in broken", "--loss", "rankclip", **broken_plugin)
    table.add("help", trainer.python, "-m", "open_clip_train.main", "--help", COLUMNS="200")
    yield table
    table.close()
