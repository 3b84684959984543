"""Search your own pictures by words: two frozen encoders in one space by your pairs, in a minute on a CPU.

Run ``rankloss sample --output outputs/sample``, then ``python examples/search_pictures.py``; or put in your
files, and the encoders efficientnet-lite0 and minilm of ``rankloss[encoders]``. ``rankloss heads`` encodes
the pairs, brings both encoders into one space in closed form, and prints the recall of held-out pairs.
"""

import csv

from rankloss_features.heads import load_heads
from rankloss_trainers import console


def align(folder, image_encoder, text_encoder, output):
    """Bring two encoders into one space by the pairs of ``train.csv``, and save the heads that do so."""
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder]
    data = ["--data", f"{folder}/train.csv", "--val-data", f"{folder}/val.csv", "--ids-key", "product"]
    how = ["--method", "cca", "--output", output, "--overwrite", "--workers", "0"]
    if console.main(["heads", *encoders, *data, *how]):
        raise SystemExit(1)


def search(model, pictures, words, count=3):
    """The pictures that fit the words best, the best first, with their cosines."""
    cosines = model.encode_images(pictures) @ model.encode_texts([words])[0]
    found = cosines.topk(min(count, len(pictures)))
    places = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [(pictures[place], cosine) for place, cosine in places]


def main(folder="outputs/sample", output="outputs/search", words="a black triangle"):
    """Align the encoders of the sample, and search pictures of products that they have not seen."""
    align(folder, f"{folder}/image_encoder", f"{folder}/text_encoder", output)
    with open(f"{folder}/val.csv", encoding="utf-8") as lines:
        pictures = [row["filepath"] for row in csv.DictReader(lines, delimiter="\t")]
    found = search(load_heads(output), pictures, words)
    for picture, cosine in found:
        print(f"{cosine:5.2f}  {picture}")
    return found


if __name__ == "__main__":
    main()
