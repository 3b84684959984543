"""A teacher's principal components: what they are, and the command that writes them."""

import numpy as np
from miniature_paper import components
from miniature_paper.components import principal_components

ROWS, WIDE, NARROW = 9, 8, 3


def features(seed):
    return np.random.default_rng(seed).normal(size=(ROWS, WIDE))


def test_they_keep_products_best(monkeypatch):
    """As the truncated singular value decomposition of all features does, read in parts or not."""
    both = features(0), features(1)
    whole = principal_components(*both, NARROW)
    monkeypatch.setattr(components, "_ROWS", 4)
    kept = principal_components(*both, NARROW)
    u, s, vt = np.linalg.svd(np.concatenate(both), full_matrices=False)
    for found in (whole, kept):
        projected = np.concatenate(both) @ found @ found.T
        np.testing.assert_allclose(projected, (u[:, :NARROW] * s[:NARROW]) @ vt[:NARROW], atol=1e-12)
