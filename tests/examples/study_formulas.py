"""The examples' losses as their papers have them, in NumPy, and the check of a loss against its formula.

A formula takes rows of features, or matrices of scores: first the student's, then the teacher's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch


def unit(rows, columns, seed):
    """Return random rows of length 1."""
    return normalized(np.random.default_rng(seed).normal(size=(rows, columns)))


def normalized(x):
    """Return the rows at length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_is_formula(term, formula, student, weight):
    """Value, and a multiple's gradient along a random direction, as a difference quotient has it.

    ``term`` takes two tensors, ``formula`` two arrays; the first is to be ``weight`` times the second.
    """
    features = [torch.from_numpy(x).requires_grad_() for x in student]
    value = term(*features)
    assert value.item() == pytest.approx(weight * formula(*student), rel=1e-6)
    along, step = [np.random.default_rng(9 + i).normal(size=x.shape) for i, x in enumerate(student)], 1e-6
    ends = (formula(*(x + sign * step * a for x, a in zip(student, along, strict=True))) for sign in (1, -1))
    found = torch.autograd.grad(-3 * value, features, allow_unused=True, materialize_grads=True)
    inner = sum((x.numpy() * a).sum() for x, a in zip(found, along, strict=True))
    assert inner == pytest.approx(-3 * weight * np.subtract(*ends) / (2 * step), rel=1e-5)


def log_softmax(rows):
    """Return the logarithms of the rows' softmax."""
    return rows - np.log(np.exp(rows - rows.max()).sum(-1, keepdims=True)) - rows.max()


def without_diagonal(x):
    """Return a square matrix without its own pairs."""
    return np.array([np.delete(row, i) for i, row in enumerate(x)])


def within(features, scale=1.0):
    """Return the scaled similarities within each modality, without the own pairs."""
    return [scale * without_diagonal(x @ x.T) for x in features]


def both_ways(features, scale=1.0):
    """Return the scaled similarities of pictures with texts, and of texts with pictures."""
    v, t = features
    return [scale * v @ t.T, scale * t @ v.T]


def mean_of(distance, mine, theirs):
    """Return the mean of a distance over pairs of matrices."""
    return np.mean([distance(x, y) for x, y in zip(mine, theirs, strict=True)])


def cross_entropy(x, y):
    """Return the mean cross-entropy from the softmax of the teacher's rows to that of the student's."""
    return -(np.exp(log_softmax(y)) * log_softmax(x)).sum(-1).mean()


def pearson(x, y):
    """Return one minus the correlation of softmax rows (DIST)."""
    rows = zip(np.exp(log_softmax(x)), np.exp(log_softmax(y)), strict=True)
    return np.mean([1 - np.corrcoef(mine, theirs)[0, 1] for mine, theirs in rows])


def mimicry(student, teacher):
    """Return the mean squared distance from the teacher's features, of both modalities together."""
    return sum(((x - y) ** 2).sum(1).mean() for x, y in zip(student, teacher, strict=True))


def contrast(student, teacher, scale):
    """Return CLIP's loss of each modality of the student with the other one of the teacher."""
    crossed = zip(student, reversed(teacher), strict=True)
    return -np.mean([np.diag(log_softmax(scale * x @ y.T)).mean() for x, y in crossed])


def distances(student, teacher):
    """Return Huber's loss of the distances within a modality, each over their mean (RKD)."""
    total = 0.0
    for both in zip(student, teacher, strict=True):
        pairs = [(i, j) for i in range(len(both[0])) for j in range(i)]
        own, theirs = (np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in both)
        off = abs(own / own.mean() - theirs / theirs.mean())
        total += np.where(off < 1, off**2 / 2, off - 0.5).mean()
    return total


def cka(student, teacher):
    """Return one minus linear CKA, the mean of both modalities, by the N × N matrices of the definition."""
    found = []
    for both in zip(student, teacher, strict=True):
        centring = np.eye(len(both[0])) - 1 / len(both[0])
        k, m = (centring @ x @ x.T @ centring for x in both)
        found.append(1 - (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    return np.mean(found)


def plackett_luce(x, grades, top_k=None):
    """Return the NLL of one list's order by grades, per counted item; items of −∞ are not counted."""
    terms = []
    for rank, place in enumerate(np.argsort(-grades, kind="stable")):
        below = x[grades <= grades[place]]
        is_counted = grades[place] > -np.inf and len(below) > 1 and (top_k is None or rank < top_k)
        if is_counted:
            terms.append(np.log(np.exp(below).sum()) - x[place])
    return np.mean(terms)
