"""The linear probe: logistic regression on frozen features, regularised by a validation split."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

_PROBE = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def linear_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test: Tensor,
    *,
    classes: int,
    strengths: Sequence[float],
) -> Tensor:
    """Train logistic regression on features ``[N, D]`` with labels ``[N]``, and score test features.

    The features are standardised, so the same strengths suit every model. The strength with the best accuracy
    on the validation items is taken, the stronger regularisation among equals; the probe is then trained
    again on training and validation items together. Strengths are inverse, as scikit-learn counts them.

    Returns:
        The class probabilities of the test items, ``[N, classes]``.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, appendix A.3.
    """
    x, y = (torch.cat(both).double().numpy() for both in zip(train, validation, strict=True))
    parts = np.repeat([-1, 0], [len(train[1]), len(validation[1])])  # −1: trained on; 0: held out
    # The first of equally good strengths is the strongest regularisation. The best is refitted on both parts.
    search = GridSearchCV(_PROBE, {"logisticregression__C": sorted(strengths)}, cv=PredefinedSplit(parts))
    search.fit(x, y.astype(int))
    scores = np.zeros((len(test), classes))
    scores[:, search.classes_] = search.predict_proba(test.double().numpy())
    return torch.from_numpy(scores)
