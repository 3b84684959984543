"""The evaluation example: metrics against other ways to count, probes, readers of data, the command line."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from clip_evaluation import command, datasets, geometry, metrics, pixel_knn, probe
from clip_evaluation.model import ClipModel
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from miniature_paper.grid import model_folder
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score, top_k_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate


def _features(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


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
    images, texts = _features(17, 8), _features(40, 8, seed=1)
    image_of = torch.cat([torch.arange(17), torch.arange(23) ** 2 % 17])
    found = metrics.retrieval(images, texts, image_of)
    assert metrics.retrieval(images, texts[:17]) == metrics.retrieval(images, texts[:17], torch.arange(17))
    matrix, right = images @ texts.T, image_of == torch.arange(17).unsqueeze(1)
    assert metrics.recall(matrix, image_of) == found
    for task, scores, answers in (("image_to_text", matrix, right), ("text_to_image", matrix.T, right.T)):
        for k in metrics.RETRIEVAL_KS:
            hits = [retrieval_hit_rate(*row, top_k=k) for row in zip(scores, answers, strict=True)]
            assert found[task][k] == pytest.approx(100 * torch.stack(hits).mean().item(), abs=1e-4)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_chance_is_the_score_of_a_model_that_sees_no_difference(own):
    image_of = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own))
    blind = metrics.retrieval(torch.ones(len(own), 2), torch.ones(len(image_of), 2), image_of)
    guess = metrics.retrieval_chance(len(own), image_of)
    for task, values in guess.items():
        assert values == pytest.approx(blind[task], abs=1e-9)


def test_chance_and_standard_error():
    assert metrics.chance(270, (1, 5, 10)) == pytest.approx({1: 0.37037, 5: 1.85185, 10: 3.7037}, abs=1e-4)
    assert metrics.chance(4, (1, 3, 5)) == {1: 25.0, 3: 75.0, 5: 100.0}
    assert metrics.standard_error(10, 270) == pytest.approx(1.8257, abs=1e-3)


def test_accuracies_are_what_scikit_learn_counts():
    scores = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(6, (200,), generator=torch.Generator().manual_seed(1))  # class 6 does not occur
    for k, value in metrics.accuracy_at_k(scores, labels, (1, 3, 5)).items():
        expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=np.arange(7))
        assert value == pytest.approx(100 * expected, abs=1e-4)
    expected = recall_score(labels, scores.argmax(dim=1), labels=range(6), average="macro")
    assert metrics.mean_per_class_accuracy(scores, labels) == pytest.approx(100 * expected)


def test_pixel_knn_finds_neighbours_and_lends_their_words():
    images = np.array([[0, 0], [1, 0], [9, 9], [9, 8]], dtype=np.uint8)
    queries = np.array([[0, 1], [8, 9]], dtype=np.uint8)
    distances, neighbours = pixel_knn.nearest(images, queries, 2)
    assert neighbours.tolist() == [[0, 1], [2, 3]]
    assert distances == pytest.approx(np.array([[1, math.sqrt(2)], [1, math.sqrt(2)]]))
    captions = ["red apple", "red cherry", "blue whale", "blue fish"]
    scores = pixel_knn.caption_scores(neighbours, captions, ["blue shark", "red berry", "green"])
    assert scores.argmax(dim=1).tolist() == [1, 0]
    assert scores[:, 2].tolist() == [0, 0]
    assert pixel_knn.nearest(images, queries, 9)[1].shape == (2, 4)


def test_pixel_knn_votes():
    rng = np.random.default_rng(0)
    images, queries = rng.integers(0, 255, (30, 4, 4)), rng.integers(0, 255, (10, 4, 4))
    labels = rng.integers(0, 3, 30)
    scores = pixel_knn.class_scores(images, labels, queries, [0, 1, 2, 3]).numpy()
    distance = np.sqrt(((queries[:, None] - images[None]) ** 2).sum(axis=(2, 3)))
    for row, query in zip(scores, distance, strict=True):
        first = labels[np.argsort(query)[:5]]
        for label in range(3):
            tie_break = 1 / (2 + query[labels == label].min())
            assert row[label] == pytest.approx((first == label).sum() + tie_break)
        assert row[3] == 0


def _clusters(n, *, classes=4, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, 16, generator=generator), labels


def test_probe_is_logistic_regression_with_the_best_strength_of_the_validation_split():
    train, held_out, test = (_clusters(n, noise=3.0, seed=s) for n, s in ((80, 1), (200, 2), (150, 3)))
    strengths = (1e-4, 1e-2, 1.0)
    found = probe.linear_probe(train, test, held_out, classes=4, strengths=strengths)

    def fit(x, y, strength):
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=strength, max_iter=5000).fit(scaler.transform(x), y)
        return lambda z: model.predict_proba(scaler.transform(z))

    arrays = [(x.double().numpy(), y.numpy()) for x, y in (train, held_out, test)]
    for strength in strengths:
        guess = fit(*arrays[0], strength)(arrays[1][0]).argmax(axis=1)
        assert found.validation[strength] == pytest.approx(100 * (guess == arrays[1][1]).mean())
    assert found.validation[found.strength] == max(found.validation.values())
    both = [np.concatenate(pair) for pair in zip(arrays[0], arrays[1], strict=True)]
    expected = fit(*both, found.strength)(arrays[2][0])
    assert found.scores.numpy() == pytest.approx(expected, abs=1e-3)
    assert metrics.accuracy_at_k(found.scores, test[1])[1] > 60
    assert found.at_edge == (found.strength in (1e-4, 1.0))


def test_probe_prefers_more_regularisation_among_equals():
    train, test = _clusters(60, noise=0.01), _clusters(30, noise=0.01, seed=1)
    found = probe.linear_probe(train, test, classes=4, strengths=(10.0, 0.1, 1.0))
    assert set(found.validation.values()) == {100.0}
    assert found.strength == 0.1
    assert found.at_edge
    assert metrics.accuracy_at_k(found.scores, test[1])[1] == 100.0


def test_probe_scores_classes_that_training_lacks():
    x, y = _clusters(60, classes=2)
    found = probe.linear_probe((x, y * 3), (x, y * 3), classes=5, strengths=(1.0,))
    assert found.scores.shape == (60, 5)
    assert found.scores[:, [1, 2, 4]].abs().max() == 0
    assert not found.at_edge


_NAN = torch.full((2, 2), torch.nan)
_IMAGES, _TEXTS, _OF = _features(3, 4), _features(5, 4), torch.tensor([0, 1, 1, 1, 0])
_X, _Y = _clusters(20)
REFUSED = {
    "scores: hold NaN": lambda: metrics.accuracy_at_k(_NAN, torch.tensor([0, 1])),
    "similarity: holds NaN": lambda: metrics.recall(_NAN),
    "3 captions with 2 images": lambda: metrics.recall(torch.zeros(2, 3)),
    "query 1: has no right answer": lambda: metrics.recall(torch.zeros(2, 2), torch.tensor([0, 0])),
    "query 2: has no right answer": lambda: metrics.retrieval(_IMAGES, _TEXTS, _OF),
    "5 captions with 3 images": lambda: metrics.retrieval(_IMAGES, _TEXTS),
    "numbers of images below 3": lambda: metrics.retrieval(_IMAGES, _TEXTS, _OF * 3),
    r"\(3, 4\) and \(5, 6\)": lambda: metrics.retrieval(_IMAGES, _features(5, 6), _OF),
    "all labels are equal": lambda: probe.linear_probe((_X, _Y * 0), (_X, _Y), classes=4),
    "test: labels must be below 2": lambda: probe.linear_probe((_X, _Y % 2), (_X, _Y), classes=2),
    "train: the features hold NaN": lambda: probe.linear_probe((_X * math.nan, _Y), (_X, _Y), classes=4),
    r"validation: .*\(20, 16\) and \(19,\)": lambda: probe.linear_probe(
        (_X, _Y), (_X, _Y), (_X, _Y[:-1]), classes=4
    ),
    "strengths": lambda: probe.linear_probe((_X, _Y), (_X, _Y), classes=4, strengths=()),
    "random weights": lambda: ClipModel("RN50"),
    "give one of them": lambda: ClipModel("RN50", pretrained="openai", checkpoint="x.pt"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_measured_is_refused(said):
    with pytest.raises(ValueError, match=said):
        REFUSED[said]()


def test_geometry_of_pairs_that_coincide():
    v = _features(30, 6)
    found = geometry.geometry(v, v)
    assert found["alignment"] == found["modality_gap"] == 0
    assert found["uniformity_image"] == found["uniformity_text"] == found["uniformity_cross"]
    distance = torch.pdist(v.double()).square()
    assert found["uniformity_image"] == pytest.approx(distance.mul(-2).exp().mean().log().item(), abs=1e-6)
    assert found["cross_modal_tau"] == found["in_modal_rho"] == pytest.approx(1.0)


def _pictures(folder, **colours):
    """Write small pictures; ``__`` in a name is a slash."""
    for name, colour in colours.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(path)


def _load(source, split="test", **options):
    return datasets.load(str(source), split, lambda image: image.convert("RGB").getpixel((0, 0)), **options)


def test_folders_named_by_number_are_in_the_order_of_the_numbers(tmp_path):
    _pictures(tmp_path, **{f"{number}__a": (number, 0, 0) for number in (0, 2, 10)})
    (tmp_path / "2" / "notes.txt").write_text("no picture")
    found = _load(tmp_path, class_names="imagenet")
    assert sorted(found.images) == [((0, 0, 0), 0), ((2, 0, 0), 1), ((10, 0, 0), 2)]
    assert found.classes == [open_clip.IMAGENET_CLASSNAMES[i] for i in (0, 2, 10)]
    assert not found.retrieval


def test_some_of_imagenets_classes_are_named(tmp_path):
    _pictures(tmp_path / "val", n01443537__a="red", n01484850__a="red")  # two classes of ImageNet-R
    (tmp_path / "val" / "n01484850" / "a.png").unlink()  # a class without a picture is a class
    assert _load(tmp_path, "val", class_names="imagenet").classes == ["goldfish", "great white shark"]


def test_folders_have_names_of_their_own_or_those_of_a_file(tmp_path):
    source, names = tmp_path / "data", tmp_path / "names.txt"
    _pictures(source, big_cat__a="red", ant__a="red")
    assert _load(source).classes == ["ant", "big cat"]
    names.write_text("an ant\na tiger\n")
    assert _load(source, class_names=str(names)).classes == ["an ant", "a tiger"]
    names.write_text("an ant\n")
    for where, named, said in (
        (source, str(names), "1 lines for 2 folders"),
        (source, "imagenet", "ant is none of ImageNet's .* must be named n01440764 or 0"),
        (source / "ant", None, "no folders of images"),
    ):
        with pytest.raises(ValueError, match=said):
            _load(where, class_names=named)
    with pytest.raises(FileNotFoundError, match="no such data"):
        _load(tmp_path / "nothing")


def test_a_table_gives_every_image_once_with_all_its_captions(tmp_path):
    _pictures(tmp_path, img__a="red", img__b="blue")
    table = tmp_path / "pairs.csv"
    table.write_text("filepath\ttitle\nimg/a.png\tone\nimg/b.png\ttwo\nimg/a.png\tthree, again\n")
    found = _load(table)
    assert found.retrieval
    assert list(found.images) == [((255, 0, 0), ["one", "three, again"]), ((0, 0, 255), ["two"])]
    with pytest.raises(ValueError, match="no column 'image' among filepath, title"):
        _load(table, csv_image_key="image")


def test_a_table_with_labels_is_for_classification(tmp_path):
    _pictures(tmp_path, a="red", b="red")
    table = tmp_path / "labels.csv"
    table.write_text("image,kind\na.png,zebra\nb.png,ant\n")
    found = _load(table, csv_image_key="image", csv_label_key="kind", csv_separator=",")
    assert found.classes == ["ant", "zebra"]
    assert [target for _, target in list(found.images)] == [1, 0]


def test_cocos_captions(tmp_path):
    _pictures(tmp_path / "val", **{f"{i}": (i, 0, 0) for i in range(3)})
    images = [{"id": 7 + i, "file_name": f"{i}.png"} for i in range(3)]
    notes = [{"id": 20 - i, "image_id": 7 + (i == 6), "caption": f"caption {20 - i} "} for i in range(7)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    # Five captions at most, in the order of their numbers; an image without any is no query.
    first = [f"caption {i}" for i in range(15, 20)]
    found = _load(path, image_folder=tmp_path / "val")
    assert list(found.images) == [((0, 0, 0), first), ((1, 0, 0), ["caption 14"])]
    path.write_text("{}")
    with pytest.raises(ValueError, match="images and annotations"):
        _load(path)


def _shard(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for number, (colour, target) in enumerate(samples):
            tar.write({"__key__": f"s{number}", "png": Image.new("RGB", (32, 32), colour), **target})


def _captions(i, colour):
    return [f"colour {colour[0]}", f"shade {colour[1]}"] if i % 2 else [f"tone {colour[2]}"]


@pytest.fixture
def shards(tmp_path):
    """A classification and a retrieval set in CLIP_benchmark's layout."""
    colours = [tuple(colour) for colour in np.random.default_rng(0).integers(0, 255, (24, 3)).tolist()]
    top, texts = tmp_path / "colours", tmp_path / "texts"
    for split, part in (("train", colours[:12]), ("test", colours[12:])):
        for shard in (0, 1):
            samples = [(c, {"cls": c[0] // 128}) for c in part[shard::2]]
            _shard(top / split / f"{shard}.tar", samples)
    samples = [(c, {"txt": "\n".join(_captions(i, c))}) for i, c in enumerate(colours)]
    _shard(texts / "test" / "0.tar", samples)
    for path, text in (
        (top / "train" / "nshards.txt", "2\n"),
        (top / "test" / "nshards.txt", "2\n"),
        (top / "classnames.txt", "dark\nlight\n"),
        (top / "zeroshot_classification_templates.txt", "a {c} patch\nthe colour {c}\n"),
        (texts / "test" / "nshards.txt", "1\n"),
        (texts / "dataset_type.txt", "retrieval\n"),
    ):
        path.write_text(text)
    return SimpleNamespace(classes=top, texts=texts, colours=colours)


def test_clip_benchmarks_layout(shards):
    found = _load(shards.classes)
    colours = [*shards.colours[12::2], *shards.colours[13::2]]
    assert list(found.images) == [(c, c[0] // 128) for c in colours]
    assert (found.name, found.retrieval, found.classes) == ("colours", False, ["dark", "light"])
    assert found.templates == ["a {c} patch", "the colour {c}"]
    found = _load(shards.texts)
    assert found.retrieval
    assert list(found.images) == [(c, _captions(i, c)) for i, c in enumerate(shards.colours)]
    assert datasets.has_split(str(shards.classes), "train")
    assert not datasets.has_split(str(shards.classes), "validation")
    (shards.classes / "test" / "1.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"nshards.txt says 2, but there is no .*1\.tar"):
        _load(shards.classes)
    (shards.texts / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(ValueError, match="multilabel is not supported"):
        _load(shards.texts)


def test_torchvisions_sets(tmp_path):
    for split in ("train", "valid", "test"):
        _pictures(tmp_path / "rendered-sst2" / split, negative__a="red", positive__a="red")
    found = _load("torchvision:RenderedSST2", "validation", root=tmp_path)
    assert list(found.images) == [((255, 0, 0), 0), ((255, 0, 0), 1)]
    assert found.classes == ["negative", "positive"]
    assert datasets.has_split("torchvision:RenderedSST2", "validation")
    assert not datasets.has_split("torchvision:CIFAR10", "validation")
    with pytest.raises(ValueError, match="no split 'validation'; there are train, test"):
        _load("torchvision:CIFAR10", "validation", root=tmp_path)
    with pytest.raises(ValueError, match="torchvision:MNIST is not supported"):
        _load("torchvision:MNIST", root=tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An architecture, and a checkpoint as open_clip's trainer saves it."""
    name, checkpoint = f"local-dir:{model_folder('vit')}", tmp_path_factory.mktemp("model") / "epoch_3.pt"
    torch.manual_seed(1)
    model = open_clip.create_model(name).eval()
    model.logit_scale.data.fill_(math.log(23.0))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, checkpoint)
    return SimpleNamespace(name=name, checkpoint=checkpoint, model=model)


@pytest.fixture(scope="module")
def loaded(trained):
    return ClipModel(trained.name, checkpoint=trained.checkpoint, batch_size=5)


def test_features_are_the_models_own(trained, loaded):
    images = [loaded.preprocess(Image.new("RGB", (40, 32), (10 * i, 0, 0))) for i in range(12)]
    features, others = loaded.image_features([(image, i) for i, image in enumerate(images)])
    with torch.no_grad():
        expected = trained.model.encode_image(torch.stack(images))
        texts = trained.model.encode_text(loaded.tokenizer(["one", "two"]), normalize=True)
    assert torch.allclose(features, expected, atol=1e-6)
    assert others == list(range(12))
    assert torch.allclose(loaded.text_features(["one", "two"]), texts, atol=1e-6)
    assert loaded.logit_scale == pytest.approx(23.0, rel=1e-6)
    with pytest.raises(ValueError, match="empty"):
        loaded.image_features([])


def test_prompts_are_filled_in_both_notations(trained, loaded):
    found = loaded.classifier(["cat", "dog"], ["a {c} on a {c}", "the {}"])
    with torch.no_grad():
        for column, name in enumerate(("cat", "dog")):
            texts = loaded.tokenizer([f"a {name} on a {name}", f"the {name}"])
            mean = trained.model.encode_text(texts, normalize=True).mean(dim=0)
            assert torch.allclose(found[:, column], normalize(mean, dim=0), atol=1e-6)
    with pytest.raises(ValueError, match="'a photo'"):
        loaded.classifier(["cat"], ["a photo"])


@pytest.fixture
def evaluated(trained, tmp_path, capsys):
    """Runs the command, and returns its status, what it printed, and its results by task and metric."""

    def run(*argv):
        out = tmp_path / "results" / "results.json"
        model = ("--model", trained.name, "--checkpoint", str(trained.checkpoint), "--device", "cpu")
        status = command.main([*model, "--output", str(out), "--data", *map(str, argv)])
        stored = json.loads(out.read_text()) if out.is_file() else {"results": []}
        assert status or stored["conditions"]["device"] == "cpu"
        return status, capsys.readouterr().out, {(r["task"], r["metric"]): r for r in stored["results"]}

    return run


def _encoded(model, source, split="test"):
    return model.image_features(datasets.load(str(source), split, model.preprocess).images)


def test_zero_shot_and_probe_on_the_command_line(evaluated, loaded, shards):
    status, _, found = evaluated(shards.classes, "--tasks", "zero-shot", "probe")
    assert status == 0
    sides = (_encoded(loaded, shards.classes, split) for split in ("train", "test"))
    train, test = ((x, torch.tensor(labels)) for x, labels in sides)
    classifier = loaded.classifier(["dark", "light"], ["a {c} patch", "the colour {c}"])
    expected = metrics.accuracy_at_k(normalize(test[0], dim=-1) @ classifier, test[1])[1]
    top = found["zero-shot", "top-1"]
    assert (top["value"], top["chance"], top["n"]) == (expected, 50.0, 12)
    expected = probe.linear_probe(train, test, classes=2)
    assert found["probe", "top-1"]["value"] == metrics.accuracy_at_k(expected.scores, test[1])[1]
    assert expected.strength in {row["value"] for (_, name), row in found.items() if "strength" in name}


def test_retrieval_and_geometry_on_the_command_line(evaluated, loaded, shards):
    status, _, found = evaluated(shards.texts, "--caption-prefix", "a photo of ")
    assert status == 0
    features, captions = _encoded(loaded, shards.texts)
    images = normalize(features, dim=-1)
    texts = loaded.text_features([f"a photo of {caption}" for own in captions for caption in own])
    image_of = torch.tensor([i for i, own in enumerate(captions) for _ in own])
    for task, recall in metrics.retrieval(images, texts, image_of).items():
        for k, value in recall.items():
            assert found["retrieval", f"{task} R@{k}"]["value"] == pytest.approx(value, abs=1e-3)
    first = loaded.text_features([f"a photo of {own[0]}" for own in captions])
    for name, value in geometry.geometry(images, first).items():
        assert found["geometry", name]["value"] == pytest.approx(value, abs=1e-4)
    assert found["geometry", "logit_scale"]["value"] == pytest.approx(23.0, rel=1e-6)
    assert found["geometry", "alignment"]["standard_error"] is None
    assert found["retrieval", "text_to_image R@1"]["n"] == len(texts)


def test_mistakes_are_named(evaluated, shards, tmp_path):
    (shards.classes / "classnames.txt").unlink()
    for argv, said in (
        ((shards.texts, "--tasks", "probe"), "has captions: probe cannot be measured"),
        ((tmp_path / "nothing",), "no such data"),
        ((shards.classes,), "give --class-names"),
    ):
        status, text, _ = evaluated(*argv)
        assert (status, said in text) == (1, True)
    with pytest.raises(SystemExit):
        evaluated("a", "b", "--train-data", "c")


def test_templates(tmp_path):
    assert len(command.templates("openai", ["{}"])) == 80
    assert command.templates(None, ["{c} icon"]) == ["{c} icon"]
    assert "itap of a {}." in command.templates(None, None)
    path = tmp_path / "prompts.txt"
    path.write_text("a {}\n\nthe {}\n")
    assert command.templates(str(path), None) == ["a {}", "the {}"]
