"""``rankloss heads``: heads on two frozen encoders, for a few thousand pairs: trained, evaluated, saved."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloss.options import check_count, check_weight
from rankloss_features import data, sources
from rankloss_features.errors import last_line
from rankloss_features.evaluate import described, lines, quiet_libraries
from rankloss_features.evaluation import Pairs, encode_rows, measure
from rankloss_features.heads import ABOUT, Encoders, FrozenEncoders, has_other_files
from rankloss_features.heads_training import Training, train

_FEWEST = 16  # pairs, on either side of the split
_HELD_OUT = 10  # of so many ids one
_WIDEST = 65_536  # of the common space
_LARGEST_SEED = 2**63 - 1  # which torch takes


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
        check_count("--workers", args.workers, at_least=0)
        device = sources.device_of(args.device, "cuda" if torch.cuda.is_available() else "cpu")
        _check_output(args.output, overwrite=args.overwrite)
        with quiet_libraries():
            run(args, settings, device)
    except (OSError, ValueError) as error:
        print(f"rankloss heads: {last_line(error)}", file=sys.stderr)
        return 1
    return 0


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
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {folder} cannot be written: {parent} may not be changed")


class Side(NamedTuple):
    """A side of the data, to train on or held out.

    Attributes:
        opened: The file of data that has it.
        rows: Its rows in that file.
        pairs: Its pairs.
    """

    opened: Any
    rows: list[int]
    pairs: Pairs

    def of(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its rows of the features of the whole file."""
        return {name: x[self.rows] for name, x in features.items()}


def run(args: argparse.Namespace, settings: Training, device: torch.device) -> None:
    """Encode the pairs, train on some, evaluate on the others, and save.

    Pictures are upright, whatever the kind of data: no other trainer sees them otherwise.

    Raises:
        ValueError: An encoder or the data cannot be read, there are too few pairs, or an id stands on both
            sides.
    """
    training, validation = _sides(args, settings.seed)
    encoders = Encoders(args.image_encoder, args.text_encoder, args.image_weights)
    rendering = data.rendering_of(args.background, upright=True)
    frozen = replace(encoders.load(device, args.batch_size), rendering=rendering)
    encode = partial(encode_rows, frozen, batch_size=64, workers=args.workers, shows=True)
    features = encode(training.opened)
    is_one_file = validation.opened is training.opened
    held_out = validation.of(features if is_one_file else encode(validation.opened))
    ids = _numbers(training.pairs.groups)
    print(f"training on {len(training.rows)} pairs of {int(ids.max()) + 1} {_kind(args)}")
    heads, scale, losses = train(training.of(features), ids, settings)
    _print_course(losses)
    model = FrozenEncoders(encoders, frozen, heads, scale, rendering)
    model.save(args.output)
    _print_evaluation(args, model, validation.pairs, held_out)
    print(f'\nSaved. In Python: rankloss_features.heads.load_heads({str(args.output)!r}).encode_texts(["…"])')


def _sides(args: argparse.Namespace, seed: int) -> tuple[Side, Side]:
    """The pairs to train on, and those of ``--val-data``, or a part of the data that is held out."""
    opened = data.open_data(args)
    pairs = Pairs.of(opened)
    if args.val_data is None:
        learned, held_out = split(pairs.groups, seed)
        training = Side(opened, learned, pairs.take(learned))
        validation = Side(opened, held_out, pairs.take(held_out))
    else:
        try:
            val_data = data.open_data(argparse.Namespace(**{**vars(args), "data": args.val_data}))
            val_pairs = Pairs.of(val_data)
        except ValueError as error:
            raise ValueError(str(error).replace("--data ", "--val-data ")) from error
        training = Side(opened, [*range(len(pairs.captions))], pairs)
        validation = Side(val_data, [*range(len(val_pairs.captions))], val_pairs)
        _check_disjoint(args, pairs, val_pairs)
    for purpose, side in (("train", training), ("evaluate", validation)):
        if len(side.rows) < _FEWEST:
            raise ValueError(
                f"{len(side.rows)} pairs are too few to {purpose} on, of {len(pairs.captions)} in --data "
                f"{args.data}; at least {_FEWEST} are needed"
            )
    return training, validation


def _check_disjoint(args: argparse.Namespace, pairs: Pairs, val_pairs: Pairs) -> None:
    """Raise a ValueError for an id, or a picture, that is trained on and evaluated on."""
    both = sorted({*map(str, pairs.groups)} & {*map(str, val_pairs.groups)})
    if both:
        raise ValueError(
            f"{len(both)} {_kind(args)} of --val-data are in --data, too; the first is {both[0]!r}"
        )


def _print_course(losses: list[float]) -> None:
    """Print the loss of some five epochs, and of the last."""
    for epoch in range(0, len(losses), max(1, len(losses) // 5)):
        print(f"epoch {epoch + 1}: loss {losses[epoch]:.3f}")
    print(f"epoch {len(losses)}: loss {losses[-1]:.3f}")


def _print_evaluation(
    args: argparse.Namespace, model: FrozenEncoders, pairs: Pairs, features: dict[str, Tensor]
) -> None:
    """Print the table of ``rankloss evaluate`` of held-out pairs, from the encoders' features of them."""
    projected = {}
    with torch.no_grad():
        for name, x in features.items():
            projected[name] = torch.nn.functional.normalize(
                model.heads[name](x.to(model.teacher.device)), dim=-1
            )
    encoded = pairs.encoded(**{name: x.cpu() for name, x in projected.items()})
    most = min(len(encoded.image_features), len(encoded.text_features))
    ks = [k for k in (1, 5, 10) if k <= most]
    about = described(encoded, str(args.output), str(args.val_data or f"held-out {args.data}"), args.ids_key)
    print()
    print("\n".join(lines({**about, **measure(encoded, ks, by_ids=args.ids_key is not None)}, ks)))


def split(groups: Sequence[object], seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on and those held out: of ten groups one, at least one; none is on both sides.

    Example:
        >>> learned, held_out = split(["a", "a", "b", "c"], 0)
        >>> sorted(learned + held_out), len({"aabc"[row] for row in held_out})
        ([0, 1, 2, 3], 1)
    """
    names = list(dict.fromkeys(groups))
    chosen = set(random.Random(seed).sample(names, max(1, len(names) // _HELD_OUT)))
    learned = [row for row, group in enumerate(groups) if group not in chosen]
    return learned, [row for row, group in enumerate(groups) if group in chosen]


def _numbers(groups: Sequence[object]) -> Tensor:
    numbers: dict[object, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups])


def _kind(args: argparse.Namespace) -> str:
    return "pictures" if args.ids_key is None else f"ids of {args.ids_key!r}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankloss heads",
        description="Train a head on each of two frozen encoders with CLIP's loss, for a few thousand pairs; "
        "evaluate on held-out pairs, and save both with the names of their encoders.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the heads go")
    parser.add_argument("--overwrite", action="store_true", help="replace the heads that are there")
    parser.add_argument("--image-encoder", required=True, metavar="NAME", help="as rankloss features has it")
    parser.add_argument("--image-weights", metavar="PATH", help="as rankloss features has it")
    parser.add_argument("--text-encoder", required=True, metavar="NAME", help="as rankloss features has it")
    data.add_options(parser)
    parser.add_argument("--val-data", metavar="DATA", help="held-out pairs; without it a tenth of the ids")
    parser.add_argument(
        "--ids-key", metavar="COLUMN", help="column of ids: pairs of one id are on one side, and partners"
    )
    defaults = Training()
    for name, kind, text in (
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
