"""One picture's ranking of the concepts and its caption's, under CLIP and under RankCLIP."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from style import WIDTH, Colors

from rankloss import plots

RECORD = Path(__file__).parents[2] / "docs/assets/agreement.json"
MODELS = {"clip": "CLIP", "rankclip": "RankCLIP"}


def draw(_: Colors) -> Figure:
    """Two slope charts, one above the other: names need the width."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    labels = [label if len(label) <= 22 else label[:20].rstrip() + " …" for label in record["labels"]]
    figure = Figure(figsize=(WIDTH, 7.4), layout="constrained")
    for axes, (loss, title) in zip(figure.subplots(2, 1), MODELS.items(), strict=True):
        plots.compare_rankings(
            *(torch.tensor(scores) for scores in record["scores"][loss]),
            labels,
            own=record["anchor"],
            names=("by the picture", "by its caption"),
            items=10,
            title=title,
            axes=axes,
        )
    return figure
