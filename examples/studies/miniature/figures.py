"""Figures 3, 4, 6 and 7, as small PNGs."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from PIL import Image
from scipy.ndimage import zoom
from scipy.stats import gaussian_kde

from studies.report import COLOURS, Picture, fill, picture
from studies.statistics import Arms, Estimate

from .scores import LOSS_NAMES, Measure
from .settings import Setting
from .tables import (
    REFERENCE,
    TERM_NAMES,
    Quoted,
    shift_measure,
    size_measures,
    sweep_measures,
    sweep_of,
)

if TYPE_CHECKING:
    from .exhibits import Collection

_WIDTH = 8.4
CLIP, RANK, MUTED, INK, QUOTED = (f"C{number}" for number in range(5))  # the style's colours

# What ``templates/alt.md`` says of a figure to those who cannot see it, and how it is drawn.
_ALT = Path(__file__).with_name("templates") / "alt.md"
Drawing = tuple[dict[str, Any], Callable[[], Figure]]


def draw(collection: Collection, paper: Mapping[str, Quoted]) -> dict[str, Picture]:
    """Draw every figure, by the names of ``exhibits.EXHIBITS``."""
    drawn = {}
    for key, of in {"figure3": _sweep, "figure4": _sizes, "figure6": _umaps, "figure7": _heat}.items():
        values, figure_of = of(collection, paper[key])
        # Heat maps have more colours than a palette holds.
        colours = None if key == "figure7" else COLOURS
        drawn[key] = picture(fill(_ALT, key=key, **values).strip(), figure_of, colours=colours)
    return drawn


# --- Figure 3 ---


def _sweep(collection: Collection, quoted: Quoted) -> Drawing:
    shown, plotted = collection.arms("figure3"), sweep_measures(collection)
    clip = next(m for m in shown.records if m.loss == REFERENCE)

    def figure_of() -> Figure:
        figure = Figure(figsize=(_WIDTH, 8.2), layout="constrained")
        axes = figure.subplots(len(plotted) + 1, len(TERM_NAMES), sharey="row")
        for column, (term, name) in enumerate(TERM_NAMES.items()):
            models = sweep_of(shown.records, term)
            for axis, measure in zip(axes[:, column], plotted, strict=False):
                level = shown.estimate(clip, measure)
                axis.axhline(level.mean, color=CLIP, lw=1.2, ls="--", label="CLIP")
                axis.axhspan(level.low, level.high, color=CLIP, alpha=0.15, lw=0)
                _line(axis, shown, {m: float(x) for x, m in enumerate(models)}, measure, RANK, "RankCLIP")
                axis.set_xticks(range(len(models)), [f"{getattr(m, term):g}" for m in models])
                axis.set_xlim(-0.4, len(models) - 0.6)
                axis.grid(axis="y")
                axis.set_ylabel("" if column else f"{measure.group},\n{measure.label} (%)")
            axes[0, column].set_title(name)
            _quoted_lines(axes[-1, column], quoted, term)
            axes[-1, column].set_xlabel(name.partition(",")[0])
        axes[0, 0].legend(loc="best")
        axes[-1, 0].set_ylabel("%")
        return figure

    return {"spans": _spans(shown, plotted)}, figure_of


def _quoted_lines(axis: Axes, quoted: Quoted, term: str) -> None:
    axis.set_facecolor(QUOTED)
    axis.set_title(f"The paper's {quoted['source']}: {quoted['setting']}", fontsize=8.5)
    lines = [s for s in quoted["series"] if s["panel"] == term]
    levels = {s["name"]: s["y"][0] for s in quoted["series"] if s["panel"] == "scheduled"}
    for line, style, mark in zip(lines, ("-", "--"), ("^", "s"), strict=True):
        looks = {"marker": mark, "color": INK, "lw": 1.2, "markersize": 4.5}
        axis.plot(line["x"], line["y"], style, label=line["name"], **looks)
        axis.axhline(levels[line["name"]], color=MUTED, lw=0.9, ls=":")
    axis.set_xticks(lines[0]["x"])
    axis.grid(axis="y")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")


# --- Figure 4 ---


def _sizes(collection: Collection, quoted: Quoted) -> Drawing:
    shown = collection.arms("figure4")
    sizes = sorted({m.pairs for m in shown.records})
    zero_shot, retrieval = sweep_measures(collection)
    shifted = shift_measure(collection)

    def figure_of() -> Figure:
        figure = Figure(figsize=(_WIDTH, 6.6), layout="constrained")
        first, second, third, last = figure.subplots(2, 2).flat
        colours = {"clip": CLIP, "rankclip": RANK}
        for axis, measure in ((first, zero_shot), (second, retrieval)):
            _size_axis(axis, sizes)
            for (loss, colour), shift in zip(colours.items(), (0.97, 1.03), strict=True):  # side by side
                positions = {m: m.pairs * shift for m in _by_size(shown, loss)}
                _line(axis, shown, positions, measure, colour, LOSS_NAMES[loss])
            axis.set_title(measure.name, fontsize=9)
            axis.set_ylabel("%")
        first.legend(loc="best")
        _robustness(third, shown, zero_shot, shifted, colours)
        last.set_facecolor(QUOTED)
        last.set_title(f"The paper's {quoted['source']}: ImageNet1K top-1", fontsize=9)
        for line in (s for s in quoted["series"] if s["panel"] == "size"):
            looks = {"marker": "o", "color": colours[line["name"]], "markersize": 4}
            last.plot(line["x"], line["y"], label=LOSS_NAMES[line["name"]], **looks)
            _size_axis(last, [int(x) for x in line["x"] if x is not None])
        last.set_ylabel("%")
        return figure

    return {"spans": _spans(shown, size_measures(collection)), "sizes": sizes}, figure_of


def _by_size(shown: Arms, loss: str) -> list[Setting]:
    return sorted((m for m in shown.records if m.loss == loss), key=lambda m: m.pairs)


def _robustness(
    axis: Axes, shown: Arms, plain: Measure, shifted: Measure | None, colours: Mapping[str, str]
) -> None:
    """Accuracy under shift against accuracy without: a point above the other's line would be robustness."""
    axis.set_title("Under shift against without, one point per size", fontsize=9)
    axis.set_xlabel(f"{plain.name} (%)", fontsize=8.5)
    if shifted is None:
        return
    axis.set_ylabel(f"{shifted.group},\n{shifted.label} (%)", fontsize=8.5)
    for (loss, colour), mark in zip(colours.items(), ("o", "^"), strict=True):
        models = _by_size(shown, loss)
        (xs, x_halves), (ys, y_halves) = (
            _intervals(shown.estimate(m, measure) for m in models) for measure in (plain, shifted)
        )
        looks = {"fmt": f"{mark}:", "markersize": 5, "lw": 0.8, "elinewidth": 1, "alpha": 0.8}
        axis.errorbar(xs, ys, y_halves, x_halves, color=colour, **looks)
    axis.grid()


def _size_axis(axis: Axes, sizes: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_major_formatter(FixedFormatter([_short(n) for n in sizes]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("training pairs")
    axis.grid()


def _short(n: int) -> str:
    return f"{n / 1e6:g}M" if n >= 1_000_000 else f"{n / 1000:.3g}k" if n >= 1000 else f"{n}"


# --- Figure 6 ---


def _pictured(collection: Collection, key: str, part: str) -> list[tuple[Setting, dict[str, Any]]]:
    records = ((model, of[0]) for model, of in collection.arms(key).records.items())
    return [(model, record["figures"][part]) for model, record in records]


def _umaps(collection: Collection, quoted: Quoted) -> Drawing:  # noqa: ARG001
    shown = [
        (LOSS_NAMES[m.loss], points, collection.records[m]["metrics"]["geometry/test"]["modality_gap"])
        for m, points in _pictured(collection, "figure6", "umap")
    ]

    def figure_of() -> Figure:
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(_WIDTH, 3.5 * rows), layout="constrained")
        cells = figure.add_gridspec(rows, columns)
        for number, (name, points, gap) in enumerate(shown):
            inner = cells[divmod(number, columns)].subgridspec(2, 1, height_ratios=[1, 4], hspace=0)
            above, axis = inner.subplots(sharex=True)
            _scatter(axis, above, points)
            above.set_title(name, fontsize=9)
            axis.set_xlabel(f"modality gap {gap:.2f}", fontsize=8.5)
            if number == 0:
                axis.legend(loc="best", handletextpad=0.1, fontsize=8, markerscale=2)
        return figure

    return {"shown": shown}, figure_of


def _scatter(axis: Axes, above: Axes, points: dict[str, Any]) -> None:
    images, texts = np.array(points["image"], dtype=float), np.array(points["text"], dtype=float)
    links = LineCollection(np.stack([images, texts], axis=1), colors=MUTED, linewidths=0.4, alpha=0.35)
    axis.add_collection(links)
    clouds = ((images, RANK, "o", "pictures"), (texts, CLIP, "s", "texts"))
    for cloud, colour, mark, label in clouds:
        axis.scatter(*cloud.T, s=5, color=colour, marker=mark, linewidths=0, alpha=0.8, label=label)
    axis.margins(0.06)
    axis.autoscale_view()
    axis.autoscale(False)  # contours and densities reach beyond the points
    above.autoscale(False, axis="x")
    for cloud, colour, *_ in clouds:
        _contours(axis, cloud, colour)
        _density(above, cloud[:, 0], colour)
    above.set_ylim(bottom=0)
    for part in (axis, above):
        part.set(xticks=[], yticks=[])
    above.spines[["left", "bottom"]].set_visible(False)


def _contours(axis: Axes, cloud: np.ndarray, colour: str) -> None:
    if density := _kde(cloud.T):
        margin = 0.25 * np.ptp(cloud, axis=0)
        (left, bottom), (right, top) = cloud.min(0) - margin, cloud.max(0) + margin
        grid = np.mgrid[left:right:60j, bottom:top:60j]
        # Lines around a quarter, a half and three quarters of the points.
        levels = np.unique(np.quantile(density(cloud.T), [0.25, 0.5, 0.75]))
        values = density(grid.reshape(2, -1)).reshape(60, 60)
        axis.contour(*grid, values, levels=levels, colors=[colour], linewidths=0.9)


def _density(axis: Axes, values: np.ndarray, colour: str) -> None:
    if density := _kde(values):
        spread = 0.25 * np.ptp(values)
        xs = np.linspace(values.min() - spread, values.max() + spread, 120)
        axis.fill_between(xs, density(xs), color=colour, alpha=0.25, lw=0)
        axis.plot(xs, density(xs), color=colour, lw=1)
    axis.axvline(float(np.median(values)), color=colour, lw=1, ls="--")


def _kde(points: np.ndarray) -> gaussian_kde | None:
    try:
        return gaussian_kde(points)
    except (np.linalg.LinAlgError, ValueError):  # too few points, or all on a line
        return None


# --- Figure 7 ---


def _heat(collection: Collection, quoted: Quoted) -> Drawing:  # noqa: ARG001
    shown = [(LOSS_NAMES[m.loss], maps) for m, maps in _pictured(collection, "figure7", "heat_maps")]

    def figure_of() -> Figure:
        first = shown[0][1]
        figure = Figure(figsize=(_WIDTH, 0.5 + 1.28 * len(first)), layout="constrained")
        axes = figure.subplots(len(first), len(shown) + 1, squeeze=False)
        for row, one in enumerate(first):
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["image"]))).convert("RGB"))
            _show(axes[row, 0], picture)
            axes[row, 0].set_xlabel("\n".join(textwrap.wrap(one["text"], 18)[:2]), fontsize=7.5)
            for axis, (_, maps) in zip(axes[row, 1:], shown, strict=True):
                cells = np.array(maps[row]["map"], dtype=float)
                _show(axis, picture)
                _overlay(axis, cells, picture.shape[:2])
                axis.set_xlabel(f"± {np.abs(cells).max():.2g}", fontsize=7.5)
        for axis, name in zip(axes[0], ["picture", *(name for name, _ in shown)], strict=True):
            wrapped = textwrap.wrap(name, 14, break_on_hyphens=False)
            axis.set_title("\n".join(wrapped), fontsize=8, loc="center")
        return figure

    return {"shown": shown}, figure_of


def _show(axis: Axes, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, linewidth=0.5)


def _overlay(axis: Axes, cells: np.ndarray, shape: tuple[int, ...]) -> None:
    """Red where covering hurts, blue where it helps, as strong as the effect in this map's own range."""
    # As fine as half a pixel: a smooth map would make the file several times as large.
    fine = zoom(cells, [2 * side / n for side, n in zip(shape, cells.shape, strict=True)], order=1)
    strength = np.abs(fine) / max(float(np.abs(cells).max()), 1e-12)
    colours = {"cmap": ListedColormap(["#1f6fd6", "#e02b1d"]), "vmin": -1e-12, "vmax": 1e-12}
    extent = (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)
    axis.imshow(fine, alpha=0.8 * strength, extent=extent, interpolation="nearest", **colours)


# --- parts ---


def _spans(shown: Arms, plotted: Sequence[Measure]) -> dict[str, list[float]]:
    """Return the means of every measure."""
    return {m.name: [shown.estimate(one, m).mean for one in shown.records] for m in plotted}


def _intervals(estimates: Iterable[Estimate]) -> tuple[list[float], list[float]]:
    """Return means, and halves of the intervals: nothing where one seed has none."""
    found = list(estimates)
    return [e.mean for e in found], [e.half_width or 0.0 for e in found]


def _line(
    axis: Axes, shown: Arms, at: Mapping[Setting, float], measure: Measure, colour: str, label: str
) -> None:
    """Means with their intervals, and beside them every seed as a small point."""
    beside = (lambda x: x * 1.07) if axis.get_xscale() == "log" else (lambda x: x + 0.12)
    for model, x in at.items():
        values = list(shown.values(model, measure).values())
        axis.plot([beside(x)] * len(values), values, ".", color=colour, markersize=4, alpha=0.6)
    xs, (means, halves) = list(at.values()), _intervals(shown.estimate(m, measure) for m in at)
    looks = {"color": colour, "marker": "o", "markersize": 4.5, "lw": 1.4, "capsize": 3}
    axis.errorbar(xs, means, halves, label=label, **looks)
    axis.scatter(xs, means, 20, [colour] * len(xs), edgecolors=colour, zorder=5)
