"""The examples' measures: metrics against other ways to count, a model's features."""

import itertools
import math

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from openmoji_demo import metrics
from openmoji_demo.model import ClipModel
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from studies.manifest import HERE
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate

from batches import unit


def _in_every_order(similarity, right, k):
    """R@k, averaged over all orders of the columns, of a ranking that leaves ties as it found them."""
    hits = []
    for row, answers in zip(similarity.tolist(), right.tolist(), strict=True):
        orders = itertools.permutations(range(len(row)))
        hits.append([any(answers[c] for c in sorted(o, key=lambda c: -row[c])[:k]) for o in orders])
    return 100 * np.mean(hits)


@given(st.data(), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
def test_recall_shares_places_among_ties(data, images, more, k):
    own = torch.tensor([*range(images), *(data.draw(st.integers(0, images - 1)) for _ in range(more))])
    similarity = torch.tensor(
        data.draw(st_numpy.arrays(float, (images, len(own)), elements=st.integers(0, 2)))
    )
    right = own == torch.arange(images).unsqueeze(1)
    found = metrics.recall(similarity, own, ks=(k,))
    assert found["image_to_text"][k] == pytest.approx(_in_every_order(similarity, right, k), abs=1e-9)
    assert found["text_to_image"][k] == pytest.approx(_in_every_order(similarity.T, right.T, k), abs=1e-9)


@pytest.mark.parametrize("block", [2**24, 40])
def test_retrieval_with_several_captions_is_what_torchmetrics_counts(block, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", block)  # 40 elements: two rows at a time
    images, texts = (unit(n, 8, seed=n, dtype=torch.float32) for n in (17, 40))
    image_of = torch.cat([torch.arange(17), torch.arange(23) ** 2 % 17])
    found = metrics.retrieval(images, texts, image_of)
    assert metrics.retrieval(images, texts[:17]) == metrics.retrieval(images, texts[:17], torch.arange(17))
    matrix, right = images @ texts.T, image_of == torch.arange(17).unsqueeze(1)
    assert metrics.recall(matrix, image_of) == found
    for task, scores, answers in (("image_to_text", matrix, right), ("text_to_image", matrix.T, right.T)):
        for k in metrics.RETRIEVAL_KS:
            hits = [retrieval_hit_rate(*row, top_k=k) for row in zip(scores, answers, strict=True)]
            assert found[task][k] == pytest.approx(100 * torch.stack(hits).mean().item(), abs=1e-4)


def test_accuracies_are_what_scikit_learn_counts():
    scores = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(6, (200,), generator=torch.Generator().manual_seed(1))  # class 6 does not occur
    for k, value in metrics.accuracy_at_k(scores, labels, (1, 3, 5)).items():
        expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=np.arange(7))
        assert value == pytest.approx(100 * expected, abs=1e-4)
    assert metrics.chance(4, (1, 3, 5)) == {1: 25.0, 3: 75.0, 5: 100.0}
    assert metrics.standard_error(10, 270) == pytest.approx(1.8257, abs=1e-3)


def test_features_are_those_of_the_trainers_checkpoint(tmp_path):
    name, checkpoint = f"local-dir:{HERE / 'miniature/models/transformer'}", tmp_path / "epoch_3.pt"
    model = open_clip.create_model(name).eval()
    model.logit_scale.data.fill_(math.log(23.0))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, checkpoint)
    loaded = ClipModel(name, checkpoint=checkpoint)
    images = [loaded.preprocess(Image.new("RGB", (40, 32), (i % 256, 0, 0))) for i in range(260)]
    with torch.no_grad():
        torch.testing.assert_close(loaded.image_features(images), model.encode_image(torch.stack(images)))
        texts = model.encode_text(loaded.tokenizer(["one", "two"]), normalize=True)
        prompts = model.encode_text(loaded.tokenizer(["a cat", "the cat"]), normalize=True)
    torch.testing.assert_close(loaded.text_features(["one", "two"]), texts)
    assert loaded.logit_scale == pytest.approx(23.0, rel=1e-6)
    found = loaded.classifier(["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(found[:, 0], normalize(prompts.mean(dim=0), dim=0))
