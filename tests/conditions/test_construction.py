"""However a loss is built, moved, copied or saved: the same value and gradients afterwards."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import (
    SUBJECTS,
    Result,
    Subject,
    assert_right,
    data,
    expected,
    right_or_refused,
    run,
    tolerances,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from defaults import default_device, default_dtype

every = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
modules = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.is_module], ids=str)
full_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def assert_works(subject: Subject, built: Any, dtype: torch.dtype = torch.float64) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    assert_right(run(subject, inputs, built), expected(subject, inputs), tolerances(subject, dtype))


# --- modules ----------------------------------------------------------------------------------------------


def on_meta(subject: Subject) -> nn.Module:
    with torch.device("meta"):
        return subject.build()


def saved(module: nn.Module) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def loaded(module: nn.Module, state: dict[str, Any], **options: Any) -> nn.Module:
    module.load_state_dict(state, **options)
    return module


def called(subject: Subject) -> nn.Module:
    """A loss with a call behind it, which has left no trace in its state."""
    module = subject.started().eval()
    run(subject, subject.pick(data("sparse")), module)
    return module.train()


CONSTRUCTIONS: dict[str, Callable[[Subject], nn.Module]] = {
    "meta, to_empty": lambda subject: on_meta(subject).to_empty(device="cpu"),
    "meta, to_empty, load": lambda subject: loaded(
        on_meta(subject).to_empty(device="cpu"), subject.build().state_dict()
    ),
    "meta, load by assignment": lambda subject: loaded(
        on_meta(subject), subject.build().state_dict(), assign=True
    ),
    "meta, deepcopy, to_empty, load": lambda subject: loaded(
        copy.deepcopy(on_meta(subject)).to_empty(device="cpu"), subject.build().state_dict()
    ),
    "meta, to_empty, deepcopy": lambda subject: copy.deepcopy(on_meta(subject).to_empty(device="cpu")),
    "to meta, to_empty, load": lambda subject: loaded(
        subject.build().to("meta").to_empty(device="cpu"), subject.build().state_dict()
    ),
    "inside another module on meta": lambda subject: loaded(
        nn.ModuleList([on_meta(subject)]).to_empty(device="cpu"),
        nn.ModuleList([subject.build()]).state_dict(),
    )[0],
    "to the device that it is on": lambda subject: subject.build().to("cpu"),
    "to float64": lambda subject: subject.build().double(),
    "to bfloat16": lambda subject: subject.build().bfloat16(),
    "to float16 and back": lambda subject: subject.build().half().float(),
    "deepcopy": lambda subject: copy.deepcopy(subject.build()),
    "deepcopy after a call": lambda subject: copy.deepcopy(called(subject)),
    "pickle": lambda subject: pickle.loads(pickle.dumps(subject.build())),
    "pickle after a call": lambda subject: pickle.loads(pickle.dumps(called(subject))),
    "state_dict": lambda subject: loaded(subject.build(), saved(subject.build())),
    "state_dict after a call": lambda subject: loaded(subject.build(), saved(called(subject))),
    "requires_grad_(False)": lambda subject: subject.build().requires_grad_(False),
    "share_memory": lambda subject: subject.build().share_memory(),
}


# Of a loss that has a state and was not given one after to_empty, an error is right as well.
NO_STATE = "meta|state_dict|initiali[sz]ed"


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@full_precision
@modules
def test_a_loss_is_right_however_it_came_about(
    subject: Subject, dtype: torch.dtype, construction: str
) -> None:
    module = CONSTRUCTIONS[construction](subject)
    with right_or_refused(NO_STATE):
        assert_works(subject, subject.started(module), dtype)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "to": lambda module: module.to("cpu", torch.float64),
    "bfloat16": lambda module: module.bfloat16(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "load_state_dict": lambda module: module,
}


@pytest.mark.parametrize("move", MOVES)
@modules
def test_where_training_stands_outlives_a_move(subject: Subject, move: str) -> None:
    module = MOVES[move](subject.started())
    assert_works(subject, loaded(module, subject.build().state_dict()))


@modules
def test_where_training_stands_may_be_told_on_meta(subject: Subject) -> None:
    module = on_meta(subject)
    with right_or_refused(NO_STATE):
        subject.started(module)
        module.to_empty(device="cpu")
        assert_works(subject, loaded(module, subject.build().state_dict()))


@full_precision
@modules
def test_a_loss_may_be_told_a_new_epoch_after_every_move(subject: Subject, dtype: torch.dtype) -> None:
    built = on_meta(subject).to_empty(device="cpu")
    built.load_state_dict(subject.build().state_dict())
    if hasattr(built, "set_epoch"):
        built.set_epoch(1, 12)
    assert_works(subject, subject.started(copy.deepcopy(built.double())), dtype)


@modules
def test_a_copy_is_on_its_own(subject: Subject) -> None:
    """What happens to the copy does not change the original, and the other way round."""
    original = subject.started()
    duplicate = copy.deepcopy(original)
    if hasattr(duplicate, "set_epoch"):
        duplicate.set_epoch(12, 12)
    run(subject, subject.pick(data("sparse")), duplicate)
    assert_works(subject, original)


@every
def test_features_on_two_devices_are_an_error(subject: Subject) -> None:
    inputs = subject.pick(data(), torch.float32)
    if len(inputs) == 1:
        pytest.skip("takes one tensor")
    for name in inputs:
        # A scale of the other device is moved; from meta nothing can be.
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"(?i)meta|device"):
            subject.started()(**{**inputs, name: inputs[name].to("meta")})


# --- surroundings -----------------------------------------------------------------------------


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "torch.device(meta)": lambda: torch.device("meta"),
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@full_precision
@every
def test_surroundings_of_the_construction_do_not_matter(
    subject: Subject, dtype: torch.dtype, surroundings: str
) -> None:
    with SURROUNDINGS[surroundings]():
        built = subject.build()
    if subject.is_module and "meta" in surroundings:
        built = loaded(built.to_empty(device="cpu"), subject.build().state_dict())
    with right_or_refused("inference"):
        assert_works(subject, subject.started(built), dtype)


@pytest.mark.parametrize(
    "surroundings", [name for name in SURROUNDINGS if "default" in name or "meta" in name]
)
@full_precision
@every
def test_surroundings_of_the_call_do_not_matter(
    subject: Subject, dtype: torch.dtype, surroundings: str
) -> None:
    """A default device or dtype is for new tensors of the user's; the features have their own."""
    inputs = subject.pick(data("equal rows"), dtype)
    owed, built = expected(subject, inputs), subject.started()
    with SURROUNDINGS[surroundings]():
        found = run(subject, inputs, built)
    assert_right(found, owed, tolerances(subject, dtype))


@pytest.mark.parametrize("surroundings", ["torch.device(meta)", "default dtype float64"])
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if "logit_scale" in s.inputs], ids=str)
def test_a_scale_that_is_a_number_follows_the_features(subject: Subject, surroundings: str) -> None:
    inputs = subject.pick(data(), torch.float32)
    owed, built = expected(subject, inputs, ()), subject.started()
    with SURROUNDINGS[surroundings]():
        value = built(**{**inputs, "logit_scale": float(inputs["logit_scale"])})
    assert value.dtype == torch.float32
    assert_right(Result(value, {}), owed, tolerances(subject, torch.float32))


@pytest.mark.parametrize("fake", [False, True])
@every
def test_features_without_values_give_a_value_of_the_same_shape(subject: Subject, fake: bool) -> None:
    inputs, built = subject.pick(data(), torch.float32), subject.started()
    if subject.is_module and not fake:
        built.to("meta")
    owed = expected(subject, inputs, ()).value
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, right_or_refused("(?i)meta|data.dependent|local_scalar_dense"):
        value = built(**{k: torch.empty_like(x) if fake else x.to("meta") for k, x in inputs.items()})
        assert value.shape == owed.shape
