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
from scipy import stats
from sklearn.metrics import top_k_accuracy_score
from studies.manifest import HERE
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate

from batches import unit


def _recall_over_all_orders(similarity, right, k):
    """R@k, averaged over all orders of the columns, of a ranking that leaves ties as it found them."""
    hits = []
    for scores, is_right in zip(similarity.tolist(), right.tolist(), strict=True):
        for order in itertools.permutations(range(len(scores))):
            best = sorted(order, key=lambda column: -scores[column])[:k]
            hits.append(any(is_right[column] for column in best))
    return 100 * np.mean(hits)


@given(st.data(), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
def test_recall_shares_places_among_ties(data, images, more, k):
    """A caption of each image, and more captions of drawn images; ``own`` has the image of each caption."""
    images_of_more = [data.draw(st.integers(0, images - 1)) for _ in range(more)]
    own = torch.tensor([*range(images), *images_of_more])
    scores = st_numpy.arrays(float, (images, len(own)), elements=st.integers(0, 2))
    similarity = torch.tensor(data.draw(scores))
    right = own == torch.arange(images).unsqueeze(1)
    recall = metrics.recall(similarity, own, ks=(k,))
    assert recall["image_to_text"][k] == pytest.approx(
        _recall_over_all_orders(similarity, right, k), abs=1e-9
    )
    assert recall["text_to_image"][k] == pytest.approx(
        _recall_over_all_orders(similarity.T, right.T, k), abs=1e-9
    )


IMAGES, TEXTS = (unit(n, 8, seed=n, dtype=torch.float32) for n in (17, 40))
IMAGE_OF = torch.cat([torch.arange(17), torch.arange(23) ** 2 % 17])
"""The image of each text: one text of each, then more of some."""


@pytest.mark.parametrize("block", [2**24, 40])
def test_retrieval_with_several_captions_is_what_torchmetrics_counts(block, monkeypatch):
    """With all similarities in one block, and with blocks of 40: a row of images, two rows of texts."""
    monkeypatch.setattr(metrics, "_BLOCK", block)
    recall = metrics.retrieval(IMAGES, TEXTS, IMAGE_OF)
    matrix, right = IMAGES @ TEXTS.T, torch.arange(17).unsqueeze(1) == IMAGE_OF
    for task, scores, answers in (("image_to_text", matrix, right), ("text_to_image", matrix.T, right.T)):
        for k in metrics.RETRIEVAL_KS:
            hits = [
                retrieval_hit_rate(scores_of_query, is_answer, top_k=k)
                for scores_of_query, is_answer in zip(scores, answers, strict=True)
            ]
            assert recall[task][k] == pytest.approx(100 * torch.stack(hits).mean().item(), abs=1e-4)


def test_retrieval_of_features_is_the_recall_of_their_similarities():
    assert metrics.retrieval(IMAGES, TEXTS, IMAGE_OF) == metrics.recall(IMAGES @ TEXTS.T, IMAGE_OF)


def test_retrieval_takes_texts_for_those_of_the_images_in_their_order_unless_it_is_told():
    one_each = TEXTS[:17]
    assert metrics.retrieval(IMAGES, one_each) == metrics.retrieval(IMAGES, one_each, torch.arange(17))


def test_accuracies_are_what_scikit_learn_counts():
    scores = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(6, (200,), generator=torch.Generator().manual_seed(1))  # class 6 does not occur
    for k, value in metrics.accuracy_at_k(scores, labels, (1, 3, 5)).items():
        expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=np.arange(7))
        assert value == pytest.approx(100 * expected, abs=1e-4)


def test_chance_is_the_share_of_the_answers_that_may_be_given():
    assert metrics.chance(4, (1, 3, 5)) == {1: 25.0, 3: 75.0, 5: 100.0}


def test_the_standard_error_of_a_share_is_that_of_a_binomial():
    hits = stats.binom(270, 0.1)
    assert metrics.standard_error(10, 270) == pytest.approx(100 * hits.std() / 270)


SCALE = 23.0


@pytest.fixture(scope="module")
def model_and_loaded(tmp_path_factory):
    """A model of open_clip, and the same loaded from a checkpoint as the trainer saves it."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "epoch_3.pt"
    name = f"local-dir:{HERE / 'miniature/models/transformer'}"
    model = open_clip.create_model(name).eval()
    model.logit_scale.data.fill_(math.log(SCALE))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, checkpoint)
    return model, ClipModel(name, checkpoint=checkpoint)


@torch.no_grad()
def test_features_are_those_of_the_trainers_checkpoint(model_and_loaded):
    """Also of more images than are encoded at a time."""
    model, loaded = model_and_loaded
    images = [loaded.preprocess(Image.new("RGB", (40, 32), (i % 256, 0, 0))) for i in range(260)]
    texts = model.encode_text(loaded.tokenizer(["one", "two"]), normalize=True)
    torch.testing.assert_close(loaded.image_features(images), model.encode_image(torch.stack(images)))
    torch.testing.assert_close(loaded.text_features(["one", "two"]), texts)


def test_the_scale_is_that_of_the_trainers_checkpoint(model_and_loaded):
    _, loaded = model_and_loaded
    assert loaded.logit_scale == pytest.approx(SCALE, rel=1e-6)


@torch.no_grad()
def test_a_class_has_the_mean_of_its_prompts(model_and_loaded):
    model, loaded = model_and_loaded
    prompts = model.encode_text(loaded.tokenizer(["a cat", "the cat"]), normalize=True)
    classes = loaded.classifier(["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(classes[:, 0], normalize(prompts.mean(dim=0), dim=0))
