"""The paper in miniature: the pairs that are trained on, and what is measured of a model."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from icons_data.load import load
from miniature_icons import write_icons
from miniature_paper import data, measure
from miniature_paper.grid import PRESETS
from miniature_paper.search.trials import TEST, VALIDATION
from PIL import Image
from scipy import stats
from torch.nn.functional import normalize


def _no_track(items, length, what):
    return items


# --- the pairs ---


def test_smaller_tables_are_parts_of_larger_ones_and_hold_no_held_out_picture(icons, tmp_path):
    tables = data.prepare(icons, tmp_path, (32, 64), _no_track)
    small, large = (pd.read_csv(tmp_path / tables.tables[pairs], sep="\t") for pairs in (32, 64))
    assert large[:32].equals(small)
    train = icons.part("train")
    for row, record, pixels in zip(large.itertuples(), train.records, train.images, strict=False):
        assert row.title == record.text
        with Image.open(tmp_path / row.filepath) as image:
            shown = np.asarray(image.convert("RGB")).astype(float)
        assert np.abs(shown - np.asarray(Image.fromarray(pixels).reduce(2))).max() <= 1
    assert len(list(tmp_path.rglob("*.png"))) == 64


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
