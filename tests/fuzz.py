"""Random options and data against the NumPy reference, for as long as it is given: ``make fuzz``.

Every example is computed in float64 and in float32: the value against :mod:`rankloss.reference`, the gradient
of every input against dense autograd (:mod:`oracle`), under an upstream gradient that is not 1. At the end
comes a table of the worst errors by option. An error above its bound, or an exception, is a finding: it is
made as small as hypothesis can make it and printed as a command that repeats it, and the exit code is 1.

Where rounding may put two items of a list in another order there is no one right value; such examples are
counted, and left out. Errors are relative to the value (or gradient), or to what one nat per item would give
where that is larger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
import rankloss
from rankloss import reference, schedules

BOUNDS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-4)}  # value, gradient
GAPS = {torch.float64: 1e-12, torch.float32: 3e-6}  # below it, a rounded product may stand on the other side
EXACT = ("sign codes", "sparse")  # data whose products are exact in float32: their ties are no accidents
LIST_OPTIONS = ("worth", "discount", "top_k")


class Finding(Exception):
    """An example that the library gets wrong."""


# --- examples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One example; everything random in it comes from the seed."""

    loss: str
    seed: int
    n: int
    d: int
    scale: float
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    of_clip: dict[str, Any] = field(default_factory=dict)
    """What RankClipLoss takes beside the options of its terms."""
    teacher: list[str] = field(default_factory=list)
    """The modalities of which a teacher's features rank the lists."""

    def of_teacher(self) -> dict[str, Tensor]:
        """Features of another dimension, by the names of the arguments."""
        both = replace(self, seed=self.seed // 2, d=self.d + 3).features()
        named = dict(zip(("image", "text"), both, strict=True))
        return {f"reference_{modality}_features": named[modality] for modality in self.teacher}

    def features(self) -> tuple[Tensor, Tensor]:
        """Images and texts, ``[n, d]`` in float64."""
        rng = np.random.default_rng(self.seed)
        v, t = (_rows(rng, self) for _ in range(2))
        if self.data == "correlated":
            t = v + rng.choice([0.01, 0.1, 0.5]) * t
        if self.data == "duplicates":
            for x in (v, t):
                for _ in range(rng.integers(1, self.n)):
                    x[rng.integers(self.n)] = rng.choice([1, 1, -1]) * x[rng.integers(self.n)]
        if self.data == "clusters":
            v, t = (x[rng.integers(0, 2, self.n)] + 1e-3 * rng.standard_normal(x.shape) for x in (v, t))
        if self.options.get("worth") == "identity":
            v, t = abs(v), abs(t)  # a cosine that is not positive has no logarithm
        if self.data not in EXACT:
            v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, t))
        if self.data == "near unit":
            v, t = (x * rng.uniform(0.995, 1.005, (self.n, 1)) for x in (v, t))
        return torch.from_numpy(v), torch.from_numpy(t)

    @property
    def command(self) -> str:
        """What repeats it."""
        return f"{sys.executable} tests/fuzz.py --case '{json.dumps(asdict(self))}'"


def _rows(rng: np.random.Generator, case: Case) -> np.ndarray:
    n, d = case.n, case.d
    if case.data == "sign codes":
        return rng.choice([-0.25, 0.25], (n, 16)) if d > 4 else rng.choice([-0.5, 0.5], (n, 4))
    if case.data == "sparse":
        x = np.zeros((n, 16))
        for row in x:
            count = rng.choice([1, 4])
            row[rng.permutation(16)[:count]] = rng.choice([-1, 1], count) / math.sqrt(count)
        return x
    if case.data == "low rank":
        return rng.standard_normal((n, 2)) @ rng.standard_normal((2, d))
    return rng.standard_normal((n, d))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Options of every kind, as far as they can be combined."""
    loss = draw(st.sampled_from(["RankConsistency", "RankClipLoss", "plackett_luce_nll"]))
    options: dict[str, Any] = {
        "worth": draw(st.sampled_from(["exp", "shifted", "identity"])),
        "discount": draw(st.sampled_from([None, "log"])),
        "top_k": draw(st.none() | st.integers(1, 12)),
        "ties": draw(st.sampled_from(["shared", "shared", "shared", "random"])),
    }
    of_clip: dict[str, Any] = {}
    teacher: list[str] = []
    data = ["random", "correlated", "low rank", "duplicates", "clusters", "near unit", *EXACT]
    if loss == "plackett_luce_nll":
        options = {k: v for k, v in options.items() if k != "worth"}
    else:
        options["lists"] = draw(st.sampled_from(["row", "batch"]))
        options["model"] = draw(st.sampled_from(["plackett_luce", "plackett_luce", "top_one"]))
        teacher = draw(st.sampled_from([[], [], [], ["image", "text"], ["image"], ["text"]]))
        is_ranked = options["model"] == "plackett_luce"
        if not is_ranked:
            options |= {"worth": "exp", "discount": None, "top_k": None, "ties": "shared"}
            options["reference_scale"] = draw(st.sampled_from([None, 5.0, 60.0])) if teacher else None
        shared, row = options["ties"] == "shared", options["lists"] == "row"
        reductions = ["mean", "sum", "none"] if loss == "RankConsistency" else ["mean", "sum"]
        options |= {
            "reduction": draw(st.sampled_from(reductions)),
            "fixed_reference": None if teacher else draw(st.sampled_from([None, "image", "text"])),
            "diagonal": draw(st.booleans()) if shared else True,
            "method": draw(st.sampled_from(["sort", "bin"])) if shared and row and is_ranked else "sort",
            "chunk_size": draw(st.sampled_from([None, 1, 2, 5])),
            "memory_budget": draw(st.sampled_from([None, 0, 300])),
            # "triton": in tests/kernels and in the core's.
            "kernel": draw(st.sampled_from(["auto", "torch"])),
            "precision": draw(st.sampled_from(["default", "exact-order"])) if row else "default",
        }
        if options["method"] == "bin":
            options["bins"] = draw(st.sampled_from([2, 3, 17, 640]))
        alone = [(0.0, 1.0), (0.0, 0.25)]
        weights = st.sampled_from(
            alone if len(teacher) == 1 else [(1.0, 1.0), (1.0, 0.0), *alone, (0.25, 3.0)]
        )
        names = ("cross_modal", "in_modal") if loss == "RankConsistency" else ("lambda_cross", "lambda_in")
        of_terms = dict(zip(names, draw(weights), strict=True))
        if loss == "RankConsistency":
            options |= of_terms
        else:
            of_clip = {
                **of_terms,
                "schedule": draw(st.sampled_from(schedules.NAMES)),
                "epoch": draw(st.integers(1, 8)),
                "normalizer": draw(st.sampled_from([1 / 16, 1.0])),
            }
    return Case(
        loss,
        seed=draw(st.integers(0, 2**32 - 1)),
        n=draw(st.integers(2, 9) | st.sampled_from([16, 24])),
        d=draw(st.integers(2, 16)),
        scale=draw(st.sampled_from([1.0, 10.0, 1 / 0.07, 100.0]) | st.floats(1, 100)),
        data=draw(st.sampled_from(data)),
        options=options,
        of_clip=of_clip,
        teacher=teacher,
    )


# --- what the library gives, and what it owes ---------------------------------------------------------------


@dataclass(frozen=True)
class Owed:
    """Value and gradients in float64, and the size of both if every item cost one nat."""

    value: Tensor
    gradients: tuple[Tensor, ...]
    one_nat: float
    one_nat_gradient: float


def _epochs(case: Case) -> tuple[int, int]:
    return case.of_clip["epoch"], 8


def build(case: Case) -> Any:
    """The library's own, ready to be called with features and a scale, or with scores and a reference."""
    if case.loss == "plackett_luce_nll":
        return lambda x, y: rankloss.plackett_luce_nll(x, y, **case.options)
    if case.loss == "RankConsistency":
        return rankloss.RankConsistency(**case.options)
    of_clip = {k: v for k, v in case.of_clip.items() if k != "epoch"}
    loss = rankloss.RankClipLoss(**of_clip, **case.options)
    loss.set_epoch(*_epochs(case))
    return loss


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Features, a scale and a teacher's features, or for a single list scores and a reference."""
    v, t = case.features()
    if case.loss == "plackett_luce_nll":
        return (case.scale * (v @ t.T)).to(dtype), (t @ v.T).to(dtype)
    teacher = (x.to(dtype) for x in case.of_teacher().values())
    return v.to(dtype), t.to(dtype), torch.tensor(case.scale, dtype=dtype), *teacher


def _named(case: Case, inputs: Any) -> dict[str, Any]:
    """The teacher's features among the inputs."""
    return dict(zip(case.of_teacher(), inputs[3:], strict=True))


def _weights(case: Case) -> tuple[float, float]:
    if case.loss == "RankConsistency":
        return case.options["cross_modal"], case.options["in_modal"]
    factor = schedules.by_name(case.of_clip["schedule"])(*_epochs(case)) * case.of_clip["normalizer"]
    return factor * case.of_clip["lambda_cross"], factor * case.of_clip["lambda_in"]


def _formula(case: Case) -> dict[str, Any]:
    """The options that the formula knows; the others say how it is computed."""
    of_lists = ("lists", "model", "reference_scale", "reduction", "fixed_reference", "diagonal", "bins")
    known = (*of_lists, *LIST_OPTIONS)
    return {k: v for k, v in case.options.items() if k in known}


def owed(case: Case, inputs: tuple[Tensor, ...]) -> Owed:
    """The oracles' answer at the inputs' own values; they must be of one mind."""
    exact = [x.detach().double() for x in inputs]
    arrays, formula = [x.numpy() for x in exact], _formula(case)
    if case.loss == "plackett_luce_nll":
        scores = exact[0].requires_grad_()
        value = oracle.nll(scores, exact[1], **formula)
        literal = reference.plackett_luce_nll(*arrays, **formula)
        wanted, one_nat, slope = (scores,), float(case.n), 1.0
    else:
        wanted = tuple(x.requires_grad_() for x in exact[:3])
        cross, within = _weights(case)
        teacher = _named(case, exact)
        value = oracle.rank_terms(*wanted, cross_modal=cross, in_modal=within, **teacher, **formula)
        literal = value.detach().numpy()
        if case.options["method"] == "sort":
            arguments = (arrays[0], arrays[1], float(arrays[2]))
            teacher = _named(case, arrays)
            literal = within * reference.in_modal(*arguments, **teacher, **formula)
            if cross:
                literal = literal + cross * reference.cross_modal(*arguments, **teacher, **formula)
        one_nat = (cross + within) * {"mean": 1, "sum": case.n**2, "none": case.n**1.5}[formula["reduction"]]
        if case.loss == "RankClipLoss":
            value = value + oracle.clip(*wanted)
            literal = literal + reference.clip(arrays[0], arrays[1], float(arrays[2]))
            one_nat += 1
        slope = case.scale if formula["worth"] == "exp" else 1.0
    # The reference takes a unit vector's cosine with itself as 1; in float32 that is off by a rounding.
    rounded = inputs[0].dtype == torch.float32 and formula.get("lists") == "batch"
    agreed = 1e-7 * case.scale if rounded else 1e-11
    if not np.allclose(value.detach().numpy(), literal, rtol=agreed, atol=agreed * one_nat):
        raise Finding(f"the oracles are of two minds: {literal} by NumPy, {value.detach().numpy()} by torch")
    gradients = torch.autograd.grad(value, wanted, _upstream(value), allow_unused=True)
    filled = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True))
    return Owed(torch.as_tensor(literal, dtype=torch.float64), filled, one_nat, one_nat * slope / 10)


def _upstream(value: Tensor) -> Tensor:
    return torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype).view_as(value)


def found(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The library's answer; an input that the value does not depend on has a gradient of zero."""
    count = 1 if case.loss == "plackett_luce_nll" else 3
    leaves = [x.detach().requires_grad_() if k < count else x for k, x in enumerate(inputs)]
    if case.loss == "plackett_luce_nll":
        value = build(case)(*leaves)
    else:
        value = build(case)(*leaves[:3], **_named(case, leaves))
    gradients = torch.autograd.grad(value, leaves[:count], _upstream(value), allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=False))
    return value.detach(), tuple(filled)


def errors(case: Case, dtype: torch.dtype) -> tuple[float, float] | None:
    """How far value and gradients are off; None where rounding may reorder a list."""
    inputs = inputs_of(case, dtype)
    if not is_decided(case, inputs, GAPS[dtype]):
        return None
    wanted, (value, gradients) = owed(case, inputs), found(case, inputs)
    if value.shape != wanted.value.shape:
        raise Finding(f"a value of shape {tuple(value.shape)}, not {tuple(wanted.value.shape)}")
    whole = math.sqrt(sum(float(g.square().sum()) for g in wanted.gradients))
    floors = [max(1e-2 * whole, wanted.one_nat_gradient)] * len(gradients)
    pairs = zip(gradients, wanted.gradients, floors, strict=True)
    return _error(value, wanted.value, wanted.one_nat), max(_error(*pair) for pair in pairs)


def _error(actual: Tensor, wanted: Tensor, at_least: float) -> float:
    error = float((actual.double() - wanted).norm() / wanted.norm().clamp_min(at_least))
    return math.inf if math.isnan(error) else error


# --- whether there is one right answer ---------------------------------------------------------------------


def _lists(case: Case, inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Reference values of all lists, ``[lists, items]``, and which of them are equal by construction."""
    if case.loss == "plackett_luce_nll":
        yield inputs[1].double(), inputs[1].double()
        return
    v, t = inputs[0], inputs[1]
    if case.teacher:
        v, t = inputs[3], inputs[-1]
    kept = torch.ones(case.n, case.n, dtype=torch.bool)
    if not case.options["diagonal"]:
        kept = ~torch.eye(case.n, dtype=torch.bool)
    shape = (case.n, -1) if case.options["lists"] == "row" else (1, -1)
    pairs = ((v, t), (t, v), (v, v), (t, t))
    for a, b in pairs[2:] if len(case.teacher) == 1 else pairs:
        i, j = _first_equal(a)[:, None], _first_equal(b)[None]
        if a is b:  # I and X are symmetric, and a row is as similar to itself as any other to itself
            kinds = torch.where(i == j, -1, torch.minimum(i, j) * case.n + torch.maximum(i, j))
        else:
            kinds = i * case.n + j
        yield oracle.exact_products(a, b)[kept].view(shape), kinds[kept].view(shape)


def _first_equal(features: Tensor) -> Tensor:
    return (features[:, None] == features[None]).all(-1).long().argmax(-1)


def is_decided(case: Case, inputs: tuple[Tensor, ...], gap: float) -> bool:
    """Whether every list has one order, ties included, whatever the rounding of the products."""
    worth = case.options.get("worth", "exp")
    lowest = {"exp": -math.inf, "shifted": -0.99, "identity": 0.01}[worth]
    if case.loss != "plackett_luce_nll" and worth != "exp":
        v, t = (x.double() for x in inputs[:2])
        if any(bool(((a @ b.T) <= lowest).any()) for a, b in ((v, t), (v, v), (t, t))):
            return False
    if case.options.get("model") == "top_one":
        return True
    for y, kinds in _lists(case, inputs):
        ordered, order = y.sort(-1)
        steps, change = ordered.diff(dim=-1), kinds.gather(-1, order).diff(dim=-1) != 0
        exact = case.data in EXACT or case.loss == "plackett_luce_nll"
        if not exact and bool((change & (steps < gap)).any()):
            return False
        if case.options["ties"] == "random" and bool((steps == 0).any() | (~change & (steps < gap)).any()):
            return False
        if case.options.get("method") == "bin" and not _off_the_edges(y, case.options["bins"], gap):
            return False
    return True


def _off_the_edges(y: Tensor, bins: int, gap: float) -> bool:
    """Whether no rounding can move an item of a list into another bin."""
    lowest, highest = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    second = y.masked_fill(y == highest, -math.inf).amax(-1, keepdim=True)  # of the others, which have bins
    extent = second - lowest
    place = (y - lowest) / extent.clamp_min(1e-300) * (bins - 1)
    margin = (place - place.round()).abs() * extent / (bins - 1)
    is_bound = (y == lowest) | (y == second) | (y == highest)
    apart = (extent > 1e3 * gap) & (highest - second > 4 * gap)
    return bool(((margin > 4 * gap) | is_bound).all() and apart.all())


# --- the search -------------------------------------------------------------------------------------------


class Table:
    """The worst errors by the value of every option."""

    COLUMNS = ("float64 value", "float64 gradient", "float32 value", "float32 gradient")

    def __init__(self) -> None:
        self.examples = 0
        self.undecided = 0
        self._rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, *[-math.inf] * 4])

    def add(self, case: Case, off: dict[torch.dtype, tuple[float, float] | None]) -> None:
        """Take in one example."""
        self.examples += 1
        self.undecided += not any(off.values())
        numbers = [x for e in off.values() for x in (e or (-math.inf, -math.inf))]
        if max(numbers) < 0:
            return
        for key in _labels(case):
            row = self._rows[key]
            self._rows[key] = [row[0] + 1, *map(max, row[1:], numbers)]

    def __str__(self) -> str:
        width = max((len(f"{name} {value}") for name, value in self._rows), default=0)
        head = f"{'':{width}} {'examples':>9} " + " ".join(f"{c:>16}" for c in self.COLUMNS)
        lines = [head]
        for (name, value), row in sorted(self._rows.items()):
            cells = " ".join(f"{x:16.1e}" if x >= 0 else f"{'–':>16}" for x in row[1:])
            lines.append(f"{f'{name} {value}':{width}} {row[0]:9} {cells}")
        lines.append(f"{self.examples} examples, {self.undecided} of them without one right answer.")
        return "\n".join(lines)


def _labels(case: Case) -> Iterator[tuple[str, str]]:
    yield "", case.loss
    yield "data", case.data
    yield "teacher", "+".join(case.teacher) or "none"
    yield "scale", "≤ 10" if case.scale <= 10 else "≤ 50" if case.scale <= 50 else "≤ 100"
    for name, value in itertools.chain(case.options.items(), case.of_clip.items()):
        if name not in ("epoch", "cross_modal", "in_modal", "lambda_cross", "lambda_in"):
            yield name, str(value) if name != "top_k" or value is None else "k"


def _bounds(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    value, gradient = BOUNDS[dtype]
    if case.options.get("model") == "top_one":
        # p follows the values of the lists, not their order: the rounding of a cosine counts by the scale.
        scale = max(case.scale, case.options["reference_scale"] or 0.0)
        value = max(value, 2 * scale * torch.finfo(dtype).eps)
    return value, gradient


def check(case: Case) -> dict[torch.dtype, tuple[float, float] | None]:
    """The errors of one example; a :class:`Finding` where one is above its bound, or the library fails."""
    off = {}
    for dtype in BOUNDS:
        try:
            off[dtype] = errors(case, dtype)
        except Finding:
            raise
        except Exception as error:
            raise Finding(f"{dtype}: {error!r}") from error
        for name, error, bound in zip(
            ("value", "gradient"), off[dtype] or (), _bounds(case, dtype), strict=False
        ):
            if error > bound:
                raise Finding(f"{dtype}: the {name} is off by {error:.1e}; the bound is {bound:.0e}")
    return off


def search(seconds: float, first_seed: int) -> tuple[Table, Case | None, str]:
    """Try examples until the time is over or one is wrong: that case and what is wrong with it, if any."""
    table, give_up = Table(), time.monotonic() + seconds
    failed: list[tuple[Case, str]] = []

    def test(case: Case) -> None:
        if time.monotonic() > give_up and not failed:
            return
        try:
            table.add(case, check(case))
        except Finding as finding:
            failed.append((case, str(finding)))  # the last one is the smallest
            raise

    options = settings(
        max_examples=500,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    for number in itertools.count(first_seed):
        try:
            seed(number)(options(given(cases())(test)))()
        except Exception:
            if not failed:
                raise
            return table, *failed[-1]
        if time.monotonic() > give_up:
            return table, None, ""
    raise AssertionError("unreachable")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search")
    parser.add_argument(
        "--seed", type=int, help="the first of hypothesis's seeds; by default another every time"
    )
    parser.add_argument(
        "--case", type=json.loads, help="check this example alone: JSON, as a finding prints it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case is not None:
        print(check(Case(**arguments.case)))
        return 0
    first_seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"Searching for {arguments.minutes:g} minutes, from seed {first_seed}.", flush=True)
    table, case, message = search(60 * arguments.minutes, first_seed)
    print(table)
    if case is None:
        print("No finding.")
        return 0
    print(f"\nA finding: {message}\n{case}\nTo see it again:\n    {case.command}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
