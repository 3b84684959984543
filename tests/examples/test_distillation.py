"""The rivals of ranking by a teacher: their terms against NumPy."""

import numpy as np
import pytest
import study_formulas
import torch
from studies.miniature.rivals import TERMS, RivalsLoss
from study_formulas import both_ways, cross_entropy, mean_of, pearson, unit, within

import rankloss

N, D, WIDE = 7, 5, 8
S, S_TEACHER = 12.0, 30.0
STUDENT = unit(N, D, 0), unit(N, D, 1)
TEACHER = unit(N, WIDE, 2), unit(N, WIDE, 3)
COMPONENTS = np.linalg.qr(np.random.default_rng(4).normal(size=(WIDE, D)))[0]
PROJECTED = [study_formulas.normalized(x @ COMPONENTS) for x in TEACHER]


def relation(*x):
    return mean_of(cross_entropy, both_ways(x, S), both_ways(TEACHER, S_TEACHER))


FORMULAS = {
    "mimicry": lambda *x: study_formulas.mimicry(x, PROJECTED),
    "contrast": lambda *x: study_formulas.contrast(x, PROJECTED, 20.0),
    "relation": relation,
    "softmax": lambda *x: relation(*x) + mean_of(cross_entropy, within(x, S), within(TEACHER, S_TEACHER)),
    "pearson": lambda *x: mean_of(pearson, both_ways(x, S), both_ways(TEACHER, S_TEACHER)),
    "distances": lambda *x: study_formulas.distances(x, TEACHER),
}


def given(pair=TEACHER):
    names = ("reference_image_features", "reference_text_features")
    return dict(zip(names, map(torch.from_numpy, pair), strict=True))


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_papers_formula(name):
    scales = {"contrast": 20.0, **dict.fromkeys(("relation", "softmax", "pearson"), S_TEACHER)}
    criterion = RivalsLoss(rankloss.ClipLoss(), {name: 2.5}, scales, torch.from_numpy(COMPONENTS))

    def term(*features):
        entries = criterion(*features, S, output_dict=True, **given())
        assert entries.keys() == {"contrastive_loss", f"{name}_loss"}
        torch.testing.assert_close(entries["contrastive_loss"], rankloss.ClipLoss()(*features, S))
        return entries[f"{name}_loss"]

    study_formulas.assert_is_formula(term, FORMULAS[name], STUDENT, 2.5)
