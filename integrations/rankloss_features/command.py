"""``rankloss features``: a teacher's features of the pairs of a training, computed once.

``--output`` computes them, or goes on where it was stopped; ``--check`` compares a folder with data and
describes it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rankloss.options import check_count
from rankloss_features import aligning, checking, data, sources, writing
from rankloss_features.folder import SPACES
from rankloss_features.image_encoders import did_you_mean


def main(argv: Sequence[str]) -> int:
    """Carry out a command line, and return the exit code: 0, 1 after an error, 130 where it was stopped."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known_options = [option for action in parser._actions for option in action.option_strings]
        hint = did_you_mean(unknown[0], known_options)
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}{hint}")
    command = shlex.join(["rankloss", "features", *argv])
    logging.basicConfig(format="rankloss features: %(message)s")
    logging.getLogger("rankloss_features").setLevel(logging.INFO)
    try:
        check_count("--batch-size", args.batch_size)
        check_count("--workers", args.workers, at_least=0)
        if args.check is not None:
            print(checking.report(args.check, data.open_data(args)))
            return 0
        gpu_of_process = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = sources.device_of(args.device, gpu_of_process if torch.cuda.is_available() else "cpu")
        settings = {
            "dtype": args.dtype,
            "precision": args.precision or writing.precision_on(device),
            "batch_size": args.batch_size,
            "command": command,
        }
        options_of_teacher = sources.options_of_teacher(args)
        pairs = data.open_data(args)
        teacher = sources.load(options_of_teacher, args, device)
        if isinstance(args.align, str):  # a folder, whose projections are taken
            teacher = aligning.aligned_teacher(teacher, args.align)
        write = aligning.write_aligned if args.align is True else writing.write
        write(args.output, pairs, teacher, settings, args.workers)
    except (OSError, ValueError) as error:
        print(f"rankloss features: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rankloss features: stopped; to go on, give the same command: {command}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankloss features",
        description="Compute a teacher's features of the pairs of a training, once. Stopped at any moment, "
        "the same command goes on. Under torchrun the processes share the work.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, metavar="FOLDER", help="where the features go")
    where.add_argument("--check", metavar="FOLDER", help="a folder to compare with the data and describe")
    teacher = parser.add_argument_group("the teacher")
    teacher.add_argument("--model", help="a model of open_clip, hf-hub:… and local-dir:… included")
    teacher.add_argument(
        "--pretrained", metavar="TAG", help="its weights, a tag or a file; of hf-hub:… and local-dir:… none"
    )
    teacher.add_argument(
        "--image-encoder",
        metavar="NAME",
        help="of images: a model of timm or transformers (a folder), or efficientnet-lite0 of the extra "
        "encoders",
    )
    teacher.add_argument("--image-weights", metavar="PATH", help="its weights, a file or a folder with one")
    teacher.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="of texts: a model of sentence-transformers or transformers (a folder), or minilm of the extra "
        "encoders",
    )
    teacher.add_argument(
        "--features",
        metavar="PATH",
        help="a folder or .npz file of image_features and text_features, in the order of the data",
    )
    teacher.add_argument(
        "--spaces",
        choices=SPACES,
        help="of --features: separate if images and texts are of two encoders; else common, for equal widths",
    )
    teacher.add_argument(
        "--align",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="bring images and texts into one space, by projections that are fitted to these pairs (CCA with "
        "ridges), or by those of an aligned folder",
    )
    data.add_options(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of the file")
    how.add_argument("--batch-size", type=int, default=256, metavar="N", help="rows of a forward pass")
    how.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read pictures")
    how.add_argument("--device", help="the teacher's device; a GPU where there is one")
    how.add_argument("--precision", choices=("fp32", "amp_bf16"), help="amp_bf16 on a GPU, else fp32")
    return parser
