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
        return loss_of_rows(name, self.towers, rows, self.losses[name])


def loss_of_rows(
    name: str, model: nn.Module, rows: slice, loss: Any = None, *, step: int | None = 3
) -> Tensor:
    """A named loss of a model, for some rows of a fixed batch of pictures, texts and other texts.

    Args:
        name: The loss, whose inputs beside the model's features are drawn at random.
        model: Called with pictures and texts; returns their features, the scale and the bias.
        rows: Rows of the batch, which has N.
        loss: The module, by default a new one.
        step: The step of four that the loss is told of before, or None to tell it nothing.
    """
    if loss is None:
        loss = rankloss_trainers.create(name)
    if step is not None:
        loss.set_epoch(step, 4)
        loss.set_progress(step, 4)
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(3, N, 5, generator=generator, dtype=torch.float64)
    pictures, texts, other_texts = batch[:, rows]
    of_pictures, of_all_texts, scale, bias = model(pictures, torch.cat([texts, other_texts]))
    of_texts, of_other_texts = of_all_texts.chunk(2)
    inputs = {key: x[rows] if x.dim() else x for key, x in inputs_of(name, seed=3).items()}
    if "query_features" in inputs:
        candidates = [of_texts, of_other_texts, of_other_texts]
        inputs.update(query_features=of_pictures, candidate_features=torch.stack(candidates, dim=1))
    if "caption_features" in inputs:
        inputs.update(caption_features=of_other_texts)
    inputs.update(image_features=of_pictures, text_features=of_texts, logit_scale=scale, logit_bias=bias)
    value: Tensor = loss(**inputs)
    return value


def rows_of_process(rank: int, world_size: int) -> slice:
    """An equal share of the batch's rows for each process."""
    share = N // world_size
    return slice(rank * share, (rank + 1) * share)


def gradients(rank: int, world_size: int, wrap: Callable[[Any], Any]) -> dict[str, dict[str, Tensor]]:
    """The gradients of a process's share of the batch, by loss and parameter, all of one wrapped model.

    The first loss comes once more at the end: DDP refuses the step after one that left parameters it waits
    for.
    """
    gradients_of_losses = {}
    model, rows = Towers().double(), rows_of_process(rank, world_size)
    wrapped = wrap(model)
    for name in (*NAMES, NAMES[0]):
        model.zero_grad()
        value = wrapped(name, rows) if has_losses(wrapped) else loss_of_rows(name, wrapped, rows)
        value.backward()
        gradients_of_losses[name] = whole_gradients(model, wrapped)
    return gradients_of_losses


def has_losses(wrapped: nn.Module) -> bool:
    """True for a model that calls the losses itself, also within a wrapper."""
    return isinstance(getattr(wrapped, "module", wrapped), WithLosses)


def whole_gradients(model: nn.Module, wrapped: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters that have one, put together where they are sharded."""
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            whole = {key: x.grad.clone() for key, x in wrapped.named_parameters() if x.grad is not None}
        return {key.removeprefix("towers."): x for key, x in whole.items()}
    local = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    return {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in local.items()}


# Each wraps a model in a process group, and returns it as it is (with the losses, if it is to hold them) in
# a single process, whose gradients are the expected ones.


def distributed(model: Any, frozen: tuple[str, ...] = (), **options: Any) -> Any:
    """DDP of a model whose parameters of these prefixes are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return DistributedDataParallel(model, **options) if is_initialized() else model


def sharded(model: Any, holds_losses: bool = False) -> Any:
    """FSDP2, which shards each parameter in place."""
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
    "wrapping",
    [pytest.param(name, marks=needs_fsdp2) if name in NEEDS_FSDP2 else name for name in WRAPPED],
)
def test_two_processes_have_the_gradients_of_the_whole_batch(pools: Pools, wrapping: str) -> None:
    """As one process has them, of every loss and parameter; without a gradient is as good as zero."""
    of_whole_batch = gradients(0, 1, WRAPPED[wrapping])
    zero = torch.zeros((), dtype=torch.float64)
    for of_process in pools[2].run(gradients, WRAPPED[wrapping]):
        assert of_process.keys() == of_whole_batch.keys() == {*NAMES}
        for name, expected_by_parameter in of_whole_batch.items():
            assert expected_by_parameter["logit_scale"].abs() > 1e-3, "there is something to compare"
            for key in expected_by_parameter.keys() | of_process[name].keys():
                actual = of_process[name].get(key, zero).double()
                expected = expected_by_parameter.get(key, zero).double()
                actual, expected = torch.broadcast_tensors(actual, expected)
                torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10, msg=f"{name}: {key}")


def refusal_of_sharded(rank: int, world_size: int, name: str, argument: str) -> str:
    """A loss's error about one of its arguments, which is sharded by FSDP2 while the others are whole.

    The scale and the bias are parameters of a sharded model, the others are sharded by rows.
    """
    rows = rows_of_process(rank, world_size)
    inputs = {key: x[rows] if x.dim() else x for key, x in inputs_of(name).items()}
    if argument in ("logit_scale", "logit_bias"):
        model = Towers().double()
        fully_shard(model, reshard_after_forward=True)
        inputs[argument] = getattr(model, argument).exp()
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        inputs[argument] = DTensor.from_local(inputs[argument], mesh, [Shard(0)])
    loss = rankloss_trainers.create(name)
    loss.set_progress(3, 4)
    with pytest.raises(ValueError, match=argument) as error:
        loss(**inputs)
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


def wrapped_with_losses(wrap: Callable[[Any], Any], state: dict[str, Any] | None = None) -> Any:
    """A model with the losses that have a state, from its beginning or a saved one, wrapped in a group."""
    model = WithLosses(Towers().double(), WITH_A_STATE)
    model.towers.unused.requires_grad_(False)  # DDP would wait for its gradients
    if state is not None:
        model.load_state_dict(state)
    return wrap(model) if is_initialized() else model


def train(wrapped: nn.Module, rows: slice, rounds: int) -> None:
    """Train with each loss in turn, as many rounds; an optimizer that remembers nothing is built anew."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(rounds):
        for name in WITH_A_STATE:
            optimizer.zero_grad()
            wrapped(name, rows).backward()
            optimizer.step()


def whole_state(wrapped: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, with whole tensors under the names of the model without its wrapper."""
    options = StateDictOptions(full_state_dict=True)
    return {key: x.clone() for key, x in get_model_state_dict(wrapped, options=options).items()}


class States(NamedTuple):
    """The states of a training.

    Attributes:
        half: The whole state at the half of the training.
        names: The names in the wrapper's own ``state_dict()``.
        end: The whole state at the end.
        resumed: The whole state at the end of another training, which begins with the state at the half.
    """

    half: dict[str, Tensor]
    names: list[str]
    end: dict[str, Tensor]
    resumed: dict[str, Tensor]


def train_whole_and_resumed(rank: int, world_size: int, wrap: Callable[[Any], Any]) -> States:
    """The states of a training of four rounds on a process's rows, and of one resumed at its half."""
    rows = rows_of_process(rank, world_size)
    whole = wrapped_with_losses(wrap)
    train(whole, rows, rounds=2)
    half, names = whole_state(whole), [*whole.state_dict()]
    train(whole, rows, rounds=2)
    resumed = wrapped_with_losses(wrap, half)
    train(resumed, rows, rounds=2)
    return States(half, names, end=whole_state(whole), resumed=whole_state(resumed))


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
    of_one = train_whole_and_resumed(0, 1, wrap)
    return Trainings(of_one, pools[2].run(train_whole_and_resumed, wrap))


def test_the_state_of_every_loss_that_has_one_is_saved_and_moves(trainings: Trainings) -> None:
    states = trainings.one_process
    keys = [key for key in states.half if key.startswith("losses.")]
    names_of_losses = {key.split(".")[1] for key in keys}  # of losses.NAME.BUFFER
    assert names_of_losses == {*WITH_A_STATE}
    assert all(not torch.equal(states.half[key], states.end[key]) for key in keys)


def test_a_wrapper_adds_no_entry_to_the_state(trainings: Trainings, request: pytest.FixtureRequest) -> None:
    first, _ = trainings.two_processes
    prefix = "module." if "DDP" in request.node.name else ""  # DDP's own, of every name
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


def errors_of_unequal_batches(rank: int, world_size: int, rows_of_last: int) -> dict[str, str]:
    """Each loss's error, by its name, where the last process has these rows and the others have two.

    Afterwards the loss is called with two rows in every process, which has to be no error.
    """
    errors = {}
    model = Towers().double()
    count = rows_of_last if rank == world_size - 1 else 2
    for name in NAMES:
        loss = rankloss_trainers.create(name)
        with pytest.raises(ValueError) as error:  # noqa: PT011, the test looks at the message
            loss_of_rows(name, model, slice(0, count), loss)
        errors[name] = str(error.value)
        assert loss_of_rows(name, model, slice(0, 2), loss).isfinite(), name
    return errors


@pytest.mark.filterwarnings("ignore:logit_bias is given")  # by one model for all losses
@pytest.mark.parametrize("rows_of_last", [1, 0])
@pytest.mark.parametrize("world_size", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_last_batch_of_unequal_sizes_is_an_error_of_all_and_no_wait(
    pools: Pools, world_size: int, rows_of_last: int
) -> None:
    """Of every loss, in every process, with the shapes that differ."""
    errors_of_processes = pools[world_size].run(errors_of_unequal_batches, rows_of_last)
    assert all(errors == errors_of_processes[0] for errors in errors_of_processes)
    if rows_of_last == 0:
        shapes = [f"(0, {D}) (on rank {world_size - 1} of"]
    else:
        shapes = [f"[{rows_of_last}, {D}]", f"[2, {D}]"]
    assert errors_of_processes[0].keys() == {*NAMES}
    for name, error in errors_of_processes[0].items():
        assert all(shape in error for shape in shapes), (name, error)
