"""Whatever torch.distributed holds: nothing, a group of one process, two processes that share a batch.

By default a loss is that of the whole batch: its value on average over the processes, and its gradient
after the averaging that DDP does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from subjects import (
    SUBJECTS,
    Inputs,
    Result,
    Subject,
    assert_right,
    data,
    differentiated,
    expected,
    leaves,
    run,
    tolerances,
    upstream_of,
)
from torch import Tensor

from process_pool import Pools

BY_NAME = {subject.name: subject for subject in SUBJECTS}
every = pytest.mark.parametrize("name", BY_NAME)
modules = pytest.mark.parametrize("name", [s.name for s in SUBJECTS if s.is_module])
functions = pytest.mark.parametrize(
    "name", [s.name for s in SUBJECTS if not s.is_module and s.name != "all_gather"]
)
full_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

Found = tuple[Tensor, Inputs]  # what a process sends: value and gradients


def inputs_of(subject: Subject, rank: int, world_size: int, dtype: torch.dtype) -> Inputs:
    """This process's share of the pairs; the equal rows are in both shares."""
    whole = subject.pick(data("equal rows"), dtype)
    return {k: x.chunk(world_size)[rank] if x.dim() else x for k, x in whole.items()}


def share(
    rank: int,
    world_size: int,
    name: str,
    dtype: torch.dtype,
    build: Callable[[Subject], Any] | None = None,
    bad: float | None = None,
    create_graph: bool = False,
) -> Found:
    """What one process of several gets of its share; a value per pair is weighted as the whole batch's is."""
    subject = BY_NAME[name]
    inputs = leaves(inputs_of(subject, rank, world_size, dtype), subject.differentiable)
    if bad is not None and rank == 0:
        inputs[subject.inputs[0]].data[1, 2] = bad
    value = subject.started(None if build is None else build(subject))(**inputs)
    upstream = upstream_of(value)
    if value.dim():
        whole = upstream_of(value.new_empty(world_size * len(value)))
        upstream = world_size * whole.chunk(world_size)[rank]
    found = differentiated(value, inputs, subject.differentiable, upstream, create_graph)
    return found.value, found.gradients


def averaged(results: list[Found]) -> Result:
    """The value and the gradients of the whole batch, as DDP makes them of the processes'."""
    values = [value for value, _ in results]
    value = torch.stack(values).mean(0) if values[0].dim() == 0 else torch.cat(values)
    names = results[0][1]
    gradients = {k: [of_process[k] for _, of_process in results] for k in names}
    joined = {
        k: torch.stack(g).mean(0) if g[0].dim() == 0 else torch.cat(g) / len(g) for k, g in gradients.items()
    }
    return Result(value, joined)


def whole(name: str, dtype: torch.dtype) -> Result:
    return expected(BY_NAME[name], BY_NAME[name].pick(data("equal rows"), dtype))


@full_precision
@every
def test_a_group_of_one_process_changes_nothing(pools: Pools, name: str, dtype: torch.dtype) -> None:
    ((value, gradients),) = pools[1].run(alone, name, dtype)
    assert_right(Result(value, gradients), whole(name, dtype), tolerances(BY_NAME[name], dtype))


def alone(rank: int, world_size: int, name: str, dtype: torch.dtype) -> Found:
    assert dist.is_initialized()
    assert world_size == 1
    found = run(BY_NAME[name], BY_NAME[name].pick(data("equal rows"), dtype))
    return found.value, found.gradients


@full_precision
@modules
def test_two_processes_have_the_loss_of_the_whole_batch(pools: Pools, name: str, dtype: torch.dtype) -> None:
    found = averaged(pools[2].run(share, name, dtype))
    assert_right(found, whole(name, dtype), tolerances(BY_NAME[name], dtype))


@modules
def test_two_processes_have_its_gradient_where_that_is_to_be_differentiated(pools: Pools, name: str) -> None:
    found = averaged(pools[2].run(share, name, torch.float64, None, None, True))
    assert_right(found, whole(name, torch.float64))


def build_local(subject: Subject) -> Any:
    return subject.build(gather=False)


def build_compiled(subject: Subject) -> Any:
    torch._dynamo.reset()
    return torch.compile(subject.build(), backend="aot_eager")


def build_on_meta(subject: Subject) -> Any:
    with torch.device("meta"):
        module = subject.build()
    module.to_empty(device="cpu").load_state_dict(subject.build().state_dict())
    return module


@modules
def test_without_gathering_a_process_has_the_loss_of_its_own_pairs(pools: Pools, name: str) -> None:
    subject = BY_NAME[name]
    for rank, (value, _) in enumerate(pools[2].run(share, name, torch.float64, build_local)):
        owed = expected(subject, inputs_of(subject, rank, 2, torch.float64), ())
        assert_right(Result(value, {}), owed)


@modules
def test_two_processes_that_built_their_loss_on_meta(pools: Pools, name: str) -> None:
    found = averaged(pools[2].run(share, name, torch.float64, build_on_meta))
    assert_right(found, whole(name, torch.float64))


@functions
def test_a_function_sees_its_own_process_only(pools: Pools, name: str) -> None:
    subject = BY_NAME[name]
    for rank, (value, _) in enumerate(pools[2].run(share, name, torch.float64)):
        owed = expected(subject, inputs_of(subject, rank, 2, torch.float64), ())
        assert_right(Result(value, {}), owed)


def gather_and_weigh(rank: int, world_size: int) -> Found:
    subject = BY_NAME["all_gather"]
    found = run(subject, inputs_of(subject, rank, world_size, torch.float64))
    return found.value, found.gradients


def test_all_gather_gives_the_whole_and_adds_up_the_gradients(pools: Pools) -> None:
    owed = whole("all_gather", torch.float64)
    for rank, (value, gradients) in enumerate(pools[2].run(gather_and_weigh)):
        added = 2 * owed.gradients["x"].chunk(2)[rank]
        assert_right(Result(value, gradients), Result(owed.value, {"x": added}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@modules
def test_a_bad_feature_of_one_process_makes_the_loss_nan_on_all(pools: Pools, name: str, bad: float) -> None:
    """Otherwise one process would skip a step that the others take."""
    for value, gradients in pools[2].run(share, name, torch.float32, None, bad):
        if (
            BY_NAME[name].covers == "SigLipLoss"
        ):  # no image leaves its process, but what it does to a text does
            value = gradients["text_features"]
        assert value.isnan().any(), value


def without_a_graph(rank: int, world_size: int, name: str, mode: Callable[[], Any]) -> Tensor:
    subject = BY_NAME[name]
    with mode():
        return subject.started()(**inputs_of(subject, rank, world_size, torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@modules
def test_two_processes_without_a_graph(pools: Pools, name: str, mode: Callable[[], Any]) -> None:
    values = pools[2].run(without_a_graph, name, mode)
    found = averaged([(value, {}) for value in values])
    assert_right(found, Result(whole(name, torch.float64).value, {}))


@pytest.mark.parametrize("name", ["RankConsistency[row]", "RankClipLoss", "ClipLoss"])
def test_two_processes_with_a_compiled_loss(pools: Pools, name: str) -> None:
    """Graph breaks are allowed around the collectives; wrong gradients are not."""
    found = averaged(pools[2].run(share, name, torch.float64, build_compiled))
    assert_right(found, whole(name, torch.float64))
