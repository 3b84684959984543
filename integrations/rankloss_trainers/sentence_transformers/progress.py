"""The callback that tells losses where a ``SentenceTransformerTrainer`` stands, and checks its data."""

from __future__ import annotations

import contextlib
import enum
import itertools
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset

from rankloss_features.data import is_first_pair
from rankloss_features.folder import Features
from rankloss_trainers.extras import extra
from rankloss_trainers.pair_ids import check_column
from rankloss_trainers.sentence_transformers.pairs import ContrastiveLoss

with extra("sentence-transformers"):
    import datasets as datasets

    from rankloss_trainers.transformers.progress import Progress as TrainerProgress


_TRAININGS = "rankloss"
"""The key in a checkpoint's trainer_state.json, among the states of callbacks."""


class Progress(TrainerProgress):
    """Tells losses where a ``SentenceTransformerTrainer`` stands, and compares its data with their folders.

    Args:
        *losses: The losses that the trainer was given, or losses that hold them.

    Raises:
        ValueError: None of the losses is a :class:`ContrastiveLoss`; when training begins, for a last batch
            of one pair, for several datasets on several processes, unless the losses have ``gather=False``,
            for a label that all pairs share and that is their id, for a loss of another model than the
            trainer's, and for columns that are not those of the folder of a teacher's features.
    """

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__(*losses)
        parts = [part for loss in losses for part in loss.modules()]
        self._losses = [part for part in parts if isinstance(part, ContrastiveLoss)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the data, and put the losses with their course among the states that checkpoints hold."""
        data = kwargs["train_dataloader"].dataset
        datasets_of_run = data.datasets if isinstance(data, ConcatDataset) else [data]
        for loss in self._losses:
            _check_model(loss, kwargs.get("model"))
            _check_data(loss, datasets_of_run)
        if state.global_step > 0:  # a run that is resumed
            self._restore(state)
        super().on_train_begin(args, state, control, **kwargs)
        # Of texts alone: the losses have no state of tensors, which this trainer does not serve.
        state.stateful_callbacks[_TRAININGS] = [run.saved() for run in self.runs]

    def _restore(self, state: Any) -> None:
        """Compare the losses with those of the checkpoint that the run is resumed from."""
        saved_runs = state.stateful_callbacks.get(_TRAININGS, [])
        if not isinstance(saved_runs, list):
            raise ValueError(
                "the checkpoint resumed from holds the state of another trainer's loss; got "
                f"{saved_runs!r:.60}"
            )
        # A run beyond the saved ones is restored from None.
        for run, saved in itertools.zip_longest(self.runs, saved_runs[: len(self.runs)]):
            run.restore(saved, warn=state.is_world_process_zero)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Before each further batch of an optimizer step."""
        for run in self.runs:
            run.go_on()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """After a line of the log about training, the next line's metrics begin."""
        is_about_training = "loss" in logs
        if is_about_training:
            for loss in self._losses:
                loss.metrics = None


def _check_model(loss: ContrastiveLoss, model: nn.Module | None) -> None:
    """Raise a ValueError for a loss that was built with another model, which alone its gradients reach."""
    trained = set() if model is None else {*model.parameters()}
    own = {*loss.model.parameters()}  # empty where a wrapper has taken them
    if trained and own and trained.isdisjoint(own):
        raise ValueError(
            f"{type(loss).__name__} was built with another model than the trainer's, which it would not "
            "train: build it with the model that the trainer is given"
        )


def _check_data(loss: ContrastiveLoss, datasets_of_run: list[Any]) -> None:
    """Check the datasets of a run, and tell a loss with a folder its column of images.

    Raises:
        ValueError: They are several on several processes, one has the same label for all pairs, or none is
            bound to the folder.
    """
    if len(datasets_of_run) > 1:
        _rank, world_size = loss.run.gather.place
        if world_size > 1:
            raise ValueError("several datasets on several processes: give each loss gather=False")
    if loss.run.id_key == "label":
        for dataset in datasets_of_run:
            _check_labels(dataset)
    folder = loss.run.teaching.features
    if folder is not None:
        loss.image_column = _image_column(folder, datasets_of_run)


def _image_column(folder: Features, datasets_of_run: list[Any]) -> int:
    """The place of the column of a folder's images in data that are bound to the folder.

    Raises:
        ValueError: No dataset is bound to it, or the datasets differ.
    """
    bindings = {_binding(folder, dataset) for dataset in datasets_of_run} - {Binding.NONE}
    if bindings == {Binding.IMAGES_FIRST}:
        return 0
    if bindings == {Binding.IMAGES_SECOND}:
        return 1
    bind = f"rankloss_features.bind(dataset, {folder.path!r}, column='label')"
    raise ValueError(f"teacher needs the two columns and the label of {bind}")


def _check_labels(dataset: Any) -> None:
    """Raise a ValueError for a table whose pairs all have one label."""
    if isinstance(dataset, datasets.Dataset) and "label" in dataset.column_names:
        array = dataset.with_format("numpy")["label"][:]  # all rows of what may be a lazy column
        labels = torch.as_tensor(array)
        are_ids = not labels.is_floating_point() and labels.dim() == 1  # others are of another loss
        if are_ids:
            check_column(labels, "label")


class Binding(enum.Enum):
    """The relation of a dataset of pairs to a folder of features, as the first row's label tells it."""

    NONE = "no label of a row and its hash binds the data to the folder"
    IMAGES_FIRST = "the first column has the folder's images"
    IMAGES_SECOND = "the second column has the folder's images"
    OTHER = "the columns are not those of the folder's pairs"


def _binding(folder: Features, dataset: Any) -> Binding:
    """The binding of a dataset to a folder, by its first label: a row of the folder, and that pair's hash."""
    if not isinstance(dataset, datasets.Dataset) or "label" not in dataset.column_names:
        return Binding.NONE
    columns = [name for name in dataset.column_names if name not in ("label", "dataset_name")]
    first_pair = dataset.select([0]).with_format(None)
    label = np.array(first_pair[0]["label"])
    if len(columns) != 2 or label.dtype != np.int64 or label.shape != (2,):
        return Binding.NONE
    row, pair_hash = (int(number) % 2**64 for number in label)  # uint64, which the label holds as int64
    if row >= len(folder) or int(folder.pairs[row]) != pair_hash:
        return Binding.NONE
    first, second = columns
    for images, captions, binding in (
        (first, second, Binding.IMAGES_FIRST),
        (second, first, Binding.IMAGES_SECOND),
    ):
        with contextlib.suppress(ValueError):  # of a column of pictures, which holds no captions
            if is_first_pair(pair_hash, first_pair, images, captions):
                return binding
    return Binding.OTHER
