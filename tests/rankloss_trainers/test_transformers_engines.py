"""Compilers and sharded models under Hugging Face's Trainer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from tiny_transformers import METRICS, TERMS, Pairs, clip, leave, steps, train, weights

import rankloss
from process_pool import Pools
from rankloss_trainers.transformers.embeddings import features_of, logit_scale


def test_compiled_model_trains_the_same(tmp_path: Path) -> None:
    options = {"optim": "sgd", "max_grad_norm": 0, "max_steps": 4, "num_train_epochs": 1}
    plain, compiled = (
        train(tmp_path / str(number), **options, **given)
        for number, given in enumerate(({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}))
    )
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-4, atol=1e-5)
    for a, b in zip(steps(compiled), steps(plain), strict=True):
        names = (*TERMS, *METRICS, "loss")
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=1e-3, abs=1e-5)


def batch(rows: slice) -> dict[str, Tensor]:
    pairs = [Pairs(8)[i] for i in range(*rows.indices(8))]
    return {name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]}


def gradients(model: Any, rows: slice) -> dict[str, Tensor]:
    loss = rankloss.RankClipLoss(schedule="constant")
    features = features_of(model(**batch(rows)))
    loss(**features, logit_scale=logit_scale(model)).backward()
    return {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def one_dimensional_scale() -> Any:
    model = clip()  # a scalar cannot be sharded
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))
    return model


def sharded_gradients(rank: int, world_size: int, reshard: bool | None) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    model = fully_shard(one_dimensional_scale(), mesh=mesh, reshard_after_forward=reshard)
    share = 8 // world_size
    return gradients(model, slice(rank * share, (rank + 1) * share))


# accelerate 1.6 to 1.13 reshards the root as well; by default torch leaves it whole for the backward pass.
@pytest.mark.parametrize("reshard", [None, True, False])
def test_sharded_model_has_the_gradients_of_the_whole_batch(pools: Pools, reshard: bool | None) -> None:
    whole = gradients(one_dimensional_scale(), slice(None))
    assert whole["logit_scale"].abs() > 1e-4
    for seen in pools[2].run(sharded_gradients, reshard):
        assert seen.keys() == whole.keys()
        for name, gradient in seen.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def distributed_gradient(rank: int, _: int, shape: tuple[int, ...], sharded: tuple[bool, ...]) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if shards else Replicate() for shards in sharded]
    model = torch.nn.Module()
    scale = distribute_tensor(torch.zeros(1), init_device_mesh("cpu", shape), placements)
    model.logit_scale = torch.nn.Parameter(scale)
    ((rank + 1) * logit_scale(model)).backward()
    assert model.logit_scale.grad.placements == tuple(placements)
    return model.logit_scale.grad.full_tensor()


@pytest.mark.parametrize(
    ("shape", "sharded"),
    [((2,), (False,)), ((2,), (True,)), ((2, 1), (False, True)), ((1, 2), (False, True))],
)
def test_gradient_of_the_scale_is_the_mean_over_the_processes(
    pools: Pools, shape: tuple[int, ...], sharded: tuple[bool, ...]
) -> None:
    for seen in pools[2].run(distributed_gradient, shape, sharded):
        assert seen == (1 + 2) / 2


# --- engines of several processes -----------------------------------------------------------------------


def zero_2() -> dict[str, Any]:
    settings = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    return {"deepspeed": settings}


def fsdp_2() -> dict[str, Any]:
    """FSDP, which accelerate starts on accelerators only: here it is told that it runs on some."""
    create = transformers.Trainer.create_accelerator_and_postprocess

    def create_sharding(trainer: Any) -> None:
        create(trainer)
        state = trainer.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        trainer.is_fsdp_enabled = True

    transformers.Trainer.create_accelerator_and_postprocess = create_sharding  # type: ignore[method-assign]
    return {}


def run_as_a_process(engine: str, directory: str, batch_size: str) -> None:
    given: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 3}
    if "WORLD_SIZE" in os.environ:
        given.update({"zero_2": zero_2, "fsdp_2": fsdp_2}[engine]())
    model = one_dimensional_scale()  # neither engine takes a scalar
    if engine == "fsdp_2":
        model.get_input_embeddings = lambda: None  # accelerate asks for them, and CLIPModel refuses
    trainer = train(Path(directory), model=model, per_device_train_batch_size=int(batch_size), **given)
    if "WORLD_SIZE" in os.environ and engine == "fsdp_2":
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    if trainer.is_world_process_zero():
        lines = [{name: line[name] for name in (*TERMS, "loss")} for line in steps(trainer)]
        Path(directory, "result.json").write_text(json.dumps(lines))
    del trainer, model
    leave()


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            "zero_2",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
            ),
        ),
        "fsdp_2",
    ],
)
def test_engine_of_two_processes_trains_as_one_process(tmp_path: Path, engine: str) -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    results = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
        command = [sys.executable, *launcher[: 6 * (processes > 1)], __file__, engine, str(directory)]
        # DeepSpeed compiles an extension when it is first started.
        done = subprocess.run(
            [*command, str(16 // processes)], env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(json.loads((directory / "result.json").read_text()))
    whole, two = results
    assert len(whole) == 3
    assert whole[-1]["loss"] < whole[0]["contrastive_loss"]
    for a, b in zip(two, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


if __name__ == "__main__":
    run_as_a_process(*sys.argv[1:])
