"""What a loss, or one of its options, cannot do in a run: one table for all trainers.

The plug-in of a trainer says which conditions hold in a run, each in its user's words: ``{"sigmoid":
"--siglip"}`` on open_clip's command line, ``{"sigmoid": "a model that has a logit_bias"}`` in Hugging Face's
Trainer. The entry of a loss says what it needs. :data:`TABLE` says which of the two do not go together, and
why. What its options rule out in every trainer, a loss refuses by itself: ``LossEntry.refuse``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rankloss_trainers.catalog import LossEntry, Options

if TYPE_CHECKING:
    from torch import nn

    from rankloss.distributed import Gather

Conditions = Mapping[str, str]
"""The conditions of :data:`TABLE` that hold in a run, and the user's words for each."""

NEEDS: dict[str, Callable[[LossEntry, Options], object]] = {
    "softmax": lambda entry, _: entry.no_sigmoid,
    "sigmoid": lambda entry, _: entry.only_sigmoid,
    "caption": lambda entry, options: entry.caption_key(options) is not None,
    "features": lambda entry, options: entry.reference_features(options) is not None,
    "teacher": lambda entry, options: entry.uses_teacher(options) and not entry.reference_features(options),
    "companion": lambda entry, options: entry.caption_key(options) or entry.reference_features(options),
    "distillation": lambda entry, options: entry.keeps_distillation(options),
    "distill_loss": lambda _, options: "distill_loss" in options,
}
"""What a loss with its options can need.

- ``softmax``, ``sigmoid``: that the trainer's own loss is of this kind.
- ``caption``: a second caption of each image.
- ``features``: a teacher's precomputed features, read by the trainer.
- ``companion``: one of these two, which open_clip's trainer has to read with each text.
- ``teacher``: the features of a teacher that the trainer has.
- ``distillation``: that the trainer's distillation term, where it has one, stays.
- ``distill_loss``: an option that says whether it stays.
"""

TABLE = {
    # Runs in which no loss works.
    "": {
        "horovod": "{loss} does not work with {horovod}, use torchrun",
        "audio": "{loss} compares images with texts, and {audio} is of audio",
        "generative": "{loss} does not work with {generative}, a generative model without a contrastive loss",
        "compute_loss_func": "compute_loss_func is ignored by this trainer; give the loss as `loss`",
        "data_parallel": "DataParallel over {data_parallel} GPUs contrasts each GPU's pairs alone; "
        "start the script with torchrun or accelerate launch",
        "fsdp_1": "FSDP version 1 does not show the model's logit_scale outside the forward pass; "
        'use version 2: fsdp_config={{"version": 2}}',
        "several_datasets": "at one step each process has a batch of another dataset, and the loss would "
        "contrast them with each other, or wait for a process that calls another loss: with several datasets "
        "on several processes give each loss gather=False",
        "own_steps": "with {own_steps} call set_progress(step, total_steps) in training_step instead",
        "uncounted": "with {uncounted} the trainer does not know how many optimizer steps the run has: "
        "give Progress its total_steps",
        "no_epochs": "unit='epoch' needs a Trainer whose run max_epochs ends; got {no_epochs}",
    },
    # The trainer's own loss.
    "softmax": {"sigmoid": "{loss} does not work with {sigmoid}: {no_sigmoid}"},
    "sigmoid": {"softmax": "{loss} needs {softmax}: {only_sigmoid}"},
    # A teacher.
    "features": {
        "columns": "reference_features: {columns} are members of a webdataset; here a teacher's features are "
        "a folder, or columns of the batch",
        "distills": "reference_features: excludes {distills}, which is a teacher too",
    },
    "teacher": {
        "no_teacher": "{loss} ranks by a teacher: name it with {no_teacher}, or give its features",
    },
    "teacher distillation distill_loss": {
        "distills sigmoid": "distill_loss: {sigmoid} requires exclude, since the trainer's distillation loss "
        "takes no bias",
    },
    "distillation": {
        "distills sigmoid": "{loss} does not work with {sigmoid} and {distills}: the trainer's distillation "
        "loss takes no bias",
    },
    # What comes with the texts of the training data.
    "caption": {"distills": "{loss} does not work with {distills}: the teacher takes one caption per image"},
    "companion": {
        "synthetic": "{synthetic} has no second caption, and no row of precomputed features",
        "coca": "{loss} does not work with CoCa, whose decoder reads the tokens of the batch itself",
        "torchscript": "{loss} does not work with {torchscript}: a compiled model takes one text per image",
        "other_texts": "{loss} does not work with {other_texts}",
    },
}
"""What does not go together, and why: ``{needs: {conditions: reason}}``, several separated by spaces.

The first row whose needs and conditions all hold is the answer. In a reason ``{loss}`` is the loss, and each
condition's name in braces is the user's words for it; one about an option alone begins with the option's key.
"""


def reason_against(
    name: str, entry: LossEntry, options: Options, gather: Gather, conditions: Conditions
) -> str | None:
    """Why a loss of the catalogue cannot work in a run, or None.

    Args:
        name: The loss.
        entry: Its entry.
        options: The values of its options.
        gather: How the run's batches are gathered.
        conditions: What holds in the run.

    Returns:
        A reason, which begins with the key of an option where it is about that option alone.

    Example:
        >>> entry = LossEntry(build=lambda base, *_: base, no_sigmoid="it is a softmax loss")
        >>> reason_against("mine", entry, {}, None, {"sigmoid": "--siglip"})
        'mine does not work with --siglip: it is a softmax loss'
    """
    needs = {need for need, applies in NEEDS.items() if applies(entry, options)}
    words = {"loss": name, "no_sigmoid": entry.no_sigmoid, "only_sigmoid": entry.only_sigmoid}
    return _first(needs, conditions, words) or entry.refuse(options, gather)


def refuse_run(conditions: Conditions) -> None:
    """Raise a ValueError for a run in which no loss works; for trainers that are given a loss as a module."""
    reason = _first(set(), conditions, {"loss": "the loss"})
    if reason is not None:
        raise ValueError(reason)


def _first(needs: set[str], conditions: Conditions, words: Mapping[str, str]) -> str | None:
    for needed, rows in TABLE.items():
        for when, reason in rows.items():
            if needs.issuperset(needed.split()) and conditions.keys() >= set(when.split()):
                return reason.format(**words, **conditions)
    return None


def check_criterion(what: str, criterion: Any) -> nn.Module:
    """What an entry has built, or a user has given, if a trainer can train with it.

    Args:
        what: What the error begins with.
        criterion: The loss.

    Raises:
        TypeError: It is no module.
        ValueError: It has parameters, which would not be trained as they should: an optimizer may not know
            them, DDP does not average their gradients, and checkpoints do not hold them.
    """
    from torch import nn

    if not isinstance(criterion, nn.Module):
        raise TypeError(f"{what} must be a module; got {criterion!r}")
    if any(parameter.requires_grad for parameter in criterion.parameters()):
        raise ValueError(f"{what}: {type(criterion).__name__} has parameters, which would not be trained")
    return criterion
