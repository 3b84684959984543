"""Canonical correlation analysis: oracles of NumPy and other libraries, blocks of rows, search, refusals."""

from __future__ import annotations

import itertools
import logging
import re
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA
from statsmodels.multivariate.cancorr import CanCorr
from torch import Tensor

from rankloss.metrics import recall
from rankloss_features.cca import CanonicalCorrelation, Eigenbases, Grid, PairSums, Setting, search


def features(
    n: int = 120, widths: tuple[int, int] = (10, 7), captions: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two views of four shared directions, with noise, float64; captions add a dimension to the texts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width, text_width = widths
    shared = normal(n, 4)
    images = shared @ normal(4, width) + 0.7 * normal(n, width) + 0.5
    if captions is None:
        return images, shared @ normal(4, text_width) + 0.7 * normal(n, text_width) - 0.3
    texts = shared[:, None] @ normal(4, text_width) + 0.7 * normal(n, captions, text_width) - 0.3
    return images, texts


def unit(x: Tensor, *, root: bool = False) -> np.ndarray:
    """Rows, or their signed square roots, divided by their norms; float64."""
    values = x.double().numpy()
    if root:
        values = np.sign(values) * np.sqrt(np.abs(values))
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def whitening(x: np.ndarray, ridge: float) -> np.ndarray:
    """The inverse square root of a covariance with a ridge, which is a multiple of its mean variance."""
    covariance = x.T @ x / len(x)
    covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.inv(scipy.linalg.sqrtm(covariance).real)


def features_by_numpy(v: Tensor, t: Tensor, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """The features of the pictures and of all captions, by the definition."""
    images, texts = unit(v, root=setting.root), unit(t, root=setting.root)
    texts = texts if texts.ndim == 3 else texts[:, None]
    images, texts = images - images.mean(0), texts - texts.mean((0, 1))
    captions = texts.reshape(-1, texts.shape[-1])
    of_images, of_texts = whitening(images, setting.image_ridge), whitening(captions, setting.text_ridge)
    cross_covariance = images.T @ texts.mean(1) / len(images)
    U, S, Vh = np.linalg.svd(of_images @ cross_covariance @ of_texts)
    power = S[: setting.dimensions] ** setting.power
    v_k = images @ of_images @ U[:, : setting.dimensions] * power
    t_k = captions @ of_texts @ Vh.T[:, : setting.dimensions] * power
    return (
        v_k / np.linalg.norm(v_k, axis=1, keepdims=True),
        t_k / np.linalg.norm(t_k, axis=1, keepdims=True),
    )


SETTINGS = [
    Setting(image_ridge=1.0, text_ridge=1.0, dimensions=7),
    Setting(image_ridge=0.3, text_ridge=0.1, dimensions=3, power=0.5, root=True),
    Setting(image_ridge=0.0, text_ridge=2.0, dimensions=5, power=0.0),
    Setting(image_ridge=0.0, text_ridge=0.0, dimensions=4, power=2.0, root=True),
]


@pytest.mark.parametrize("captions", [None, 1, 3])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_features_are_those_of_the_definition_in_numpy(setting: Setting, captions: int | None) -> None:
    """Compared by their similarities, since the sign of each direction is free."""
    v, t = features(captions=captions)
    cca = CanonicalCorrelation.fit(v, t, **setting.as_options())
    images, texts = cca.images(v).numpy(), cca.texts(t.reshape(-1, t.shape[-1])).numpy()
    expected_images, expected_texts = features_by_numpy(v, t, setting)
    for projected in (images, texts, expected_images, expected_texts):
        assert projected.shape[1] == setting.dimensions
    for similarities, expected in (
        (images @ images.T, expected_images @ expected_images.T),
        (images @ texts.T, expected_images @ expected_texts.T),
        (texts @ texts.T, expected_texts @ expected_texts.T),
    ):
        np.testing.assert_allclose(similarities, expected, atol=1e-9)


def fit_without_ridges(v: Tensor, t: Tensor) -> CanonicalCorrelation:
    """The canonical correlation analysis of textbooks, with all directions of the narrower features."""
    return CanonicalCorrelation.fit(v, t, dimensions=t.shape[1], image_ridge=0, text_ridge=0, power=0)


def test_without_ridges_correlations_are_those_of_statsmodels() -> None:
    v, t = features(300)
    expected = CanCorr(unit(v), unit(t)).cancorr
    np.testing.assert_allclose(fit_without_ridges(v, t).correlations.numpy(), expected, atol=1e-10)


def test_without_ridges_the_first_correlations_are_those_of_scikit_learn() -> None:
    """scikit-learn finds the directions by iteration, so its correlations are less exact."""
    v, t = features(300)
    x, y = CCA(n_components=3, scale=False, tol=1e-12, max_iter=100_000).fit_transform(unit(v), unit(t))
    expected = [np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(3)]
    np.testing.assert_allclose(fit_without_ridges(v, t).correlations[:3].numpy(), expected, atol=1e-6)


def test_without_ridges_projected_features_correlate_by_direction_alone() -> None:
    """Different directions are uncorrelated, within a modality as between the two."""
    v, t = features(300)
    cca = fit_without_ridges(v, t)
    x = (torch.from_numpy(unit(v)) - cca.image_mean) @ cca.image_projection
    y = (torch.from_numpy(unit(t)) - cca.text_mean) @ cca.text_projection
    between, within = np.diag(cca.correlations), np.eye(len(cca.correlations))
    expected = np.block([[within, between], [between, within]])
    np.testing.assert_allclose(np.corrcoef(x.T, y.T), expected, atol=1e-9)


def test_captions_of_a_picture_are_pairs_in_which_it_is_repeated() -> None:
    """A fit fixes the sign of each direction, so the features themselves are compared."""
    v, t = features(captions=3)
    options = {"image_ridge": 0.5, "text_ridge": 0.2, "dimensions": 5}
    of_captions = CanonicalCorrelation.fit(v, t, **options)
    of_pairs = CanonicalCorrelation.fit(v.repeat_interleave(3, 0), t.flatten(0, 1), **options)
    torch.testing.assert_close(of_captions.images(v), of_pairs.images(v))
    torch.testing.assert_close(of_captions.texts(t[:, 0]), of_pairs.texts(t[:, 0]))


@pytest.mark.parametrize(
    "cuts", [[120], [1, 2, 117], [0, 60, 60]], ids=["one block", "unequal blocks", "an empty block"]
)
def test_blocks_of_rows_give_the_same_projections(cuts: list[int], monkeypatch: Any) -> None:
    v, t = features(captions=2)
    whole = CanonicalCorrelation.fit(v, t, dimensions=7)
    monkeypatch.setattr("rankloss_features.cca._BLOCK", 77)  # blocks are themselves cut, into rows of five
    blocks = CanonicalCorrelation.fit(iter(v.split(cuts)), iter(t.split(cuts)), dimensions=7)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(blocks.tensors()[name], tensor, atol=1e-9, rtol=0)


def test_sums_of_two_parts_are_those_of_all_pairs() -> None:
    v, t = features()
    parts = PairSums.of(v[:50], t[:50]).merged(PairSums.of(v[50:], t[50:]))
    whole = PairSums.of(v, t)
    assert parts.pairs == whole.pairs == len(v)
    for name in ("image_mean", "text_mean", "image_covariance", "text_covariance", "cross_covariance"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-14, rtol=0)


def test_sums_are_exact_beside_a_mean_that_is_large() -> None:
    v, t = (x + 1e5 for x in features())
    sums = PairSums()
    for images, texts in zip(v.split(7), t.split(7), strict=True):
        sums.add(images, texts)
    for covariance, x in ((sums.image_covariance, v), (sums.text_covariance, t)):
        expected = np.cov(unit(x).T, bias=True)  # NumPy subtracts the mean of all rows first
        # The mean of the squares minus the square of the mean has an error of 4e-7 of the largest covariance.
        np.testing.assert_allclose(covariance.numpy(), expected, rtol=0, atol=1e-9 * expected.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_fitted_in_float64(dtype: torch.dtype) -> None:
    v, t = (x.to(dtype) for x in features())
    cca = CanonicalCorrelation.fit(v, t, dimensions=7)
    expected = CanonicalCorrelation.fit(v.double(), t.double(), dimensions=7)
    assert torch.equal(cca.image_projection, expected.image_projection)
    images = cca.images(v)
    assert images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(images.double(), expected.images(v.double()), atol=1e-7, rtol=0)


def test_autocast_and_inference_mode_change_nothing() -> None:
    v, t = (x.float() for x in features())
    cca = CanonicalCorrelation.fit(v, t, dimensions=7)
    images, texts = cca.images(v), cca.texts(t)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        inside = CanonicalCorrelation.fit(v, t, dimensions=7)
        assert torch.equal(inside.images(v), images)
        assert torch.equal(inside.texts(t), texts)


def test_features_that_need_gradients_are_projected_without_them() -> None:
    v, t = features()
    v.requires_grad_()
    assert not CanonicalCorrelation.fit(v, t, dimensions=7).images(v).requires_grad


def test_a_constant_dimension_is_left_out() -> None:
    """The other dimensions have unit norm, so that the added one stays constant beside them."""
    v, t = (torch.from_numpy(unit(x)) for x in features())
    padded_v = torch.cat([v, torch.full((120, 1), 0.25, dtype=torch.float64)], dim=1)
    options = {"dimensions": 5, "image_ridge": 0, "text_ridge": 0}
    padded = CanonicalCorrelation.fit(padded_v, t, **options)
    plain = CanonicalCorrelation.fit(v, t, **options)
    torch.testing.assert_close(padded.correlations, plain.correlations)
    torch.testing.assert_close(padded.images(padded_v).abs(), plain.images(v).abs())  # each sign is free


def test_fewer_pairs_than_dimensions_give_as_many_directions_as_there_are(caplog: Any) -> None:
    v, t = features(6)
    with caplog.at_level(logging.WARNING, "rankloss_features"):
        cca = CanonicalCorrelation.fit(v, t, dimensions=7)
    assert cca.images(v).shape == (6, 5)  # six rows, whose mean is taken off, span five directions
    assert "dimensions=7: the pairs have 5 canonical directions, which are taken" in caplog.text
    torch.testing.assert_close(cca.images(v).norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_directions_of_linearly_dependent_features_are_not_invented() -> None:
    """Features of nine columns that lie in a plane have two directions, where five are asked for."""
    v, t = features()
    directions = torch.from_numpy(unit(v))
    plane = directions[:, :2] / directions[:, :2].norm(dim=1, keepdim=True)
    cca = CanonicalCorrelation.fit(plane @ torch.eye(2, 9, dtype=torch.float64), t, dimensions=5, power=0)
    assert cca.image_projection.shape == (9, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, t: (v[:2], t[:2]), "image_features and text_features must be at least 3 pairs; got 2"),
        (
            lambda v, t: (v, t[:-1]),
            "must have one row per pair, texts [N, D'] or [N, S, D']; got (120, 10) and",
        ),
        (lambda v, t: (v, t[:, None][:, :0]), "must have one row per pair"),
        (lambda v, t: (torch.ones_like(v), t), "image_features must differ; all rows are equal"),
        (lambda v, t: (v, torch.ones_like(t) * torch.rand(len(t), 1)), "text_features must differ; all rows"),
        (lambda v, t: (v.long(), t), "image_features must be floating point; got torch.int64"),
        (lambda v, t: (v[0], t), "image_features must have shape [N, D]; got (10,)"),
        (lambda v, t: ([v, v], [t]), "must have equally many blocks of rows"),
        (lambda v, t: ([v, v[:, :3]], [t, t]), "image_features must have the 10 columns of the pairs before"),
        (lambda v, t: (v.to("meta"), t.to("meta")), "image_features must have values"),
    ],
    ids=[
        "two pairs",
        "a text too few",
        "no texts of a picture",
        "equal pictures",
        "equal texts",
        "integers",
        "one dimension",
        "blocks of other numbers",
        "blocks of other widths",
        "meta device",
    ],
)
def test_features_that_cannot_be_fitted_are_refused_by_name(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CanonicalCorrelation.fit(*change(*features()), dimensions=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_a_picture_that_is_not_finite_is_named(value: float) -> None:
    v, t = features(captions=2)
    v[17, 3] = value
    with pytest.raises(ValueError, match="image_features must be finite; row 17 has NaN or infinity"):
        CanonicalCorrelation.fit(v, t, dimensions=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_of_a_caption_that_is_not_finite_is_named_by_its_picture_and_place(value: float) -> None:
    v, t = features(captions=2)
    t[4, 1, 2] = value
    with pytest.raises(ValueError, match="text_features must be finite; row 4, 1 has NaN or infinity"):
        CanonicalCorrelation.fit(v, t, dimensions=3)


def test_sums_of_other_widths_are_refused_by_name() -> None:
    v, t = features()
    widths = re.escape("other must be of features of widths (10, 7); got (9, 7)")
    with pytest.raises(ValueError, match=widths):
        PairSums.of(v, t).merged(PairSums.of(v[:, :9], t))


def test_held_out_pairs_of_another_width_are_refused_by_name() -> None:
    v, t = features(200)
    with pytest.raises(ValueError, match="text_features must have the 7 columns of the pairs before"):
        search([PairSums.of(v[40:], t[40:])], v[:40], t[:40, :6])


def test_a_search_without_held_out_pairs_is_refused() -> None:
    v, t = features(200)
    with pytest.raises(ValueError, match="image_features and text_features must be held-out pairs; got none"):
        search([PairSums.of(v[40:], t[40:])], v[:0], t[:0])


def test_a_row_of_zeros_is_named() -> None:
    v, t = features()
    cca = CanonicalCorrelation.fit(v, t, dimensions=3)
    v[5] = 0
    with pytest.raises(ValueError, match="image_features must have a direction; row 5 has zeros alone"):
        CanonicalCorrelation.fit(v, t, dimensions=3)
    with pytest.raises(ValueError, match="images must have a direction; row 5 has zeros alone"):
        cca.images(v)


def test_projected_rows_of_another_width_are_refused_by_name() -> None:
    v, t = features()
    cca = CanonicalCorrelation.fit(v, t, dimensions=3)
    with pytest.raises(ValueError, match=re.escape("texts must have 7 columns; got shape (120, 10)")):
        cca.texts(v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_ridge": -0.1}, "image_ridge must be a finite number >= 0; got -0.1"),
        ({"text_ridge": float("nan")}, "text_ridge must be a finite number >= 0; got nan"),
        ({"text_ridge": float("inf")}, "text_ridge must be a finite number >= 0; got inf"),
        ({"power": -1}, "power must be a finite number >= 0; got -1"),
        ({"dimensions": 0}, "dimensions must be an integer of at least 1; got 0"),
        ({"dimensions": 8}, "dimensions must be at most the width of the narrower features, 7; got 8"),
        ({"root": 1}, "root must be True or False; got 1"),
    ],
    ids=[
        "a negative ridge",
        "a ridge of NaN",
        "an infinite ridge",
        "a negative power",
        "no dimensions",
        "more dimensions than the texts have",
        "a root that is no boolean",
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CanonicalCorrelation.fit(*features(), **{"dimensions": 3, **options})


def test_a_ridge_of_zero_needs_two_pairs_more_than_dimensions() -> None:
    """Noise would correlate perfectly: eleven centred pictures span all of their ten dimensions."""
    v, t = features(11)
    message = "image_ridge=0 needs at least two pairs more than dimensions.*; got 11 pairs and 10 dimensions"
    with pytest.raises(ValueError, match=message):
        CanonicalCorrelation.fit(v, t, dimensions=3, image_ridge=0)
    CanonicalCorrelation.fit(*features(12), dimensions=3, image_ridge=0)
    # The texts have seven dimensions, so that their ridge may be 0 with eleven pairs.
    CanonicalCorrelation.fit(v, t, dimensions=3, text_ridge=0)


# --- search -----------------------------------------------------------------------------------------------

ONE_SETTING = Grid(image_ridges=(1.0,), text_ridges=(1.0,), dimensions=(7,), powers=(1.0,))
"""The default setting, with all seven dimensions of the texts."""


def mean_recall(images: Tensor, texts: Tensor, k: int, **ids: Tensor) -> float:
    """R@k, the mean of both ways."""
    recalls = recall(images, texts, k, **ids)
    return (recalls[f"image_to_text_R@{k}"] + recalls[f"text_to_image_R@{k}"]).item() / 2


@pytest.mark.parametrize("captions", [None, 2])
def test_every_trial_has_the_recall_of_its_own_fit(captions: int | None) -> None:
    """Of a grid of eight settings, each of features and of their square roots; the best comes first."""
    v, t = features(400, (20, 12), captions=captions)
    grid = Grid(image_ridges=(0.5, 2.0), text_ridges=(0.1,), dimensions=(3, 12), powers=(0.0, 1.0))
    learned = [PairSums.of(v[:300], t[:300], root=root) for root in (False, True)]
    trials = search(learned, v[300:], t[300:], grid=grid)
    assert len({trial.setting for trial in trials}) == len(trials) == 8 * 2
    recalls = [trial.recall for trial in trials]
    assert recalls == sorted(recalls, reverse=True)
    ids = torch.arange(100)  # of the held-out pictures
    text_ids = ids.repeat_interleave(captions or 1)
    for setting, value in trials:
        cca = CanonicalCorrelation.fit(v[:300], t[:300], **setting.as_options())
        images, texts = cca.images(v[300:]), cca.texts(t[300:].reshape(-1, t.shape[-1]))
        expected = mean_recall(images, texts, k=10, image_ids=ids, text_ids=text_ids)
        one_hit = 0.5 / len(texts)  # of a text, the least by which two recalls differ
        assert value == pytest.approx(expected, abs=0.9 * one_hit)


def test_equal_held_out_rows_are_ties_and_rank_before_the_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that of 40 pairs the 30 equal ones have no hit among the first ten: 29 others are as good.

    The product has errors that depend on the place, as rounding may have on some machines.
    """
    v, t = features(200)
    images, texts = v[:40].clone(), t[:40].clone()
    images[:30], texts[:30] = v[0], t[0]
    errors = 1e-6 * torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("rankloss_features.cca.product", lambda x, y: x @ y + errors)
    (trial,) = search([PairSums.of(v[40:], t[40:])], images, texts, grid=ONE_SETTING)
    cca = CanonicalCorrelation.fit(v[40:], t[40:], dimensions=7)
    assert trial.recall == mean_recall(cca.images(images), cca.texts(texts), k=10)
    assert trial.recall <= (40 - 30) / 40


def test_partners_that_are_equally_good_are_no_wrong_answers_to_each_other() -> None:
    """Each picture has one caption twice: both are the best, and neither is a wrong answer."""
    v, t = features(200)
    twice = t[:40, None].expand(-1, 2, -1)
    (trial,) = search([PairSums.of(v[40:], t[40:])], v[:40], twice, grid=ONE_SETTING, k=1)
    (trial_of_one,) = search([PairSums.of(v[40:], t[40:])], v[:40], t[:40], grid=ONE_SETTING, k=1)
    assert trial.recall == trial_of_one.recall > 0


def test_ids_make_partners_of_several_pictures_and_captions() -> None:
    v, t = features(300)
    ids = torch.arange(60) // 3  # three pictures and three captions of one id
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    partner_ids = {"image_ids": ids, "text_ids": ids[order]}
    sums = PairSums.of(v[60:], t[60:])
    (trial,) = search([sums], v[:60], t[:60][order], grid=ONE_SETTING, k=3, **partner_ids)
    cca = Eigenbases(sums).fit(Setting(dimensions=7))
    expected = mean_recall(cca.images(v[:60]), cca.texts(t[:60][order]), k=3, **partner_ids)
    assert trial.recall == pytest.approx(expected, abs=1e-6)


def test_of_equally_good_settings_the_first_of_the_grid_is_the_best() -> None:
    v, t = features(200)
    grid = Grid(image_ridges=(2.0, 1.0, 0.5), text_ridges=(1.0, 0.7), dimensions=(7,), powers=(1.0,))
    trials = search([PairSums.of(v, t)], v[:10], t[:10], grid=grid)  # ten items: all are found
    ridges = [(trial.setting.image_ridge, trial.setting.text_ridge) for trial in trials]
    assert ridges == list(itertools.product(grid.image_ridges, grid.text_ridges))


def test_widths_beyond_the_features_are_tried_as_these() -> None:
    v, t = features(200)
    grid = Grid(image_ridges=(1.0,), text_ridges=(1.0,), dimensions=(3, 256, 384), powers=(1.0,))
    trials = search([PairSums.of(v, t)], v[:50], t[:50], grid=grid)
    assert {trial.setting.dimensions for trial in trials} == {3, 7}  # the texts have seven dimensions


def test_one_decomposition_serves_all_ridges_and_one_all_widths_and_powers(monkeypatch: Any) -> None:
    v, t = features(200)
    eigh, svd = Mock(wraps=torch.linalg.eigh), Mock(wraps=torch.linalg.svd)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    grid = Grid(image_ridges=(1.0, 2.0, 3.0), text_ridges=(0.1, 0.2), dimensions=(2, 4, 6), powers=(0.5, 1.0))
    trials = search([PairSums.of(v, t)], v, t, grid=grid)
    assert len(trials) == 3 * 2 * 3 * 2  # ridges of pictures and of texts, widths, powers
    assert eigh.call_count == 2  # one of each modality
    assert svd.call_count == 3 * 2  # one of each pair of ridges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 41}, "k must be at most 40; got 41"),
        ({"image_ids": torch.arange(40)}, "image_ids and text_ids go together; got image_ids alone"),
        (
            {"image_ids": torch.arange(40), "text_ids": torch.arange(40) + 1},
            "image_ids: 1 of 40 images have no text of their id, the first is row 0 with id 0",
        ),
        ({"grid": Grid(powers=())}, "grid must have at least one setting"),
    ],
    ids=["k above the pairs", "ids of one modality", "ids without a partner", "an empty grid"],
)
def test_a_search_that_cannot_be_ranked_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    v, t = features(200)
    with pytest.raises(ValueError, match=re.escape(message)):
        search([PairSums.of(v[40:], t[40:])], v[:40], t[:40], **options)


def test_a_grid_with_a_bad_number_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="text_ridge must be a finite number >= 0; got -1"):
        Grid(text_ridges=(1.0, -1.0))
