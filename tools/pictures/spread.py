"""Similarities within each modality, with and without the spread, of two small students.

``python tools/pictures/spread.py`` trains both, in minutes, and writes the record that is drawn.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors
from torch import Tensor, nn

import rankloss

RECORD = Path(__file__).parents[2] / "docs/assets/spread.json"
LOSSES: dict[str, type[nn.Module]] = {"CLIP": rankloss.ClipLoss, "CLIP + spread": rankloss.SpreadLoss}
BINS = 50  # of cosines from −1 to 1


def measure() -> None:
    """Train the studies' student on emojis, and count held-out items' similarities."""
    from studies.alignment.data import Encoded
    from studies.alignment.setting import Setting
    from studies.data.sets import emojis
    from studies.students.student import Student
    from studies.students.train import fit

    record: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Encoded(emojis(None, 0), Path(folder))
    for name, loss in LOSSES.items():
        torch.manual_seed(0)
        setting = Setting(name, seed=0, side="dev", batch_size=250, epochs=30, lr=0.004)
        model = fit(Student(data.words), loss(), setting, data.sides["train"], lambda *_: {})
        held_out = data.sides["dev"]
        with torch.no_grad():
            pictures, captions = model.pictures(held_out.pictures), model.sentences(held_out.sentences[:, 0])
        record[name] = {
            "pictures": _counts(pictures),
            "captions": _counts(captions),
            "scale": round(model.log_scale.exp().item(), 1),
        }
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _counts(features: Tensor) -> dict[str, object]:
    """Numbers of pairs of different items by their cosine, and the mean deviation of an item's cosines."""
    cosines = features @ features.T
    is_other = ~torch.eye(len(cosines), dtype=torch.bool)
    others = cosines[is_other].view(len(cosines), -1)
    counts = torch.histc(others, BINS, -1, 1).int().tolist()
    return {"counts": counts, "deviation": round(others.std(-1, unbiased=False).mean().item(), 3)}


def draw(colors: Colors) -> Figure:
    """The distribution of the cosines of different pictures, and of different captions, for both losses."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    edges = torch.linspace(-1, 1, BINS + 1).tolist()
    for axes, modality in zip(figure.subplots(1, 2, sharey=True), ("pictures", "captions"), strict=True):
        for name, color in zip(LOSSES, (colors.other, colors.ours), strict=True):
            counts, deviation = record[name][modality]["counts"], record[name][modality]["deviation"]
            bin_width = 2 / BINS
            density = [count / bin_width / sum(counts) for count in counts]
            label = f"{name}: {deviation:.2f}"
            if name == "CLIP":
                axes.stairs(density, edges, color=color, fill=True, alpha=0.6, label=label)
            else:
                axes.stairs(density, edges, color=color, linewidth=2.2, label=label)
        axes.set(xlim=(-0.75, 1), ylim=(0, 3.7), yticks=[], xlabel="cosine of two of them")
        axes.set_title(f"held-out {modality}", loc="left", fontsize=SMALL)
        axes.legend(title="mean deviation", fontsize=SMALL, loc="upper right")
        axes.spines["left"].set_visible(False)
    return figure


if __name__ == "__main__":
    measure()
