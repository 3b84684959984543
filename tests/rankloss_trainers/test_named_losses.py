"""Every loss that has a name, on a model that is sharded or frozen in part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from named_inputs import D, N, inputs_of
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import rankloss_trainers
from devices import needs_fsdp2
from process_pool import Pools
from rankloss_trainers import catalog

NAMES = sorted(catalog.known())


class Towers(nn.Module):
    """Two encoders; a scale and a bias of one element each, as a scalar cannot be sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.unused = (
            nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, D)) for _ in range(3)
        )
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.tensor([x])) for x in (2.0, -1.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        features = (normalize(tower(x), dim=-1) for tower, x in ((self.image, images), (self.text, texts)))
        return *features, self.logit_scale.exp().sum(), self.logit_bias.sum()


class WithLosses(nn.Module):
    """Towers with the losses as submodules, which are called within the forward pass of the whole."""

    def __init__(self, towers: Towers, names: Sequence[str] = NAMES) -> None:
        super().__init__()
        self.towers = towers
        self.losses = nn.ModuleDict({name: rankloss_trainers.create(name) for name in names})

    def forward(self, name: str, rows: slice) -> Tensor:
        return value_of(name, self.towers, rows, self.losses[name])


def value_of(name: str, model: nn.Module, rows: slice, loss: Any = None, step: int | None = 3) -> Tensor:
    """The loss of some of the batch's rows: pictures, texts, other texts; at a step of four, unless told."""
    if loss is None:
        loss = rankloss_trainers.create(name)
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(3, N, 5, generator=generator, dtype=torch.float64)[:, rows]
    if step is not None:
        loss.set_epoch(step, 4)
        loss.set_progress(step, 4)
    pictures, texts, other_texts = data
    v, of_texts, scale, bias = model(pictures, torch.cat([texts, other_texts]))
    t, c = of_texts.chunk(2)
    inputs = {key: x[rows] if x.dim() else x for key, x in inputs_of(name, 3).items()}
    of_model = {"query_features": v, "candidate_features": torch.stack([t, c, c], 1), "caption_features": c}
    inputs.update({key: x for key, x in of_model.items() if key in inputs})
    inputs.update(image_features=v, text_features=t, logit_scale=scale, logit_bias=bias)
    value: Tensor = loss(**inputs)
    return value


def gradients(rank: int, world_size: int, wrap: Callable[[Any], Any]) -> dict[str, dict[str, Tensor]]:
    """The gradients of a share of the batch, by loss and parameter, all of one model.

    The first loss comes once more at the end: DDP refuses the step after one that left parameters it waits
    for.
    """
    of_losses, share = {}, N // world_size
    model = Towers().double()
    wrapped = wrap(model)
    for name in (*NAMES, NAMES[0]):
        model.zero_grad()
        rows = slice(rank * share, (rank + 1) * share)
        value = wrapped(name, rows) if has_losses(wrapped) else value_of(name, wrapped, rows)
        value.backward()
        of_losses[name] = whole_gradients(model, wrapped)
    return of_losses


def has_losses(wrapped: nn.Module) -> bool:
    return isinstance(getattr(wrapped, "module", wrapped), WithLosses)


def whole_gradients(model: nn.Module, wrapped: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters that have one, put together where they are sharded."""
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            given = {key: x.grad.clone() for key, x in wrapped.named_parameters() if x.grad is not None}
        return {key.removeprefix("towers."): x for key, x in given.items()}
    given = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    return {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in given.items()}


def distributed(model: Any, frozen: tuple[str, ...] = (), **options: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return DistributedDataParallel(model, **options) if is_initialized() else model


def sharded(model: Any, holds_losses: bool = False) -> Any:
    whole = WithLosses(model) if holds_losses else model
    for part in (model.image, model.text, whole) if is_initialized() else ():
        fully_shard(part)
    return whole


def sharded_by_wrappers(model: Any, holds_losses: bool = False) -> Any:
    """The older FSDP, which keeps the parameters of each wrapped part in one flat tensor."""
    whole = WithLosses(model) if holds_losses else model
    if not is_initialized():
        return whole
    wrap = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    model.image, model.text = wrap(model.image), wrap(model.text)
    return wrap(whole)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "of used parameters": functools.partial(distributed, frozen=("unused",)),
    "of unused parameters": functools.partial(distributed, find_unused_parameters=True),
    "of a frozen image tower": functools.partial(distributed, frozen=("unused", "image")),
    "of a frozen text tower": functools.partial(distributed, frozen=("unused", "text")),
    "of frozen towers": functools.partial(distributed, frozen=("unused", "image", "text")),
    "sharded": sharded,
    "sharded with the losses": functools.partial(sharded, holds_losses=True),
    "sharded by wrappers": sharded_by_wrappers,
    "sharded by wrappers with the losses": functools.partial(sharded_by_wrappers, holds_losses=True),
}
NEEDS_FSDP2 = ("sharded", "sharded with the losses")


@pytest.mark.filterwarnings("ignore:logit_bias is given")  # by one model for all losses
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=needs_fsdp2) if kind in NEEDS_FSDP2 else kind for kind in WRAPPED],
)
def test_two_processes_have_the_gradients_of_the_whole_batch(pools: Pools, kind: str) -> None:
    expected = gradients(0, 1, WRAPPED[kind])
    nothing = torch.zeros((), dtype=torch.float64)  # a parameter that no step uses may have no gradient
    for of_process in pools[2].run(gradients, WRAPPED[kind]):
        assert of_process.keys() == expected.keys() >= {*NAMES}
        for name, whole in expected.items():
            assert whole["logit_scale"].abs() > 1e-3
            for key in whole.keys() | of_process[name].keys():
                both = of_process[name].get(key, nothing), whole.get(key, nothing)
                actual, wanted = torch.broadcast_tensors(*(x.double() for x in both))
                torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-10, msg=f"{name}: {key}")


def refusal_of_sharded(rank: int, world_size: int, name: str, argument: str) -> str:
    """The error about a parameter, or features, that FSDP2 left sharded."""
    model = Towers().double()
    fully_shard(model, reshard_after_forward=True)
    share = N // world_size
    rows = slice(rank * share, (rank + 1) * share)
    given = {key: x[rows] if x.dim() else x for key, x in inputs_of(name).items()}
    if argument in ("logit_scale", "logit_bias"):
        given[argument] = getattr(model, argument).exp()
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        given[argument] = DTensor.from_local(given[argument], mesh, [Shard(0)])
    loss = rankloss_trainers.create(name)
    loss.set_progress(3, 4)
    with pytest.raises(ValueError, match=argument) as error:
        loss(**given)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        ("rankclip", "logit_scale", (1,)),
        ("siglip-streamed", "logit_bias", (1,)),
        ("clip-streamed", "text_features", (N, D)),
        ("mimicry", "reference_image_features", (N, D)),
        ("clip-ids", "pair_ids", (N,)),
    ],
)
def test_a_tensor_that_is_left_sharded_is_refused(
    pools: Pools, name: str, argument: str, shape: tuple[int, ...]
) -> None:
    for message in pools[2].run(refusal_of_sharded, name, argument):
        assert f"{argument} must be a tensor of this process; got a DTensor {shape}: give its" in message


# --- states -----------------------------------------------------------------------------------------------

WITH_A_STATE = [name for name in NAMES if rankloss_trainers.create(name).state_dict()]


def of_states(wrap: Callable[[Any], Any], state: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A model with the losses that have a state, and its wrapper."""
    model = WithLosses(Towers().double(), WITH_A_STATE)
    model.towers.unused.requires_grad_(False)
    if state is not None:
        model.load_state_dict(state)
    return model, wrap(model) if is_initialized() else model


def steps(wrapped: nn.Module, rows: slice, count: int) -> None:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(count):
        for name in WITH_A_STATE:
            optimizer.zero_grad()
            wrapped(name, rows).backward()
            optimizer.step()


def whole_state(wrapped: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True)
    return {key: x.clone() for key, x in get_model_state_dict(wrapped, options=options).items()}


class States(NamedTuple):
    """The states of a training.

    Attributes:
        half: At its half.
        names: The names in the wrapper's own state.
        end: At its end.
        resumed: At the end of a second one, which begins with the state at the half.
    """

    half: dict[str, Tensor]
    names: list[str]
    end: dict[str, Tensor]
    resumed: dict[str, Tensor]


def interrupted(rank: int, world_size: int, wrap: Callable[[Any], Any]) -> States:
    """The states of a training of four steps, in one piece and in two, on a share of the batch."""
    share = N // world_size
    rows = slice(rank * share, (rank + 1) * share)
    _, wrapped = of_states(wrap)
    steps(wrapped, rows, 2)
    half = whole_state(wrapped)
    names = [*wrapped.state_dict()]
    steps(wrapped, rows, 2)
    _, again = of_states(wrap, half)
    steps(again, rows, 2)
    return States(half, names, whole_state(wrapped), whole_state(again))


def sharded_in_one(model: nn.Module) -> Any:
    return fully_shard(model)


def sharded_by_one_wrapper(model: nn.Module) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


class Trainings(NamedTuple):
    """The states of one training, by one process and by each of two."""

    one_process: States
    two_processes: list[States]


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP2": sharded_in_one,
    "FSDP1": sharded_by_one_wrapper,
}


@pytest.fixture(scope="module", params=["DDP", pytest.param("FSDP2", marks=needs_fsdp2), "FSDP1"])
def trainings(request: pytest.FixtureRequest, pools: Pools) -> Trainings:
    wrap = WRAPPERS[request.param]
    return Trainings(interrupted(0, 1, wrap), pools[2].run(interrupted, wrap))


def test_the_state_of_every_loss_that_has_one_is_saved_and_moves(trainings: Trainings) -> None:
    states = trainings.one_process
    of_losses = {key for key in states.half if key.startswith("losses.")}
    assert {key.split(".")[1] for key in of_losses} == {*WITH_A_STATE}
    assert all(not torch.equal(states.half[key], states.end[key]) for key in of_losses)


def test_a_wrapper_adds_no_name_to_the_state(trainings: Trainings, request: pytest.FixtureRequest) -> None:
    first, _ = trainings.two_processes
    prefix = "module." if "DDP" in request.node.name else ""
    assert first.names == [f"{prefix}{name}" for name in trainings.one_process.half]


def test_the_states_of_two_processes_are_those_of_one(trainings: Trainings) -> None:
    for of_process in trainings.two_processes:
        for actual, expected in (
            (of_process.half, trainings.one_process.half),
            (of_process.end, trainings.one_process.end),
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_the_states_of_two_processes_are_equal_to_the_last_bit(trainings: Trainings) -> None:
    first, second = trainings.two_processes
    torch.testing.assert_close(second.end, first.end, rtol=0, atol=0)


def test_a_state_is_resumed_to_the_last_bit(trainings: Trainings) -> None:
    for of_process in trainings.two_processes:
        torch.testing.assert_close(of_process.resumed, of_process.end, rtol=0, atol=0)


# --- a last batch -----------------------------------------------------------------------------------------


def of_last_batches(rank: int, world_size: int, left: int) -> dict[str, tuple[str, bool]]:
    """Each loss's error for a last batch of which the last process has fewer rows, and whether it goes on."""
    found = {}
    model = Towers().double()
    for name in NAMES:
        loss = rankloss_trainers.create(name)
        rows = slice(0, left if rank == world_size - 1 else 2)
        try:
            value_of(name, model, rows, loss)
            error = ""
        except (ValueError, RuntimeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        found[name] = (error, bool(value_of(name, model, slice(0, 2), loss).isfinite()))
    return found


@pytest.mark.filterwarnings("ignore:logit_bias is given")  # by one model for all losses
@pytest.mark.parametrize("left", [1, 0])
@pytest.mark.parametrize("world_size", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_last_batch_of_unequal_sizes_is_an_error_of_all_and_no_wait(
    pools: Pools, world_size: int, left: int
) -> None:
    results = pools[world_size].run(of_last_batches, left)
    assert all(result == results[0] for result in results)
    unequal = [f"[{left}, {D}]", f"[2, {D}]"]
    empty = [f"(0, {D}) (on rank {world_size - 1} of"]
    shapes = unequal if left else empty
    for name, (error, goes_on) in results[0].items():
        assert goes_on, name
        assert error.startswith("ValueError: "), name
        assert all(part in error for part in shapes), (name, error)
