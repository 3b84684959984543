"""Several processes and sharded models under Hugging Face's Trainer."""

from __future__ import annotations

import faulthandler
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from launch import torchrun
from tiny_pairs import Pairs, tiny_clip
from tiny_transformers import SGD, TERMS, leave_process_group, logged_lines, train, train_in_plain_loop
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rankloss
from devices import needs_fsdp2
from process_pool import Pools
from rankloss_trainers.cached import Split, embedding_in
from rankloss_trainers.transformers.embeddings import embeddings_of, scale_of


def one_dimensional_scale() -> Any:
    """The model with a scale of shape [1]: a scalar cannot be sharded."""
    model = tiny_clip()
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))
    return model


def gradients(
    rank: int, world_size: int, wrap: Callable[[Any], Any], mini_batch_size: int | None
) -> dict[str, Tensor]:
    """The gradients of a share of the batch.

    In mini-batches the wrapped model gives the inputs of the loss itself, embeddings and scale.
    """
    model, share = one_dimensional_scale(), 8 // world_size
    wrapped, batch = wrap(model), Pairs(8).batch(rank * share, (rank + 1) * share)
    scale = functools.partial(scale_of, model)
    with embedding_in(model, Split.of_pairs(batch, mini_batch_size), embeddings_of, scale):
        outputs = wrapped(**batch)
    inputs = outputs if mini_batch_size else {**embeddings_of(outputs), **scale()}
    rankloss.RankClipLoss(schedule="constant")(**inputs).backward()
    return {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def distributed(model: Any) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)  # as the Trainer has it


def sharded(model: Any, reshard: bool = True) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


# accelerate 1.6 to 1.13 reshards the root as well; by default torch leaves it whole for the backward pass.
@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(distributed, id="DDP"),
        pytest.param(sharded, marks=needs_fsdp2, id="FSDP"),
        pytest.param(functools.partial(sharded, reshard=False), marks=needs_fsdp2, id="FSDP, not resharded"),
    ],
)
def test_two_processes_have_the_gradients_of_the_whole_batch(
    pools: Pools, wrap: Callable[[Any], Any], mini_batch_size: int | None
) -> None:
    whole = gradients(rank=0, world_size=1, wrap=lambda model: model, mini_batch_size=None)
    assert whole["logit_scale"].abs() > 1e-4  # far above the tolerance below
    for of_process in pools[2].run(gradients, wrap, mini_batch_size):
        assert of_process.keys() == whole.keys()
        for name, gradient in of_process.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


# --- engines of two processes -----------------------------------------------------------------------------


def zero_2() -> dict[str, Any]:
    """DeepSpeed's ZeRO of stage 2, as arguments of the Trainer."""
    settings = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    return {"deepspeed": settings}


def fsdp_2() -> dict[str, Any]:
    """FSDP, which accelerate starts on accelerators only: here it is told that it runs on some.

    No argument does this, so the Trainer of this process is changed.
    """
    create = transformers.Trainer.create_accelerator_and_postprocess

    def create_sharding(trainer: Any) -> None:
        create(trainer)
        state = trainer.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        trainer.is_fsdp_enabled = True

    transformers.Trainer.create_accelerator_and_postprocess = create_sharding  # type: ignore[method-assign]
    return {}


ENGINES: dict[str, Callable[[], dict[str, Any]]] = {"ddp": dict, "zero_2": zero_2, "fsdp_2": fsdp_2}


PROCESSES, PAIRS_OF_EACH = 2, 8


def same_loss() -> rankloss.RankClipLoss:
    """The loss of the processes' trainer and of the plain loop."""
    return rankloss.RankClipLoss(schedule="linear")


def run_as_a_process(engine: str, size: str, file: str) -> None:
    """One process of a training: writes its log beside the file.

    Args:
        engine: Of ``ENGINES``.
        size: Pairs of a mini-batch, in digits; 0 embeds a batch at once.
        file: The log's path without the rank.
    """
    faulthandler.dump_traceback_later(500, exit=True)  # a process that does not end says where it stands
    given = {**SGD, "max_steps": 3, "pairs": Pairs(48, "image", "text"), **ENGINES[engine]()}
    given.update(loss=same_loss(), per_device_train_batch_size=PAIRS_OF_EACH)
    given["mini_batch_size"] = int(size) or None
    model = tiny_clip() if engine == "ddp" else one_dimensional_scale()
    if engine == "fsdp_2":
        model.get_input_embeddings = lambda: None  # accelerate asks for them, and CLIPModel refuses
    trained = train(Path(file).parent, model=model, **given)
    assert trained.args.world_size == PROCESSES
    if engine == "fsdp_2":
        assert all(isinstance(parameter, DTensor) for parameter in trained.model.parameters())
    logged = [{name: line[name] for name in ("loss", *TERMS)} for line in logged_lines(trained)]
    Path(f"{file}.{trained.args.process_index}").write_text(json.dumps(logged))
    del trained, model
    leave_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero_2", pytest.param("fsdp_2", marks=needs_fsdp2)])
@pytest.mark.parametrize("size", [0, 3])  # of mini-batches
def test_two_processes_train_as_an_own_loop_with_the_whole_batch(
    tmp_path: Path, engine: str, size: int
) -> None:
    if engine == "zero_2":
        pytest.importorskip("deepspeed")
    cpu_where_a_gpu_is_too = {"DS_ACCELERATOR": "cpu"}  # of DeepSpeed, which would take the GPU
    torchrun(__file__, engine, size, tmp_path / "log", processes=PROCESSES, **cpu_where_a_gpu_is_too)
    data, whole_batch = Pairs(48, "image", "text"), [PROCESSES * PAIRS_OF_EACH]
    expected = train_in_plain_loop(one_dimensional_scale(), same_loss(), data, whole_batch)
    for rank in range(PROCESSES):  # each logs the whole batch's values
        for line, terms in zip(json.loads((tmp_path / f"log.{rank}").read_text()), expected, strict=True):
            assert line == pytest.approx({"loss": sum(terms.values()), **terms}, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    run_as_a_process(*sys.argv[1:])
