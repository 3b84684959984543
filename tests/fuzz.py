"""Random options and data against the NumPy reference, for as long as it is given: ``make fuzz``.

Every example is computed in float64 and in float32: the value against :mod:`rankloss.reference`, the gradient
of every input against dense autograd (:mod:`oracle`), under an upstream gradient that is not 1. An error
above its bound, or an exception, is a finding: it is printed with the command that repeats it, and the exit
code is 1. Where rounding may put two items of a list in another order there is no one right value; such
examples are counted, and left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle
from rankloss import RankConsistency, reference

BOUNDS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-4)}  # value, gradient
GAPS = {torch.float64: 1e-12, torch.float32: 3e-6}  # below it, a rounded product may stand on the other side
EXACT = ("sign codes", "sparse")  # data whose products are exact in float32: their ties are no accidents
DATA = ("random", "correlated", "duplicates", "clusters", *EXACT)
COMPUTED = ("chunk_size", "kernel")  # options that the formula does not know
TEACHER = ("reference_image_features", "reference_text_features")


@dataclass(frozen=True)
class Case:
    """One example; everything random in it comes from the seed."""

    seed: int
    data: str
    scale: float
    options: dict[str, Any]
    features: tuple[np.ndarray, np.ndarray]
    teacher: tuple[np.ndarray, np.ndarray] | None

    @property
    def formula(self) -> dict[str, Any]:
        """The options that the formula knows; the others say how it is computed."""
        return {k: v for k, v in self.options.items() if k not in COMPUTED}

    @property
    def ranked_by(self) -> tuple[np.ndarray, np.ndarray]:
        """The features whose similarities order the lists."""
        return self.features if self.teacher is None else self.teacher

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the library is called with."""
        named = dict(zip(("image_features", "text_features"), self.features, strict=True))
        named |= dict(zip(TEACHER, self.teacher or (), strict=False))
        tensors = {name: torch.from_numpy(x).to(dtype) for name, x in named.items()}
        return {**tensors, "logit_scale": torch.tensor(self.scale, dtype=dtype)}


def draw(seed: int) -> Case:
    """Options of every kind, as far as they can be combined, and data."""
    rng = np.random.default_rng(seed)

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    options = {
        "model": one_of("plackett_luce", "plackett_luce", "top_one"),
        "lists": one_of("row", "row", "batch"),
        "reduction": one_of("mean", "sum", "none"),
        "diagonal": one_of(True, False),
        "chunk_size": one_of(None, 1, 2, 5),
        "kernel": one_of("auto", "torch"),
        "cross_modal": one_of(0.0, 1.0, 0.25),
        "in_modal": one_of(1.0, 3.0),
    }
    has_teacher = one_of(False, False, True)
    if options["model"] == "top_one":
        options["reference_scale"] = one_of(None, 5.0, 60.0) if has_teacher else None
    else:
        options["top_k"] = one_of(None, 1, 3, 12)
        options["discount"] = one_of(None, None, "log")
        options["worth"] = one_of("exp", "exp", "shifted")
    if not has_teacher:
        options["fixed_reference"] = one_of(None, "image", "text")
    n, d, data = int(rng.integers(2, 20)), int(rng.integers(2, 16)), one_of(*DATA)
    scale = float(one_of(1.0, 10.0, 1 / 0.07, 100.0))
    features, teacher = (_features(rng, data, n, d) for _ in range(2))
    return Case(seed, data, scale, options, features, teacher if has_teacher else None)


def _features(rng: np.random.Generator, data: str, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    v, t = (_rows(rng, data, n, d) for _ in range(2))
    if data == "correlated":
        t = v + rng.choice([0.01, 0.1, 0.5]) * t
    if data == "duplicates":
        for x in (v, t):
            for _ in range(rng.integers(1, n)):
                x[rng.integers(n)] = x[rng.integers(n)]
    if data == "clusters":
        v, t = (x[rng.integers(0, 2, n)] + 1e-3 * rng.standard_normal(x.shape) for x in (v, t))
    if data not in EXACT:
        v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, t))
    return v, t


def _rows(rng: np.random.Generator, data: str, n: int, d: int) -> np.ndarray:
    if data == "sign codes":
        return rng.choice([-0.25, 0.25], (n, 16))
    if data == "sparse":
        x = np.zeros((n, 16))
        for row in x:
            count = rng.choice([1, 4])
            row[rng.permutation(16)[:count]] = rng.choice([-1, 1], count) / math.sqrt(count)
        return x
    return rng.standard_normal((n, d))


def is_decided(case: Case, gap: float) -> bool:
    """Whether every list has one order, ties included, whatever the rounding of the products."""
    if case.options.get("worth") == "shifted" and _lowest(case.features) < -0.99:
        return False
    if case.options["model"] == "top_one" or case.data in EXACT:
        return True
    for y, kinds in _lists(case):
        order = np.argsort(y, -1, kind="stable")
        steps = np.diff(np.take_along_axis(y, order, -1))
        change = np.diff(np.take_along_axis(kinds, order, -1)) != 0
        if np.any(change & (steps < gap)):
            return False
    return True


def _lowest(features: tuple[np.ndarray, np.ndarray]) -> float:
    v, t = features
    return float(min((a @ b.T).min() for a, b in ((v, t), (v, v), (t, t))))


def _lists(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reference values of all lists, ``[lists, items]``, and which of them are equal by construction."""
    v, t = case.ranked_by
    n = len(v)
    shape = (n, n) if case.options["lists"] == "row" else (1, n * n)
    for a, b in ((v, t), (t, v), (v, v), (t, t)):
        rows, columns = (np.unique(x, axis=0, return_inverse=True)[1].reshape(-1) for x in (a, b))
        kinds = rows[:, None] * n + columns
        if a is b:  # a product with itself is symmetric, and a row's with itself is 1
            kinds = np.minimum(kinds, kinds.T)
            kinds[rows[:, None] == columns] = -1
        yield (a @ b.T).reshape(shape), kinds.reshape(shape)


def errors(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """How far value and gradients are off, relative to the value, or to one nat per item if that is more."""
    inputs = case.inputs(dtype)
    wanted = ("image_features", "text_features", "logit_scale")
    exact = {k: x.double().requires_grad_(k in wanted) for k, x in inputs.items()}
    of_oracle = oracle.rank_terms(**exact, **case.formula)
    arrays = {k: x.detach().numpy() for k, x in exact.items()}
    weights = {k: case.formula[k] for k in ("cross_modal", "in_modal")}
    literal = {k: v for k, v in case.formula.items() if k not in weights}
    of_reference = sum(
        w * getattr(reference, k)(**{**arrays, "logit_scale": case.scale}, **literal)
        for k, w in weights.items()
    )
    leaves = {k: x.requires_grad_(k in wanted) for k, x in inputs.items()}
    found = RankConsistency(**case.options)(**leaves)
    n = len(inputs["image_features"])
    one_nat = sum(weights.values()) * {"mean": 1, "sum": n**2, "none": n**1.5}[case.options["reduction"]]
    by_oracle, by_library = (_gradients(x, of, wanted) for x, of in ((of_oracle, exact), (found, leaves)))
    whole = math.sqrt(sum(float(g.square().sum()) for g in by_oracle))
    floor = max(1e-2 * whole, one_nat * case.scale / 10)
    pairs = zip(by_library, by_oracle, strict=True)
    return (
        _error(found, torch.as_tensor(of_reference, dtype=torch.float64), one_nat),
        max(_error(a, b, floor) for a, b in pairs),
    )


def _gradients(value: Tensor, inputs: dict[str, Tensor], wanted: tuple[str, ...]) -> list[Tensor]:
    upstream = torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype).view_as(value)
    by = [inputs[name] for name in wanted]
    found = torch.autograd.grad(value, by, upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


def _error(actual: Tensor, wanted: Tensor, at_least: float) -> float:
    assert actual.shape == wanted.shape
    error = float((actual.detach().double() - wanted).norm() / wanted.norm().clamp_min(at_least))
    return math.inf if math.isnan(error) else error


def check(seed: int) -> str | None:
    """What is wrong with an example; ``""`` where there is no one right answer, None where all is right."""
    case, checked = draw(seed), 0
    for dtype, bounds in BOUNDS.items():
        if not is_decided(case, GAPS[dtype]):
            continue
        checked += 1
        try:
            found = errors(case, dtype)
        except Exception as error:
            return f"{dtype}: {error!r}\n{case}"
        if (
            case.options["model"] == "top_one"
        ):  # follows the values of the lists: roundings count by the scale
            scale = max(case.scale, case.options["reference_scale"] or 0.0)
            bounds = (max(bounds[0], 4 * scale * torch.finfo(dtype).eps), bounds[1])
        for name, error, bound in zip(("value", "gradient"), found, bounds, strict=True):
            if error > bound:
                return f"{dtype}: the {name} is off by {error:.1e}; the bound is {bound:.0e}\n{case}"
    return None if checked else ""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search")
    parser.add_argument("--seed", type=int, help="of the first example; by default another every time")
    parser.add_argument("--examples", type=int, help="stop after so many")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    first, give_up = given.seed if given.seed is not None else int(time.time()), 60 * given.minutes
    begin, undecided = time.monotonic(), 0
    for seed in itertools.count(first):
        if time.monotonic() - begin > give_up or seed - first == given.examples:
            print(f"{seed - first} examples, {undecided} of them without one right answer. No finding.")
            return 0
        message = check(seed)
        undecided += message == ""
        if message:
            print(
                f"A finding: {message}\nTo see it again:\n    python tests/fuzz.py --seed {seed} --examples 1"
            )
            return 1
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
