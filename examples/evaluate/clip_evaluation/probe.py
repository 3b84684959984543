"""The linear probe: logistic regression on frozen features, regularised by a validation split."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

# Inverse strengths, as scikit-learn counts them, for features of variance one.
STRENGTHS = tuple(10.0**exponent for exponent in (-5, -4, -3, -2, -1, 0, 1))
_HELD_OUT = 0.2
_PROBE = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a linear probe found, and its scores of the test items."""

    strength: float  # the inverse regularisation strength that was chosen
    at_edge: bool  # whether that was the first or last one tried, so that a better one may lie beyond
    validation: dict[float, float]  # top-1 accuracy on the validation items for every strength, in percent
    scores: Tensor  # [N, classes]: class probabilities


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None = None,
    *,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Train logistic regression on features ``[N, D]`` with labels ``[N]``, and score the test items.

    The features are standardised, so the same strengths suit every model. The strength with the best accuracy
    on the validation items (by default a fifth of the training items) is taken, the stronger regularisation
    among equals; the probe is then trained again on training and validation items together.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, appendix A.3.
    """
    if not strengths:
        raise ValueError("strengths: none given")
    x, y = _arrays("train", train, classes)
    test_x, _ = _arrays("test", test, classes)
    if validation is None:
        counts = np.bincount(y, minlength=classes)
        stratify = y if counts[counts > 0].min() > 1 and len(y) * _HELD_OUT >= (counts > 0).sum() else None
        options = {"test_size": _HELD_OUT, "random_state": 0, "stratify": stratify}
        x, held_x, y, held_y = train_test_split(x, y, **options)
    else:
        held_x, held_y = _arrays("validation", validation, classes)
    if len(np.unique(y)) < 2:
        raise ValueError("train: all labels are equal, so there is nothing to tell apart")
    parts = np.repeat([-1, 0], [len(x), len(held_x)])  # always trained on, held out
    fold = PredefinedSplit(parts)
    # Among equals the first is taken, so the strongest regularisation; then it is trained on both parts.
    search = GridSearchCV(_PROBE, {"logisticregression__C": sorted(strengths)}, cv=fold)
    search.fit(np.concatenate([x, held_x]), np.concatenate([y, held_y]))
    accuracies = 100 * search.cv_results_["mean_test_score"]
    tried = dict(zip(sorted(strengths), accuracies.tolist(), strict=True))
    best, model = search.best_params_["logisticregression__C"], search.best_estimator_
    scores = np.zeros((len(test_x), classes))
    scores[:, model.classes_] = model.predict_proba(test_x)
    at_edge = len(tried) > 1 and best in (min(tried), max(tried))
    return Probe(best, at_edge, tried, torch.from_numpy(scores))


def _arrays(name: str, data: tuple[Tensor, Tensor], classes: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = data
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        got = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{name}: expected features [N, D] and labels [N], got {got}")
    if not features.isfinite().all():
        raise ValueError(f"{name}: the features hold NaN or infinity (did training diverge?)")
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"{name}: labels must be below {classes}")
    return features.double().cpu().numpy(), labels.long().cpu().numpy()
