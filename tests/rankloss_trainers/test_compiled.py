"""A compiled step trains as the step: λ and states move on, and are in no graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lightning import Module, fit, lambdas
from test_named_losses import NAMES, N, Towers, loss_of_rows
from tiny_sentences import rank_clip, tiny_model, train
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

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
    """All parameters of a module in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


STEPS = 4


def train_in_loop(
    name: str, *, is_told_inside: bool, backend: CompileCounter | None = None
) -> dict[str, torch.Tensor]:
    """Train in a loop of one's own, with a λ that grows.

    Args:
        name: The loss.
        is_told_inside: Whether the step itself tells the loss of its progress, or the loop around it.
        backend: Compiles the step, if given: it runs each graph as it is, and counts the graphs.

    Returns:
        The loss's values at each step; at the end, the weights of the model and the state of the loss.
    """
    model, loss = Towers().double(), rankloss_trainers.create(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward_and_backward(number: int | None) -> torch.Tensor:
        optimizer.zero_grad()
        value = loss_of_rows(name, model, slice(0, N), loss, step=number)
        value.backward()
        return value.detach()

    step = forward_and_backward
    if backend is not None:
        step = torch.compile(forward_and_backward, backend=backend)
    values = []
    for number in range(1, STEPS + 1):
        if not is_told_inside:
            loss.set_epoch(number, STEPS)
            loss.set_progress(number, STEPS)
        values.append(step(number if is_told_inside else None))
        optimizer.step()
    return {"values": torch.stack(values), "weights": weights(model), **loss.state_dict()}


@pytest.mark.parametrize(
    "name", [x if x == "rankclip" else pytest.param(x, marks=pytest.mark.slow) for x in NAMES]
)
def test_a_compiled_step_of_a_loop_is_the_step(name: str) -> None:
    expected = train_in_loop(name, is_told_inside=False)
    for is_told_inside in (False, True):
        backend = CompileCounter()
        actual = train_in_loop(name, is_told_inside=is_told_inside, backend=backend)
        assert backend.frame_count > 0, "nothing was compiled"
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


class Quiet(Module):
    """The module without Lightning's log, which cannot be compiled."""

    def log_dict(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lightning's own
def test_a_compiled_lightning_module_trains_as_the_module(tmp_path: Path) -> None:
    plain, compiled, backend = Quiet(), Quiet(), CompileCounter()
    fit(tmp_path, plain)
    fit(tmp_path, torch.compile(compiled, backend=backend))
    assert backend.frame_count > 0, "nothing was compiled"
    assert lambdas(compiled) == lambdas(plain)
    assert len({*lambdas(compiled)}) == 8, "λ changes at each step"
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-5, atol=1e-6)


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def run_of_sentence_transformers(place: Path, **options: Any) -> tuple[torch.Tensor, list[float]]:
    """The weights at the end of a run, and λ at each step."""
    model = tiny_model()
    trainer = train(place, rank_clip(model, schedule="linear"), model, learning_rate=0.1, **options)
    return weights(model), [line["rank_lambda"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
def test_a_compiled_run_of_sentence_transformers_trains_as_the_run(tmp_path: Path) -> None:
    expected_weights, expected_lambdas = run_of_sentence_transformers(tmp_path)
    counters.clear()
    compiled_weights, compiled_lambdas = run_of_sentence_transformers(tmp_path, **COMPILED)
    assert counters["frames"]["ok"] > 0, "nothing was compiled"
    assert compiled_lambdas == expected_lambdas
    assert len({*expected_lambdas}) == 8, "λ changes at each step"
    torch.testing.assert_close(compiled_weights, expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_mini_batches_of_a_compiled_model_of_sentence_transformers_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    loss = rank_clip(model, schedule="linear", mini_batch_size=3)
    with pytest.raises(ValueError, match="mini_batch_size cannot split a model that is compiled"):
        train(tmp_path, loss, model, learning_rate=0.1, **COMPILED)
