"""One picture's ranking of the concepts and its caption's, under CLIP and under RankCLIP."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from openmoji_demo.slope_chart import compare_rankings
from style import WIDTH, Colors

RECORD = Path(__file__).parents[2] / "docs/assets/agreement.json"  # a copy of what the demo wrote


def draw(_: Colors) -> Figure:
    """Two slope charts, one above the other: names need the width."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    labels = [label if len(label) <= 22 else label[:20].rstrip() + " …" for label in record["labels"]]
    figure = Figure(figsize=(WIDTH, 7.4), layout="constrained")
    figure.get_layout_engine().set(hspace=0.05)  # or the second title touches the first chart
    for axes, (model, lists) in zip(figure.subplots(2, 1), record["scores"].items(), strict=True):
        compare_rankings(
            *map(torch.tensor, lists),
            labels,
            own=record["anchor"],
            names=("by the picture", "by its caption"),
            items=10,
            title=model,
            axes=axes,
        )
    return figure
