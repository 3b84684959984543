"""Each training run happens once per session, when a test first asks for it; many tests assert on it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "rankloss_features"))  # its tiny teacher
sys.path.append(str(Path(__file__).parents[1] / "rankloss_trainers"))  # the inputs of its losses

if importlib.util.find_spec("open_clip_train") is None:
    collect_ignore_glob = ["*.py"]
else:
    from trainer_runs import (
        PLUGIN_OFF,
        PRECISIONS,
        RANKCLIP_IN_WHOLE_BATCHES,
        RANKCLIP_OFFICIAL,
        SAMPLES,
        WITHOUT_PLUGIN,
        Run,
        Runs,
        Trainer,
    )


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="session")
def runs(trainer: Trainer) -> Runs:
    """The training runs that several tests look at."""
    table = Runs()

    def add(name: str, options: list[str], *, epochs: int = 2, **keywords: object) -> None:
        """A run in an interpreter of its own where a command starts it, else in a fork, which is faster."""
        start = trainer.run if "command" in keywords else trainer.call
        table.add(name, start, name, "--epochs", str(epochs), *options, **keywords)

    rankclip, tiny = ["--loss", "rankclip"], f"local-dir:{trainer.directory / 'tiny'}"
    # In interpreters of their own: without the plug-in, with it, and by the runner.
    add("stock", [], epochs=3, command=("-c", WITHOUT_PLUGIN), TORCH_DEVICE_BACKEND_AUTOLOAD="")
    add("command", RANKCLIP_OFFICIAL, epochs=3, command=("-m", "open_clip_train.main"))
    add(
        "runner",
        ["--loss=rankclip", *RANKCLIP_OFFICIAL[2:]],  # without "--loss", "rankclip"
        epochs=3,
        command=("-m", "rankloss_open_clip"),
        **PLUGIN_OFF,
    )

    add("no --loss", [], epochs=3)
    add("--loss rankclip", RANKCLIP_OFFICIAL, epochs=3)
    add("agreement", [*RANKCLIP_OFFICIAL, "--loss-agreement-every", "3"], epochs=3)
    for precision in PRECISIONS:
        add(precision, [*rankclip, "--precision", precision, "--skip-scheduler"], epochs=1)
    add("siglip", [*rankclip, "--siglip"])
    # So many pairs that the cube of their features' norms overflows; so large an ε that it is no 0 in half.
    many = [*trainer.webdataset, "--dataset-resampled", "--train-num-samples", "512", "--batch-size", "512"]
    add("siglip, fp16", [*RANKCLIP_OFFICIAL, "--siglip", "--precision", "fp16", "--eps", "1e-4", *many])
    add("coca", [*rankclip, "--model", f"{tiny}-coca"])
    teacher = ["--distill-model", tiny, "--distill-pretrained", "none"]
    add("distill", [*rankclip, *teacher], epochs=1)
    add("ranked by the teacher", [*rankclip, *teacher, "--loss-teacher", "given"], epochs=1)
    add("rankclip-distill", ["--loss", "rankclip-distill", *teacher], epochs=1)
    add("mimicry", ["--loss", "mimicry", *teacher], epochs=1)
    add("spread", ["--loss", "spread+clip-ids", "--spread-weight", "0.5"], epochs=1)
    add("spread, siglip", ["--loss", "rankclip+spread", "--siglip"], epochs=1)
    add("csv, whole set", [*RANKCLIP_IN_WHOLE_BATCHES, "--val-data", str(trainer.directory / "data.csv")])

    add("tiny", ["--loss", "tiny", "--accum-freq", "2"], epochs=1)
    add("clip-streamed", ["--loss", "clip-streamed"], epochs=3)
    add("stock siglip", ["--siglip"], epochs=3)
    add("siglip-streamed", ["--loss", "siglip-streamed", "--siglip"], epochs=3)

    captions = ["--loss", "tiny-caption", "--second-caption-key", "synthetic"]
    captions += ["--batch-size", str(SAMPLES), "--aug-cfg", "scale=(1.0,1.0)"]
    add("tiny-caption", [*captions, "--val-data", str(trainer.directory / "data.csv")], epochs=3)
    first = str(trainer.directory / "logs/tiny-caption/checkpoints/epoch_1.pt")

    def resumed() -> Run:
        assert table["tiny-caption"], "whose checkpoint it begins with"
        options = ["--epochs", "3", *captions, "--resume", first]
        return trainer.call("tiny-caption resumed", *options)

    table.add("tiny-caption resumed", resumed)
    return table
