"""Records of a study that nothing was trained for."""

from __future__ import annotations

import numpy as np
from studies.plan import Find, MissingError

QUERIES = 40


def made_up(ask, sizes, names, score, *, geometry=lambda _: {"logit_scale": 10.0}, most=1000):
    """Return the records that a plan asks for, by data set.

    Args:
        ask: Of a study.
        sizes: Its plan, whose trainings are all made up.
        names: Of the data sets.
        score: Returns a setting's R@10, to which noise is added.
        geometry: Returns that of a setting.
        most: Questions of the plan.
    """
    finds = {name: Find(name, {}) for name in names}
    rng = np.random.default_rng(0)
    for _ in range(most):
        try:
            ask(sizes, finds)
            return finds
        except MissingError as missing:
            for one in missing.settings:
                of = record(score(one) + rng.normal(0, 0.2), rng)
                of["metrics"]["geometry"] = geometry(one)
                finds[missing.data].records[one] = of
    raise AssertionError


def record(score, rng):
    """Return a record of an R@10, with hits of as many queries in percent."""
    packed = np.packbits(rng.permutation(QUERIES) < QUERIES * score / 100).tobytes().hex()
    hits = {"pictures": QUERIES, "image_to_text": packed, "text_to_image": packed}
    metrics = {"retrieval": {"R@10, mean of both": score}, "hits": hits}
    return {"metrics": metrics, "conditions": {"cores": 2}}
