"""A run with ``--loss``: its start, and the patched functions, which build the loss, read data and train."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from inspect import BoundArguments
from typing import Any

import torch
from open_clip.version import __version__
from torch import nn

from rankloss_features.clip_models import check_activation, check_pretrained
from rankloss_features.data import extensions
from rankloss_features.errors import message_of, named_errors
from rankloss_open_clip import checkpoints
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.columns.text_columns import Members, TextColumns
from rankloss_open_clip.trainer_loss import HOST, TrainerLoss, distils
from rankloss_trainers.command_line import RUN, flag, naming_flags
from rankloss_trainers.declared import Choice
from rankloss_trainers.option import OptionError
from rankloss_trainers.run_options import GIVEN

_TEXT_COLUMNS = "_rankloss_open_clip_text_columns"  # the attribute of the training data that holds them
_logger = logging.getLogger("rankloss_open_clip")


# --- the start ------------------------------------------------------------------------------------------


def start(args: Any, choice: Choice) -> TrainerLoss:
    """Build the losses of a run, check them and their data, and compute their teacher.

    All of it comes before the trainer makes its folder of logs, since it refuses a name that it has used.

    Raises:
        ValueError: The reason against them, which begins with a flag.
    """
    with naming_flags(choice.losses):
        run = TrainerLoss(args, *choice)
        check_arguments(run)
        check_batch(run)
        check_pretrained(getattr(args, "model", None), getattr(args, "pretrained", None))
        check_distillation(args)
        data_of_teacher = read_data_of_teacher(run)
        check_csv(run)
        if data_of_teacher is not None:
            compute_teacher(run, data_of_teacher)
    return run


def run_of(args: Any) -> TrainerLoss:
    """The losses of the run with these arguments; built anew where another parser than ours made them."""
    run: TrainerLoss | None = getattr(args, "rankloss_run", None)
    return start(args, chosen(args)) if run is None else run


def check_arguments(run: TrainerLoss) -> None:
    """Raise a ValueError for a reason against the losses that lies in the trainer's arguments."""
    for reason, holds in _exclusions(run):
        if holds:
            raise ValueError(f"{run.name} does not work with {reason}")
    own_teacher = run.teaching.teacher  # of --loss-teacher
    trainers_teacher = _flags_of_teacher(run.args)
    is_required = run.teaching.use == "required"
    if own_teacher is not None and trainers_teacher:
        raise OptionError("teacher", f"excludes {trainers_teacher}, which is a teacher too")
    if run.options.teacher == GIVEN and not trainers_teacher:
        raise OptionError("teacher", f"must not be {GIVEN} where the trainer has none: {HOST.teacher}")
    if is_required and own_teacher is None and not trainers_teacher:
        raise ValueError(f"{run.name} needs a teacher: {HOST.teacher}, or give {flag(RUN, 'teacher')}")
    if trainers_teacher and getattr(run.args, "siglip", False) and not is_required:
        raise ValueError(
            f"{run.name} does not work with --siglip and {trainers_teacher}, whose loss takes no bias"
        )


def check_distillation(args: Any) -> None:
    """Raise a ValueError for a teacher of the trainer's whose activation is not that of its weights."""
    model, pretrained = getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None)
    with named_errors(f"--distill-model {model}"):
        check_activation(model, pretrained)


def _exclusions(run: TrainerLoss) -> list[tuple[str, bool]]:
    """Parts of the trainer in words, with True for those that are in use and that the losses exclude."""
    args = run.args
    replaces_loss = any(loss.replaces for loss in run.losses)
    has_columns = any(loss.columns is not None for loss in run.losses)
    takes_columns = has_columns or run.teaching.teacher is not None  # whose rows are a column

    horovod = _flags(args, "horovod")
    model = getattr(args, "model", "").lower()
    is_coca = "coca" in model
    is_generative = "genlip" in model or "genlap" in model  # as open_clip's main branch names them
    data_type = getattr(args, "dataset_type", None) or ""
    has_no_pairs = "audio" in data_type
    has_no_columns = data_type == "synthetic"
    ways_without_columns = _flags(args, "torchscript", "json_text_key", "variable_text", "use_naflex")
    trainers_teacher = _flags_of_teacher(args)
    keeps_distillation = trainers_teacher != "" and run.teaching.use != "required"
    return [
        ("--horovod", horovod != ""),
        (model, is_generative),
        (f"--dataset-type {data_type}", has_no_pairs or (takes_columns and has_no_columns)),
        (ways_without_columns, takes_columns and ways_without_columns != ""),
        # A loss in place of CoCa's would leave out its captioning term.
        ("CoCa", is_coca and (replaces_loss or takes_columns)),
        (f"{trainers_teacher}, whose loss it would replace", replaces_loss and keeps_distillation),
        (
            f"{trainers_teacher}, whose teacher takes captions alone",
            has_columns and trainers_teacher != "",
        ),
    ]


def _flags_of_teacher(args: Any) -> str:
    """The flags of a teacher of the trainer's; empty without one."""
    return _flags(args, "distill_model", "dataset_reinforcement") if distils(args) else ""


def _flags(args: Any, *names: str) -> str:
    """The flags of those of these arguments that are given, separated by commas; empty if none is."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None))


def check_batch(run: TrainerLoss) -> None:
    """Raise an error for a batch, or a device, that the loss would refuse at the first step."""
    from open_clip_train.distributed import world_info_from_env  # no process group is there yet

    args = run.args
    batch_size = getattr(args, "batch_size", None)
    if batch_size is None:  # another trainer's parser
        return
    accum_freq = getattr(args, "accum_freq", 1)
    _local_rank, _rank, world_size = world_info_from_env()
    pairs = batch_size * accum_freq * world_size
    if pairs < run.min_pairs:
        raise ValueError(
            f"{run.name} needs at least {run.min_pairs} pairs in a batch; got {pairs}: "
            f"--batch-size {batch_size}, --accum-freq {accum_freq}, {world_size} process(es)"
        )
    run.check_device(torch.device(device_of(args)), pairs)


def device_of(args: Any) -> str:
    """The device that the trainer will choose for this process."""
    device = str(getattr(args, "device", None) or "cuda")
    if not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        return "cpu"
    local_rank = os.environ.get("LOCAL_RANK")  # as torchrun sets it
    if local_rank is None or getattr(args, "no_set_device_rank", False):
        return device
    return f"cuda:{local_rank}"


@contextlib.contextmanager
def _naming_train_data() -> Iterator[None]:
    """Let an error of the training data begin with ``--train-data``, unless it begins with another flag."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith("--") else f"--train-data: {text}") from error


def read_data_of_teacher(run: TrainerLoss) -> Any:
    """The run's training data, if a teacher's features of them are to be computed; None otherwise.

    Raises:
        ValueError: The data cannot be read, or are not of pairs.
    """
    spec = run.teaching.spec
    if spec is None:
        return None
    from rankloss_features import caching

    with _naming_train_data():
        return caching.of_open_clip(run.args, spec)


def check_csv(run: TrainerLoss) -> None:
    """Check a CSV file of training data: its header, its rows, and the columns of losses and teacher, if any.

    A teacher's rows are compared if its features are stored already, not if this run computes them. Samples
    of a webdataset are checked when they are read.

    Raises:
        ValueError: The file lacks a column, a cell has swallowed rows, a row is not the folder's, or its list
            or id is wrong.
    """
    args = run.args
    path, kind = getattr(args, "train_data", None), getattr(args, "dataset_type", None)
    is_csv = kind == "csv" or (kind == "auto" and str(path).endswith((".csv", ".tsv")))
    if not path or not is_csv:
        return
    columns = run.text_columns() or TextColumns([])
    with _naming_train_data():
        columns.check_csv(path, args.csv_separator, args.csv_img_key, args.csv_caption_key)


def compute_teacher(run: TrainerLoss, data: Any) -> None:
    """Compute the teacher's features of the training data, unless a cache has them.

    Raises:
        OptionError: The teacher cannot be loaded, a picture cannot be read, or the cache cannot be written.
    """
    from rankloss_features import caching

    place = os.path.join(getattr(run.args, "logs", None) or "logs", "teachers")
    try:
        folder = caching.cached(run.teaching.spec, data, place, device_of(run.args))
    except (OSError, ValueError) as error:
        raise OptionError("teacher", message_of(error)) from error
    run.teaching.open_folder(folder)


# --- the patched functions ------------------------------------------------------------------------------


def create_loss(original: Callable[..., Any], bound: BoundArguments) -> nn.Module:
    """A loss for a trainer that adds up every value of the dict that a loss returns.

    Args:
        original: The trainer's function, which builds its own loss.
        bound: The arguments of the call.
    """
    return build_loss(original(*bound.args, **bound.kwargs), bound.arguments["args"], sums_every_value=True)


def create_task(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """A task of open_clip's later trainer, which adds up keys that end in ``_loss`` and logs the others."""
    task = original(*bound.args, **bound.kwargs)
    task.loss = build_loss(task.loss, bound.arguments["args"], sums_every_value=False)
    return task


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """The losses of a run, on the loss that the trainer built, after a line of log that names them.

    For ``sums_every_value`` see :class:`TrainerLoss`.
    """
    if isinstance(base, TrainerLoss):  # from a patched factory that the original has called
        return base
    loss = run_of(args).on(base).to(getattr(args, "device", None))
    loss.sums_every_value = sums_every_value
    _log_summary(loss)
    return loss


def _log_summary(loss: TrainerLoss) -> None:
    """Log the losses with their options, and a computed teacher's folder, in one process."""
    if getattr(loss.args, "rank", 0) != 0:
        return
    features = loss.teaching.features
    if loss.teaching.spec is not None and features is not None:  # computed before there was a log
        _logger.info("The teacher's features are in %s", features.path)
    _logger.info("%s, open_clip %s", loss.summary(loss.args.epochs), __version__)


def train_one_epoch(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """Announce an epoch to the loss; before the first of a run, connect it with the rest of the run.

    Raises:
        RuntimeError: The run asks for a loss of the catalogue, and trains with one that this plug-in did not
            build.
    """
    arguments = dict(bound.arguments)
    if "state" in arguments:  # of open_clip's later trainer, whose epochs take loss and model in a task
        state = arguments["state"]
        of_task = {"loss": state.task.loss, "model": state.task.trainable_module}
        arguments = {**vars(state), **arguments, **of_task}
    loss, args, epoch = arguments["loss"], arguments["args"], arguments["epoch"]
    train = arguments["data"]["train"]
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss {args.loss} was given, but the trainer trains with {type(loss).__name__}; "
            "run `rankloss doctor` for advice"
        )
    is_first_epoch_of_run = loss.place is None
    if is_first_epoch_of_run:
        _log_summary(loss)  # again, where a reader of a long log looks: as the last line before training
        columns = getattr(train, _TEXT_COLUMNS, None)
        if columns is not None:
            columns.attach(arguments["model"])
        checkpoints.connect(loss, args, arguments.get("optimizer"), epoch)
    accum_freq = getattr(args, "accum_freq", 1)  # forks of early releases have no such option
    steps = max(1, train.dataloader.num_batches // accum_freq)
    loss.start_epoch(epoch, args.epochs, steps, accum_freq)
    return original(*bound.args, **bound.kwargs)


def get_dataset(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """Data of the trainer, whose training texts have the columns that the loss needs."""
    arguments, args = bound.arguments, bound.arguments["args"]
    columns = run_of(args).text_columns() if arguments["is_train"] else None
    if columns is None:
        return original(*bound.args, **bound.kwargs)
    arguments["tokenizer"] = columns.tokenizer(arguments["tokenizer"])  # in bound.args and bound.kwargs, too
    # A webdataset's pipeline is built inside the call, so the reader of its samples is replaced during it.
    names_of_module, reader = inspect.unwrap(original).__globals__, "tarfile_to_samples_nothrow"
    read_samples: Any = names_of_module.get(reader)
    members = members_of(args, names_of_module)
    names_of_module[reader] = functools.partial(columns.join_samples, read_samples, members)
    try:
        info = original(*bound.args, **bound.kwargs)
    finally:
        names_of_module[reader] = read_samples
    setattr(info, _TEXT_COLUMNS, columns)
    dataset = getattr(info.dataloader, "dataset", None)
    if hasattr(dataset, "captions"):  # of a CSV file
        columns.join_csv(dataset, args.train_data, args.csv_separator)
    return info


def members_of(args: Any, names_of_module: Mapping[str, Any]) -> Members:
    """The members of a webdataset sample that the trainer takes.

    Args:
        args: Its arguments; early releases have no such options, and one extension of captions.
        names_of_module: The names of its module of data.
    """
    captions, images = getattr(args, "text_key", None), getattr(args, "image_key", None)
    return Members(
        captions=extensions(captions) if captions else Members.captions,
        images=extensions(images) if images else Members.images,
        skips_blank="FilterNonEmptyText" in names_of_module,  # the class of releases that do
    )
