"""The rivals of ranking by a teacher: their terms against NumPy, and what they refuse."""

import numpy as np
import pytest
import torch
from miniature_paper.rivals import TERMS, RivalsLoss

import rankloss

N, D, WIDE = 7, 5, 8
S, S_TEACHER = 12.0, 30.0


def unit(rows, columns, seed):
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


STUDENT = unit(N, D, 0), unit(N, D, 1)
TEACHER = unit(N, WIDE, 2), unit(N, WIDE, 3)
COMPONENTS = np.linalg.qr(np.random.default_rng(4).normal(size=(WIDE, D)))[0]


# --- the papers' formulas, entry by entry ---


def projected():
    found = []
    for x in TEACHER:
        rows = x @ COMPONENTS
        found.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return found


def probabilities(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def cross_entropy(teacher, student):
    rows = zip(teacher, student, strict=True)
    return np.mean([-(probabilities(y) * np.log(probabilities(x))).sum() for y, x in rows])


def without_diagonal(x):
    return np.array([np.delete(row, i) for i, row in enumerate(x)])


def numpy_mimicry(v, t):
    return sum(sum(((x - y) ** 2).sum(1)) / N for x, y in zip((v, t), projected(), strict=True))


def numpy_contrast(v, t):
    images, texts = projected()
    one_hot = 1e9 * np.eye(N)
    return (cross_entropy(one_hot, 20 * v @ texts.T) + cross_entropy(one_hot, 20 * t @ images.T)) / 2


def numpy_relation(v, t):
    mine, theirs = S * v @ t.T, S_TEACHER * TEACHER[0] @ TEACHER[1].T
    return (cross_entropy(theirs, mine) + cross_entropy(theirs.T, mine.T)) / 2


def numpy_softmax(v, t):
    within = [
        cross_entropy(without_diagonal(S_TEACHER * y @ y.T), without_diagonal(S * x @ x.T))
        for x, y in zip((v, t), TEACHER, strict=True)
    ]
    return numpy_relation(v, t) + sum(within) / 2


def numpy_pearson(v, t):
    mine, theirs = S * v @ t.T, S_TEACHER * TEACHER[0] @ TEACHER[1].T
    rows = [*zip(mine, theirs, strict=True), *zip(mine.T, theirs.T, strict=True)]
    return np.mean([1 - np.corrcoef(probabilities(x), probabilities(y))[0, 1] for x, y in rows])


def numpy_distances(v, t):
    total = 0.0
    for x, y in zip((v, t), TEACHER, strict=True):
        pairs = [(i, j) for i in range(N) for j in range(i)]
        own, theirs = (np.array([np.linalg.norm(z[i] - z[j]) for i, j in pairs]) for z in (x, y))
        off = abs(own / own.mean() - theirs / theirs.mean())
        total += np.where(off < 1, off**2 / 2, off - 0.5).mean()
    return total


def tensors(pair):
    return [torch.from_numpy(x).requires_grad_() for x in pair]


def given(pair=TEACHER):
    names = ("reference_image_features", "reference_text_features")
    return dict(zip(names, map(torch.from_numpy, pair), strict=True))


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_papers_formula(name):
    """Value, and the gradient along a random direction as a difference quotient has it."""
    scales = {"contrast": 20.0, **dict.fromkeys(("relation", "softmax", "pearson"), S_TEACHER)}
    criterion = RivalsLoss(components=torch.from_numpy(COMPONENTS), scales=scales, **{name: 2.5})
    features = tensors(STUDENT)
    entries = criterion(*features, S, output_dict=True, **given())
    expected = globals()[f"numpy_{name}"]
    assert entries.keys() == {"contrastive_loss", f"{name}_loss"}
    assert entries[f"{name}_loss"].item() == pytest.approx(2.5 * expected(*STUDENT), rel=1e-12)
    torch.testing.assert_close(entries["contrastive_loss"], rankloss.ClipLoss()(*features, S))
    along, step = [np.random.default_rng(9 + i).normal(size=(N, D)) for i in range(2)], 1e-6
    ends = (expected(*(x + sign * step * a for x, a in zip(STUDENT, along, strict=True))) for sign in (1, -1))
    slope = 2.5 * np.subtract(*ends) / (2 * step)
    found = torch.autograd.grad(entries[f"{name}_loss"], features)
    inner = sum((x.numpy() * a).sum() for x, a in zip(found, along, strict=True))
    assert inner == pytest.approx(slope, rel=1e-6)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "references", "named"),
    [
        ({"mimicry": 1.0}, TEACHER, "reference_image_features must have the student's width"),
        ({"contrast": 1.0, "components": torch.ones(3, D)}, TEACHER, "components"),
        ({"relation": 1.0}, (TEACHER[0][:3], TEACHER[1]), "reference_image_features"),
        ({"relation": 1.0}, (TEACHER[0], TEACHER[1] * np.nan), "reference_text_features"),
    ],
)
def test_a_wrong_teacher_is_named(options, references, named):
    with pytest.raises(ValueError, match=named):
        RivalsLoss(**options)(*tensors(STUDENT), S, **given(references))
