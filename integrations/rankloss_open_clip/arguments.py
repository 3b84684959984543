"""The command line: ``--loss``, the options of each loss, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the defaults of that loss's options are
filled in, and ``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rankloss.distributed import Gather
from rankloss_features import Features
from rankloss_features.binding import RowCompanion
from rankloss_open_clip.companions import Companions
from rankloss_open_clip.failures import raise_failures
from rankloss_trainers import catalog
from rankloss_trainers.command_line import (
    LossArguments,
    chosen_by,
    dest,
    flag,
    mentioned,
    misspelt,
    with_flag,
)
from rankloss_trainers.extras import extra
from rankloss_trainers.named import NamedLoss, OptionError
from rankloss_trainers.runtime import Host, tried, with_folder

HOST = Host(
    name="open_clip's trainer",
    biased="--siglip",
    teacher="name it with --distill-model and --distill-pretrained",
    progress="run `rankloss doctor` for advice",
    serves=("caption", "folder", "lists", "state", "teacher"),
)

# --- the run that is asked for --------------------------------------------------------------------------


def requested(args: Any) -> str | None:
    """The loss of the catalogue that the trainer's parsed arguments ask for.

    Raises:
        RuntimeError: ``--loss`` was read by a parser without the plug-in, as ``--loss-dist-impl``.
    """
    swallowed = getattr(args, "loss_dist_impl", None)
    # The option's own values come first.
    if swallowed not in (None, "bidir", "shift", "reduce", "gather") and _is_named(swallowed):
        raise RuntimeError(
            f"--loss {swallowed} was read as --loss-dist-impl {swallowed}: start the training with "
            "`python -m rankloss_open_clip`, or run `rankloss doctor` for advice"
        )
    name = getattr(args, "loss", None)
    return name if name is not None and _is_named(name) else None


def _is_named(name: str) -> bool:
    """True for a loss of the catalogue, or several joined."""
    return all(part in catalog.known() for part in name.split(catalog.JOIN))


def chosen(args: Any) -> NamedLoss:
    """The loss that a run with ``--loss`` asks for.

    Raises:
        ValueError: An option cannot have its value; the error begins with the flag.
    """
    return chosen_by(args, [catalog.load(name) for name in catalog.names_of(args.loss)])


def companions_of(args: Any) -> Companions | None:
    """Companions of every training text in a run with ``--loss``; None for a loss of pairs alone."""
    loss = chosen(args)
    parts, where = [*loss.companions()], loss.reference_features
    if where is not None:
        parts.append(RowCompanion(Features(where)))
    return Companions(parts) if parts else None


def check_data(args: Any) -> None:
    """Read what a loss takes from the training data beside pairs, before the trainer makes a folder of logs.

    Of a webdataset samples are compared when they are read.

    Raises:
        ValueError: A CSV file lacks a column, a row of it is not the folder's, or its list or id is wrong.
    """
    loss, companions = chosen(args), companions_of(args)
    path, kind = getattr(args, "train_data", None), getattr(args, "dataset_type", None)
    if kind == "auto" and str(path).endswith((".csv", ".tsv")):
        kind = "csv"
    try:
        if loss.teacher is not None:
            from rankloss_features import caching

            caching.of_open_clip(args, caching.Spec.of(loss.teacher))
        if path and kind == "csv":
            (companions or Companions([])).check_csv(
                path, args.csv_separator, args.csv_img_key, args.csv_caption_key
            )
    except (OSError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith("--") else f"--train-data: {text}") from error


def compute_teacher(args: Any) -> None:
    """Compute the teacher's features of the training data, unless a cache has them, and note their folder."""
    loss = chosen(args)
    if loss.teacher is None:
        return
    with extra("features"):
        from rankloss_features import caching

    spec = caching.Spec.of(loss.teacher)
    place = os.path.join(getattr(args, "logs", None) or "logs", "teachers")
    folder = caching.cached(spec, caching.of_open_clip(args, spec), place, getattr(args, "device", None))
    for part in with_folder(loss, folder).parts:
        for key in ("teacher", "reference_features") if part.reference_features == folder else ():
            setattr(args, dest(part, part.options()[key]), getattr(part, key))


def flags_of(loss: NamedLoss, *keys: str) -> dict[str, str]:
    """The flags of options by key; of joined losses that have one, the first's."""
    found = [(part, part.options()) for part in reversed(loss.parts)]
    return {key: flag(part, options[key]) for part, options in found for key in keys if key in options}


def gather_of(args: Any) -> Gather:
    """The gathering that the trainer's arguments ask for; until they are completed, that of one process."""
    # The sigmoid loss is exact in every layout, whatever the flags say, and so must its companions be.
    exact = getattr(args, "siglip", False)
    flags = {name: exact or getattr(args, name, False) for name in ("local_loss", "gather_with_grad")}
    return Gather(**flags, rank=getattr(args, "rank", 0), world_size=getattr(args, "world_size", 1))


def distils(args: Any) -> bool:
    """True if the trainer hands a teacher's features to its loss.

    It has a teacher where both of its arguments name one. MobileCLIP's patch adds an option by which it reads
    the features with the data.
    """
    named = getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None)
    return getattr(args, "dataset_reinforcement", False) or None not in named


# --- the parser -----------------------------------------------------------------------------------------


def parsed(parse_args: Callable[[list[str]], Any], argv: Sequence[str]) -> Any:
    """Parse a command line: the losses and their options here, and the rest by the trainer's function.

    With a loss the arguments gain its name and the values of all its options.

    Args:
        parse_args: The trainer's function.
        argv: The command line.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage="... --loss NAME [--NAME-OPTION VALUE ...]"
    )
    losses = LossArguments(parser, mentioned(argv))
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
    own, rest = losses.parsed(argv)
    try:
        args = parse_args(rest)
    except SystemExit as exit_:
        hint = misspelt(rest, parser._option_string_actions)
        if exit_.code and hint:
            print(hint.removeprefix("; "), file=sys.stderr)
        raise
    vars(args).update(vars(own))
    try:
        loss = losses.chosen(own)
        if loss is not None:
            raise_failures()
            check_run(loss, args)
            for part in loss.parts:
                vars(args).update({dest(part, x): getattr(part, x.key) for x in part.options().values()})
            check_data(args)
    except ValueError as error:
        parser.error(f"argument {error}")
    requested(args)
    return args


def check_run(loss: NamedLoss, args: Any) -> None:
    """Refuse a loss that cannot work in a run.

    Raises:
        ValueError: The reason, which begins with the flag of an option.
    """
    try:
        _check_trainer(loss, args)
        tried(HOST, loss, gather_of(args), sigmoid=getattr(args, "siglip", False))
    except ValueError as error:
        raise ValueError(with_flag(loss.parts, error)) from error


def _check_trainer(loss: NamedLoss, args: Any) -> None:
    """Raise a ValueError for a reason against the loss that lies in this trainer."""
    name, flags = loss.name, flags_of(loss, "teacher", "reference_features", "distill_loss")

    def given(*names: str) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None))

    model, data_type = getattr(args, "model", "").lower(), getattr(args, "dataset_type", None) or ""
    caption, features = loss.caption_key, loss.reference_features or loss.teacher
    teacher = given("distill_model", "dataset_reinforcement") if distils(args) else ""
    other_texts = given("torchscript", "json_text_key", "variable_text", "use_naflex")
    more_texts = caption or [*loss.companions()]
    companion, needs_teacher = more_texts or features, loss.use_of_teacher == "required"
    excluded = {
        "--horovod": given("horovod"),
        model: "genlip" in model or "genlap" in model,  # by its name, as open_clip's main branch knows one
        f"--dataset-type {data_type}": "audio" in data_type or (companion and data_type == "synthetic"),
        other_texts: companion and other_texts,
        "CoCa": companion and "coca" in model,
        f"{teacher}, whose teacher takes one caption per image": more_texts and teacher,
    }
    for word in [word for word, holds in excluded.items() if holds]:
        raise ValueError(f"{name} does not work with {word}")
    if caption and not loss.companions():
        raise ValueError(f"{name} needs a second caption, but it has no companions() that read it")
    if features and teacher:
        key = "teacher" if loss.teacher else "reference_features"
        raise OptionError(key, f"excludes {teacher}, which is a teacher too")
    if needs_teacher and not (features or teacher):
        hint = ", or give {teacher} or {reference_features}" if "reference_features" in flags else ""
        raise ValueError(f"{name} needs a teacher: {HOST.teacher}{hint.format(**flags)}")
    if teacher and given("siglip") and loss.keeps_distillation:
        hint = "; {distill_loss} exclude leaves it out" if needs_teacher and "distill_loss" in flags else ""
        text = f"{name} does not work with --siglip and {teacher}, whose loss takes no bias"
        raise ValueError(text + hint.format(**flags))
