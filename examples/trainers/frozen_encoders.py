"""Two heads on the stored features of frozen encoders, trained with CLIP's loss: for a few thousand pairs.

Run ``rankloss features --image-encoder efficientnet-lite0 --text-encoder minilm --data pairs.csv --output
features`` with ``rankloss[encoders]``, then ``python examples/trainers/frozen_encoders.py``.
"""

import sys

import torch
from torch import nn
from torch.nn.functional import normalize

import rankloss
from rankloss_features import Features


def head(width):
    """Standardise an encoder's features, and bring them into the common space."""
    hidden = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Dropout(0.3), nn.Linear(width, 512))
    return nn.Sequential(hidden, nn.GELU(), nn.Dropout(0.3), nn.Linear(512, 256))


def train(images, texts, epochs=20, batch_size=128):
    """Train on pairs of features, and return the heads of images and texts."""
    heads = nn.ModuleList([head(images.shape[1]), head(texts.shape[1])])
    log_scale, criterion = nn.Parameter(torch.tensor(2.66)), rankloss.ClipLoss()
    optimizer = torch.optim.AdamW([*heads.parameters(), log_scale], lr=1e-3, weight_decay=0.05)
    steps = len(images) // batch_size
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size)[:steps]:
            v, t = normalize(heads[0](images[rows])), normalize(heads[1](texts[rows]))
            loss = criterion(v, t, log_scale.exp())
            loss.backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    return heads.eval()


@torch.no_grad()
def recall(heads, images, texts):
    """R@10 of images among texts, where each image has one text."""
    scores = normalize(heads[0](images)) @ normalize(heads[1](texts)).T
    return (scores > scores.diagonal()[:, None]).sum(1).lt(10).float().mean().item()


def main(folder="features", output="heads.pt"):
    """Hold a tenth of the pairs out, train on the others, measure, and save."""
    features = Features(folder).check()
    n, order = len(features) // 10, torch.randperm(len(features))
    found = features.take(order.numpy())
    images, texts = (torch.from_numpy(found[name]) for name in ("image_features", "text_features"))
    heads = train(images[n:], texts[n:])
    print(f"R@10 of {n} held-out pairs: {recall(heads, images[:n], texts[:n]):.3f}")
    torch.save(heads.state_dict(), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
