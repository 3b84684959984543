"""``rankloss heads``: heads on two frozen encoders, for a few thousand pairs: made, evaluated, saved."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankloss.options import check_count, check_weight
from rankloss_features import data, sources
from rankloss_features.errors import flag, message_of
from rankloss_features.evaluate import described, lines, quiet_libraries
from rankloss_features.evaluation import Pairs, encode_rows, measure, noun_of_group
from rankloss_features.folder import NAMES
from rankloss_features.heads import ABOUT, CCA, METHODS, Encoders, FrozenEncoders, has_other_files
from rankloss_features.heads_training import Training
from rankloss_features.methods import DEFAULT, Asked, Made, make, setting_in_words
from rankloss_features.methods import Pairs as PairsToLearn

KEEP = 0.9
"""The share of a CLIP's own similarity without ``--keep``: of those tried, the least that kept its zero-shot
accuracy within a point (docs/your_data.md)."""

_FEWEST = 16  # pairs, on either side of the split
_GROUPS_FOR_ONE_HELD_OUT = 10  # so that a tenth of the pictures, or of the ids, is held out
_ENCODED_TOGETHER = 64  # pairs; --batch-size has those of a training step
_WIDEST = 65_536  # of the common space
_LARGEST_SEED = 2**63 - 1  # which torch takes
_OF_TRAINED_HEADS = ("epochs", "batch_size", "lr", "width", "dropout", "label_smoothing", "spread_weight")


def main(argv: Sequence[str]) -> int:
    """Carry out a command line, and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        settings = Training(
            check_count("--epochs", args.epochs),
            check_count("--batch-size", args.batch_size, at_least=2),
            check_weight("--lr", args.lr, above=0.0, below=1.0),
            width=check_count("--width", args.width, at_most=_WIDEST),
            seed=check_count("--seed", args.seed, at_least=0, at_most=_LARGEST_SEED),
            dropout=check_weight("--dropout", args.dropout, below=1.0),
            label_smoothing=check_weight("--label-smoothing", args.label_smoothing, below=1.0),
            spread_weight=check_weight("--spread-weight", args.spread_weight),
        )
        asked = Asked(args.method, settings, check_count("--heads", args.heads), _keep(args))
        encoders = _encoders(args)
        check_count("--workers", args.workers, at_least=0)
        device = sources.device_of(args.device, "cuda" if torch.cuda.is_available() else "cpu")
        _check_output(args.output, overwrite=args.overwrite)
        with quiet_libraries():
            run(args, asked, encoders, device)
    except (OSError, ValueError) as error:
        print(f"rankloss heads: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


def _encoders(args: argparse.Namespace) -> Encoders:
    """The encoders of the options.

    Raises:
        ValueError: They are neither two encoders nor a model that has both; the model has heads already; or
            an option of trained heads stands beside ``--method cca``.
    """
    # The options of stored features, which `rankloss features` has and this command has not, are not given.
    args_of_teacher = argparse.Namespace(**vars(args), features=None, spaces=None, align=None)
    options = sources.options_of_teacher(args_of_teacher)
    if options == ["image_encoder"] or options == ["text_encoder"]:
        missing = "--text-encoder" if options == ["image_encoder"] else "--image-encoder"
        raise ValueError(f"{missing} is missing: heads bring images and texts into one space")
    if args.method == CCA:
        _check_no_training_options(args)
    if options == ["model"] and (Path(args.model) / ABOUT).is_file():
        raise ValueError(f"--model {args.model} has heads already: give its encoders")
    return Encoders(args.image_encoder, args.text_encoder, args.image_weights, args.model, args.pretrained)


def _keep(args: argparse.Namespace) -> float:
    """The share of the encoders' own similarity.

    Raises:
        ValueError: It is out of its range, or the encoders have no similarity of their own.
    """
    if args.keep is None:
        return KEEP if args.model is not None else 0.0
    share = check_weight("--keep", args.keep, below=1.0)
    if share and args.model is None:
        raise ValueError(
            f"--keep {share:g} keeps the space that images and texts share: it needs --model, since two "
            "encoders share none"
        )
    return share


def _check_no_training_options(args: argparse.Namespace) -> None:
    """Raise a ValueError for an option of trained heads, which the closed form would ignore."""
    of_training = Training()
    defaults = {"heads": 1, **{name: getattr(of_training, name) for name in _OF_TRAINED_HEADS}}
    for name, default in defaults.items():
        value = getattr(args, name)
        if value != default:
            raise ValueError(f"{flag(name)} {value:g} is of trained heads: --method {CCA} trains none")


def _check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise a ValueError for a place where the heads cannot go, or where others are."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--output {folder} is no folder, nor a link to one that is there")
    if folder.is_dir() and has_other_files(folder):
        raise ValueError(f"--output {folder} is there and no folder of heads: give a new one")
    if os.path.lexists(folder / ABOUT) and not overwrite:
        raise ValueError(
            f"--output {folder} has trained heads: give another folder, or --overwrite to replace them"
        )
    # The folder, or the first above it that is there.
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {folder} cannot be written: {parent} may not be changed")


class Selection(NamedTuple):
    """Some pairs of the data.

    Attributes:
        option: The option of their file, ``--data`` or ``--val-data``.
        rows: Their rows.
    """

    option: str
    rows: list[int]


class HeldOut(NamedTuple):
    """Held-out pairs.

    Attributes:
        pairs: The pairs.
        features: The encoders' features of them, a row for each pair.
    """

    pairs: Pairs
    features: dict[str, Tensor]


def run(args: argparse.Namespace, asked: Asked, encoders: Encoders, device: torch.device) -> None:
    """Encode the pairs, learn from some, evaluate on the others, and save.

    Pictures are upright, whatever the kind of data: no other trainer sees them otherwise.

    Raises:
        ValueError: An encoder or the data cannot be read, there are too few pairs, or a picture or an id
            stands on both sides.
    """
    # All of these have a value for each option of a file: --data, and --val-data if it is given.
    data_of = {"--data": data.open_data(args)}
    pairs_of = {"--data": Pairs.of(data_of["--data"])}
    if args.val_data is not None:
        data_of["--val-data"], pairs_of["--val-data"] = _read_val_data(args)
    features_of: dict[str, dict[str, Tensor]] = {}

    _check_enough_pairs(args, pairs_of)
    seed = asked.training.seed
    if args.ids_key is not None:
        _split(args, pairs_of, seed, are_read=False)  # raises before anything is encoded

    rendering = data.rendering_of(args.background, upright=True)
    frozen = replace(encoders.load(device, args.batch_size), rendering=rendering)
    for option, opened in data_of.items():
        encoded = encode_rows(frozen, opened, batch_size=_ENCODED_TOGETHER, workers=args.workers, shows=True)
        features_of[option] = encoded.features
        pairs_of[option] = pairs_of[option].with_pictures(encoded.pictures)

    learned, held_out = _split(args, pairs_of, seed, are_read=True)
    # The held-out rows come first: the others are moved out of the features, often those of the same file.
    held_out_pairs = _take_held_out(pairs_of, features_of, held_out)
    pairs_to_learn = _move_learned(pairs_of, features_of, learned)

    groups = _noun_of_groups(args)
    print(f"training on {len(learned.rows)} pairs of {pairs_to_learn.groups.max() + 1} {groups}")
    made = make(asked, pairs_to_learn)
    _print_course(made, groups)
    if asked.keep:
        print(f"share of the model's own similarity (--keep): {asked.keep:g}")
    model = FrozenEncoders(encoders, frozen, made.parts, made.scale, rendering)
    model.save(args.output)
    _print_evaluation(args, model, held_out_pairs)
    print(f'\nSaved. In Python: rankloss_features.heads.load_heads({str(args.output)!r}).encode_texts(["…"])')


def _take_held_out(
    pairs_of: dict[str, Pairs], features_of: dict[str, dict[str, Tensor]], held_out: Selection
) -> HeldOut:
    """The held-out pairs with their features, which stay where they are.

    Args:
        pairs_of: The pairs of each option's file.
        features_of: The features of all of them.
        held_out: Those that are held out.
    """
    pairs = pairs_of[held_out.option].take(held_out.rows)
    all_features = features_of[held_out.option]
    features = {name: _take_rows(of_all, held_out.rows) for name, of_all in all_features.items()}
    return HeldOut(pairs, features)


def _move_learned(
    pairs_of: dict[str, Pairs], features_of: dict[str, dict[str, Tensor]], learned: Selection
) -> PairsToLearn:
    """The pairs to learn from with their features, which are moved, so that memory does not hold them twice.

    Args:
        pairs_of: The pairs of each option's file.
        features_of: The features of all of them, from which one modality after the other is removed.
        learned: Those to learn from.
    """
    pairs = pairs_of[learned.option].take(learned.rows)
    all_features = features_of[learned.option]
    features = {name: _take_rows(all_features.pop(name), learned.rows) for name in NAMES}
    return PairsToLearn(features, _number_groups(pairs.pictures), _number_groups(pairs.groups))


def _take_rows(features: Tensor, rows: list[int]) -> Tensor:
    """The features of ascending, distinct rows. All of them are the tensor itself, to save memory."""
    has_all_rows = len(rows) == len(features)
    return features if has_all_rows else features[rows]


def _read_val_data(args: argparse.Namespace) -> tuple[data.Data, Pairs]:
    """The data of ``--val-data`` and their pairs."""
    try:
        opened = data.open_data(args, args.val_data)
        return opened, Pairs.of(opened)
    except ValueError as error:
        # The readers name --data in their errors, whichever option gave the path.
        raise ValueError(str(error).replace("--data ", "--val-data ")) from error


def _check_enough_pairs(args: argparse.Namespace, pairs: dict[str, Pairs]) -> None:
    """Raise a ValueError for a file with so few pairs that no split of them could do."""
    sides_in_a_file = 1 if args.val_data is not None else 2  # without --val-data both sides are of --data
    for option, of_file in pairs.items():
        count = len(of_file.captions)
        if count < sides_in_a_file * _FEWEST:
            raise ValueError(
                f"{option} {of_file.data} has {count} pairs: at least {_FEWEST} are needed to train on, and "
                f"{_FEWEST} to evaluate on"
            )


def _split(
    args: argparse.Namespace, pairs: dict[str, Pairs], seed: int, *, are_read: bool
) -> tuple[Selection, Selection]:
    """The pairs to train on, and those to evaluate on.

    Args:
        args: The command line.
        pairs: The pairs of each option's file.
        seed: The seed of the choice of the pairs of ``--data`` that are held out, without ``--val-data``.
        are_read: True once the pictures are known by their content, so that equal ones are found.

    Raises:
        ValueError: The pairs are too few, a picture or an id stands on both sides, or the held-out pairs have
            one picture, or one id, alone.
    """
    if args.val_data is None:
        learned, held_out = _split_data(args, pairs["--data"], seed)
    else:
        learned, held_out = _all_rows("--data", pairs), _all_rows("--val-data", pairs)
        _check_nothing_on_both_sides(args, pairs, are_read=are_read)
    for purpose, selection in (("train", learned), ("evaluate", held_out)):
        if len(selection.rows) < _FEWEST:
            raise ValueError(
                f"{len(selection.rows)} pairs are too few to {purpose} on, of "
                f"{len(pairs['--data'].captions)} in --data {args.data}; at least {_FEWEST} are needed"
            )
    groups_of_file = pairs[held_out.option].groups
    held_out_groups = {groups_of_file[row] for row in held_out.rows}
    if len(held_out_groups) == 1:
        raise ValueError(
            f"the {len(held_out.rows)} held-out pairs have one of the {_noun_of_groups(args)}, "
            f"{next(iter(held_out_groups))!r}, so every answer would be right: give --val-data with several"
        )
    return learned, held_out


def _split_data(args: argparse.Namespace, pairs: Pairs, seed: int) -> tuple[Selection, Selection]:
    """The pairs of ``--data`` to train on, and those that are held out; see :func:`split`.

    Raises:
        ValueError: All of them are of one picture or id.
    """
    if len({*map(str, pairs.groups)}) == 1:
        raise ValueError(
            f"--data {args.data}: all {len(pairs.captions)} pairs have one {noun_of_group(args.ids_key)}, so "
            "none can be held out: give --val-data"
        )
    learned_rows, held_out_rows = split(pairs.groups, seed)
    return Selection("--data", learned_rows), Selection("--data", held_out_rows)


def _all_rows(option: str, pairs: dict[str, Pairs]) -> Selection:
    """All pairs of an option's file."""
    return Selection(option, list(range(len(pairs[option].captions))))


def _check_nothing_on_both_sides(
    args: argparse.Namespace, pairs: dict[str, Pairs], *, are_read: bool
) -> None:
    """Raise a ValueError for an id of both files, or once pictures are read for a picture of both."""
    of_data, of_val_data = pairs["--data"], pairs["--val-data"]
    if args.ids_key is not None:
        _check_disjoint(_noun_of_groups(args), of_val_data.groups, of_data.groups, of_val_data.groups)
    if are_read:
        _check_disjoint("pictures", of_val_data.pictures, of_data.pictures, of_val_data.names)


def _check_disjoint(
    plural_noun: str, held_out: Sequence[object], learned: Sequence[object], names: Sequence[object]
) -> None:
    """Raise a ValueError for an id, or a picture, that is trained on and evaluated on.

    Args:
        plural_noun: The noun for them in the error: ids, or pictures.
        held_out: The id, or the picture, of each row of ``--val-data``.
        learned: The same of ``--data``.
        names: The name of the id, or of the picture, of each row of ``--val-data``, for the error.
    """
    learned_values = {*map(str, learned)}  # as texts: 7 in a folder of datasets is "7" elsewhere
    rows_on_both_sides = [row for row, value in enumerate(held_out) if str(value) in learned_values]
    if rows_on_both_sides:
        first = rows_on_both_sides[0]
        count = len({str(held_out[row]) for row in rows_on_both_sides})
        raise ValueError(
            f"{count} {plural_noun} of --val-data are in --data, too; the first is {str(names[first])!r}, "
            f"of row {first}"
        )


def _print_course(made: Made, groups: str) -> None:
    """Print the losses of the training, and the setting and the weight of the closed form.

    Where these were chosen, R@10 of each method on the pairs of the choice is printed, too.

    Args:
        made: The heads.
        groups: The noun for the groups of pairs.
    """
    if made.losses:
        _print_losses(made.losses)
    if made.tuned is None:
        return
    if made.chosen:
        cut = f"{made.tuned.cut} {groups} cut from those to learn from"
        print(f"R@10 on {cut}, by which settings were chosen:")
        for method in METHODS:
            if method in made.chosen:  # the closed form alone has no recall of the others
                print(f"  {method} {100 * made.chosen[method]:.1f}")
    default = "" if made.chosen else ", of the default setting, since there are few pairs"
    print(f"closed form{default}: {setting_in_words(made.tuned.cca)}")
    if "weight" in made.chosen:
        print(f"weight of the closed form beside each trained head: {made.chosen['weight']:g}")


def _print_losses(losses: list[float]) -> None:
    """Print the loss of each of up to nine epochs, of six to eight of more, the last among them."""
    some_epochs = range(1, len(losses) + 1, max(1, len(losses) // 5))
    for epoch in sorted({*some_epochs, len(losses)}):
        print(f"epoch {epoch}: loss {losses[epoch - 1]:.3f}")


def _print_evaluation(args: argparse.Namespace, model: FrozenEncoders, held_out: HeldOut) -> None:
    """Print the table of ``rankloss evaluate`` of held-out pairs, from the encoders' features of them."""
    projected = {}
    with torch.no_grad():
        for name, features in held_out.features.items():
            of_heads = model.heads[name](features.to(model.teacher.device))
            projected[name] = torch.nn.functional.normalize(of_heads, dim=-1).cpu()
    encoded = held_out.pairs.encoded(projected)
    most_answers = min(len(encoded.image_features), len(encoded.text_features))
    ks = [k for k in (1, 5, 10) if k <= most_answers]  # R@k needs k answers to choose from
    name_of_data = str(args.val_data or f"held-out {args.data}")
    about = described(encoded, str(args.output), name_of_data, args.ids_key)
    measures = measure(encoded, ks, by_ids=args.ids_key is not None)
    print()
    print("\n".join(lines({**about, **measures}, ks)))


def split(groups: Sequence[object], seed: int) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and those to hold out, by groups that are chosen at random.

    All rows of a group are on one side. A tenth of the groups is held out, at least one.

    Args:
        groups: The group of each row: its picture, or its id.
        seed: The seed of the choice.

    Returns:
        The rows to train on, and those that are held out, both ascending.

    Example:
        >>> learned, held_out = split(["a", "a", "b", "c"], 0)
        >>> sorted(learned + held_out), len({"aabc"[row] for row in held_out})
        ([0, 1, 2, 3], 1)
    """
    distinct_groups = list(dict.fromkeys(groups))
    count = max(1, len(distinct_groups) // _GROUPS_FOR_ONE_HELD_OUT)
    chosen_groups = set(random.Random(seed).sample(distinct_groups, count))
    learned = [row for row, group in enumerate(groups) if group not in chosen_groups]
    held_out = [row for row, group in enumerate(groups) if group in chosen_groups]
    return learned, held_out


def _number_groups(groups: Sequence[object]) -> NDArray[np.int64]:
    """The number of each row's group: groups are counted from 0 in the order of their first rows."""
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([number_of[group] for group in groups])


def _noun_of_groups(args: argparse.Namespace) -> str:
    """The noun for the groups of pairs in messages: pictures, or the ids of a column."""
    return "pictures" if args.ids_key is None else f"ids of {args.ids_key!r}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankloss heads",
        description="Bring two frozen encoders into one space by a few thousand pairs, in closed form or by "
        "heads that are trained with CLIP's loss; evaluate on held-out pairs, and save.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the heads go")
    parser.add_argument("--overwrite", action="store_true", help="replace the heads that are there")
    parser.add_argument("--image-encoder", metavar="NAME", help="as rankloss features has it")
    parser.add_argument("--image-weights", metavar="PATH", help="as rankloss features has it")
    parser.add_argument("--text-encoder", metavar="NAME", help="as rankloss features has it")
    parser.add_argument("--model", help="in place of both, a CLIP, as rankloss features has it")
    parser.add_argument("--pretrained", metavar="TAG", help="its weights")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=DEFAULT,
        help="cca: projections in closed form, with the best of 256 settings; trained: heads; both: side by "
        f"side ({DEFAULT})",
    )
    parser.add_argument(
        "--heads", type=int, default=1, metavar="N", help="trained heads side by side, each with its seed (1)"
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help=f"of --model: the share of its own similarity, below 1, which keeps what it can do ({KEEP})",
    )
    data.add_options(parser)
    parser.add_argument("--val-data", metavar="DATA", help="held-out pairs; without it a tenth of the ids")
    parser.add_argument(
        "--ids-key", metavar="COLUMN", help="column of ids: pairs of one id are on one side, and partners"
    )
    defaults = Training()
    for name, kind, text in (  # the attributes of Training, whose defaults they have
        ("epochs", int, "passes over the pairs"),
        ("batch-size", int, "pairs of a step"),
        ("lr", float, "learning rate"),
        ("width", int, "width of the common space"),
        ("seed", int, "seed of the split and of the training"),
        ("dropout", float, "share of units that drop out in training"),
        ("label-smoothing", float, "of CLIP's loss"),
        ("spread-weight", float, "weight of the spread of each modality beside CLIP's loss"),
    ):
        value = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=value, metavar="N", help=f"{text} ({value})")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="readers of pictures (2)")
    parser.add_argument("--device", help="the encoders' device; a GPU where there is one")
    return parser
