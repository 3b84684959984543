"""A compiled step trains as the step: λ and states move on, and are in no graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lightning import Module, fit, lambdas
from test_named_losses import NAMES, N, Towers, value_of
from tiny_sentences import rank_clip, tiny, train
from torch import nn

import rankloss_trainers

pytestmark = [
    pytest.mark.filterwarnings("ignore:logit_bias is given"),  # by one model for all losses
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch's own compiler imports it
]


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def looped(name: str, *, is_compiled: bool, is_told_inside: bool) -> dict[str, Any]:
    """A training of four steps, whose λ grows."""
    model, loss = Towers().double(), rankloss_trainers.create(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number: int | None) -> torch.Tensor:
        optimizer.zero_grad()
        value = value_of(name, model, slice(0, N), loss, number)
        value.backward()
        return value.detach()

    called = torch.compile(step, backend="eager") if is_compiled else step
    values = []
    for number in range(1, 5):
        if not is_told_inside:
            loss.set_epoch(number, 4), loss.set_progress(number, 4)
        values.append(called(number if is_told_inside else None))
        optimizer.step()
    return {"values": torch.stack(values), "weights": weights(model), **loss.state_dict()}


@pytest.mark.parametrize(
    "name", [x if x == "rankclip" else pytest.param(x, marks=pytest.mark.slow) for x in NAMES]
)
def test_a_compiled_step_of_a_loop_is_the_step(name: str) -> None:
    expected = looped(name, is_compiled=False, is_told_inside=False)
    for is_told_inside in (False, True):
        found = looped(name, is_compiled=True, is_told_inside=is_told_inside)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Quiet(Module):
    """Lightning's log cannot be compiled."""

    def log_dict(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lightning's own
def test_a_compiled_lightning_module_trains_as_the_module(tmp_path: Path) -> None:
    modules = Quiet(), Quiet()
    fit(tmp_path, modules[0])
    fit(tmp_path, torch.compile(modules[1], backend="eager"))
    assert lambdas(modules[1]) == lambdas(modules[0])
    assert len({*lambdas(modules[1])}) == 8
    torch.testing.assert_close(weights(modules[1]), weights(modules[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_compiled_run_of_sentence_transformers_trains_as_the_run(
    tmp_path: Path, mini_batch_size: int | None
) -> None:
    """Mini-batches need the model as it is."""
    ended, lines = [], []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = tiny()
        loss = rank_clip(model, schedule="linear", mini_batch_size=mini_batch_size)
        if compiled and mini_batch_size:
            with pytest.raises(ValueError, match="mini_batch_size cannot split a model that is compiled"):
                train(tmp_path, loss, model, learning_rate=0.1, **compiled)
            return
        trainer = train(tmp_path, loss, model, learning_rate=0.1, **compiled)
        ended.append(weights(model))
        lines.append([line["rank_lambda"] for line in trainer.state.log_history if "loss" in line])
    assert lines[0] == lines[1]
    assert len({*lines[0]}) == 8
    torch.testing.assert_close(*ended, rtol=1e-3, atol=1e-4)
