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
        self._losses = [x for loss in losses for x in loss.modules() if isinstance(x, ContrastiveLoss)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the data."""
        data = kwargs["train_dataloader"].dataset
        parts = data.datasets if isinstance(data, ConcatDataset) else [data]
        for loss in self._losses:
            _check_model(loss, kwargs.get("model"))
            if len(parts) > 1 and loss.run.gather.place[1] > 1:
                raise ValueError("several datasets on several processes: give each loss gather=False")
            folder = loss.run.teaching.features
            if loss.run.id_key == "label":
                for dataset in parts:
                    _check_labels(dataset)
            if folder is not None:
                bindings = {_binding(folder, dataset) for dataset in parts} - {Binding.NONE}
                if bindings not in ({Binding.IMAGES_FIRST}, {Binding.IMAGES_SECOND}):
                    bind = f"rankloss_features.bind(dataset, {folder.path!r}, column='label')"
                    raise ValueError(f"teacher needs the two columns and the label of {bind}")
                loss.image_column = 0 if bindings == {Binding.IMAGES_FIRST} else 1
        states = state.stateful_callbacks  # which its checkpoints hold
        if state.global_step > 0:  # a run that is resumed
            before = states.get(_TRAININGS, [])
            if not isinstance(before, list):
                raise ValueError(
                    "the checkpoint resumed from holds the state of another trainer's loss; got "
                    f"{before!r:.60}"
                )
            for run, saved in itertools.zip_longest(self.runs, before[: len(self.runs)]):
                run.restore(saved, warn=state.is_world_process_zero)
        super().on_train_begin(args, state, control, **kwargs)
        # The losses have no state of tensors, which this trainer does not serve.
        states[_TRAININGS] = [run.saved() for run in self.runs]

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Before each further batch of an optimizer step."""
        for run in self.runs:
            run.go_on()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """After a line about training an interval begins."""
        for loss in self._losses if "loss" in logs else ():
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


def _check_labels(dataset: Any) -> None:
    """Raise a ValueError for a table whose pairs all have one label."""
    if isinstance(dataset, datasets.Dataset) and "label" in dataset.column_names:
        labels = torch.as_tensor(dataset.with_format("numpy")["label"][:])
        if not labels.is_floating_point() and labels.dim() == 1:  # others are of another loss
            check_column(labels, "label")


class Binding(enum.Enum):
    """The columns of data, as the folder knows them that their label may bind them to."""

    NONE = "the label is of another kind"
    IMAGES_FIRST = "the first column has the folder's images"
    IMAGES_SECOND = "the second column has the folder's images"
    OTHER = "the columns are not those of the folder's pairs"


def _binding(folder: Features, dataset: Any) -> Binding:
    """How the columns of data are bound to a folder: its first label is a row of it, and that pair's hash."""
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
