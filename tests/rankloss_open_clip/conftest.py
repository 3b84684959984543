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
    from trainer_runs import OFF, OFFICIAL, Processes, Runs, Trainer


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
    (package / "seams.py").write_text("raise OSError('sabotaged')\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="session")
def runs(trainer: Trainer, broken_plugin: dict[str, str]) -> Iterator[Runs]:
    """Every training run that ends well."""
    import open_clip_train

    main = str(Path(open_clip_train.__file__).parent / "main.py")
    in_process = "import sys, open_clip; from open_clip_train.main import main; main(sys.argv[1:])"
    official, three = OFFICIAL, ["--epochs", "3"]
    table = Runs()

    def add(name: str, *options: str, **keywords: object) -> None:
        table.add(name, trainer.run, name, *options, **keywords)

    add("stock", *three, **OFF)
    add("no --loss", *three)
    add("--loss clip", *three, "--loss", "clip")
    add("--loss rankclip", *three, *official)
    add("runner", *three, "--loss=rankclip", *official[2:], command=("-m", "rankloss_open_clip"), **OFF)
    add("file path", *three, *official, command=(main,))
    add("in process", *three, *official, command=("-c", in_process))
    add("one epoch", "--epochs", "1", "--loss", "rankclip")
    steps = ["--epochs", "2", "--loss", "rankclip", "--rankclip-schedule", "linear"]
    add("steps with accumulation", *steps, "--rankclip-schedule-unit", "step", "--accum-freq", "2")
    add("broken plug-in", "--epochs", "1", **broken_plugin)
    agreement = ["--rankclip-agreement-every", "3", "--report-to", "wandb,tensorboard"]
    add("agreement", *three, *official, *agreement, WANDB_MODE="offline", WANDB_SILENT="true")
    add("siglip", "--epochs", "2", "--loss", "rankclip", "--siglip")
    add("coca", "--epochs", "2", "--loss", "rankclip", "--model", f"local-dir:{trainer.directory}/tiny-coca")
    add("bf16", "--epochs", "2", "--loss", "rankclip", "--precision", "amp_bf16")
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
