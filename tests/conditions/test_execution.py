"""However a loss is run: flush-to-zero, determinism, autocast, a compiler, transforms, threads, a fork."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from subjects import (
    EPOCHS,
    SUBJECTS,
    Inputs,
    Result,
    Subject,
    assert_right,
    data,
    differentiated,
    expected,
    leaves,
    right_or_refused,
    run,
    tolerances,
    upstream_of,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from process_pool import TIMEOUT

pytestmark = [
    # Zero rows are not unit-norm, and of that a loss may warn.
    pytest.mark.filterwarnings("ignore:.*norm"),
    # torch's own forward mode is made with it.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    # vmap says of some operators that it takes them one by one.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

every = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
differentiable = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.differentiates], ids=str)
full_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


# --- the state of the machine -----------------------------------------------------------------------------


@pytest.fixture
def flush_to_zero() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor knows no flushing")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", ["plain", "equal rows", "sign codes", "zero rows", "sparse"])
@full_precision
@every
@pytest.mark.usefixtures("flush_to_zero")
def test_with_flush_to_zero(subject: Subject, dtype: torch.dtype, kind: str) -> None:
    inputs = subject.pick(data(kind), dtype)
    assert_right(run(subject, inputs), expected(subject, inputs), tolerances(subject, dtype))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["equal rows", "sparse"])
@full_precision
@every
@pytest.mark.usefixtures("deterministic")
def test_with_deterministic_algorithms(subject: Subject, dtype: torch.dtype, kind: str) -> None:
    inputs = subject.pick(data(kind), dtype)
    assert_right(run(subject, inputs), expected(subject, inputs), tolerances(subject, dtype))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@full_precision
@every
def test_without_a_graph(subject: Subject, dtype: torch.dtype, mode: Callable[[], Any]) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    owed, built = Result(expected(subject, inputs).value, {}), subject.started()
    with mode():
        value = built(**leaves(inputs, subject.differentiable))
        made_inside = subject.started()(**{k: x.clone() for k, x in inputs.items()})
    for found in (value, made_inside):
        assert not found.requires_grad or subject.name == "all_gather"  # one process gets its own tensor
        assert_right(Result(found, {}), owed, tolerances(subject, dtype))


@differentiable
def test_a_call_without_a_graph_leaves_none_out_of_the_next(subject: Subject) -> None:
    inputs, module = subject.pick(data()), subject.started()
    if subject.is_module:
        module.eval()
    with torch.inference_mode():
        module(**inputs)
    assert_right(
        run(subject, inputs, module.train() if subject.is_module else module), expected(subject, inputs)
    )


# --- autocast ---------------------------------------------------------------------------------------------

REGIONS = ["forward", "backward", "both"]
HALF = [torch.bfloat16, torch.float16]


def autocast(dtype: torch.dtype, wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype) if wanted else contextlib.nullcontext()


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("half", HALF, ids=str)
@full_precision
@every
def test_autocast_around_forward_and_backward(
    subject: Subject, dtype: torch.dtype, half: torch.dtype, region: str
) -> None:
    inputs = leaves(subject.pick(data("equal rows"), dtype), subject.differentiable)
    built = subject.started()
    with autocast(half, region in ("forward", "both")):
        value = built(**inputs)
    with autocast(half, region in ("backward", "both")):
        found = differentiated(value, inputs, subject.differentiable)
    of_value = tolerances(subject, dtype, half if region != "backward" else None)[0]
    of_gradient = tolerances(subject, dtype, half)[1]  # torch's matrix products differentiate by others
    assert_right(found, expected(subject, inputs), (of_value, of_gradient))


def second_order(value: Tensor, inputs: Inputs, wanted: tuple[str, ...]) -> Result:
    """A directional second derivative: the gradients of Σ_k ⟨∂L/∂x_k, u_k⟩, u fixed."""
    found = torch.autograd.grad(value, [inputs[k] for k in wanted], upstream_of(value), create_graph=True)
    along = sum((g * upstream_of(g)).sum() for g in found)
    again = torch.autograd.grad(along, [inputs[k] for k in wanted])
    return Result(along.detach(), dict(zip(wanted, again, strict=True)))


@pytest.mark.parametrize("region", [None, *REGIONS])
@full_precision
@pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if s.differentiates and s.name != "all_gather"], ids=str
)
def test_second_derivatives_with_and_without_autocast(
    subject: Subject, dtype: torch.dtype, region: str | None
) -> None:
    inputs, half = subject.pick(data("equal rows"), dtype), torch.bfloat16
    exact = leaves({k: x.double() for k, x in inputs.items()}, subject.differentiable)
    assert subject.oracle is not None
    owed = second_order(subject.oracle(**exact), exact, subject.differentiable)
    taken, built = leaves(inputs, subject.differentiable), subject.started()
    with autocast(half, region in ("forward", "both")):
        value = built(**taken)
    with autocast(half, region in ("backward", "both")):
        found = second_order(value, taken, subject.differentiable)
    bounds = {torch.float64: (1e-9, 1e-9), torch.float32: (2e-4, 2e-4)}[dtype]
    if subject.half and region is not None and dtype == torch.float32:
        bounds = (0.1, 0.1)
    assert_right(found, owed, bounds)


# --- graphs -----------------------------------------------------------------------------------------------


def coupled(inputs: Inputs, wanted: tuple[str, ...]) -> Inputs:
    """The inputs, those after the first that takes a gradient computed of it."""
    first, *others = wanted
    shift = 0.01 * inputs[first].mean()
    return {k: x + shift if k in others else x for k, x in inputs.items()}


@pytest.mark.parametrize("create_graph", [False, True])
@differentiable
def test_inputs_that_are_computed_of_one_another(subject: Subject, create_graph: bool) -> None:
    inputs, wanted = subject.pick(data("equal rows")), subject.differentiable
    results = []
    for function in (subject.oracle, subject.started()):
        assert function is not None
        taken = leaves(inputs, wanted)
        value = function(**coupled(taken, wanted))
        results.append(differentiated(value, taken, wanted, create_graph=create_graph))
    assert_right(results[1], results[0])


@pytest.mark.parametrize("create_graph", [False, True])
@differentiable
def test_a_hook_of_an_input_runs_once(subject: Subject, create_graph: bool) -> None:
    taken, runs = (
        leaves(subject.pick(data()), subject.differentiable),
        dict.fromkeys(subject.differentiable, 0),
    )

    def hooked(name: str) -> Tensor:
        def hook(_: Tensor) -> None:
            runs[name] += 1

        x = taken[name].clone()
        x.register_hook(hook)
        return x

    value = subject.started()(**taken | {name: hooked(name) for name in runs})
    torch.autograd.grad(value, [taken[name] for name in runs], upstream_of(value), create_graph=create_graph)
    assert set(runs.values()) == {1}


@pytest.mark.parametrize("use_reentrant", [False, True])
@differentiable
def test_inside_an_activation_checkpoint(subject: Subject, use_reentrant: bool) -> None:
    inputs, built = subject.pick(data("equal rows")), subject.started()
    if subject.is_module:
        built.eval()  # a forward pass that is repeated would move a state once more

    def in_order(*x: Tensor) -> Tensor:
        value: Tensor = built(**dict(zip(inputs, x, strict=True)))
        return value

    results = []
    for forward in (in_order, functools.partial(checkpoint, in_order, use_reentrant=use_reentrant)):
        taken = leaves(inputs, subject.differentiable)
        value = forward(*taken.values())
        value.backward(upstream_of(value))  # what is reentrant knows no autograd.grad
        gradients = {k: taken[k].grad for k in subject.differentiable}
        results.append(Result(value.detach(), gradients))
    assert_right(results[1], results[0], (0.0, 0.0))


# --- compilers and transforms -----------------------------------------------------------------------------

# One subject for each way to a value, since compilations are what takes time here.
COMPILED = (
    "RankConsistency[rows of two]",
    "RankConsistency[batch]",
    "RankClipLoss",
    "ClipLoss",
    "cross_modal",
    "plackett_luce_nll",
    "all_gather",
)


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.name in COMPILED], ids=str)
def test_a_compiled_full_graph(subject: Subject) -> None:
    """One graph gives value and gradients, and reads a new λ without being compiled again."""
    torch._dynamo.reset()
    inputs = subject.pick(data("equal rows"), torch.float32)
    built = subject.build()
    if hasattr(built, "set_epoch"):
        built.set_epoch(EPOCHS, EPOCHS)
    compiled = torch.compile(built, backend="aot_eager", fullgraph=True)
    taken = leaves(inputs, subject.differentiable)
    if hasattr(built, "set_epoch"):
        compiled(**taken)
        subject.started(built)
        with torch.compiler.set_stance("fail_on_recompile"):
            value = compiled(**taken)
    else:
        value = compiled(**taken)
    found = differentiated(value, taken, subject.differentiable)
    assert_right(found, expected(subject, inputs), tolerances(subject, torch.float32))


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if not s.differentiates], ids=str)
def test_a_compiled_measure(subject: Subject) -> None:
    """A measure may leave the graph, whose number is then the same, or refuse to be one."""
    torch._dynamo.reset()
    inputs = subject.pick(data("equal rows"), torch.float32)
    for whole in (False, True):
        with right_or_refused("(?i)data.dependent|graph break|fullgraph"):
            value = torch.compile(subject.build(), backend="eager", fullgraph=whole)(**inputs)
            assert_right(Result(value, {}), expected(subject, inputs), tolerances(subject, torch.float32))


# How torch, or we, say that a transform is not there.
REFUSED = r"(?i)forward.mode|jvp|functorch|torch\.func|vmap|setup_context|not implemented|not supported"


def of_one(subject: Subject, inputs: Inputs, name: str) -> Callable[[Tensor], Tensor]:
    """The weighted sum of the values, as a function of one input."""
    built = subject.started()

    def weighted(x: Tensor) -> Tensor:
        value = built(**{**inputs, name: x})
        return (value * upstream_of(value)).sum()

    return weighted


@full_precision
@differentiable
def test_torch_func_grad(subject: Subject, dtype: torch.dtype) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    owed = expected(subject, inputs)
    for name in subject.differentiable:
        with right_or_refused(REFUSED):
            gradient, value = torch.func.grad_and_value(of_one(subject, inputs, name))(inputs[name])
            wanted = Result((owed.value * upstream_of(owed.value)).sum(), {name: owed.gradients[name]})
            assert_right(Result(value, {name: gradient}), wanted, tolerances(subject, dtype))


def tangent_of(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)


def slope(owed: Result, name: str) -> Tensor:
    """What forward mode owes: the derivative along the tangent."""
    return (owed.gradients[name] * tangent_of(owed.gradients[name])).sum()


@full_precision
@differentiable
def test_torch_func_jvp(subject: Subject, dtype: torch.dtype) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    owed = expected(subject, inputs)
    for name in subject.differentiable:
        with right_or_refused(REFUSED):
            x = inputs[name]
            _, found = torch.func.jvp(of_one(subject, inputs, name), (x,), (tangent_of(x),))
            assert_right(Result(found, {}), Result(slope(owed, name), {}), tolerances(subject, dtype)[1:] * 2)


@full_precision
@differentiable
def test_forward_ad(subject: Subject, dtype: torch.dtype) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    owed = expected(subject, inputs)
    for name in subject.differentiable:
        with right_or_refused(REFUSED), forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[name], tangent_of(inputs[name]))
            found = forward_ad.unpack_dual(of_one(subject, inputs, name)(dual)).tangent
            assert found is not None, f"no tangent by {name}, and no error"
            assert_right(Result(found, {}), Result(slope(owed, name), {}), tolerances(subject, dtype)[1:] * 2)


@full_precision
@every
def test_vmap(subject: Subject, dtype: torch.dtype) -> None:
    batches = [subject.pick(data(kind), dtype) for kind in ("plain", "equal rows")]
    stacked = {k: torch.stack([b[k] for b in batches]) for k in subject.inputs}
    built = subject.started()
    if subject.is_module:
        built.eval()  # a state of one batch after the other is none that vmap could give
    with right_or_refused(REFUSED + r"|data.dependent|\.item\(\)|in.?place|batched tensor"):
        together, one_by_one = (leaves(stacked, subject.differentiable) for _ in range(2))
        found = torch.func.vmap(lambda inputs: built(**inputs))(together)
        owed = torch.stack([built(**{k: x[i] for k, x in one_by_one.items()}) for i in range(len(batches))])
        assert_right(
            differentiated(found, together, subject.differentiable),
            differentiated(owed, one_by_one, subject.differentiable),
            tolerances(subject, dtype),
        )


# --- threads and processes --------------------------------------------------------------------------------


@every
def test_threads(subject: Subject) -> None:
    """Two threads at once, each with its own batch; what has no state of a step is one object."""
    kinds = ("equal rows", "sparse")
    inputs = {kind: subject.pick(data(kind), torch.float32) for kind in kinds}
    owed = {kind: expected(subject, inputs[kind]) for kind in kinds}
    shared = None if subject.is_module and subject.build().state_dict() else subject.started()

    def work(kind: str) -> list[Result]:
        return [run(subject, inputs[kind], shared) for _ in range(5)]

    with ThreadPoolExecutor(len(kinds)) as pool:
        for kind, results in zip(kinds, pool.map(work, kinds), strict=True):
            for found in results:
                assert_right(found, owed[kind], tolerances(subject, torch.float32))


def in_worker(names: list[str]) -> dict[str, Result | str]:
    """What a forked worker finds; it does not see how its parent's subjects fail."""
    torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads do not survive a fork
    found: dict[str, Result | str] = {}
    for subject in SUBJECTS:
        if subject.name in names:
            try:
                found[subject.name] = run(subject, subject.pick(data("equal rows"), torch.float32))
            except Exception as error:
                found[subject.name] = repr(error)
    return found


@pytest.fixture(scope="module")
def forked() -> dict[str, Any]:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    for subject in SUBJECTS:  # whatever is made at the first call is made before the fork
        run(subject, subject.pick(data(), torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of threads in the parent
        pool = multiprocessing.get_context("fork").Pool(1)
    with pool:
        return pool.apply_async(in_worker, ([s.name for s in SUBJECTS],)).get(timeout=TIMEOUT)


@every
def test_a_forked_worker(subject: Subject, forked: dict[str, Any]) -> None:
    found = forked[subject.name]
    assert isinstance(found, Result), found
    owed = expected(subject, subject.pick(data("equal rows"), torch.float32))
    assert_right(found, owed, tolerances(subject, torch.float32))
