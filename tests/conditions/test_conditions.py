"""Every subject under every condition, one at a time: the value and gradients that it owes, or an error.

A condition is a row of a table: how a subject is built, how its inputs lie in memory, or what surrounds the
call. What no trainer uses (forward mode, vmap) has to be right or an error, never a wrong number.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import re
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rankloss
from batches import upstream_for
from fake_devices import CUDA, MPS, meta_is, no_float64
from rankloss.losses import gathering
from subjects import (
    EPOCHS,
    FROZEN,
    KINDS,
    NO_SUBJECTS,
    PAIR,
    SUBJECTS,
    TEACHER,
    Inputs,
    N,
    Result,
    Subject,
    assert_right,
    differentiated,
    drawn_inputs,
    expected_result_of,
    leaves,
    result_of,
    tolerances,
)

pytestmark = [
    # Zero rows are not unit-norm, and of that a loss may warn.
    pytest.mark.filterwarnings("ignore:.*norm"),
    # torch's own forward mode is made with it.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
every = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
differentiable = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.differentiable], ids=str)
modules = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.is_module], ids=str)

Context = Callable[[], AbstractContextManager[Any]]


# --- the subjects -----------------------------------------------------------------------------------------


def public_names() -> set[str]:
    """The names of ``rankloss``; of a documented module, functions and classes that are not at the top.

    A module that is no subject as a whole counts as one name.
    """
    names = {"__version__"}
    top = {name: public for name, public in vars(rankloss).items() if not name.startswith("_")}
    ids_at_the_top = {id(public) for public in top.values()}
    for name, public in top.items():
        if not isinstance(public, types.ModuleType) or name in NO_SUBJECTS:
            names.add(name)
            continue
        for part in getattr(public, "__all__", ()):  # without it, the module is not documented
            member = getattr(public, part)
            is_callable = type(member) in (types.FunctionType, type)
            if is_callable and id(member) not in ids_at_the_top:
                names.add(f"{name}.{part}")
    return names


def test_every_public_name_is_a_subject_or_is_none_for_a_reason() -> None:
    covered = {subject.covers for subject in SUBJECTS}
    assert covered | NO_SUBJECTS.keys() == public_names() | {""}


# --- the inputs -------------------------------------------------------------------------------------------


@functools.cache
def expected_for_kind(subject: Subject, kind: str, dtype: torch.dtype) -> Result:
    """The value and gradients of the definition in float64, for a kind of data rounded to a dtype."""
    return expected_result_of(subject, subject.pick(drawn_inputs(kind), dtype))


@pytest.mark.parametrize("kind", KINDS)
@every
def test_value_and_gradients_are_right(subject: Subject, kind: str) -> None:
    """In every dtype; where ``rankloss.reference`` has no value, in others than float64 as in float64."""
    half_dtypes = (BF16, F16) if kind == "sign codes" else ()  # in which these codes are exact
    for dtype in (F64, F32, *half_dtypes):
        result = result_of(subject, subject.pick(drawn_inputs(kind), dtype))
        assert_right(result, expected_for_kind(subject, kind, dtype), tolerances(subject, dtype))
        keeps_bfloat16 = subject.is_open_clips and dtype is BF16  # as open_clip's own losses do
        if subject.is_module and not keeps_bfloat16:
            assert result.value.dtype == torch.promote_types(dtype, F32)


@differentiable
def test_an_input_may_be_the_only_one_with_a_gradient(subject: Subject) -> None:
    inputs, of_all = subject.pick(drawn_inputs("equal rows")), expected_for_kind(subject, "equal rows", F64)
    for name in subject.differentiable:
        alone = result_of(subject, inputs, wanted=(name,))
        assert_right(alone, Result(of_all.value, {name: of_all.gradients[name]}))


OF_DATA = (*TEACHER, *FROZEN, "grades")
"""Inputs that come from the data, and not from the model that is trained."""


def spoilt_inputs(subject: Subject) -> Iterator[tuple[str, float, Inputs]]:
    """Each of its inputs in turn with a NaN or an infinity in the third row, by its name."""
    has_features = not {"image_features", "query_features"}.isdisjoint(subject.inputs)
    for name in subject.inputs:
        if name == "pair_ids":
            continue
        # The promise is about features; of a list, infinity is an item like others.
        may_be_infinite = not (has_features and name.endswith("features"))
        for bad in (math.nan,) if may_be_infinite else (math.nan, math.inf, -math.inf):
            inputs = subject.pick(drawn_inputs(), F32)
            inputs[name][(2,) * inputs[name].dim()] = bad
            yield name, bad, inputs


@every
def test_a_feature_that_is_not_finite_makes_the_value_nan(subject: Subject) -> None:
    """Value and, where it is differentiated, the gradients: an optimiser's scaler looks at these.

    A measure, which is not differentiated, may be infinite instead.
    """
    for name, bad, inputs in spoilt_inputs(subject):
        if name in OF_DATA:
            continue
        result = result_of(subject, inputs)
        has_value_of_each_row = result.value.dim() > 0 and subject.differentiable
        value = result.value[2] if has_value_of_each_row else result.value
        is_seen = value.isnan() if subject.differentiable else ~value.isfinite()
        assert is_seen.any(), f"{bad} in {name} gives {value}"
        for other, gradient in result.gradients.items():
            if subject.name != "all_gather":  # whose gradient is the upstream one
                assert gradient.isnan().any(), f"{bad} in {name}: the gradient of {other}"


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if not {*OF_DATA}.isdisjoint(s.inputs)], ids=str)
def test_data_that_are_not_finite_are_refused(subject: Subject) -> None:
    for name, _, inputs in spoilt_inputs(subject):
        if name in OF_DATA:
            with pytest.raises(ValueError, match=f"{name} must be (finite|numbers|positive and finite)"):
                result_of(subject, inputs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T if x.dim() == 2 else x,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2] if x.dim() else x,
    "columns of a wider matrix": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]] if x.dim() else x,
    "negative bit": lambda x: torch.complex(0 * x, -x).conj().imag if x.is_floating_point() else x,
    "not at the start of its storage": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every
def test_strides_do_not_matter(subject: Subject, layout: str) -> None:
    inputs = {k: LAYOUTS[layout](x) for k, x in subject.pick(drawn_inputs("equal rows"), F32).items()}
    expected = expected_for_kind(subject, "equal rows", F32)
    assert_right(result_of(subject, inputs), expected, tolerances(subject, F32))


@differentiable
def test_rows_that_are_one_row_in_memory_are_right(subject: Subject) -> None:
    """As ``expand`` makes them, here of the first input."""
    inputs, name = subject.pick(drawn_inputs(), F32), subject.inputs[0]
    inputs[name] = inputs[name][:1].expand_as(inputs[name])
    assert_right(result_of(subject, inputs), expected_result_of(subject, inputs), tolerances(subject, F32))


@every
def test_one_input_of_another_dtype_gives_the_right_value_and_gradients(subject: Subject) -> None:
    in_float32, in_float64 = (subject.pick(drawn_inputs(), dtype) for dtype in (F32, F64))
    for name in subject.inputs:
        inputs = {**in_float32, name: in_float64[name]}  # ids are integers in both
        owed = expected_result_of(subject, inputs)
        assert_right(result_of(subject, inputs), owed, tolerances(subject, F32))


def permuted(inputs: Inputs, order: list[int]) -> Inputs:
    """The pairs in another order."""
    return {name: x[order] if x.dim() else x for name, x in inputs.items()}


def swapped(inputs: Inputs, _: list[int]) -> Inputs:
    """Images as texts, and texts as images, those of a teacher too."""
    return {other_modality(name): x for name, x in inputs.items()}


def other_modality(name: str) -> str:
    return re.sub("image|text", lambda match: {"image": "text", "text": "image"}[match[0]], name)


def rescaled(inputs: Inputs, _: list[int]) -> Inputs:
    """All features twice as long, and the scales a quarter: their products are the same."""

    def factor(name: str) -> float:
        if name.endswith("features"):
            return 2.0
        return 0.25 if name.endswith("scale") else 1.0

    return {name: x * factor(name) if x.is_floating_point() else x for name, x in inputs.items()}


UNCHANGING: list[tuple[Callable[[Inputs, list[int]], Inputs], Subject]] = [
    *((permuted, s) for s in SUBJECTS if s.is_module),
    *((swapped, s) for s in SUBJECTS if s.takes_pairs),
    *((rescaled, s) for s in SUBJECTS if s.is_module and not s.has_unscaled_term),
]


@pytest.mark.parametrize(("change", "subject"), UNCHANGING, ids=lambda x: getattr(x, "__name__", str(x)))
@settings(max_examples=settings.default.max_examples // 5)
@given(
    kind=st.sampled_from(["plain", "equal rows"]),
    seed=st.integers(0, 10_000),
    order=st.permutations(range(N)),
)
def test_orders_names_and_units_do_not_matter(
    change: Callable[[Inputs, list[int]], Inputs], subject: Subject, kind: str, seed: int, order: list[int]
) -> None:
    """The order of the pairs, the names of the modalities, and what is scaled: features or their products."""
    inputs = leaves(subject.pick(drawn_inputs(kind, seed=seed)), subject.differentiable)
    value = subject.started()(**change(inputs, order))
    of_changed = differentiated(value, inputs, subject.differentiable)
    assert_right(of_changed, result_of(subject, inputs), (1e-9, 1e-9))


# --- how a loss is built ----------------------------------------------------------------------------------


def started_in(context: AbstractContextManager[Any], subject: Subject) -> Any:
    """A subject that is built within a context."""
    with context:
        return subject.started()


def on_meta(subject: Subject) -> nn.Module:
    return started_in(torch.device("meta"), subject)


def loaded(module: nn.Module, state: dict[str, Any], **options: Any) -> nn.Module:
    module.load_state_dict(state, **options)
    return module


def saved(module: nn.Module) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def called(subject: Subject) -> nn.Module:
    """A loss with a call behind it."""
    module = subject.started()
    result_of(subject, subject.pick(drawn_inputs("sparse")), module)
    return module


CONSTRUCTIONS: dict[str, Callable[[Subject], nn.Module]] = {
    "meta, to_empty": lambda subject: on_meta(subject).to_empty(device="cpu"),
    "meta, load by assignment": lambda subject: loaded(
        on_meta(subject), subject.build().state_dict(), assign=True
    ),
    "meta, deepcopy, to_empty": lambda subject: copy.deepcopy(on_meta(subject)).to_empty(device="cpu"),
    "to meta, to_empty": lambda subject: called(subject).to("meta").to_empty(device="cpu"),
    "to bfloat16": lambda subject: called(subject).bfloat16(),
    "copy": lambda subject: copy.copy(called(subject)),
    "deepcopy": lambda subject: copy.deepcopy(called(subject)),
    "pickle": lambda subject: pickle.loads(pickle.dumps(called(subject))),
    "state_dict": lambda subject: loaded(subject.started(), saved(called(subject))),
    "default device meta": lambda subject: started_in(on_meta_by_default(), subject),
    "default dtype bfloat16": lambda subject: started_in(by_default(BF16)(), subject),
    "inference mode": lambda subject: started_in(torch.inference_mode(), subject),
}


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@modules
def test_a_loss_is_right_however_it_came_about(subject: Subject, construction: str) -> None:
    """Where it stands in training it has kept, and may be told again."""
    as_built = CONSTRUCTIONS[construction](subject)
    inputs = subject.pick(drawn_inputs("equal rows"), F32)
    expected = expected_for_kind(subject, "equal rows", F32)
    assert_right(result_of(subject, inputs, as_built), expected, tolerances(subject, F32))
    told_again = subject.started(as_built)
    assert_right(result_of(subject, inputs, told_again), expected, tolerances(subject, F32))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@modules
def test_a_copy_is_on_its_own(subject: Subject, copied: Callable[[Any], Any]) -> None:
    """A change of the copy does not change the original, nor its position in training.

    A shallow copy of any module shares the modules within, so a loss within is that of both.
    """
    original = subject.started()
    duplicate = copied(original)
    shares_a_loss = copied is copy.copy and any(hasattr(part, "set_epoch") for part in original.children())
    if hasattr(duplicate, "set_epoch") and not shares_a_loss:
        duplicate.set_epoch(EPOCHS, EPOCHS)
    inputs = subject.pick(drawn_inputs("equal rows"))
    result_of(subject, inputs, duplicate)
    assert_right(result_of(subject, inputs, original), expected_for_kind(subject, "equal rows", F64))


# --- what surrounds the call ------------------------------------------------------------------------------


@contextmanager
def during(choose: Callable[[Any], Any], value: Any, former: Any) -> Iterator[None]:
    """A setting of torch, and the former one in the end."""
    choose(value)
    try:
        yield
    finally:
        choose(former)


flush_to_zero = functools.partial(during, torch.set_flush_denormal, True, False)
# torch.empty is then filled with NaN.
deterministic = functools.partial(during, torch.use_deterministic_algorithms, True, False)
on_meta_by_default = functools.partial(during, torch.set_default_device, "meta", None)


def by_default(dtype: torch.dtype) -> Context:
    """Inside, tensors have this dtype if no other is asked for."""
    return functools.partial(during, torch.set_default_dtype, dtype, F32)


def autocast(dtype: torch.dtype) -> Context:
    return lambda: torch.autocast("cpu", dtype)


SURROUNDINGS: dict[str, tuple[Context, Context, torch.dtype | None]] = {
    "flush to zero": (flush_to_zero, flush_to_zero, None),
    "deterministic algorithms": (deterministic, deterministic, None),
    "torch.device(meta)": (lambda: torch.device("meta"), nullcontext, None),
    "default device meta": (on_meta_by_default, nullcontext, None),
    "default dtype float64": (by_default(F64), by_default(F64), None),
    "autocast of the forward pass": (autocast(BF16), nullcontext, BF16),
    "autocast of the backward pass": (nullcontext, autocast(BF16), BF16),
    "autocast of both": (autocast(F16), autocast(F16), F16),
    "no float64": (no_float64, no_float64, None),
}
"""What is around the forward pass, around the backward pass, and the dtype that autocast asks for."""


@pytest.mark.parametrize("name", SURROUNDINGS)
@every
def test_surroundings_do_not_matter(subject: Subject, name: str) -> None:
    around_forward, around_backward, half = SURROUNDINGS[name]
    for kind in ("equal rows", "sparse"):
        inputs = leaves(subject.pick(drawn_inputs(kind), F32), subject.differentiable)
        expected, built = expected_for_kind(subject, kind, F32), subject.started()
        with around_forward():
            value = built(**inputs)
        upstream = upstream_for(value)
        with around_backward():
            result = differentiated(value, inputs, subject.differentiable, upstream)
        assert_right(result, expected, tolerances(subject, F32, half))
        if subject.is_module:
            assert result.value.dtype == F32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every
def test_without_a_graph_there_is_the_value_and_in_the_next_call_gradients(
    subject: Subject, mode: Context
) -> None:
    inputs, built = subject.pick(drawn_inputs("equal rows"), F32), subject.started()
    expected = expected_for_kind(subject, "equal rows", F32)
    with mode():
        of_leaves = built(**leaves(inputs, subject.differentiable))
        of_inputs_made_inside = built(**{k: x.clone() for k, x in inputs.items()})
    for value in (of_leaves, of_inputs_made_inside):
        if subject.name != "all_gather":  # of one process, it returns the leaf itself
            assert not value.requires_grad
        assert_right(Result(value, {}), Result(expected.value, {}), tolerances(subject, F32))
    assert_right(result_of(subject, inputs, built), expected, tolerances(subject, F32))


@pytest.mark.parametrize("within_compiled_model", [False, True], ids=["by itself", "within a compiled model"])
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if {*TEACHER} <= {*s.inputs}], ids=str)
def test_a_teacher_may_come_from_inference_mode(subject: Subject, within_compiled_model: bool) -> None:
    inputs, started = subject.pick(drawn_inputs("equal rows")), subject.started()
    with torch.inference_mode():
        teacher = {name: inputs[name].clone() for name in TEACHER}
    student = leaves({k: x for k, x in inputs.items() if k not in TEACHER}, subject.differentiable)
    are_of_inference_mode = []

    @torch.compiler.disable  # so that it sees the tensors themselves
    def loss(**given: Tensor) -> Tensor:
        are_of_inference_mode.append(all(given[name].is_inference() for name in TEACHER))
        value: Tensor = started(**given)
        return value

    built = compiled(loss, cloned=student.keys()) if within_compiled_model else loss
    result = differentiated(built(**student, **teacher), student, subject.differentiable)
    assert are_of_inference_mode == [True]
    assert_right(result, expected_for_kind(subject, "equal rows", F64))


@pytest.mark.parametrize("use_reentrant", [False, True])
@differentiable
def test_value_and_gradients_are_right_inside_an_activation_checkpoint(
    subject: Subject, use_reentrant: bool
) -> None:
    inputs, built = subject.pick(drawn_inputs("equal rows")), subject.started()

    def in_order(*x: Tensor) -> Tensor:
        value: Tensor = built(**dict(zip(inputs, x, strict=True)))
        return value

    taken = leaves(inputs, subject.differentiable)
    value = checkpoint(in_order, *taken.values(), use_reentrant=use_reentrant)
    value.backward(upstream_for(value))  # what is reentrant knows no autograd.grad
    gradients = {k: taken[k].grad for k in subject.differentiable}
    assert_right(Result(value.detach(), gradients), expected_for_kind(subject, "equal rows", F64))


READING = ("metrics.rank_agreement", "metrics.ndcg")
"""Measures that look at their inputs' values."""


@every
def test_on_the_meta_device_it_has_the_right_shape_or_says_that_there_are_no_values(subject: Subject) -> None:
    on_meta = {name: x.to("meta") for name, x in subject.pick(drawn_inputs(), F32).items()}
    shape = expected_for_kind(subject, "plain", F32).value.shape
    with pytest.raises(RuntimeError, match="meta") if subject.name in READING else nullcontext():
        assert subject.started()(**on_meta).shape == shape


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if len(s.inputs) > 1], ids=str)
def test_one_input_on_another_device_is_an_error_that_says_so(subject: Subject) -> None:
    inputs = subject.pick(drawn_inputs(), F32)
    for name, x in inputs.items():
        with pytest.raises((ValueError, RuntimeError), match="device"):
            subject.started()(**{**inputs, name: x.to("meta")})


@pytest.mark.parametrize(("device", "as_numbers"), [(CUDA, False), (MPS, True)], ids=["cuda", "mps, numbers"])
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.takes_pairs], ids=str)
def test_a_step_on_an_accelerator_never_waits_for_it_and_copies_the_weights_alone_to_it(
    subject: Subject, as_numbers: bool, device: torch.device
) -> None:
    """As far as tensors without values can show; the scale and the bias may be numbers.

    Reading a value of such a tensor, for which a step would wait, is an error.
    """
    on_cpu = subject.pick(drawn_inputs(), F32)
    inputs = leaves({name: x.to("meta") for name, x in on_cpu.items()}, subject.differentiable)
    numbers = {name: x.item() for name, x in on_cpu.items() if as_numbers and not x.dim()}
    passes = mock.patch.object(gathering, "weighted_terms", wraps=gathering.weighted_terms)
    with meta_is(device) as copies, passes as weighted_terms:
        value = subject.started()(**inputs | numbers)
        value.backward()
        assert {value.device, *(inputs[k].grad.device for k in PAIR)} == {device}
    # The weights of each pass of the engine, and MimicryLoss's components, which then stay there.
    expected_copies = weighted_terms.call_count + (subject.covers == "MimicryLoss")
    assert copies == ["aten._to_copy.default"] * expected_copies


# --- derivatives ------------------------------------------------------------------------------------------


@contextmanager
def right_or_error() -> Iterator[None]:
    """Lets any error pass but a failed assertion: what is inside holds, or a user sees that it does not."""
    with suppress(ValueError, TypeError, RuntimeError, NotImplementedError):
        yield


def second_order(value: Tensor, inputs: Inputs, wanted: tuple[str, ...]) -> Result:
    """A directional second derivative: the gradients of Σ_k ⟨∂L/∂x_k, u_k⟩, u fixed."""
    by = [inputs[name] for name in wanted]
    first = torch.autograd.grad(value, by, upstream_for(value), create_graph=True)
    along = sum((gradient * upstream_for(gradient)).sum() for gradient in first)
    second = torch.autograd.grad(along, by)
    return Result(along.detach(), dict(zip(wanted, second, strict=True)))


# The gradient of all_gather is the upstream one, and depends on no input.
twice_differentiable = [s for s in SUBJECTS if s.differentiable and s.name != "all_gather"]
OF_FLOAT32 = 2e-4
"""The largest relative error of a second derivative in float32."""


@pytest.mark.parametrize(
    ("around", "tolerance_of_half_logits"),
    [(autocast(BF16), 0.1), (no_float64, OF_FLOAT32)],
    ids=["autocast", "no float64"],
)
@pytest.mark.parametrize("subject", twice_differentiable, ids=str)
def test_second_derivatives_in_float32_are_those_in_float64(
    subject: Subject, around: Context, tolerance_of_half_logits: float
) -> None:
    inputs = subject.pick(drawn_inputs("equal rows"), F32)

    def second_in(dtype: torch.dtype, context: Context) -> Result:
        converted = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        taken, built = leaves(converted, subject.differentiable), subject.started()
        with context():
            return second_order(built(**taken), taken, subject.differentiable)

    tolerance = tolerance_of_half_logits if subject.half else OF_FLOAT32
    assert_right(second_in(F32, around), second_in(F64, nullcontext), (tolerance, tolerance))


def coupled(inputs: Inputs, wanted: tuple[str, ...]) -> Inputs:
    """Inputs that all depend on the first one, too, as gathered features do on the local ones."""
    first, *others = wanted
    return {k: x + 0.01 * inputs[first].mean() if k in others else x for k, x in inputs.items()}


# Equal candidates have to stay equal: test_ranked_lists has the second derivatives of lists.
@pytest.mark.parametrize("subject", [s for s in twice_differentiable if s.covers != "RankedLists"], ids=str)
def test_second_derivatives_are_differences_of_gradients(subject: Subject) -> None:
    inputs, wanted, step = subject.pick(drawn_inputs()), subject.differentiable, 1e-6

    def value_and_leaves(inputs: Inputs) -> tuple[Tensor, Inputs]:
        taken = leaves(inputs, wanted)
        return subject.started()(**coupled(taken, wanted)), taken

    def gradients_after(step: float) -> Inputs:
        """The gradients where the inputs have moved in the direction of the second derivative."""
        moved = {name: x + step * upstream_for(x) if name in wanted else x for name, x in inputs.items()}
        return differentiated(*value_and_leaves(moved), wanted).gradients

    second = second_order(*value_and_leaves(inputs), wanted)
    above, below = gradients_after(step), gradients_after(-step)
    quotients = {name: (above[name] - below[name]) / (2 * step) for name in wanted}
    no_error_of_value = 0.0  # it is compared with itself
    assert_right(second, Result(second.value, quotients), (no_error_of_value, 1e-4))


@differentiable
def test_inputs_may_be_computed_of_one_another(subject: Subject) -> None:
    first, *others = wanted = subject.differentiable
    inputs = subject.pick(drawn_inputs("equal rows"))
    of_coupled = expected_result_of(subject, coupled(inputs, wanted))
    for name in others:  # the chain rule: every entry has 0.01 of the first input's mean added to it
        of_coupled.gradients[first] += 0.01 * of_coupled.gradients[name].sum() / inputs[first].numel()
    for create_graph in (False, True):
        taken = leaves(inputs, wanted)
        value = subject.started()(**coupled(taken, wanted))
        assert_right(differentiated(value, taken, wanted, create_graph=create_graph), of_coupled)


class OfFirstInput:
    """A subject as a function of its first input to a number, and its slope in one direction.

    Attributes:
        x: The first input.
        tangent: The direction, of the shape of ``x``.
        expected_slope: The product of the definition's gradient and the direction.
    """

    def __init__(self, subject: Subject) -> None:
        self.built = subject.started()
        self.inputs = subject.pick(drawn_inputs("equal rows"))
        self.name = subject.differentiable[0]
        self.x = self.inputs[self.name]
        self.tangent = torch.linspace(-1, 2, self.x.numel(), dtype=self.x.dtype).view_as(self.x)
        gradient = expected_for_kind(subject, "equal rows", F64).gradients[self.name]
        self.expected_slope = Result((gradient * self.tangent).sum(), {})

    def __call__(self, x: Tensor) -> Tensor:
        value = self.built(**{**self.inputs, self.name: x})
        return (value * upstream_for(value)).sum()


@differentiable
def test_functional_forward_mode_gives_no_wrong_number(subject: Subject) -> None:
    number = OfFirstInput(subject)
    with right_or_error():
        _, slope = torch.func.jvp(number, (number.x,), (number.tangent,))
        assert_right(Result(slope, {}), number.expected_slope)


@differentiable
def test_dual_tensors_give_no_wrong_number(subject: Subject) -> None:
    number = OfFirstInput(subject)
    with right_or_error(), forward_ad.dual_level():
        slope = forward_ad.unpack_dual(number(forward_ad.make_dual(number.x, number.tangent))).tangent
        assert slope is not None, "no tangent, and no error"
        assert_right(Result(slope, {}), number.expected_slope)


@differentiable
def test_vmap_gives_no_wrong_number(subject: Subject) -> None:
    number = OfFirstInput(subject)
    stacked = torch.stack([number.x, number.x.flip(0)])
    one_by_one = torch.stack([number(x) for x in stacked])
    with right_or_error():
        assert_right(Result(torch.func.vmap(number)(stacked), {}), Result(one_by_one, {}))


# --- a compiler -------------------------------------------------------------------------------------------

BY_NAME = {subject.name: subject for subject in SUBJECTS}


def compiled(built: Callable[..., Any], cloned: Collection[str] | None = None) -> Callable[..., Tensor]:
    """A model around a loss, compiled anew; the loss itself, which breaks the graph, is called as it is.

    Args:
        built: The loss.
        cloned: The inputs of which the model passes a clone on, the others as they are; None: all.
    """
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def model(**inputs: Tensor) -> Tensor:
        names = inputs.keys() if cloned is None else cloned
        value: Tensor = built(**{name: x.clone() if name in names else x for name, x in inputs.items()})
        return value

    of_graphs = torch.compile(model, backend=backend)

    def call(**inputs: Tensor) -> Tensor:
        value: Tensor = of_graphs(**inputs)
        assert backend.frame_count > 0, "nothing was compiled"
        return value

    return call


@pytest.mark.parametrize(
    "name",
    [
        "RankConsistency[top k]",
        "RankClipLoss",
        "RankedLists[default]",
        "SigLipLoss[streamed]",
        "plackett_luce_nll",
    ],
)
def test_value_and_gradients_are_right_within_a_compiled_model(name: str) -> None:
    subject = BY_NAME[name]
    result = result_of(subject, subject.pick(drawn_inputs("equal rows"), F32), compiled(subject.started()))
    assert_right(result, expected_for_kind(subject, "equal rows", F32), tolerances(subject, F32))
