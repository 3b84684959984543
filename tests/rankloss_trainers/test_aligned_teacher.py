"""Two encoders in one space, in every trainer: by one flag, or one call, as by the folder of the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import tiny_teacher
import torch
from tiny_encoders import FLAG, TinyEncoders, put_tiny_encoders, write_aligned
from torch import Tensor, nn
from torch.nn.functional import normalize

from rankloss_features import Features, bind
from rankloss_features.caching import compute_features
from rankloss_features.folder import NAMES
from rankloss_trainers import create
from rankloss_trainers.doctor import TRAINERS

LOSS = "rankclip-distill+mimicry"
RANKS = {"schedule": "constant", "top_k": 4}
OPTIONS: dict[str, Any] = {"rankclip-distill": RANKS, "mimicry": {"weight": 0.5}}
ROWS, STEPS = 32, 2


class Trained(NamedTuple):
    """A training.

    Attributes:
        folder: The folder of the teacher's features.
        weights: The weights at its end.
    """

    folder: str
    weights: Tensor


class Training(NamedTuple):
    """A way to train.

    Attributes:
        data: Writes the pairs into a folder; the options by which ``rankloss features`` reads them.
        train: Trains in a folder, by the flag or a call, or with a folder of features.
        package: A package that has to be installed.
    """

    data: Callable[[Path], list[str]]
    train: Callable[[Path, str | None], Trained]
    package: str = "torch"


# --- the trainings ----------------------------------------------------------------------------------------
# by_TRAINER trains with a folder of features; without one, by the flag, or by the call if there is no flag.


def captioned() -> Any:
    """Names and captions of the pairs."""
    columns = {"image": [f"{i}.png" for i in range(ROWS)], "caption": [f"caption {i}" for i in range(ROWS)]}
    return datasets.Dataset.from_dict(columns)


def saved(pairs: Any, place: Path, *options: str) -> list[str]:
    """Write the pairs into a folder; the options by which ``rankloss features`` reads them, and more."""
    pairs.save_to_disk(str(place / "pairs"))
    return ["--data", str(place / "pairs"), *options]


def by_transformers(place: Path, folder: str | None) -> Trained:
    from tiny_pairs import Pairs
    from tiny_transformers import SGD, train, weights

    inputs = datasets.Dataset.from_dict({name: x.tolist() for name, x in Pairs(ROWS).columns.items()})
    pairs = captioned() if folder is None else bind(captioned(), folder)
    data = datasets.concatenate_datasets([x.with_format("torch") for x in (pairs, inputs)], axis=1)
    loss = {"loss": LOSS, "loss_options": OPTIONS, "teacher": folder or FLAG}
    trainer = train(place / "run", pairs=data, **loss, max_steps=STEPS, **SGD)
    return Trained(trainer.loss_runtime.teaching.features.path, weights(trainer.model))


def words_of_sentences() -> Any:
    from tiny_sentences import pairs

    return pairs(ROWS)


def by_sentence_transformers(place: Path, folder: str | None) -> Trained:
    from tiny_sentences import tiny_model, train, weights

    from rankloss_trainers.sentence_transformers import ContrastiveLoss

    pairs, model = words_of_sentences(), tiny_model()
    folder = folder or compute_features(FLAG, pairs, caption_column="text")
    loss = ContrastiveLoss(model, LOSS, OPTIONS, teacher=folder)
    bound = bind(pairs, folder, caption_column="text", column="label")
    train(place, loss, model, train_dataset=bound, max_steps=STEPS, learning_rate=0.1)
    return Trained(folder, weights(model))


class Towers(nn.Module):
    """Two linear towers, and the rows of a folder of features beside their batches."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images, self.texts = nn.Linear(6, 8), nn.Linear(5, 8)
        self.features = Features(folder).check()
        self.criterion = create(LOSS, teacher=folder, **OPTIONS)

    def loss(self, images: Tensor, texts: Tensor, rows: Tensor) -> Any:
        taken = self.features.take(rows.numpy())
        references = {f"reference_{name}": torch.from_numpy(x) for name, x in taken.items()}
        v, t = normalize(self.images(images), dim=-1), normalize(self.texts(texts), dim=-1)
        return self.criterion(v, t, 10.0, **references)

    @property
    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector([*self.images.parameters(), *self.texts.parameters()]).detach()


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(ROWS, width, generator=generator) for width in (6, 5))
    pairs = torch.utils.data.TensorDataset(images, texts, torch.arange(ROWS))
    return torch.utils.data.DataLoader(pairs, ROWS // STEPS)


def by_loop(_: Path, folder: str | None) -> Trained:
    folder = folder or compute_features(FLAG, captioned())
    towers = Towers(folder)
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        towers.loss(*batch).backward()
        optimizer.step()
    return Trained(folder, towers.weights)


def by_lightning(place: Path, folder: str | None) -> Trained:
    import lightning

    from rankloss_trainers.lightning import Progress

    class Module(lightning.LightningModule):
        def __init__(self, folder: str) -> None:
            super().__init__()
            self.towers = Towers(folder)

        def training_step(self, batch: list[Tensor], _: int) -> Any:
            return self.towers.loss(*batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    folder = folder or compute_features(FLAG, captioned())
    module = Module(folder)
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[Progress()],
        default_root_dir=place,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches())
    return Trained(folder, module.towers.weights)


def csv_file(place: Path) -> list[str]:
    """Write pairs as open_clip's trainer reads them; the options by which ``rankloss features`` does."""
    return ["--data", str(tiny_teacher.csv_table(place))]


def by_open_clip(place: Path, folder: str | None) -> Trained:
    from trainer_runs import Trainer

    runs = place / ("flag" if folder is None else "folder")
    runs.mkdir()
    data = ("--train-data", str(place / "pairs.csv"), "--epochs", "1")
    ranks = ("--rankclip-schedule", "constant", "--rankclip-top-k", "4", "--mimicry-weight", "0.5")
    loss = ("--loss", LOSS, *ranks, "--loss-teacher", folder or FLAG)
    run = Trainer(runs).call("run", *data, *loss, change=TinyEncoders())
    if folder is None:
        (about,) = (runs / "logs/teachers").glob("*align*/folder.json")
        folder = str(about.parent)
    return Trained(folder, torch.cat([x.flatten() for x in run.tensors_after_epoch(1).values()]))


TRAININGS = {
    "open-clip": Training(csv_file, by_open_clip, "open_clip_train"),
    "transformers": Training(lambda place: saved(captioned(), place), by_transformers, "transformers"),
    "sentence-transformers": Training(
        lambda place: saved(words_of_sentences(), place, "--caption-column", "text"),
        by_sentence_transformers,
        "sentence_transformers",
    ),
    "lightning": Training(lambda place: saved(captioned(), place), by_lightning, "lightning"),
    "a loop of one's own": Training(lambda place: saved(captioned(), place), by_loop),
}


def test_every_trainer_is_tried() -> None:
    assert [*TRAININGS] == [*(trainer.name for trainer in TRAINERS), "a loop of one's own"]


def arrays_of(folder: str) -> dict[str, Any]:
    """The features in a folder, by name."""
    return {name: array[:] for name, array in Features(folder).check().arrays.items()}


@pytest.mark.filterwarnings("ignore")  # lightning's own, of tiny runs
@pytest.mark.parametrize("trainer", TRAININGS)
def test_features_and_training_without_a_folder_are_those_of_the_commands_bit_for_bit(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAININGS[trainer]
    pytest.importorskip(training.package)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    put_tiny_encoders(monkeypatch)
    written = str(tmp_path / "written")
    write_aligned(written, *training.data(tmp_path))
    by_flag, by_folder = training.train(tmp_path, None), training.train(tmp_path, written)
    assert Path(by_folder.folder) == Path(written)
    assert Path(by_flag.folder) != Path(written), "it computes a folder of its own"
    computed, expected = arrays_of(by_flag.folder), arrays_of(written)
    assert {*computed} == {*NAMES}
    assert all(np.array_equal(computed[name], expected[name]) for name in NAMES)
    assert torch.equal(by_flag.weights, by_folder.weights)


def a_loss_of_a_loop(teacher: str) -> None:
    create("mimicry", teacher=teacher)


def a_loss_of_sentence_transformers(teacher: str) -> None:
    pytest.importorskip("sentence_transformers")
    from tiny_sentences import tiny_model

    from rankloss_trainers.sentence_transformers import ContrastiveLoss

    ContrastiveLoss(tiny_model(), "mimicry", teacher=teacher)


@pytest.mark.parametrize("make", [a_loss_of_a_loop, a_loss_of_sentence_transformers])
def test_where_a_loss_has_no_data_the_error_names_the_command_and_the_call(
    make: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tiny_encoders(monkeypatch)
    command = "`rankloss features --image-encoder a --text-encoder b --align --data PAIRS --output FOLDER`"
    call = r"rankloss_features\.caching\.compute_features"
    with pytest.raises(ValueError, match=f"{command}, and .* of `rankloss features` or of {call}"):
        make(FLAG)
