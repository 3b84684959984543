"""One subject for each way in which a value is computed, with the value that it owes.

A :class:`Subject` is built, and called with inputs by name. Its value is compared with ``rankloss.reference``
where that has it, the gradient of every input, under an upstream gradient that is not 1, with that of the
differentiable formula, which a graph of the gradients asks for. The conditions are in the test files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloss
import rankloss_trainers
from batches import upstream_for
from measures import MEASURES_WITH_MASK
from rankloss import metrics, reference
from rankloss.distributed import all_gather
from rankloss.losses import GatheringLoss
from rankloss_trainers import catalog
from registered import OF_PACKAGES, input_names

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
    """The public name of ``rankloss``, or ``module.function``; "" for a loss of another package."""
    build: Callable[..., Callable[..., Any]]
    reference: Callable[..., Any] | None = None
    """The value in NumPy, of arrays by the same names; None where ``rankloss.reference`` does not have it."""
    inputs: tuple[str, ...] = (*PAIR, "logit_scale")
    differentiable: tuple[str, ...] = (*PAIR, "logit_scale")
    half: bool = False
    """Whether logits, or the result alone, have the dtype of the features or of autocast, as in open_clip."""
    has_unscaled_term: bool = False
    """Whether a part of the value is no function of the scores s·x·y alone, but of features of unit norm."""

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def is_module(self) -> bool:
        """True for a module, which can be moved, copied and saved."""
        return isinstance(self.build(), nn.Module)

    def started(self, built: Any = None) -> Any:
        """A built subject, new by default, that knows where training stands."""
        built = self.build() if built is None else built
        for part in built.modules() if isinstance(built, nn.Module) else ():
            if hasattr(part, "set_epoch"):
                part.set_epoch(EPOCH, EPOCHS)
        return built

    def pick(self, data: Inputs, dtype: torch.dtype = torch.float64) -> Inputs:
        """The inputs that it takes, in a dtype; ids stay integers."""
        return {name: data[name].to(dtype) if name != "pair_ids" else data[name] for name in self.inputs}

    @property
    def is_open_clips(self) -> bool:
        """True for the operations of open_clip's losses, bit by bit."""
        return self.covers in ("ClipLoss", "SigLipLoss") and "streamed" not in self.name

    @property
    def takes_pairs(self) -> bool:
        """True for a loss of images and texts."""
        return self.is_module and set(PAIR) <= set(self.inputs)


@dataclass(frozen=True)
class Result:
    """A value, and the gradients of the inputs that were asked for."""

    value: Tensor
    gradients: Inputs


def leaves(inputs: Inputs, wanted: tuple[str, ...]) -> Inputs:
    """The same values; those that are wanted take a gradient."""
    return {k: x.detach().requires_grad_() if k in wanted else x.detach() for k, x in inputs.items()}


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
    upstream = upstream_for(value) if upstream is None else upstream
    by = [inputs[name] for name in wanted]
    gradients = torch.autograd.grad(value, by, upstream, create_graph=create_graph)
    detached = [gradient.detach() for gradient in gradients]
    return Result(value.detach(), dict(zip(wanted, detached, strict=True)))


def result_of(
    subject: Subject,
    inputs: Inputs,
    built: Any = None,
    wanted: tuple[str, ...] | None = None,
    upstream: Tensor | None = None,
) -> Result:
    """The library's value and gradients."""
    wanted = subject.differentiable if wanted is None else wanted
    built = subject.started() if built is None else built
    taken = leaves(inputs, wanted)
    return differentiated(built(**taken), taken, wanted, upstream)


def expected_result_of(subject: Subject, inputs: Inputs, wanted: tuple[str, ...] | None = None) -> Result:
    """The value and gradients owed, in float64 at the inputs' own values."""
    wanted = subject.differentiable if wanted is None else wanted
    exact = {k: x.detach().cpu() for k, x in inputs.items()}
    exact = {k: x.double() if x.is_floating_point() else x for k, x in exact.items()}
    taken = leaves(exact, wanted)
    owed = differentiated(subject.started()(**taken), taken, wanted, create_graph=True)
    if subject.reference is not None:
        value = subject.reference(**{k: x.numpy() for k, x in exact.items()})
        owed = Result(torch.as_tensor(value, dtype=torch.float64), owed.gradients)
    return owed


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
    """The largest errors of value and gradients for features of a dtype, in an autocast region or not."""
    computed = autocast if autocast is not None and dtype == torch.float32 else dtype
    if subject.half and computed in OF_HALF_LOGITS:
        return OF_HALF_LOGITS[computed]
    return TOLERANCES[dtype]


def assert_right(actual: Result, wanted: Result, tolerance: tuple[float, float] = (1e-10, 1e-10)) -> None:
    """Value and every gradient agree: in the norm, against the norm of what is owed."""
    error = _distance(actual.value, wanted.value)
    assert error <= tolerance[0], f"value {actual.value}, not {wanted.value}: off by {error:.1e}"
    assert actual.gradients.keys() == wanted.gradients.keys()
    largest_norm = max((float(gradient.norm()) for gradient in wanted.gradients.values()), default=0.0)
    if largest_norm < 1e-14:  # zero but for roundings, as where a list is compared with itself
        largest_norm = 1e-3
    for name, gradient in wanted.gradients.items():
        error = _distance(actual.gradients[name], gradient, at_least=1e-2 * largest_norm)
        assert error <= tolerance[1], f"gradient of {name} off by {error:.1e}"


def _distance(actual: Tensor, wanted: Tensor, at_least: float = 1e-3) -> float:
    """‖actual − wanted‖, relative to the norm of what is wanted, or to a number where that is less."""
    actual, wanted = actual.detach().double().cpu(), wanted.detach().double().cpu()
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    if not torch.equal(actual.isnan(), wanted.isnan()):  # a list in which all is tied has no correlation
        return math.inf
    actual, wanted = actual.nan_to_num(), wanted.nan_to_num()
    return float((actual - wanted).norm() / wanted.norm().clamp_min(max(at_least, 1e-12)))


# --- the subjects -----------------------------------------------------------------------------------------


TEACHER = ("reference_image_features", "reference_text_features")
FROZEN = ("reference_query_features", "reference_candidate_features", "reference_scale")
RANK_FACTOR = 0.5


def ranks(image_features: Any, text_features: Any, logit_scale: Any, **options: Any) -> Any:
    """The two rank terms in NumPy."""
    inputs = (image_features, text_features, float(logit_scale))
    return reference.cross_modal(*inputs, **options) + reference.in_modal(*inputs, **options)


def rank_terms(name: str, *, teacher: tuple[str, ...] = (), **options: Any) -> Subject:
    """``RankConsistency`` with some options, ranked by a teacher's features where those are named."""
    formula = {k: v for k, v in options.items() if k != "chunk_size"}
    return Subject(
        f"RankConsistency[{name}]",
        "RankConsistency",
        functools.partial(rankloss.RankConsistency, **options),
        None if "bins" in options else functools.partial(ranks, **formula),
        inputs=(*PAIR, *teacher, "logit_scale"),
    )


def of_pairs(name: str, build: Callable[..., Any], literal: Callable[..., Any], **options: Any) -> Subject:
    """A loss of all pairs; with ``same_id`` some pairs have the same id."""
    of_formula = {option: options[option] for option in ("same_id", "label_smoothing") if option in options}
    differentiable: tuple[str, ...] = (*PAIR, "logit_scale")
    if build is rankloss.SigLipLoss:
        differentiable += ("logit_bias",)
    return Subject(
        f"{build.__name__}{name}",
        build.__name__,
        functools.partial(build, **options),
        functools.partial(literal, **of_formula),
        inputs=(*differentiable, "pair_ids") if "same_id" in options else differentiable,
        differentiable=differentiable,
        half=True,  # streamed, only the result has that dtype
    )


_clip = functools.partial(of_pairs, build=rankloss.ClipLoss, literal=reference.clip)
_siglip = functools.partial(of_pairs, build=rankloss.SigLipLoss, literal=reference.siglip)


def function(name: str, public: Callable[..., Any], *inputs: str) -> Subject:
    """A function that nothing is differentiated through; a dict of numbers is taken as a vector.

    What it owes is its own value in float64. ``test_metrics`` compares that with other libraries.
    """

    def call(**arguments: Tensor) -> Tensor:
        value = public(**arguments)
        return torch.stack(list(value.values())) if isinstance(value, dict) else value

    return Subject(name, name, lambda: call, inputs=inputs or PAIR, differentiable=())


def of_lists(name: str) -> Subject:
    """A measure of lists, whose last items are padding; grades that gain are at least 0."""
    measure = MEASURES_WITH_MASK[name]

    def masked(x: Tensor, y: Tensor) -> Tensor:
        items = x.shape[-1]
        is_item = torch.arange(items, device=x.device).expand(x.shape) < items - 1
        value: Tensor = measure(x, y.abs() if name == "ndcg" else y, mask=is_item)
        return value

    return function(f"metrics.{name.partition(',')[0]}", masked, "x", "y")


class Lists(nn.Module):
    """``RankedLists`` of grades that its model takes: NDCG's gains begin at 0."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lists = rankloss.RankedLists(chunk_size=4, **options)

    def forward(self, grades: Tensor, **inputs: Tensor) -> Tensor:
        grades = grades.clamp_min(0.0) if self.lists.model == "lambda" else grades
        value: Tensor = self.lists(grades=grades, **inputs)
        return value


def ranked_lists(name: str, *, frozen: bool = False, **options: Any) -> Subject:
    """``RankedLists`` of each text's candidates, some of which several lists share.

    With ``frozen`` the scores are those beyond a frozen model's. ``test_ranked_lists`` has the values owed.
    """
    features = ("candidate_features", "query_features")  # in this order, since queries have to differ
    return Subject(
        f"RankedLists[{name}]",
        "RankedLists",
        functools.partial(Lists, **options),
        inputs=(*features, "grades", "logit_scale", *(FROZEN if frozen else ())),
        differentiable=(*features, "logit_scale"),
    )


def mimicry(
    name: str, build: Callable[..., nn.Module], has_ranks: bool = True, weight: float = 8.0
) -> Subject:
    """A composition with ``MimicryLoss``, whose teacher is wider than the student.

    The components, of a teacher's D + 4 numbers the first D, are those that the student copies.
    """

    def built() -> nn.Module:
        loss = build(functools.partial(rankloss.MimicryLoss, weight=weight))
        part = next(x for x in loss.modules() if isinstance(x, rankloss.MimicryLoss))
        part.components = torch.eye(D + 4, device="cpu")[:, :D]
        return loss

    def distance(student: Any, teacher: Any) -> Any:
        copied = teacher[:, :D] / np.linalg.norm(teacher[:, :D], axis=-1, keepdims=True)
        return ((student - copied) ** 2).sum(-1).mean()

    def literal(image_features: Any, text_features: Any, logit_scale: Any, **teacher: Any) -> Any:
        inputs = (image_features, text_features, logit_scale)
        of_images, of_texts = (teacher[name] for name in TEACHER)
        value = reference.clip(*inputs)
        value += weight * (distance(image_features, of_images) + distance(text_features, of_texts))
        return value + (RANK_FACTOR * ranks(*inputs, **teacher) if has_ranks else 0.0)

    return Subject(
        f"MimicryLoss[{name}]",
        "MimicryLoss",
        built,
        literal,
        inputs=(*PAIR, "logit_scale", *TEACHER),
        half=name != "over RankClipLoss",  # in which CLIP's loss is a term of the rank terms' pass
        has_unscaled_term=True,
    )


class OfFewDimensions(nn.Module):
    """A loss of features with fewer dimensions than pairs: the sums of four columns each."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, image_features: Tensor, text_features: Tensor, **inputs: Tensor) -> Tensor:
        folded = (x.unflatten(-1, (-1, 4)).sum(-1) for x in (image_features, text_features))
        value: Tensor = self.loss(*folded, **inputs)
        return value


def spread(name: str, base: Any = None, of_base: Any = reference.clip, *, narrow: bool = False) -> Subject:
    """``SpreadLoss`` from the similarities, or of narrow features from their covariance.

    The scale, a constant in the term, is left to ``test_spread``.
    """

    def literal(image_features: Any, text_features: Any, logit_scale: Any, **bias: Any) -> Any:
        if narrow:  # as OfFewDimensions does it
            columns = (len(image_features), -1, 4)
            image_features, text_features = (
                x.reshape(columns).sum(-1) for x in (image_features, text_features)
            )
        inputs = image_features, text_features, logit_scale
        return of_base(*inputs, **bias) + 0.3 * reference.spread(*inputs)

    def built() -> nn.Module:
        loss = rankloss.SpreadLoss(None if base is None else base())
        return OfFewDimensions(loss) if narrow else loss

    differentiable = (*PAIR, *(["logit_bias"] if base is rankloss.SigLipLoss else []))
    inputs = (*differentiable, "logit_scale")
    return Subject(
        f"SpreadLoss[{name}]",
        "SpreadLoss",
        built,
        literal,
        inputs,
        differentiable,
        half=True,
        has_unscaled_term=True,  # ε, beside a variance of cosines
    )


def _rankclip(name: str = "", base: Any = None, of_base: Any = reference.clip, **of_ids: Any) -> Subject:
    def literal(pair_ids: Any = None, **inputs: Any) -> Any:
        return of_base(**inputs, pair_ids=pair_ids, **of_ids) + RANK_FACTOR * ranks(**inputs)

    return Subject(
        f"RankClipLoss{name}",
        "RankClipLoss",
        lambda: _rankclip_loss(base(**of_ids) if base else None),
        literal,
        inputs=(*PAIR, "logit_scale", *(["pair_ids"] if of_ids else [])),
        half=base is not None,
    )


def _rankclip_loss(base: Any = None) -> nn.Module:
    return rankloss.RankClipLoss(base, normalizer=RANK_FACTOR)


def registered(name: str) -> Subject:
    """A loss that another package registers, with its own defaults."""
    inputs = input_names(name)
    of_data = (*TEACHER, "grades", "pair_ids")
    return Subject(
        name,
        "",
        catalog.load(name).constructor,
        inputs=inputs,
        differentiable=tuple(x for x in inputs if x not in of_data),
        half=True,
        has_unscaled_term=True,  # as another package's may have
    )


def has_state(name: str) -> bool:
    """True for a registered loss whose buffers move with its calls, which the conditions do not expect."""
    return bool(rankloss_trainers.create(name).state_dict())


class OwnRows(GatheringLoss):
    """CLIP's loss as a loss of rows, as another package would write it."""

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        inputs = image_features, text_features, logit_scale
        return self.streamed(lambda x, row: x.logsumexp(-1) - x.diagonal(row), *inputs, chunk_size=4)


SUBJECTS = [
    rank_terms("default"),
    rank_terms("top k", top_k=3, diagonal=False, chunk_size=2),
    rank_terms("bins", method="bin", bins=17),  # a prime: no code's cosine is on a bin's edge
    rank_terms("top one", teacher=TEACHER, model="top_one"),
    rank_terms("teacher", teacher=TEACHER, chunk_size=4),
    _rankclip(),
    _rankclip("[over SigLipLoss]", rankloss.SigLipLoss, reference.siglip),
    _rankclip("[over ClipLoss of ids]", rankloss.ClipLoss, same_id="ignore"),
    mimicry("default", lambda build: build(), has_ranks=False),
    mimicry("under RankClipLoss", lambda build: _rankclip_loss(build()), weight=0.5),
    mimicry("over RankClipLoss", lambda build: build(_rankclip_loss()), weight=2.0),
    spread("similarities"),
    spread("covariance", narrow=True),
    spread("over SigLipLoss", rankloss.SigLipLoss, reference.siglip),
    ranked_lists("default"),
    ranked_lists("lambda", model="lambda", gain="exponential"),
    ranked_lists("pairwise, frozen", model="pairwise", frozen=True),
    ranked_lists("negatives, frozen", in_batch_negatives=True, frozen=True),
    ranked_lists("negatives, top k", in_batch_negatives=True, top_k=2),
    ranked_lists("negatives, top one", in_batch_negatives=True, model="top_one"),
    ranked_lists("negatives, pairwise", in_batch_negatives=True, model="pairwise"),
    _clip(""),
    _clip("[streamed]", memory_budget=0),
    _clip("[share]", same_id="share"),
    _clip("[share, streamed]", same_id="share", memory_budget=0),
    _clip("[ignore, streamed]", same_id="ignore", memory_budget=0, chunk_size=4),
    _clip("[smoothed, streamed]", label_smoothing=0.2, memory_budget=0),
    _clip("[smoothed, ignore]", label_smoothing=0.2, same_id="ignore"),
    _siglip(""),
    _siglip("[streamed]", memory_budget=0),
    _siglip("[ignore]", same_id="ignore"),
    _siglip("[ignore, streamed]", same_id="ignore", memory_budget=0),
    _siglip("[share]", same_id="share"),
    _siglip("[share, streamed]", same_id="share", memory_budget=0, chunk_size=4),
    Subject("a loss of rows", "", OwnRows, reference.clip),
    Subject(
        "plackett_luce_nll",
        "plackett_luce_nll",
        lambda: functools.partial(rankloss.plackett_luce_nll, top_k=4),
        functools.partial(reference.plackett_luce_nll, top_k=4),
        inputs=("scores", "reference"),
        differentiable=("scores",),
    ),
    Subject(
        "all_gather",
        "distributed.all_gather",
        lambda: all_gather,
        lambda x: x,
        inputs=("x",),
        differentiable=("x",),
    ),
    function("metrics.rank_agreement", metrics.rank_agreement),
    function("metrics.modality_gap", metrics.modality_gap),
    function("metrics.alignment", metrics.alignment),
    function("metrics.uniformity", metrics.uniformity, "image_features"),
    *map(of_lists, MEASURES_WITH_MASK),
    function("metrics.spearman_rho", metrics.spearman_rho, "x", "y"),
    *(registered(name) for name in OF_PACKAGES if not has_state(name)),
]

NO_SUBJECTS = {
    "__version__": "a string",
    "AddedTerms": "the base class of MimicryLoss, SpreadLoss and others",
    "Gather": "how a loss gathers: test_distributed has the losses with it",
    "InputWarning": "the warning of a suspicious input",
    "OwnTerms": "the base class of AddedTerms, and of losses that other packages register",
    "RankOptions": "the options that RankConsistency and RankClipLoss are built with",
    "distributed.gather_once": "a context: test_distributed has losses in it",
    "functional.cross_modal": "a term of RankConsistency",
    "functional.in_modal": "a term of RankConsistency",
    "metrics.partner_ranks": "ranks of a test set: test_retrieval has them",
    "metrics.recall": "shares of a test set: test_retrieval has them",
    "reference": "the oracle",
    "schedules": "numbers in, a number out: no tensor that a condition could touch",
}


# --- data -------------------------------------------------------------------------------------------------


def _features(kind: str, seed: int = 7, n: int = N) -> tuple[Tensor, Tensor]:
    """Images and texts of a kind, rows of unit norm but for those of zeros."""
    rng = np.random.default_rng(seed)
    v, t = (torch.from_numpy(rng.standard_normal((n, D))) for _ in range(2))
    v, t = (x / x.norm(dim=-1, keepdim=True) for x in (v, t))
    if kind == "equal rows":  # the later ones equal an earlier one that equals nothing else, too
        v[3], v[5] = v[0], v[0]
        t[4], t[5], t[3] = t[1], t[0], t[0]
    elif kind == "negated rows":  # -x stands before x and its equals; x·x is exactly 1
        codes = _sign_codes(rng, 2)
        v[:3] = torch.stack([-codes[0], codes[0], codes[0]])
        t[1:5] = torch.stack([-codes[1], codes[1], -codes[1], codes[1]])
    elif kind == "clusters":  # close rows, and equal ones
        v, t = (_around_16_centres(x) for x in (v, t))
        v[-20:], t[-20:] = v[:20], t[:20]
    elif kind == "sign codes":  # cosines are multiples of 1/8, exact in every dtype; some rows are equal
        v, t = _sign_codes(rng, n), _sign_codes(rng, n)
        v[4], t[4], t[5] = v[1], t[1], t[2]
    elif kind == "zero rows":
        v[2] = t[4] = t[5] = 0.0
    elif kind == "sparse":  # most similarities are exactly 0
        v, t = _sparse_rows(rng, n), _sparse_rows(rng, n)
    elif kind != "plain":
        raise ValueError(kind)
    return v, t


def _around_16_centres(x: Tensor) -> Tensor:
    """Rows near one of the first 16, in turn."""
    centres = x[:16].repeat(len(x) // 16, 1)
    return F.normalize(centres + 0.05 * x, dim=-1)


def _sign_codes(rng: np.random.Generator, n: int) -> Tensor:
    """Rows of ±1/4, which have unit norm in 16 dimensions."""
    bits = torch.from_numpy(rng.integers(0, 2, (n, D)))
    return bits.double() / 2 - 0.25


def _sparse_rows(rng: np.random.Generator, n: int) -> Tensor:
    """In turn rows of four halves, of both signs, and one-hot rows."""
    rows = torch.zeros(n, D, dtype=torch.float64)
    for row in range(n):
        count = 1 if row % 2 else 4
        places = rng.permutation(D)[:count]
        signs = rng.choice([-1.0, 1.0], count) if count > 1 else np.ones(1)
        rows[row, places] = torch.from_numpy(signs) / math.sqrt(count)
    return rows


KINDS = ("plain", "equal rows", "negated rows", "sign codes", "zero rows", "sparse")


def _queries(kind: str, n: int) -> Tensor:
    """Rows that all differ, exact in every dtype where those of the kind are."""
    if kind != "sign codes":
        return _features("plain", 9, n)[0]
    digits = torch.arange(D) % 3  # of a row's number, which are repeated along the row
    bits = torch.arange(n)[:, None] >> digits & 1
    return (bits / 2 - 0.25).double()


@functools.cache
def _data(kind: str, n: int, seed: int) -> Inputs:
    v, t = _features(kind, seed, n)
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, -math.inf, 1.0]]).double()
    cosines = reference._cosines(v[:N], t[:N])  # equal for equal pairs
    of_teacher = "plain" if kind == "zero rows" else kind  # a teacher's row of zeros is refused
    return {
        "image_features": v,
        "text_features": t,
        **{name: F.pad(x, (0, 4)) for name, x in zip(TEACHER, _features(of_teacher, 8, n), strict=True)},
        "caption_features": _features("plain", 11, n)[1],
        "query_features": _queries(kind, n),
        "candidate_features": torch.stack([t, t.roll(1, 0), v], 1),
        "reference_query_features": _features("plain", 10, n)[0][:, :5],
        "reference_candidate_features": torch.stack([v, t, t.roll(1, 0)], 1)[:, :, :5],
        "reference_scale": torch.tensor(SCALE / 2, dtype=torch.float64),
        "grades": grades.repeat(n // 3 + 1, 1)[:n],
        "logit_scale": torch.tensor(SCALE, dtype=torch.float64),
        "logit_bias": torch.tensor(BIAS, dtype=torch.float64),
        "pair_ids": torch.tensor([3, -1, 3, 7, -1, 3]).repeat(n // 6 + 1)[:n],
        "scores": SCALE * cosines,
        "reference": cosines.T.contiguous(),
        "x": cosines,
        "y": cosines.T.contiguous(),
    }


def drawn_inputs(kind: str = "plain", n: int = N, seed: int = 7) -> Inputs:
    """Features of n pairs, a scale, and lists: all float64, of one kind."""
    return {name: x.clone() for name, x in _data(kind, n, seed).items()}
