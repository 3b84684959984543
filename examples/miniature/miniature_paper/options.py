"""The options that the miniature's two commands share, and what they prepare."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from examples_common.records import Store
from examples_common.terminal import positive, tracker
from examples_common.trainer import place_model
from icons_data.load import load
from joblib import cpu_count
from rich.console import Console

from . import data
from .grid import BACKBONES, model_folder
from .runs import Machine, Workshop

_EXAMPLE = Path(__file__).resolve().parents[1]


def add_options(parser: argparse.ArgumentParser, presets: Sequence[str]) -> None:
    """Add the preset, the machine and the folders."""
    add = parser.add_argument
    add("--preset", choices=tuple(presets), default="quick", help="size (default: %(default)s)")
    add("--jobs", type=positive, help="runs at a time (default: one per core, or one on a GPU)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    add("--output", type=Path, default=Path("outputs/miniature"), help="folder for data and runs")
    add("--icons", type=Path, default=Path("outputs/icons"), help="the icons; built there if missing")
    add("--results", type=Path, help="folder of the records (default: by the preset)")
    add("--report", type=Path, help="folder of the report (default: by the preset)")
    add("--report-only", action="store_true", help="train nothing; report the records that are there")


def complete_options(parser: argparse.ArgumentParser, args: argparse.Namespace, *, records: str) -> None:
    """Check what :func:`add_options` added, and fill in its folders; ``records`` is below ``results``."""
    if args.device is not None and args.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"argument --device: must be cpu or cuda, got {args.device}")
    # The full preset's records are part of the repository: runs resume from them.
    home = _EXAMPLE if args.preset == "full" else args.output / args.preset
    args.results = args.results or home / "results" / records
    args.report = args.report or home / "report"
    for name in ("output", "icons", "results", "report"):
        setattr(args, name, getattr(args, name).resolve())


def prepare(args: argparse.Namespace, sizes: Sequence[int], console: Console) -> Workshop:
    """Build the icons and write the pairs, if they are missing, and return where models are made.

    Both commands pass all sizes of the preset, so that they share the pictures on the disk.

    Raises:
        ValueError: If a GPU is requested and there is none.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"argument --device: {device}, but torch sees no GPU")
    args.output.mkdir(parents=True, exist_ok=True)
    console.rule("Data")
    data.build_icons(args.icons)
    tables = data.prepare(load(args.icons), args.output, sizes, tracker(console))
    for backbone in BACKBONES:
        place_model(model_folder(backbone), args.output / "models" / model_folder(backbone).name)
    return Workshop(
        output=args.output,
        icons=args.icons,
        tables=tables,
        store=Store(args.results),
        machine=Machine(device, args.jobs or (cpu_count() if device == "cpu" else 1)),
    )
