"""The command line: ``--loss``, the options of each loss, and the combinations that are refused.

Every option is absent from the parsed arguments unless it was given, so that a run without ``--loss`` writes
the same ``params.txt`` as one without the plug-in. With ``--loss`` the defaults of that loss's options are
filled in, and ``params.txt`` names everything the run depended on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rankloss.distributed import Gather
from rankloss_features import Features
from rankloss_features.binding import RowCompanion
from rankloss_open_clip import bootstrap
from rankloss_open_clip.companions import Companions
from rankloss_open_clip.reference_features import IN_SAMPLES, SampleFeatures
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry, Options, error_of
from rankloss_trainers.command_line import LossArguments, dest, flag, mentioned, misspelt, with_flag
from rankloss_trainers.runtime import Host, reason_against

HOST = Host(
    name="open_clip's trainer",
    biased="--siglip",
    teacher="name it with --distill-model and --distill-pretrained",
    progress="run `rankloss doctor` for advice",
    serves=("caption", "folder", "lists", "orders", "state"),
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
    return all(part in catalog.candidates() for part in name.split(catalog.JOIN))


def chosen(args: Any) -> tuple[LossEntry, dict[str, Any]]:
    """The entry of the loss that a run with ``--loss`` asks for, and the values of its options.

    Raises:
        ValueError: A value is none that the option can have; the error begins with the flag.
    """
    entry = catalog.find(args.loss).load()
    names = {option.key: dest(args.loss, entry, option) for option in entry.options}
    given = {key: getattr(args, name) for key, name in names.items() if hasattr(args, name)}
    try:
        return entry, entry.checked(args.loss, given)
    except ValueError as error:
        raise ValueError(with_flag(args.loss, entry, str(error))) from None


def companions_of(args: Any) -> Companions | None:
    """Companions of every training text in a run with ``--loss``; None for a loss of pairs alone."""
    entry, options = chosen(args)
    parts, where = [*entry.companions(options)], entry.reference_features(options)
    if where in IN_SAMPLES:
        two_widths = error_of(lambda: entry.in_separate_spaces(options)) is None
        parts.append(SampleFeatures(where, two_widths=two_widths))
    elif where is not None:
        parts.append(RowCompanion("row of features", Features(where), "reference_"))
    return Companions(parts) if parts else None


def remedy_for_unused_features(args: Any) -> str | None:
    """Advice for a run whose samples hold a teacher's features that no option names, or one excludes."""
    entry, options = chosen(args)
    folder, names = entry.reference_features(options), {"reference", "reference-features"}
    flags = {x.name: flag(args.loss, entry, x) for x in reversed(entry.options) if x.name in names}
    if folder is not None and folder not in IN_SAMPLES:
        return f"{flags['reference-features']} {folder} excludes them"
    if folder is None and flags.keys() == names and entry.uses_teacher(options) is None:
        own, samples = f"{flags['reference']} own", f"{flags['reference-features']} samples"
        return f"rank by them with {samples}, or by the batch's own features with {own}"
    return None


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
        if losses.chosen(own) is not None:
            bootstrap.raise_failures()
            entry, options = chosen(args)
            check_run(args.loss, entry, options, args)
            vars(args).update({dest(args.loss, entry, o): options[o.key] for o in entry.options})
    except ValueError as error:
        parser.error(f"argument {error}")
    requested(args)
    return args


def check_run(name: str, entry: LossEntry, options: Options, args: Any) -> None:
    """Refuse a loss that cannot work in a run.

    Raises:
        ValueError: The reason, which begins with the flag of an option.
    """
    sigmoid = getattr(args, "siglip", False)
    reason = reason_against(HOST, name, entry, options, gather_of(args), sigmoid=sigmoid)
    reason = reason or _reason_against(name, entry, options, args)
    folder = entry.reference_features(options)
    try:
        if reason is None and folder is not None and folder not in IN_SAMPLES:
            Features(folder).check()
    except (OSError, ValueError) as error:
        reason = f"reference_features: {error}"
    if reason is not None:
        raise ValueError(with_flag(name, entry, reason))


def _reason_against(name: str, entry: LossEntry, options: Options, args: Any) -> str | None:
    """The reason against a loss that lies in this trainer."""

    def given(*names: str) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None))

    def advice(text: str, key: str) -> str:
        flags = [flag(name, entry, x) for x in entry.options if x.own_key == key]
        return text.format(flags[0]) if flags else ""

    model, data_type = getattr(args, "model", "").lower(), getattr(args, "dataset_type", None) or ""
    caption, features = entry.caption_key(options), entry.reference_features(options)
    teacher = given("distill_model", "dataset_reinforcement") if distils(args) else ""
    other_texts = given("torchscript", "json_text_key", "variable_text", "use_naflex")
    more_texts = caption or [*entry.companions(options)]
    companion, needs_teacher = more_texts or features, entry.uses_teacher(options)
    excluded = {
        "--horovod": given("horovod"),
        model: "genlip" in model or "genlap" in model,  # by its name, as open_clip's main branch knows one
        f"--dataset-type {data_type}": "audio" in data_type or (companion and data_type == "synthetic"),
        other_texts: companion and other_texts,
        "CoCa": companion and "coca" in model,
        f"{teacher}, whose teacher takes one caption per image": more_texts and teacher,
    }
    for word in [word for word, holds in excluded.items() if holds]:
        return f"{name} does not work with {word}"
    if caption and not entry.companions(options):
        return f"{name} needs a second caption, but its LossEntry names no companions that read it"
    if features and teacher:
        return f"reference_features: excludes {teacher}, which is a teacher too"
    if needs_teacher and not (features or teacher):
        hint = advice(", or give its features with {}", "reference_features")
        return f"{name} needs a teacher: {HOST.teacher}{hint}"
    if teacher and given("siglip") and entry.keeps_distillation(options):
        hint = advice("; {} exclude leaves it out", "distill_loss") if needs_teacher else ""
        return f"{name} does not work with --siglip and {teacher}, whose loss takes no bias{hint}"
    return None
