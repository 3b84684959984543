"""Heads that see a part of a teacher: the arms' losses against their formulas, and the teacher's lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import study_formulas
import torch
from studies.photographs import teacher, views
from studies.photographs import view_losses as losses
from studies.photographs.features import Side
from studies.photographs.heads import WIDTH
from studies.photographs.teacher import Teacher
from studies.photographs.views import Setting
from study_formulas import both_ways, cross_entropy, log_softmax, pearson, within
from torch.nn.functional import normalize

import rankloss

N, D, S = 6, WIDTH, 5.0
TRAIN, EACH, WIDE = 70, 5, 300  # pictures, sentences of each, the teacher's width


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def made_up():
    common = unit(TRAIN, 1, WIDE, seed=0)
    pictures, sentences = common[:, 0], normalize(common + 0.8 * unit(TRAIN, EACH, WIDE, seed=1), dim=-1)
    side, weak = Side(pictures, sentences), Side(unit(TRAIN, 9, seed=2), unit(TRAIN, EACH, 9, seed=3))
    return Teacher({"train": side}, **teacher.lists(side, weak)), weak


TEACHER, WEAK = made_up()
INPUTS = Side(unit(TRAIN, 8, seed=4), unit(TRAIN, EACH, 12, seed=5))  # of the students
STUDENT = unit(N, D, seed=6), unit(N, D, seed=7)
ROWS, DRAWN = torch.tensor([3, 29, 0, 11, 7, 21]), torch.tensor([0, 4, 2, 2, 1, 3])
TRAINED = TEACHER.sides["train"].pictures[ROWS], TEACHER.sides["train"].sentences[ROWS, DRAWN]
SMOOTHING = 0.1


class Model:
    """A model whose features of sentences are given."""

    candidates = unit(TRAIN * EACH, D, seed=8)

    def sentences(self, features):
        """Return the features of the sentences that are looked for in the students' inputs."""
        same = (features[..., None, :] == INPUTS.sentences.flatten(0, 1)).all(-1)
        return self.candidates[same.float().argmax(-1)]


def seen(view):
    return views.of(view, TEACHER, INPUTS)(Model(), ROWS, DRAWN)


def built(view, arm, **changes):
    loss = losses.build(Setting(arm, 0, "dev", view=view, label_smoothing=SMOOTHING, **changes), (WIDE, WIDE))
    loss = loss.double()
    for part in loss.modules():
        if hasattr(part, "set_epoch"):
            part.set_epoch(3, 3)  # the end of the ramp: λ = 2/16
    return loss


# --- literal formulas ---


def nll(x, y, top_k):
    return np.mean([study_formulas.plackett_luce(*rows, top_k) for rows in zip(x, y, strict=True)])


def standardised_squares(x, y):
    return (((x - x.mean()) / x.std() - (y - y.mean()) / y.std()) ** 2).mean()


TAUGHT = [x.numpy() for x in TRAINED]
REDUCED = [study_formulas.normalized(x[:, :WIDTH]) for x in TAUGHT]


def four(v, t):
    return [*both_ways((v, t)), *within((v, t))]


def of_four(view, distance, scale=1.0):
    change = {"sharpened": lambda x: np.exp(20 * (x - 1)), "saturated": lambda x: np.tanh(4 * x)}
    theirs = [scale * change.get(view, lambda x: x)(x) for x in four(*TAUGHT)]
    return lambda v, t: sum(distance(S * x, y) for x, y in zip(four(v, t), theirs, strict=True)) / 2


def listed_in_batch():
    """Return the places in the batch of each picture's listed ids, best first."""
    found = []
    for row in ROWS.tolist():
        graded = sorted(
            zip(TEACHER.grades[row].tolist(), TEACHER.ids[row].tolist(), strict=True), reverse=True
        )
        found.append([(grade, ROWS.tolist().index(i)) for grade, i in graded if i in ROWS])
    return found


def soft_labels(v, t):
    total, rows = 0.0, [[place for _, place in of] for of in listed_in_batch()]
    for x in (v @ t.T, t @ v.T):
        total += sum(-log_softmax(S * x)[i, of].mean() for i, of in enumerate(rows) if of) / 2
    return total / sum(map(bool, rows))


def ids_ranked(v, t):
    """Return own pair first, then the listed ids in the batch, within a modality without the own pair."""
    grades = np.full((N, N), -math.inf)
    np.fill_diagonal(grades, 99)
    for i, of in enumerate(listed_in_batch()):
        for grade, place in of:
            grades[i, place] = grade
    total = (
        sum(
            study_formulas.plackett_luce(S * row, y)
            for x in both_ways((v, t))
            for row, y in zip(x, grades, strict=True)
        )
        / N
    )
    others = study_formulas.without_diagonal(grades)
    for x in within((v, t)):
        rows = [(S * row, y) for row, y in zip(x, others, strict=True) if (y > -math.inf).any()]
        total += np.mean([study_formulas.plackett_luce(*row) for row in rows])
    return total / 2


NUMPY = {
    ("features", "mimicry"): (lambda *x: study_formulas.mimicry(x, REDUCED), {}),
    ("features", "contrast"): (
        lambda *x: study_formulas.contrast(x, REDUCED, 20.0),
        {"scale": 20.0},
    ),
    ("features", "softmax"): (of_four("scores", cross_entropy, 20.0), {"scale": 20.0}),
    ("scores", "ranks"): (of_four("scores", lambda x, y: nll(x, y, 3)), {"top_k": 3}),
    ("scores", "softmax"): (of_four("scores", cross_entropy, 20.0), {"scale": 20.0}),
    ("scores", "pearson"): (of_four("scores", pearson, 20.0), {"scale": 20.0}),
    ("scores", "squares"): (of_four("scores", standardised_squares), {}),
    ("sharpened", "softmax"): (of_four("sharpened", cross_entropy, 10.0), {"scale": 10.0}),
    ("saturated", "squares"): (of_four("saturated", standardised_squares), {}),
    ("ten ids", "ranks"): (ids_ranked, {}),
    ("ten ids", "soft-labels"): (soft_labels, {}),
}


@pytest.mark.parametrize(("view", "arm"), NUMPY)
def test_a_loss_is_its_formula(view, arm):
    formula, changes = NUMPY[view, arm]
    loss, given, scale = built(view, arm, weight=2.5, **changes), seen(view), torch.tensor(S).double()
    base = losses.losses.build("clip", label_smoothing=SMOOTHING)

    def term(*features):
        return loss(*features, scale, **given) - base(*features, scale)

    study_formulas.assert_is_formula(term, formula, [x.numpy() for x in STUDENT], 2.5)


def test_the_lists_of_the_formulas_are_no_trivial_ones():
    listed = listed_in_batch()
    assert any(listed)
    assert not all(listed)
    assert (TEACHER.ids < 0).any()


def test_ranks_of_features_are_the_librarys_terms():
    features, scale = [x.clone() for x in STUDENT], torch.tensor(S).double()
    clip = losses.losses.build("clip", label_smoothing=SMOOTHING)(*features, scale)
    given = seen("features")
    terms = rankloss.RankConsistency(top_k=3)(*features, scale, **given)
    loss = built("features", "ranks", weight=16.0, top_k=3)(*features, scale, **given)
    assert (loss - clip).item() == pytest.approx(2 * terms.item())
    both = built("features", "mimicry-and-ranks", weight=16.0, top_k=3, mimicry=4.0)
    added = 2 * terms.item() + 4 * study_formulas.mimicry([x.numpy() for x in features], REDUCED)
    assert (both(*features, scale, **given) - clip).item() == pytest.approx(added)


def test_a_view_without_a_common_space_has_part_2as_losses():
    given, scale = seen("separate"), torch.tensor(S).double()
    clip = losses.losses.build("clip", label_smoothing=SMOOTHING)(*STUDENT, scale)
    terms = rankloss.RankConsistency(cross_modal=0.0, top_k=2)(*STUDENT, scale, **given)
    loss = built("separate", "ranks", weight=8.0, top_k=2)(*STUDENT, scale, **given)
    assert (loss - clip).item() == pytest.approx(terms.item())
    with pytest.raises(ValueError, match="the view 'separate' has no arm 'mimicry'"):
        built("separate", "mimicry")
