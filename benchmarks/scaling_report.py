"""From measurements to a table, plots and a verdict on every target; measures nothing itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Point", "exponent", "fill", "markdown_table", "plot", "report", "save", "targets"]

_MIB, _GIB = 2**20, 2**30
_FIT_FROM = 1024  # pairs: below, what does not grow with N counts too much


class Point(NamedTuple):
    """One loss at one N; None where it was not measured."""

    loss: str
    n: int
    seconds: float | None = None
    seconds_alone: float | None = None
    added_bytes: float | None = None
    peak_bytes: float | None = None
    saved_bytes: float | None = None

    @property
    def any_seconds(self) -> float | None:
        """In turns with the others where that was done, else alone."""
        return self.seconds if self.seconds is not None else self.seconds_alone


class Target(NamedTuple):
    """What a run is to show: ``value`` on the right side of ``bound``; None where it was not measured."""

    what: str
    value: float | None
    at_least: bool
    bound: float
    form: str = "{:.2f}×"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def row(self) -> list[str]:
        side = "at least " if self.at_least else "at most "
        value = "not measured" if self.value is None else self.form.format(self.value)
        verdict = {True: "yes", False: "**no**", None: "–"}[self.met]
        return [self.what, side + self.form.format(self.bound), value, verdict]


def exponent(ns: Sequence[float], values: Sequence[float | None], start: int = _FIT_FROM) -> float | None:
    """p of ``values ∝ N^p``, by least squares of the logarithms over N ≥ start; None below two points."""
    kept = [(n, v) for n, v in zip(ns, values, strict=True) if n >= start and v is not None and v > 0]
    if len(kept) < 2:
        return None
    n, v = np.log(np.array(kept, dtype=float)).T
    return float(np.polyfit(n, v, 1)[0])


def targets(points: Iterable[Point], step: Mapping[str, float] | None) -> list[Target]:
    """The targets that were set before anything was measured, for 2 CPU cores and D = 512."""
    at = {(p.loss, p.n): p for p in points}
    naive, clip = "naive terms", "ClipLoss"
    sort, binned, fused = "RankConsistency sort", "RankConsistency bin", "RankClipLoss bin"
    distill = "rankclip-distill"

    def seconds(above: str, below: str, n: int = 4096) -> float | None:
        a, b = at.get((above, n)), at.get((below, n))
        return None if a is None or b is None else _ratio(a.seconds, b.seconds)

    def added(above: tuple[str, int], below: tuple[str, int]) -> float | None:
        a, b = at.get(above), at.get(below)
        return None if a is None or b is None else _ratio(a.added_bytes, b.added_bytes)

    rows = [
        Target("naive / sort, time, N = 4,096", seconds(naive, sort), True, 2.5),
        Target("naive / sort, added memory, N = 4,096", added((naive, 4096), (sort, 4096)), True, 12),
        Target("naive / bin, time, N = 4,096", seconds(naive, binned), True, 5),
        Target("RankClipLoss bin / ClipLoss, time, N = 4,096", seconds(fused, clip), False, 4),
        Target(f"{distill} / ClipLoss, time, N = 4,096", seconds(distill, clip), False, 2.5),
    ]
    for loss in ("ClipLoss", "SigLipLoss"):
        streamed = f"{loss} streamed"
        both = [n for _, n in at if n > 4096 and seconds(streamed, loss, n) is not None]
        for n in (4096, *([max(both)] if both else [])):  # the second: where open_clip's just fits
            value = seconds(streamed, loss, n)
            rows.append(Target(f"{streamed} / {loss}, time, N = {n:,}", value, False, 1.3))
        largest = at.get((streamed, 32768))
        memory = None if largest is None or largest.added_bytes is None else largest.added_bytes / _GIB
        rows.append(Target(f"{streamed}, added memory, N = 32,768", memory, False, 1, "{:.2f} GiB"))
    for loss in (sort, binned):
        growth = added((loss, 16384), (loss, 8192))
        rows.append(Target(f"{loss}, added memory, N = 16,384 / 8,192", growth, False, 2.2))
    for loss in (sort, binned):
        largest = at.get((loss, 32768))
        peak = None if largest is None or largest.peak_bytes is None else largest.peak_bytes / _GIB
        rows.append(Target(f"{loss}, whole process, N = 32,768", peak, False, 2, "{:.2f} GiB"))
    ratio = None if step is None else step["--loss rankclip"]
    rows.append(Target("demo's step, --loss rankclip / --loss clip", ratio, False, 1.03, "{:.3f}×"))
    return rows


def report(results: Mapping[str, Any]) -> str:
    """The Markdown that a run leaves, from the content of its ``results.json``."""
    points = [Point(**p) for p in results["points"]]
    step = results.get("step")
    parts = [
        _conditions(results["conditions"]),
        "**Time of forward and backward, seconds.** Losses at one N ran in turns in one process (median); "
        "with *, a single run in a process of its own. In brackets: as a multiple of ClipLoss's.",
        _by_loss(points, lambda p: p.any_seconds, _seconds_cell(points)),
        "**Added memory, MiB**: the peak during forward and backward above what was resident before, each in "
        "a fresh process. In brackets: what forward keeps for backward, where it was counted.",
        _by_loss(points, lambda p: p.added_bytes, _memory_cell),
        f"p: fitted exponent, ∝ N^p, from N = {_FIT_FROM:,}.",
    ]
    if step:
        parts.append(
            "**A training step of the demo's model**, batch 128, as a multiple of that with ClipLoss."
        )
        parts.append(markdown_table(["loss", "ratio"], [[k, f"{v:.3f}"] for k, v in step["ratio"].items()]))
    parts.append("**Targets**, as measured in this run.")
    rows = [t.row for t in targets(points, step["ratio"] if step else None)]
    parts.append(markdown_table(["what", "target", "measured", "met"], rows))
    for note in results.get("notes", ()):
        parts.append(f"- {note}")
    return "\n\n".join(parts) + "\n"


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


def save(folder: Path, name: str, results: Mapping[str, Any], text: str) -> None:
    """Write ``name.json`` and ``name.md`` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def plot(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Time and added memory against N on logarithmic axes, a line a loss; its exponent is in the legend."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    points = [Point(**p) for p in results["points"]]
    c = results["conditions"]
    written = []
    quantities: dict[str, tuple[str, Callable[[Point], float | None]]] = {
        "time": ("seconds, forward and backward", lambda p: p.any_seconds),
        "memory": ("MiB added", lambda p: None if p.added_bytes is None else p.added_bytes / _MIB),
    }
    for name, (label, of) in quantities.items():
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        for loss in _losses(points):
            drawn = [(p.n, y) for p in points if p.loss == loss and (y := of(p)) is not None and y > 0]
            if not drawn:
                continue
            n, y = zip(*drawn, strict=True)
            p = exponent(n, y)
            axes.plot(n, y, "o-", label=loss if p is None else f"{loss}: ∝ N^{p:.2f}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set(xlabel="N, pairs", ylabel=label)
        axes.set_title(
            f"{c['cpu']}, {c['threads']} threads, D = {c['d']}, torch {c['torch']}, {c['date']}", fontsize=9
        )
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / f"scaling_{name}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(path)
    return written


def _conditions(c: Mapping[str, Any]) -> str:
    load = "" if c.get("load_average") is None else f", load average {c['load_average']} at the start"
    return (
        f"{c['cpu']}, {c['threads']} threads of {c['cores']} cores{load}; {c['system']}, "
        f"Python {c['python']}, torch {c['torch']}, NumPy {c['numpy']}, rankloss {c['rankloss']}; "
        f"D = {c['d']}, float32; {c['date']}."
    )


def _by_loss(
    points: Sequence[Point], of: Callable[[Point], float | None], cell: Callable[[Point], str]
) -> str:
    """A row a loss, a column an N, and the exponent."""
    ns = sorted({p.n for p in points})
    at = {(p.loss, p.n): p for p in points}
    rows = []
    for loss in _losses(points):
        mine = [at.get((loss, n)) for n in ns]
        p = exponent(ns, [None if x is None else of(x) for x in mine])
        cells = ["–" if x is None or of(x) is None else cell(x) for x in mine]
        rows.append([loss, *cells, "–" if p is None else f"{p:.2f}"])
    return markdown_table(["N =", *(f"{n:,}" for n in ns), "p"], rows)


def _seconds_cell(points: Sequence[Point]) -> Callable[[Point], str]:
    clip = {p.n: p for p in points if p.loss == "ClipLoss"}

    def cell(p: Point) -> str:
        text = f"{p.any_seconds:.3g}" + ("*" if p.seconds is None else "")
        base = clip.get(p.n)
        ratio = None if base is None else _ratio(p.seconds, base.seconds)
        return text if ratio is None or p.loss == "ClipLoss" else f"{text} ({ratio:.1f}×)"

    return cell


def _memory_cell(p: Point) -> str:
    assert p.added_bytes is not None
    saved = "" if p.saved_bytes is None else f" ({p.saved_bytes / _MIB:.1f})"
    return f"{p.added_bytes / _MIB:,.1f}{saved}"


def _losses(points: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(p.loss for p in points))


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
