"""Command line, tables and files of all benchmarks."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parser_of(doc: str, output: str = "outputs/bench") -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(output), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    parser.add_argument("--results", type=Path, help="measure nothing: report this JSON of a run again")
    parser.add_argument("--write", type=Path, help="also fill the table into this file, between its markers")
    return parser


def benchmark(
    args: argparse.Namespace,
    marker: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    files: tuple[str, str],
) -> dict[str, Any]:
    """Measure, or read what was measured; write both files, the results and the report; print the report."""
    results: dict[str, Any]
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results else measure(args)
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in zip(files, (json.dumps(results, indent=2) + "\n", text), strict=True):
        (args.output / name).write_text(content, encoding="utf-8")
    if args.write:
        fill(args.write, marker, text)
    print(text)
    print("Wrote", *(args.output / name for name in files), *([args.write] if args.write else []))
    return results


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def fill(path: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- bench:name -->`` and ``<!-- /bench:name -->``, in place of what is there.

    Raises:
        ValueError: unless the file has the two markers once, in this order.
    """
    before = path.read_text(encoding="utf-8")
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    if before.count(start) != 1 or before.count(end) != 1 or not pattern.search(before):
        raise ValueError(f"{path} must hold {start} and {end} once, in this order, to be filled")
    path.write_text(pattern.sub(lambda m: m[1] + text.rstrip() + "\n" + m[2], before), encoding="utf-8")


def under(c: Mapping[str, Any]) -> str:
    """The conditions of a measurement as a sentence."""
    return (
        f"{c['cpu']}, {c['threads']} threads of {c['cores']} cores, load average {c['load_average']} at the "
        f"start; {c['system']}, "
        f"Python {c['python']}, torch {c['torch']}, NumPy {c['numpy']}, rankloss {c['rankloss']}; "
        f"D = {c['d']}, float32; {c['date']}."
    )
