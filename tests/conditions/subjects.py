"""Every public loss and function that takes tensors, with the value that it owes: a new one joins here.

A :class:`Subject` is built, called with inputs by name, and compared with an oracle in float64: value, and
the gradient of every input under an upstream gradient that is not 1. The conditions are in the test files.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import oracle
import rankloss
from rankloss import metrics, reference
from rankloss.distributed import all_gather
from rankloss.functional import cross_modal, in_modal

N, D, SCALE = 6, 16, 100.0  # CLIP's working point
BIAS = -10.0  # where SigLIP's begins
EPOCH, EPOCHS = 4, 12  # where training stands: the schedule "rankclip" is then exactly 1
PAIR = ("image_features", "text_features")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A public loss or function under one choice of its options."""

    name: str
    covers: str
    """The public name: an entry of ``rankloss.__all__``, or ``module.function``."""
    build: Callable[..., Callable[..., Any]]
    reference: Callable[..., Any]
    """The value in NumPy, of arrays by the same names."""
    oracle: Callable[..., Tensor] | None = None
    """The value in differentiable float64 torch; None where nothing is differentiated."""
    inputs: tuple[str, ...] = (*PAIR, "logit_scale")
    differentiable: tuple[str, ...] = (*PAIR, "logit_scale")
    half: bool = False
    """Whether logits are computed in the dtype of the features or of autocast, as in open_clip."""
    refuses: str | None = None
    """Where a similarity is −1: what the error says. None: there is a value."""
    equivariant: bool = True
    """Whether pairs in another order have the same value, or the same values in that order."""

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def is_module(self) -> bool:
        """Whether it is a module, and so can be moved, copied and saved."""
        return isinstance(self.build(), nn.Module)

    def has_no_value(self, kind: str) -> bool:
        """Whether data of this kind are refused: worth ``shifted`` of a similarity of −1 has no logarithm."""
        return self.refuses is not None and kind == "negated rows"

    @property
    def differentiates(self) -> bool:
        """Whether its value has a gradient."""
        return self.oracle is not None

    def started(self, built: Any = None) -> Any:
        """A built subject, new by default, that knows where training stands."""
        built = self.build() if built is None else built
        if hasattr(built, "set_epoch"):
            built.set_epoch(EPOCH, EPOCHS)
        return built

    def pick(self, data: Inputs, dtype: torch.dtype = torch.float64) -> Inputs:
        """The inputs that it takes, in a dtype."""
        return {name: data[name].to(dtype) for name in self.inputs}


@dataclass(frozen=True)
class Result:
    """A value, and the gradients of the inputs that were asked for."""

    value: Tensor
    gradients: Inputs


def leaves(inputs: Inputs, wanted: tuple[str, ...]) -> Inputs:
    """The same values; those that are wanted take a gradient."""
    return {k: x.detach().requires_grad_() if k in wanted else x.detach() for k, x in inputs.items()}


def upstream_of(value: Tensor) -> Tensor:
    """A gradient from above that is neither 1 nor the same for every entry."""
    return torch.linspace(0.7, -1.9, value.numel(), dtype=value.dtype, device=value.device).view_as(value)


def differentiated(
    value: Tensor,
    inputs: Inputs,
    wanted: tuple[str, ...],
    upstream: Tensor | None = None,
    create_graph: bool = False,
) -> Result:
    """The value and its gradients; an input without one is an error."""
    if not wanted:
        return Result(value, {})
    upstream = upstream_of(value) if upstream is None else upstream
    found = torch.autograd.grad(value, [inputs[k] for k in wanted], upstream, create_graph=create_graph)
    return Result(value.detach(), {k: g.detach() for k, g in zip(wanted, found, strict=True)})


def run(
    subject: Subject,
    inputs: Inputs,
    built: Any = None,
    wanted: tuple[str, ...] | None = None,
    upstream: Tensor | None = None,
) -> Result:
    """What the library makes of the inputs."""
    wanted = subject.differentiable if wanted is None else wanted
    taken = leaves(inputs, wanted)
    return differentiated((subject.started() if built is None else built)(**taken), taken, wanted, upstream)


def expected(subject: Subject, inputs: Inputs, wanted: tuple[str, ...] | None = None) -> Result:
    """What it owes, in float64 at the inputs' own values."""
    taken = {k: x.detach().double().cpu() for k, x in inputs.items()}
    if subject.oracle is None:
        value = subject.reference(**{k: x.numpy() for k, x in taken.items()})
        return Result(torch.as_tensor(value, dtype=torch.float64), {})
    wanted = subject.differentiable if wanted is None else wanted
    taken = leaves(taken, wanted)
    return differentiated(subject.oracle(**taken), taken, wanted)


TOLERANCES = {  # value, gradient
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-5, 5e-3),  # the gradient's own rounding to the features' dtype included
    torch.float16: (1e-5, 1e-3),
}
OF_HALF_LOGITS = {torch.bfloat16: (3e-2, 6e-2), torch.float16: (3e-3, 6e-3)}


def tolerances(
    subject: Subject, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> tuple[float, float]:
    """How far value and gradients may be off for features of a dtype, in an autocast region or not."""
    computed = autocast if autocast is not None and dtype == torch.float32 else dtype
    if subject.half and computed in OF_HALF_LOGITS:
        return OF_HALF_LOGITS[computed]
    return TOLERANCES[dtype]


def assert_right(actual: Result, wanted: Result, tolerance: tuple[float, float] = (1e-10, 1e-10)) -> None:
    """Value and every gradient agree: in the norm, against the norm of what is owed."""
    error = _distance(actual.value, wanted.value)
    assert error <= tolerance[0], f"value {actual.value}, not {wanted.value}: off by {error:.1e}"
    assert actual.gradients.keys() == wanted.gradients.keys()
    features = max((float(g.norm()) for g in wanted.gradients.values()), default=0.0)
    if features < 1e-14:  # zero but for roundings, as where a list is compared with itself
        features = 1e-3
    for name, gradient in wanted.gradients.items():
        error = _distance(actual.gradients[name], gradient, at_least=1e-2 * features)
        assert error <= tolerance[1], f"gradient of {name} off by {error:.1e}"


def _distance(actual: Tensor, wanted: Tensor, at_least: float = 1e-3) -> float:
    actual, wanted = actual.detach().double().cpu(), wanted.detach().double().cpu()
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    if not torch.equal(actual.isnan(), wanted.isnan()):  # a list in which all is tied has no correlation
        return math.inf
    actual, wanted = actual.nan_to_num(), wanted.nan_to_num()
    return float((actual - wanted).norm() / wanted.norm().clamp_min(max(at_least, 1e-12)))


@contextmanager
def right_or_refused(message: str) -> Iterator[None]:
    """Lets an error pass whose message matches; whatever is asserted inside must hold otherwise."""
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if not re.search(message, str(error)):
            raise AssertionError(f"an error that does not say why: {error!r}") from error


# --- the subjects -----------------------------------------------------------------------------------------


TEACHER = ("reference_image_features", "reference_text_features")


def rank_terms(
    name: str, *, refuses: str | None = None, teacher: tuple[str, ...] = (), **options: Any
) -> Subject:
    """``RankConsistency`` with some options, ranked by a teacher's features where those are named."""
    formula = {k: v for k, v in options.items() if k not in ("chunk_size", "memory_budget", "method")}

    literal = {k: v for k, v in formula.items() if k not in ("cross_modal", "in_modal")}

    def of_reference(image_features: Any, text_features: Any, logit_scale: Any, **of_teacher: Any) -> Any:
        inputs = (image_features, text_features, float(logit_scale))
        value = reference.in_modal(*inputs, **of_teacher, **literal)
        if options.get("cross_modal") == 0:
            return value
        return value + reference.cross_modal(*inputs, **of_teacher, **literal)

    by_bin = options.get("method") == "bin"
    gives = functools.partial(oracle.rank_terms, **formula)
    return Subject(
        f"RankConsistency[{name}]",
        "RankConsistency",
        functools.partial(rankloss.RankConsistency, **options),
        functools.partial(_in_numpy, gives) if by_bin else of_reference,
        gives,
        inputs=(*PAIR, *teacher, "logit_scale"),
        differentiable=(*PAIR, "logit_scale") if options.get("worth", "exp") == "exp" else PAIR,
        refuses=refuses,
    )


def _in_numpy(of_tensors: Callable[..., Tensor], **arrays: Any) -> Any:
    return of_tensors(**{k: torch.as_tensor(x) for k, x in arrays.items()}).numpy()


def _rank_clip(of_base: Callable[..., Any], terms: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda **inputs: of_base(**inputs) + factor * terms(**inputs)


def _reference_clip(image_features: Any, text_features: Any, logit_scale: Any) -> Any:
    return reference.clip(image_features, text_features, float(logit_scale))


def siglip(name: str, **options: Any) -> Subject:
    """``SigLipLoss`` with some options."""
    inputs = (*PAIR, "logit_scale", "logit_bias")
    return Subject(
        name,
        "SigLipLoss",
        functools.partial(rankloss.SigLipLoss, **options),
        lambda image_features, text_features, logit_scale, logit_bias: reference.siglip(
            image_features, text_features, float(logit_scale), float(logit_bias)
        ),
        oracle.siglip,
        inputs=inputs,
        differentiable=inputs,
        half=True,
    )


def _reference_cyclip(image_features: Any, text_features: Any, logit_scale: Any) -> Any:
    pair = (image_features, text_features)
    cyclic = reference.cyclic_cross_modal(*pair) + reference.cyclic_in_modal(*pair)
    return _reference_clip(*pair, logit_scale) + cyclic / 4


def _reference_alip(image_features: Any, text_features: Any, caption_features: Any, logit_scale: Any) -> Any:
    step = reference.alip(image_features, text_features, caption_features, float(logit_scale))
    return step["text"] + step["caption"]


def _reference_term(term: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda image_features, text_features, logit_scale: term(
        image_features, text_features, float(logit_scale), **options
    )


def function(name: str, public: Callable[..., Any], numpy: Callable[..., Any], *inputs: str) -> Subject:
    """A function that nothing is differentiated through; a dict of numbers is taken as a vector."""

    def call(**arguments: Tensor) -> Tensor:
        found = public(**arguments)
        return torch.stack(list(found.values())) if isinstance(found, dict) else found

    return Subject(name, name, lambda: call, numpy, None, inputs or PAIR, ())


def _each_list(measure: Callable[..., Any]) -> Callable[..., Any]:
    def of_lists(x: Any, y: Any) -> Any:
        return np.array([_of_list(measure, a, b) for a, b in zip(x, y, strict=True)])

    return of_lists


def _of_list(measure: Callable[..., Any], a: Any, b: Any) -> float:
    tied = len(np.unique(a)) == 1 or len(np.unique(b)) == 1
    return math.nan if tied else float(measure(a, b).statistic)


def _agreement(image_features: Any, text_features: Any) -> Any:
    def products(a: Any, b: Any) -> Any:
        return oracle.exact_products(torch.as_tensor(a), torch.as_tensor(b)).numpy()

    v, t = image_features, text_features
    terms = ((products(v, t), products(t, v)), (products(v, v), products(t, t)))
    measures = (stats.kendalltau, stats.spearmanr)
    return np.array([np.nanmean(_each_list(measure)(a, b)) for a, b in terms for measure in measures])


def _uniformity(image_features: Any, text_features: Any = None) -> float:
    text_features = image_features if text_features is None else text_features
    i, j = np.tril_indices(len(image_features), -1)
    squares = ((image_features[i] - text_features[j]) ** 2).sum(-1)
    return float(np.log(np.mean(np.exp(-2 * squares))))


NEVER_MINUS_ONE = r"worth='shifted' needs (a )?(score|cosine)s? above -1"
ONE_LIST = {"inputs": ("scores", "reference"), "differentiable": ("scores",)}
RANK_FACTOR = 0.5

SUBJECTS = [
    rank_terms("row"),
    rank_terms("rows of two", chunk_size=2, memory_budget=0),
    rank_terms("batch", lists="batch"),
    rank_terms("shifted", worth="shifted", discount="log", refuses=NEVER_MINUS_ONE),
    rank_terms("others", diagonal=False, fixed_reference="text", top_k=3),
    rank_terms("bins", method="bin", bins=17),  # a prime: no code's cosine is on a bin's edge
    rank_terms("per anchor", reduction="none"),
    rank_terms("teacher", teacher=TEACHER),
    rank_terms("teacher, in rows of two", teacher=TEACHER, chunk_size=2, memory_budget=0, top_k=2),
    rank_terms("teacher, batch", teacher=TEACHER, lists="batch", top_k=7),
    rank_terms("teacher of texts", teacher=TEACHER[1:], cross_modal=0.0, diagonal=False),
    rank_terms("teacher, top one", teacher=TEACHER, model="top_one", reference_scale=7.0),
    rank_terms("top one", model="top_one"),
    rank_terms("top one, batch", model="top_one", lists="batch", diagonal=False),
    Subject(
        "RankClipLoss",
        "RankClipLoss",
        functools.partial(rankloss.RankClipLoss, normalizer=RANK_FACTOR),
        _rank_clip(_reference_clip, rank_terms("row").reference, RANK_FACTOR),
        _rank_clip(oracle.clip, oracle.rank_terms, RANK_FACTOR),
    ),
    Subject(
        "RankClipLoss[batch]",
        "RankClipLoss",
        functools.partial(rankloss.RankClipLoss, normalizer=RANK_FACTOR, lists="batch"),
        _rank_clip(_reference_clip, rank_terms("batch", lists="batch").reference, RANK_FACTOR),
        _rank_clip(oracle.clip, functools.partial(oracle.rank_terms, lists="batch"), RANK_FACTOR),
        half=True,
    ),
    Subject(
        "RankClipLoss[over CyClipLoss]",
        "RankClipLoss",
        lambda **layout: rankloss.RankClipLoss(
            rankloss.CyClipLoss(**layout), normalizer=RANK_FACTOR, **layout
        ),
        _rank_clip(_reference_cyclip, rank_terms("row").reference, RANK_FACTOR),
        _rank_clip(oracle.cyclip, oracle.rank_terms, RANK_FACTOR),
        half=True,
    ),
    Subject("ClipLoss", "ClipLoss", rankloss.ClipLoss, _reference_clip, oracle.clip, half=True),
    Subject(
        "ClipLoss[streamed]",
        "ClipLoss",
        functools.partial(rankloss.ClipLoss, memory_budget=0),
        _reference_clip,
        oracle.clip,
        half=True,  # as the dtype of the result is
    ),
    siglip("SigLipLoss"),
    siglip("SigLipLoss[streamed]", memory_budget=0),
    Subject("CyClipLoss", "CyClipLoss", rankloss.CyClipLoss, _reference_cyclip, oracle.cyclip, half=True),
    Subject(
        "AlipLoss",
        "AlipLoss",
        rankloss.AlipLoss,
        _reference_alip,
        oracle.alip,
        inputs=(*PAIR, "caption_features", "logit_scale"),
        differentiable=(*PAIR, "caption_features", "logit_scale"),
        half=True,
    ),
    Subject(
        "cross_modal",
        "functional.cross_modal",
        lambda: cross_modal,
        _reference_term(reference.cross_modal),
        functools.partial(oracle.term, "cross_modal"),
    ),
    Subject(
        "in_modal",
        "functional.in_modal",
        lambda: functools.partial(in_modal, lists="batch"),
        _reference_term(reference.in_modal, lists="batch"),
        functools.partial(oracle.term, "in_modal", lists="batch"),
    ),
    Subject(
        "plackett_luce_nll",
        "plackett_luce_nll",
        lambda: rankloss.plackett_luce_nll,
        reference.plackett_luce_nll,
        oracle.nll,
        **ONE_LIST,
    ),
    Subject(
        "plackett_luce_nll[discount, top_k]",
        "plackett_luce_nll",
        lambda: functools.partial(rankloss.plackett_luce_nll, discount="log", top_k=3),
        functools.partial(reference.plackett_luce_nll, discount="log", top_k=3),
        functools.partial(oracle.nll, discount="log", top_k=3),
        **ONE_LIST,
    ),
    Subject(
        "all_gather",
        "distributed.all_gather",
        lambda: all_gather,
        lambda x: x,
        lambda x: 1 * x,
        inputs=("x",),
        differentiable=("x",),
    ),
    function("metrics.rank_agreement", metrics.rank_agreement, _agreement),
    function(
        "metrics.modality_gap",
        metrics.modality_gap,
        lambda image_features, text_features: np.linalg.norm(image_features.mean(0) - text_features.mean(0)),
    ),
    function(
        "metrics.alignment",
        metrics.alignment,
        lambda image_features, text_features: ((image_features - text_features) ** 2).sum(-1).mean(),
    ),
    function("metrics.uniformity", metrics.uniformity, _uniformity, "image_features"),
    replace(
        function("metrics.uniformity", metrics.uniformity, _uniformity),
        name="metrics.uniformity[of two]",
        equivariant=False,  # it compares an image with the texts of the earlier pairs
    ),
    function("metrics.kendall_tau", metrics.kendall_tau, _each_list(stats.kendalltau), "x", "y"),
    function("metrics.spearman_rho", metrics.spearman_rho, _each_list(stats.spearmanr), "x", "y"),
]

NO_SUBJECTS = {
    "__version__": "a string",
    "Gather": "how a loss gathers: test_groups has the losses with it",
    "InputWarning": "what a loss warns with",
    "RankOptions": "the options that RankConsistency and RankClipLoss are built with",
    "functional.check_references": "errors alone: test_teacher has them",
    "functional.weighted_terms": "both terms in one pass: what RankConsistency is made of",
    "reference": "the oracle",
    "schedules": "numbers in, a number out: no tensor that a condition could touch",
}


# --- data -------------------------------------------------------------------------------------------------


def _features(kind: str, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    v, t, c = (torch.from_numpy(rng.standard_normal((N, D))) for _ in range(3))
    v, t, c = (x / x.norm(dim=-1, keepdim=True) for x in (v, t, c))
    if kind == "equal rows":  # the later ones equal an earlier one that equals nothing else, too
        v[3], v[5] = v[0], v[0]
        t[4], t[5], t[3] = t[1], t[0], t[0]
        c[2] = c[1]
    elif kind == "negated rows":  # -x stands before x and its equals; x·x is exactly 1
        codes = torch.from_numpy(rng.integers(0, 2, (3, D)) / 2 - 0.25)
        v[:3] = torch.stack([-codes[0], codes[0], codes[0]])
        t[1:5] = torch.stack([-codes[1], codes[1], -codes[1], codes[1]])
        c[:3] = torch.stack([-codes[2], codes[2], codes[2]])
    elif kind == "sign codes":  # cosines are multiples of 1/8, exact in every dtype; some rows are equal
        v, t, c = (torch.from_numpy(rng.integers(0, 2, (N, D)) / 2 - 0.25) for _ in range(3))
        v[4], t[4], t[5], c[4] = v[1], t[1], t[2], c[1]
    elif kind == "zero rows":
        v[2] = t[4] = t[5] = c[0] = 0.0
    elif kind == "sparse":  # one-hot rows and rows of four halves: most similarities are exactly 0
        for x in (v, t, c):
            x.zero_()
            for row in range(N):
                count = 1 if row % 2 else 4
                places = torch.from_numpy(rng.permutation(D)[:count])
                signs = rng.choice([-1.0, 1.0], count) if count > 1 else np.ones(1)
                x[row, places] = torch.from_numpy(signs) / math.sqrt(count)
    elif kind != "plain":
        raise ValueError(kind)
    return v, t, c


KINDS = ("plain", "equal rows", "negated rows", "sign codes", "zero rows", "sparse")


@functools.cache
def _data(kind: str) -> Inputs:
    v, t, c = _features(kind)
    cosines = oracle.exact_products(v, t)
    of_teacher = "plain" if kind == "zero rows" else kind  # a teacher's row of zeros is refused
    return {
        "image_features": v,
        "text_features": t,
        "caption_features": c,
        **{name: F.pad(x, (0, 4)) for name, x in zip(TEACHER, _features(of_teacher, seed=8), strict=False)},
        "logit_scale": torch.tensor(SCALE, dtype=torch.float64),
        "logit_bias": torch.tensor(BIAS, dtype=torch.float64),
        "scores": SCALE * cosines,
        "reference": oracle.exact_products(t, v),
        "x": cosines,
        "y": cosines.T.contiguous(),
    }


def data(kind: str = "plain") -> Inputs:
    """Features of N pairs and their captions, a scale, and lists: all float64, of one kind."""
    return {name: x.clone() for name, x in _data(kind).items()}
