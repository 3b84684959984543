"""The patched functions in a run with ``--loss``: data are read, the loss is built, and its epochs start."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from inspect import BoundArguments
from typing import Any

import open_clip
import torch
from open_clip.version import __version__
from torch import Tensor, nn

import rankloss
from rankloss.precision import unit_rows
from rankloss_features.errors import last_line
from rankloss_features.folder import NAMES
from rankloss_features.sources import check_pretrained
from rankloss_open_clip import checkpoints
from rankloss_open_clip.arguments import HOST, check_run, chosen, distils, gather_of
from rankloss_open_clip.columns.teacher_rows import RowColumn
from rankloss_open_clip.columns.text_columns import TextColumns
from rankloss_trainers.command_line import naming_flags
from rankloss_trainers.declared import Loss
from rankloss_trainers.entries import Entries, LoggedTerms
from rankloss_trainers.option import OptionError
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Runtime

_TEXT_COLUMNS = "_rankloss_open_clip_text_columns"  # the attribute of the training data that holds them
_logger = logging.getLogger("rankloss_open_clip")

# Early releases, to which a trainer may be attached, have no such loss.
_SigLipLoss: Any = getattr(open_clip.loss, "SigLipLoss", None)


class TrainerLoss(Runtime):
    """Losses in open_clip's trainer, which takes their terms and their metrics in one dict.

    The trainer announces epochs and no steps, so the calls of each epoch are counted. There is no other
    state, so a resumed run is where an uninterrupted one would be.

    Args:
        args: The trainer's parsed arguments.
        losses: The losses.
        options: The options of the run.
        base: The loss that the trainer built, where it is known; None: CLIP's or, with --siglip, SigLIP's.

    Attributes:
        sums_every_value: The trainer adds up all values of the returned dict, whatever their keys.
        place: The epoch that began last, counted from 0, the number of epochs, the optimizer steps of each,
            and the calls of the loss per step; None before the first.
    """

    def __init__(self, args: Any, losses: Sequence[Loss], options: RunOptions, base: Any = None) -> None:
        gather = gather_of(args)
        if base is None:
            base = rankloss.SigLipLoss if getattr(args, "siglip", False) else rankloss.ClipLoss
        super().__init__(HOST, losses, options, base=base, gather=gather)
        self.args = args
        # It replaces the trainer's own distillation term.
        self._takes_trainers_teacher = distils(args) and self.teaching.use == "required"
        self.has_fixed_entries = getattr(args, "torchcompile", False)
        self.sums_every_value = True
        self.place: tuple[int, int, int, int] | None = None
        self._data: Any = None  # of a teacher to compute
        self._calls = 0  # of the epoch

    def on(self, base: Any) -> TrainerLoss:
        """The losses on the trainer's loss: this object where it is the expected one of open_clip's."""
        expected = _SigLipLoss if getattr(self.args, "siglip", False) else open_clip.ClipLoss
        if self._takes_trainers_teacher or type(base) is expected:
            return self
        run = TrainerLoss(self.args, self.losses, self.options, base)
        run.teaching.features = self.teaching.features
        return run

    def text_columns(self) -> TextColumns | None:
        """Columns of every training text, as far as they are known; None for losses of pairs alone."""
        parts = [x for loss in self.losses if (x := loss.columns) is not None]
        if self.teaching.features is not None:
            parts.append(RowColumn(self.teaching.features))
        return TextColumns(parts) if parts else None

    def check_data(self) -> None:
        """Read the columns of the training data beside pairs, before the trainer makes a folder of logs.

        Of a webdataset samples are compared when they are read.

        Raises:
            ValueError: A CSV file lacks a column, a row of it is not the folder's, or its list or id is
                wrong.
        """
        args = self.args
        path, kind = getattr(args, "train_data", None), getattr(args, "dataset_type", None)
        if kind == "auto" and str(path).endswith((".csv", ".tsv")):
            kind = "csv"
        try:
            if self.teaching.spec is not None:
                from rankloss_features import caching

                self._data = caching.of_open_clip(self.args, self.teaching.spec)
            if path and kind == "csv":
                (self.text_columns() or TextColumns([])).check_csv(
                    path, args.csv_separator, args.csv_img_key, args.csv_caption_key
                )
        except (OSError, ValueError) as error:
            text = str(error)
            raise ValueError(text if text.startswith("--") else f"--train-data: {text}") from error

    def compute_teacher(self) -> None:
        """Compute the teacher's features of the training data, unless a cache has them.

        Raises:
            OptionError: The teacher cannot be loaded, a picture cannot be read, the cache cannot be written,
                or the teacher is narrower than a model that copies it.
        """
        if self._data is None:  # there is no teacher to compute
            return
        from rankloss_features import caching

        data, self._data = self._data, None
        place = os.path.join(getattr(self.args, "logs", None) or "logs", "teachers")
        try:
            folder = caching.cached(self.teaching.spec, data, place, device_of(self.args))
        except (OSError, ValueError) as error:
            raise OptionError("teacher", last_line(error)) from error
        self.teaching.open_folder(folder)
        self.check_width()

    def check_width(self) -> None:
        """Raise an error for a teacher that a loss copies and that is narrower than the model.

        Of a model or a teacher whose width is not known before it is built, its features tell.
        """
        student, spec = _width_of(getattr(self.args, "model", None)), self.teaching.spec
        teacher = None if spec is None else spec.model
        if self._takes_trainers_teacher:
            teacher = getattr(self.args, "distill_model", None)
        if student is not None:
            self.teaching.check_width(student, _width_of(teacher))

    def check_batch(self) -> None:
        """Raise an error for a batch, or a device, that the loss would refuse at the first step."""
        from open_clip_train.distributed import world_info_from_env  # no process group is there yet

        args, size = self.args, getattr(self.args, "batch_size", None)
        if size is None:  # of another parser
            return
        accum_freq = getattr(args, "accum_freq", 1)
        *_, world_size = world_info_from_env()
        pairs = size * accum_freq * world_size
        if pairs < self.min_pairs:
            raise ValueError(
                f"{self.name} needs at least {self.min_pairs} pairs in a batch; got {pairs}: "
                f"--batch-size {size}, --accum-freq {accum_freq}, {world_size} process(es)"
            )
        self.check_device(torch.device(device_of(args)), pairs)

    def start_epoch(self, epoch: int, epochs: int, steps: int, accum_freq: int) -> None:
        """An epoch begins; its steps are counted from the calls. For the arguments see :attr:`place`."""
        if self.place is None:
            self.begin(epochs, epochs * steps)
        self.place, self._calls = (epoch, epochs, steps, accum_freq), 0
        self.set_epoch(epoch + 1, epochs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *features: Tensor, output_dict: bool = False, **inputs: Any) -> Any:
        """The sum of the terms, or with ``output_dict`` the terms and the metrics by name.

        Some trainers give the features and the scale by position.
        """
        inputs.update(zip((*NAMES, "logit_scale"), features, strict=False))
        if self._takes_trainers_teacher:
            inputs = _with_trainers_teacher(inputs)
        self._count()
        entries: Entries = super().forward(**inputs)
        if not output_dict:
            return entries.total
        return LoggedTerms(*entries) if self.sums_every_value else {**entries.terms, **entries.metrics}

    def _count(self) -> None:
        """Announce the optimizer step of a call; gradient accumulation makes several calls for one."""
        epoch, epochs, steps, accum_freq = self.place or (0, 0, 0, 0)
        if accum_freq and self._calls % accum_freq == 0:
            # An epoch that is longer than announced stays at its last step.
            step = min(self._calls // accum_freq, steps - 1)
            self.set_progress(epoch * steps + step + 1, epochs * steps)
        self._calls += 1


def _width_of(model: str | None) -> int | None:
    """The number of dimensions of a model of open_clip; None where its configuration does not say."""
    if not model or model.startswith("hf-hub:"):
        return None
    try:
        config = open_clip.get_model_config(model) or {}
    except (OSError, ValueError):  # who builds the model says what is wrong with it
        return None
    return config.get("embed_dim")


def _with_trainers_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a loss, in which the features of the trainer's teacher have the loss's names."""
    others = {name: x for name, x in inputs.items() if not name.startswith(("dist_", "syn_"))}
    for name in NAMES:
        # Several teachers side by side, as MobileCLIP's data have them, have another norm together.
        others[f"reference_{name}"] = unit_rows(inputs[f"dist_{name}"].float())
    return others


def device_of(args: Any) -> str:
    """The device that the trainer will choose for this process."""
    device = str(getattr(args, "device", None) or "cuda")
    if not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        return "cpu"
    place = os.environ.get("LOCAL_RANK")
    if place is None or getattr(args, "no_set_device_rank", False):
        return device
    return f"cuda:{place}"


# --- the patched functions ------------------------------------------------------------------------------


_run: TrainerLoss | None = None
"""The losses of the run of this process."""


def start(args: Any, losses: Sequence[Loss], options: RunOptions) -> TrainerLoss:
    """Build the losses of a run, check them and their data, and compute their teacher.

    The trainer then makes a folder of logs, whose name cannot be used again.

    Raises:
        ValueError: The reason against them, which begins with the flag of an option.
    """
    global _run
    with naming_flags(losses):
        run = TrainerLoss(args, losses, options)
        check_run(run, args)
        run.check_width()
        run.check_batch()
    check_pretrained(getattr(args, "model", None), getattr(args, "pretrained", None))
    run.check_data()
    with naming_flags(losses):
        run.compute_teacher()
    _run = run
    return run


def run_of(args: Any) -> TrainerLoss:
    """The losses of the run with these arguments; built anew where another parser than ours made them."""
    return _run if _run is not None and _run.args is args else start(args, *chosen(args))


def create_loss(original: Callable[..., Any], bound: BoundArguments) -> nn.Module:
    """A loss for a trainer that adds up every value of the dict that a loss returns."""
    return build_loss(original(*bound.args, **bound.kwargs), bound.arguments["args"], sums_every_value=True)


def create_task(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """A task of open_clip's later trainer, which adds up keys that end in ``_loss`` and logs the others."""
    task = original(*bound.args, **bound.kwargs)
    task.loss = build_loss(task.loss, bound.arguments["args"], sums_every_value=False)
    return task


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """The losses of a run on the loss that the trainer built, which are logged. See :class:`TrainerLoss`."""
    if isinstance(base, TrainerLoss):  # from a factory within this one
        return base
    loss = run_of(args).on(base).to(getattr(args, "device", None))
    loss.sums_every_value = sums_every_value
    _log_summary(loss)
    return loss


def _log_summary(loss: TrainerLoss) -> None:
    if getattr(loss.args, "rank", 0) != 0:
        return
    features = loss.teaching.features
    if loss.teaching.spec is not None and features is not None:  # computed before there was a log
        _logger.info("The teacher's features are in %s", features.path)
    _logger.info("%s, open_clip %s", loss.summary(loss.args.epochs), __version__)


def train_one_epoch(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """Announce an epoch to the loss; before the first of a run, connect it with the rest of the run.

    Raises:
        RuntimeError: The run asks for a loss of the catalogue and trains with another.
    """
    given = bound.arguments
    if "state" in given:  # of open_clip's later trainer: it holds the task, and the task model and loss
        state = given["state"]
        given = {**vars(state), **given, "loss": state.task.loss, "model": state.task.trainable_module}
    loss, args, epoch, train = given["loss"], given["args"], given["epoch"], given["data"]["train"]
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss {args.loss} was given, but the trainer trains with {type(loss).__name__}; "
            "run `rankloss doctor` for advice"
        )
    if loss.place is None:
        _log_summary(loss)  # again, where a reader of a long log looks: as the last line before training
        columns = getattr(train, _TEXT_COLUMNS, None)
        if columns is not None:
            columns.attach(given["model"])
        checkpoints.connect(loss, args, given.get("optimizer"), epoch)
    accum_freq = getattr(args, "accum_freq", 1)  # forks of early releases have no such option
    steps = max(1, train.dataloader.num_batches // accum_freq)
    loss.start_epoch(epoch, args.epochs, steps, accum_freq)
    return original(*bound.args, **bound.kwargs)


def get_dataset(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """Data of the trainer, whose training texts have the columns that the loss needs."""
    given, args = bound.arguments, bound.arguments["args"]
    if not given["is_train"]:
        return original(*bound.args, **bound.kwargs)
    columns = run_of(args).text_columns()
    if columns is None:
        return original(*bound.args, **bound.kwargs)
    given["tokenizer"] = columns.tokenizer(given["tokenizer"])
    # A webdataset's pipeline is built inside the call, so the reader is replaced during it.
    names, reader = inspect.unwrap(original).__globals__, "tarfile_to_samples_nothrow"
    read: Any = names.get(reader)
    names[reader] = functools.partial(columns.join_samples, read, getattr(args, "text_key", None) or "txt")
    try:
        info = original(*bound.args, **bound.kwargs)
    finally:
        names[reader] = read
    setattr(info, _TEXT_COLUMNS, columns)
    dataset = getattr(info.dataloader, "dataset", None)
    if hasattr(dataset, "captions"):  # of a CSV file
        columns.join_csv(dataset, args.train_data, args.csv_separator)
    return info
