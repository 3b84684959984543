"""Build the icons data set: pictures of icons and their names, split by concept.

Run it as ``python examples/icons/build.py --output outputs/icons``; see the README beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "evaluate"))

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from icons_data.package import PACKAGE, VERSION

    parser = argparse.ArgumentParser(
        description=f"Make image–name pairs, held-out concepts and labelled sets from npm's {PACKAGE}."
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/icons"), help="folder for everything")
    parser.add_argument(
        "--tarball",
        type=Path,
        default=None,
        help="the package's file; by default npm fetches it into the output",
    )
    parser.add_argument(
        "--package-version", default=VERSION, help="what npm is asked for (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which concepts are held out (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default: %(default)s)")
    parser.add_argument(
        "--png", action="store_true", help="also write PNG files and train.csv, validation.csv, test.csv"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"argument --workers: must be at least 1, got {args.workers}")
    if args.tarball is not None and not args.tarball.is_file():
        parser.error(f"argument --tarball: no such file: {args.tarball}")
    return args


def recipe() -> str:
    """Return a fingerprint of the source, by which a build of an older recipe is recognised."""
    digest = hashlib.sha256()
    for path in sorted((HERE / "icons_data").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(
    output: Path,
    tarball: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    png: bool = False,
    track: Track | None = None,
) -> dict[str, Any]:
    """Build the data set into ``output``, which is complete once it holds ``manifest.json``.

    Args:
        output: The folder. Drawings are kept in its ``cache``; what an older build left there is replaced.
        tarball: The package.
        seed: Which concepts are held out.
        workers: Number of processes that draw.
        png: Whether to write PNG files and tables of their paths as well.
        track: Wraps loops, given their length and what is being done.

    Returns:
        The manifest.
    """
    from icons_data import baseline, card, draw, labels, package, records, split, write

    track = track or (lambda items, _length, _what: items)
    version, packaged = package.read(tarball)
    left_out = {
        prefix: reason
        for prefix, data in packaged.items()
        if (reason := package.reason_to_leave_out(prefix, data))
    }
    left_out |= {prefix: "of a vendor that is held out" for prefix in split.OF_A_SHIFT if prefix in packaged}
    brands = package.brand_names(packaged)
    chosen = [prefix for prefix in packaged if prefix not in left_out]
    icons = [
        icon
        for prefix in track(chosen, len(chosen), "Reading names")
        for icon in package.icons_of(prefix, packaged[prefix], brands)
    ]
    sets = [package.describe(prefix, packaged[prefix]) for prefix in chosen]
    del packaged  # a gigabyte
    pngs, thumbnails = draw.draw_all(icons, output / "cache", workers=workers, progress=track)
    parts = split.split(icons, thumbnails, seed=seed)
    rows, order, ranges = records.make(icons, parts, {one.prefix: one.palette for one in sets}, seed=seed)
    pngs, thumbnails = [pngs[position] for position in order], thumbnails[order]
    labelled = labels.build([icons[position] for position in order], [row.side for row in rows])
    sets = [one for one in sets if any(row.set == one.prefix for row in rows)]

    manifest = {
        "package": f"{package.PACKAGE} {version}",
        "seed": seed,
        "png": png,
        "recipe": recipe(),
        "tarball": _digest(tarball),
        "ranges": ranges,
        "labelled": [one.name for one in labelled],
        "counts": parts.counts,
    }
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as temporary:
        work = Path(temporary)
        write.images(work / "images.npy", pngs, track)
        records.write_table(work / "records.csv", rows)
        write.labels(work / "labels", labelled)
        write.shards(work / "shards", rows, pngs, ranges, track)
        write.benchmark(work / "benchmark", rows, pngs, labelled, track)
        if png:
            write.files(work, rows, pngs, ranges, track)
        attributions = card.attributions(sets, rows, version)
        (work / "ATTRIBUTIONS.md").write_text(attributions, encoding="utf-8")
        for _ in track(["pixels"], 1, "Untrained baseline"):
            retrieval = baseline.retrieval(rows, thumbnails, ranges)
            classification = baseline.classification(labelled, thumbnails)
        text = card.data_card(
            version=version,
            seed=seed,
            sets=sets,
            left_out=left_out,
            records=rows,
            ranges=ranges,
            counts=parts.counts,
            retrieval=retrieval,
            classification=classification,
        )
        (work / "DATA_CARD.md").write_text(text, encoding="utf-8")
        (output / "manifest.json").unlink(missing_ok=True)
        for path in sorted(work.iterdir()):
            _replace(path, output / path.name)
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _slowly(file)
        )


def _slowly(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def is_complete(output: Path, tarball: Path, *, seed: int, png: bool) -> bool:
    """Say whether ``output`` holds this very build already."""
    path = output / "manifest.json"
    if not path.is_file():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"seed": seed, "recipe": recipe(), "tarball": _digest(tarball)}
    return all(stored[key] == value for key, value in wanted.items()) and (stored["png"] or not png)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the build, unless it is complete already."""
    try:
        import resvg_py  # noqa: F401
        import sklearn  # noqa: F401
        import torchmetrics  # noqa: F401
        import webdataset  # noqa: F401
        from rich.console import Console
        from rich.progress import track as rich_track
    except ModuleNotFoundError as error:
        sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]'")
    from icons_data import package

    args = _parse(argv)
    console = Console()

    def track(items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        return rich_track(items, description=what, total=length, console=console)

    started = time.monotonic()
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        tarball = args.tarball or package.fetch(output / "cache", args.package_version)
    except RuntimeError as error:
        console.print(f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    if is_complete(output, tarball, seed=args.seed, png=args.png):
        console.print(f"Complete already: {output}", highlight=False, soft_wrap=True)
        return 0
    try:
        manifest = build(output, tarball, seed=args.seed, workers=args.workers, png=args.png, track=track)
    except KeyboardInterrupt:
        console.print("Interrupted; what was drawn is kept and need not be drawn again.", style="red")
        return 130
    start, stop = manifest["ranges"]["train"]
    console.print(
        f"{stop - start:,} pairs to train on, {len(manifest['labelled'])} labelled sets, in "
        f"{time.monotonic() - started:.0f} s: {output}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        "The pictures' authors and licences are in ATTRIBUTIONS.md there.", style="dim", highlight=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
