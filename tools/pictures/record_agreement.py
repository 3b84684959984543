"""Writes docs/assets/agreement.json from what ``make demo DEMO_ARGS="--loss clip rankclip"`` left.

Both models see one picture and one caption of every training concept. The pair that is recorded is the one
whose two Kendall τ are nearest to the models' averages.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rankloss.metrics import kendall_tau, rank_agreement

ROOT = Path(__file__).parents[2]
LOSSES = ("clip", "rankclip")


@torch.inference_mode()
def features(demo: Path, checkpoint: Path, rows: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """Unit-norm features of the pictures and captions."""
    name = f"local-dir:{demo / 'model'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    open_clip.load_checkpoint(model.eval(), str(checkpoint))
    pictures = torch.stack([preprocess(Image.open(demo / row["filepath"]).convert("RGB")) for row in rows])
    captions = open_clip.get_tokenizer(name)([row["title"] for row in rows])
    v = torch.cat([model.encode_image(chunk) for chunk in pictures.split(256)])
    t = torch.cat([model.encode_text(chunk) for chunk in captions.split(256)])
    return normalize(v, dim=-1), normalize(t, dim=-1)


def concepts(table: Path) -> list[dict[str, str]]:
    """One row per concept, the first."""
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return list({row["concept"]: row for row in reversed(rows)}.values())[::-1]


def main() -> None:
    """Compute both models' features and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "outputs/openmoji", help="the demo's output folder"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/assets/agreement.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip builds a model before it has weights, and says so

    (data,) = options.demo.glob("data/split0")
    train, held_out = concepts(data / "train_emojis.csv"), concepts(data / "test.csv")
    lists, averages = {}, {}
    for loss in LOSSES:
        checkpoint = max(options.demo.glob(f"runs/split0-{loss}-epochs*-seed0/checkpoints/epoch_*.pt"))
        v, t = features(options.demo, checkpoint, train)
        lists[loss] = (v @ t.T, t @ v.T)
        averages[loss] = {
            "training": rank_agreement(v, t)["cross_modal_tau"].item(),
            "held-out": rank_agreement(*features(options.demo, checkpoint, held_out))[
                "cross_modal_tau"
            ].item(),
        }
    distance = sum((kendall_tau(*lists[loss]) - averages[loss]["training"]).square() for loss in LOSSES)
    anchor = int(torch.as_tensor(distance).argmin())
    record = {
        "averages": {loss: {k: round(x, 4) for k, x in averages[loss].items()} for loss in LOSSES},
        "concepts": {"training": len(train), "held-out": len(held_out)},
        "anchor": anchor,
        "labels": [row["name"] for row in train],
        "scores": {loss: [[round(x, 5) for x in m[anchor].tolist()] for m in lists[loss]] for loss in LOSSES},
    }
    options.output.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record["averages"]), train[anchor]["name"])


if __name__ == "__main__":
    main()
