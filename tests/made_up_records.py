"""Records of a study that nothing was trained for."""

from __future__ import annotations

import numpy as np
from studies.plan import Find, MissingError

QUERIES = 40


def made_up(ask, sizes, names, score, *, geometry=lambda _: {"logit_scale": 10.0}, most=1000):
    """Return the records that a plan asks for, by data set.

    A plan is asked again until no training is missing, since what it asks for may depend on earlier scores.

    Args:
        ask: The function of a study that reads the records of its plan, and raises for missing ones.
        sizes: The plan, whose trainings are all made up.
        names: The data sets' names.
        score: Returns a setting's R@10, to which noise is added.
        geometry: Returns a setting's geometry.
        most: How often the plan is asked at most.
    """
    finds = {name: Find(name, {}) for name in names}
    rng = np.random.default_rng(0)
    for _ in range(most):
        try:
            ask(sizes, finds)
            return finds
        except MissingError as missing:
            for setting in missing.settings:
                of_setting = record(score(setting) + rng.normal(0, 0.2), rng)
                of_setting["metrics"]["geometry"] = geometry(setting)
                finds[missing.data].records[setting] = of_setting
    raise AssertionError(f"the plan has asked {most} times, and still lacks records")


def record(score, rng):
    """Return a record of an R@10 in percent, with hits of so many of the queries."""
    is_hit = rng.permutation(QUERIES) < QUERIES * score / 100
    packed = np.packbits(is_hit).tobytes().hex()
    hits = {"pictures": QUERIES, "image_to_text": packed, "text_to_image": packed}
    metrics = {"retrieval": {"R@10, mean of both": score}, "hits": hits}
    return {"metrics": metrics, "conditions": {"cores": 2}}
