"""Tables and pictures of what ``benchmarks/gpu.py`` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_report import fill, markdown_table

__all__ = ["write_report"]

TITLES = {
    "kernel_agreement": "The kernels against float64: relative errors",
    "waits": "What makes the host wait",
    "precision": "Error of the gradient by the features against float64",
    "costs": "Forward and backward pass",
    "kernel_times": "Each kernel alone",
    "graph_capture": "CUDA graphs",
    "training_step": "A training step in bfloat16",
    "two_processes": "Two processes on the card",
    "kernels_by_name": "Operations by name",
}


def write_report(folder: Path, document: Path | None) -> list[Path]:
    """Write ``report.md`` and the pictures; fill the report into a document between its markers."""
    conditions = json.loads((folder / "conditions.json").read_text(encoding="utf-8"))
    sections = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in TITLES
        if (path := folder / f"{name}.json").exists()
    }
    text = report(conditions, sections)
    written = [folder / "report.md"]
    written[0].write_text(text, encoding="utf-8")
    written += plot(conditions, sections.get("costs", {}), folder)
    if document is not None:
        fill(document, "gpu", text)
        written.append(document)
    return written


def report(conditions: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables as Markdown."""
    known = "; ".join(f"{name} {value}" for name, value in conditions.items())
    parts = [known + "."]
    for name, found in sections.items():
        if name == "kernels_by_name":
            parts += [f"### {TITLES[name]}: {engine}\n\n{_table(of)}" for engine, of in found.items()]
        else:
            parts.append(f"### {TITLES[name]}\n\n{_table(found)}")
    missing = [TITLES[name] for name in TITLES if name not in sections]
    if missing:
        parts.append("Not measured: " + "; ".join(missing) + ".")
    return "\n\n".join(parts) + "\n"


def _table(found: Mapping[str, Any]) -> str:
    rows = {key: value if isinstance(value, dict) else {"": value} for key, value in found.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return markdown_table(
        ["", *(column.replace("_", " ") for column in columns)],
        [[key, *(_cell(row.get(column)) for column in columns)] for key, row in rows.items()],
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}" if abs(value) < 1e-2 and value else f"{value:,.4g}"
    return str(value).replace("|", "\\|")


def plot(conditions: Mapping[str, Any], costs: Mapping[str, Any], folder: Path) -> list[Path]:
    """Time and peak memory of every contender, a group of bars per size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    measured = [(*key.rsplit(", ", 1), of) for key, of in costs.items() if "peak_mib" in of]
    sizes = list(dict.fromkeys(size for _, size, _ in measured))
    contenders = list(dict.fromkeys(name for name, _, _ in measured))
    written = []
    for quantity, label in (("milliseconds", "milliseconds"), ("peak_mib", "MiB added at the peak")):
        if not measured:
            break
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        width = 0.8 / len(contenders)
        for k, name in enumerate(contenders):
            bars = [(sizes.index(size), of[quantity]) for who, size, of in measured if who == name]
            axes.bar([x + k * width for x, _ in bars], [y for _, y in bars], width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(sizes))], sizes)
        axes.set_yscale("symlog" if quantity == "peak_mib" else "log")
        axes.set(xlabel="rows × items", ylabel=label, title=f"{conditions['card']}, {conditions['date']}")
        axes.legend()
        written.append(folder / f"gpu_{quantity}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written
