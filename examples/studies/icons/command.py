"""The command ``python -m studies.icons``, and the build itself."""

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from openmoji_demo.terminal import Track, positive, say, status_of, tracker
from rich.console import Console

from . import draw, labels, package, records, split, write


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Make image–name pairs, held-out concepts and labelled sets from npm's @iconify/json."
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/icons"), help="folder for everything")
    add("--tarball", type=Path, help="the package's file; by default npm fetches it into the output")
    add("--seed", type=int, default=0, help="which concepts are held out (default: %(default)s)")
    add("--workers", type=positive, default=2, help="processes that draw (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.tarball is not None and not args.tarball.is_file():
        parser.error(f"argument --tarball: no such file: {args.tarball}")
    return args


def identity(tarball: Path, seed: int) -> dict[str, Any]:
    """Return what identifies a build: the seed, this package's source, and the tarball."""
    source = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".md", ".yaml"))
    recipe, content = (hashlib.sha256(b"".join(p.read_bytes() for p in of)) for of in (source, [tarball]))
    return {"seed": seed, "recipe": recipe.hexdigest()[:16], "tarball": content.hexdigest()}


def build(
    output: Path,
    tarball: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    track: Track = lambda items, _length, _what: items,
) -> dict[str, Any]:
    """Build the data set and return its manifest.

    The folder is complete once it holds ``manifest.json``. Drawings are kept in its ``cache``; the rest of an
    older build is replaced.
    """
    version, packaged = package.read(tarball)
    reasons = {prefix: package.reason_to_leave_out(prefix, data) for prefix, data in packaged.items()}
    chosen = [prefix for prefix, reason in reasons.items() if reason is None]
    brands = package.brand_names(packaged)
    icons = [
        icon
        for prefix in track(chosen, len(chosen), "Reading names")
        for icon in package.icons_of(prefix, packaged[prefix], brands)
    ]
    sets = [package.describe(prefix, packaged[prefix]) for prefix in chosen]
    del packaged  # a gigabyte
    pngs, thumbnails = draw.draw_all(icons, output / "cache", workers=workers, track=track)
    parts = split.split(icons, thumbnails, seed=seed)
    rows, order, ranges = records.make(icons, parts, {one.prefix: one.palette for one in sets}, seed=seed)
    pngs = [pngs[position] for position in order]
    labelled = labels.build([icons[position] for position in order], [row.side for row in rows])
    sides = {side: rows[slice(*ranges[side])] for side in split.SIDES if side in ranges}
    manifest = {
        "package": f"{package.PACKAGE} {version}",
        **identity(tarball, seed),
        "ranges": ranges,
        "labelled": [one.name for one in labelled],
        "counts": parts.counts,
        "left_out": {prefix: reason for prefix, reason in reasons.items() if reason},
    }
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as temporary:
        work = Path(temporary)
        write.images(work / "images.npy", pngs, track)
        records.write_table(work / "records.csv", rows)
        write.labels(work / "labels", labelled)
        write.shards(work / "shards", sides, pngs, track)
        write.attributions(work, version, sets, rows)
        (output / "manifest.json").unlink(missing_ok=True)
        for path in sorted(work.iterdir()):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def is_complete(output: Path, tarball: Path, *, seed: int) -> bool:
    """Say whether ``output`` holds this very build already."""
    path = output / "manifest.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return identity(tarball, seed).items() <= stored.items()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the build, unless it is complete already."""
    return status_of(partial(_run, parse(argv)))


def _run(args: argparse.Namespace, console: Console) -> int:
    """Build the icons that the arguments ask for, unless they are complete, and return the exit status."""
    started = time.monotonic()
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    tarball = args.tarball or package.fetch(output / "cache")
    if is_complete(output, tarball, seed=args.seed):
        say(console, f"Complete already: {output}")
        return 0
    track = tracker(console)
    manifest = build(output, tarball, seed=args.seed, workers=args.workers, track=track)
    start, stop = manifest["ranges"]["train"]
    made = f"{stop - start:,} pairs to train on, {len(manifest['labelled'])} labelled sets"
    say(console, f"{made}, in {time.monotonic() - started:.0f} s: {output}")
    say(console, "The pictures' authors and licences are in ATTRIBUTIONS.md there.", "dim")
    return 0
