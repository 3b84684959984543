"""The paper in miniature: the pairs that are trained on, and what is measured of a model."""

import base64
import dataclasses
import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from clip_evaluation.model import ClipModel
from icons_data.load import load
from miniature_icons import write_icons
from miniature_paper import captions, data, grid, heat_maps, measure
from miniature_paper.grid import PRESETS, plan
from miniature_paper.search.trials import TEST, VALIDATION
from PIL import Image
from scipy import stats
from torch.nn.functional import cosine_similarity, normalize


def _no_track(items, length, what):
    return items


# --- synthetic captions ---


def _square(colour, low=8, high=24):
    picture = np.full((32, 32, 3), 255, dtype=np.uint8)
    picture[low:high, low:high] = colour
    return picture


def test_the_caption_says_what_the_pixels_show():
    red, black = _square((220, 50, 50)), _square((0, 0, 0))
    empty = np.full((32, 32, 3), 255, dtype=np.uint8)
    shown = [captions.colours(one) for one in (red, black, _square((130, 130, 130)), empty)]
    assert shown == [["red"], ["black"], ["gray"], []]
    red[8:16, 8:24] = (50, 100, 220)
    assert sorted(captions.colours(red)) == ["blue", "red"]
    shares = [captions.fill(_square((0, 0, 0), 16 - half, 16 + half)) for half in (3, 8, 11, 15)]
    assert shares == ["thin outline", "outline", "half filled", "solid"]
    said = captions.synthetic_caption(black, "duotone bold", ["Arrows"])
    assert said == "a symmetric black duotone bold drawing of arrows"
    black[:, 16:] = 255
    assert not captions.is_symmetric(black)


# --- the pairs ---


def test_smaller_tables_are_parts_of_larger_ones(icons, tmp_path):
    tables = data.prepare(icons, tmp_path, (32, 64), _no_track)
    small, large = (pd.read_csv(tmp_path / tables.tables[pairs], sep="\t") for pairs in (32, 64))
    assert (len(small), len(large)) == (32, 64)
    assert large[:32].equals(small)
    train = icons.part("train")
    for row, record, pixels in zip(large.itertuples(), train.records, train.images, strict=False):
        assert row.title == record.text
        assert record.caption not in row.synthetic
        assert record.categories[0] in row.synthetic
        with Image.open(tmp_path / row.filepath) as image:
            assert image.size == (32, 32)
            shown = np.asarray(image.convert("RGB")).astype(float)
        assert np.abs(shown - np.asarray(Image.fromarray(pixels).reduce(2))).max() <= 1
    assert len(list(tmp_path.rglob("*.png"))) == 64  # and no held-out picture
    with pytest.raises(ValueError, match=r"sizes: 97 pairs .* 96"):
        data.prepare(icons, tmp_path, (97,), _no_track)


def test_the_fingerprint_follows_the_content_and_not_the_place(icons, tmp_path):
    first = data.prepare(icons, tmp_path / "a", (32, 64), _no_track)
    again = data.prepare(icons, tmp_path / "b", (32, 96), _no_track)
    assert first.digests[32] == again.digests[32]
    assert len({*first.digests.values(), *again.digests.values()}) == 3
    other = load(write_icons(tmp_path / "other", test=25))
    changed = data.prepare(other, tmp_path / "c", (32,), _no_track)
    assert changed.digests[32] != first.digests[32]


def test_an_interrupted_export_leaves_nothing_and_a_finished_one_stays(icons, tmp_path):
    def interrupted(items, length, what):
        yield from list(items)[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare(icons, tmp_path, (32,), interrupted)
    assert list((tmp_path / "pairs").iterdir()) == []
    tables = data.prepare(icons, tmp_path, (32,), _no_track)
    assert data.prepare(icons, tmp_path, (32,), interrupted) == tables


# --- heat maps ---


class _Tower(torch.nn.Module):
    """An encoder with some nonlinearity, in float64 so that two orders of summation agree."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * 16 * 16, 5, generator=generator, dtype=torch.float64)

    def encode_image(self, images):
        return torch.tanh(images.flatten(1) @ self.weight / 30)


def test_a_heat_map_is_the_mean_fall_over_the_windows_on_a_pixel():
    window, stride = heat_maps.WINDOW, heat_maps.STRIDE
    model, generator = _Tower(), torch.Generator().manual_seed(1)
    image = torch.rand(3, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(5, generator=generator, dtype=torch.float64)
    whole = cosine_similarity(model.encode_image(image[None])[0], text, dim=0)
    total, count = torch.zeros(2, 16, 16, dtype=torch.float64)
    for top, left in itertools.product(range(0, 16 - window + 1, stride), repeat=2):
        place = (..., slice(top, top + window), slice(left, left + window))
        hidden = image.clone()
        hidden[place] = 1.0
        total[place] += whole - cosine_similarity(model.encode_image(hidden[None])[0], text, dim=0)
        count[place] += 1
    found = heat_maps.heat_map(model, image, text, paper=1.0)
    expected = (total / count)[::stride, ::stride]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    spread = (total / count).unfold(0, stride, stride).unfold(1, stride, stride)
    assert (spread.amax((-1, -2)) - spread.amin((-1, -2))).max() < 1e-12  # one value in a cell


# --- measuring ---

LIMITS = {"retrieval_items": 20, "class_items": 22, "probe_items": 40, "umap_pairs": 10}
PRESET = dataclasses.replace(PRESETS["quick"], probe_strengths=(1e-2,), **LIMITS)


def test_everything_is_measured(icons, model):
    found = measure.measure(model, icons, PRESET, figures=False)
    tasks = {f"{task}/{name}" for task in ("retrieval", "zero-shot") for name in ("test", "mdi", "noto")}
    tasks = tasks - {"retrieval/mdi", "zero-shot/test"} | {"probe/mdi", "geometry/test"}
    assert found["metrics"].keys() == found["chance"].keys() == found["items"].keys() == tasks
    assert "figures" not in found
    json.dumps(found, allow_nan=False)
    for task in tasks - {"geometry/test"}:
        assert found["metrics"][task].keys() == found["chance"][task].keys()
        assert all(0 <= value <= 100 for value in found["metrics"][task].values())
    assert found["items"]["retrieval/test"] == 20
    assert found["items"]["zero-shot/mdi"] == found["items"]["probe/mdi"] == 22
    assert found["metrics"]["geometry/test"]["logit_scale"] == pytest.approx(model.logit_scale, abs=1e-3)
    assert found["chance"]["zero-shot/mdi"]["top-1"] == 50.0


def test_retrieval_is_that_of_the_models_own_preprocessing(icons, model):
    """R@1 counted by hand, from pictures averaged by Pillow and preprocessed by open_clip."""
    found = measure.measure(model, icons, PRESET, figures=False)["metrics"]["retrieval/test"]
    chosen = [record for record in icons.part("test").records if record.retrieval][:20]
    pixels = [Image.fromarray(icons.images[r.index]).reduce(2) for r in chosen]
    texts = [(i, caption) for i, record in enumerate(chosen) for caption in record.captions]
    with torch.inference_mode():
        images = model.model.encode_image(torch.stack([model.preprocess(p) for p in pixels]))
        similarity = normalize(images, dim=-1) @ model.text_features([text for _, text in texts]).T
    owner = torch.tensor([i for i, _ in texts])
    # Captions of the same words are tied: each order is as likely as the others.
    best = similarity == similarity.amax(dim=1, keepdim=True)
    right = (best & (owner == torch.arange(20)[:, None])).sum(1) / best.sum(1)
    assert found["image_to_text R@1"] == pytest.approx(100 * right.mean().item(), abs=1e-3)
    assert similarity.shape == (20, 25)


def test_pictures_are_encoded_once_and_found_again(icons, model, monkeypatch):
    apart = measure.Measurement(model, icons, PRESET).features(np.array([90]))[0]
    embeddings, encoded = measure.Measurement(model, icons, PRESET).features, []
    image_features = model.image_features

    def spy(images):
        encoded.extend(i for _, i in images)
        return image_features(images)

    monkeypatch.setattr(model, "image_features", spy)
    three = embeddings(np.array([5, 3, 5]))
    assert (three[0] == three[2]).all()
    torch.testing.assert_close(embeddings(np.array([90, 3]))[0], apart, atol=1e-5, rtol=1e-4)
    assert (embeddings(np.array([3]))[0] == three[1]).all()
    assert encoded == [3, 5, 90]


def test_the_figures_are_small_and_complete(icons, model):
    figures = measure.measure(model, icons, PRESET, figures=True)["figures"]
    assert [np.shape(figures["umap"][name]) for name in ("image", "text")] == [(10, 2)] * 2
    assert np.ptp(figures["umap"]["image"], axis=0).min() > 0
    assert measure.measure(model, icons, PRESET, figures=True)["figures"] == figures
    maps = figures["heat_maps"]
    assert len(maps) == 6
    for shown in maps:
        assert np.shape(shown["map"]) == (8, 8)
        assert " " in shown["text"]
        with Image.open(io.BytesIO(base64.b64decode(shown["image"]))) as image:
            assert image.size == (32, 32)
    assert np.abs([shown["map"] for shown in maps]).max() > 0
    assert len(json.dumps(figures)) < 60_000


def test_only_the_first_seed_of_each_loss_is_shown():
    for preset in PRESETS.values():
        shown = [s for s in plan(preset) if measure.is_shown(s)]
        assert [s.loss for s in shown] == list(grid.LOSSES)
        assert {(s.seed, s.backbone, s.pairs) for s in shown} == {(0, "resnet", preset.pairs)}


# --- one side only, for the search ---


def test_the_search_never_looks_at_the_test_side(icons, model, tmp_path):
    """Its scores are the same whatever is there; the test side's are those of the tables."""
    other = load(write_icons(tmp_path / "icons", validation=30, test=60))
    found = measure.measure_side(model, icons, PRESET, VALIDATION)
    assert measure.measure_side(model, other, PRESET, VALIDATION) == found
    assert not found["diverged"]
    for part in ("metrics", "chance", "items"):
        assert found[part].keys() == {"retrieval", "zero-shot/mdi"}
    json.dumps(found, allow_nan=False)
    found = measure.measure_side(model, icons, PRESET, TEST)
    table = measure.measure(model, icons, PRESET, figures=False)
    for part in ("metrics", "chance", "items"):
        assert found[part]["retrieval"] == table[part]["retrieval/test"]
    for part in ("metrics", "chance"):
        assert found[part]["zero-shot/mdi"]["top-1"] == table[part]["zero-shot/mdi"]["top-1"]
    with pytest.raises(ValueError, match="side: must be validation or test, got 'train'"):
        measure.measure_side(model, icons, PRESET, "train")


def test_a_model_without_numbers_has_no_scores(icons):
    broken = ClipModel(f"local-dir:{grid.model_folder('resnet')}")
    with torch.no_grad():
        broken.model.text_projection.fill_(float("nan"))
    found = measure.measure_side(broken, icons, PRESET, VALIDATION)
    assert found == {"metrics": {}, "chance": {}, "items": {}, "diverged": True}


# --- agreement with a teacher ---


def test_agreement_with_a_teacher():
    torch.manual_seed(0)
    v, t = (normalize(torch.randn(40, 8), dim=-1) for _ in range(2))
    same = measure.teacher_agreement((v, t), (v, t))
    assert same == pytest.approx({"cross_modal_tau": 1.0, "in_modal_tau": 1.0})
    against = measure.teacher_agreement((v, t), (-v, t))
    assert against["cross_modal_tau"] == pytest.approx(-1.0)
    assert against["in_modal_tau"] == pytest.approx(1.0)
    tau = np.mean([stats.kendalltau(a, b).statistic for a, b in zip((v @ t.T), (t @ v.T), strict=True)])
    mirrored = measure.teacher_agreement((v, t), (t, v))
    assert mirrored["cross_modal_tau"] == pytest.approx(tau, abs=1e-6)


def test_a_model_ranks_the_held_out_pairs_as_itself(icons, model):
    found = measure.measure(model, icons, PRESET, figures=False, teacher=model)
    agreement = found["metrics"]["teacher/test"]
    assert agreement == pytest.approx({"cross_modal_tau": 1.0, "in_modal_tau": 1.0}, abs=0.01)
    assert found["items"]["teacher/test"] == found["items"]["geometry/test"]
