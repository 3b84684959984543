"""The loss inside a compiled trainer: one graph break, no recompilation whatever λ does, the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from stand_ins import at, features
from torch import Tensor, nn
from torch._dynamo.utils import counters

from rankloss import RankClipLoss
from rankloss_open_clip.training import TrainerLoss
from rankloss_trainers.logging import RankClipLog

EPOCHS, STEPS = 4, 5

# The compiler reads .grad of tensors that are not leaves, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Step(nn.Module):
    """What a task of open_clip compiles: the loss, and the sum of the terms by their names."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.loss(**inputs, output_dict=True)
        return {**losses, "loss": sum(v for k, v in losses.items() if k.endswith("_loss"))}  # type: ignore[dict-item]


def losses_of_a_run(loss: TrainerLoss, step: Any) -> list[list[float]]:
    rows = []
    for epoch in range(EPOCHS):
        loss.start_epoch(at(epoch, epochs=EPOCHS, steps=STEPS))
        for i in range(STEPS):
            inputs = features(seed=epoch * STEPS + i)
            losses = step(inputs)
            losses["loss"].backward()
            rows.append(
                [*(x.item() for x in losses.values()), *(x.grad.sum().item() for x in inputs.values())]
            )
    return rows


# Schedules that begin above zero: as λ leaves zero a graph is compiled once more, for the terms it gains.
@pytest.mark.parametrize(("unit", "agreement_every"), [("epoch", None), ("step", 2)])
def test_lambda_changes_without_a_recompilation(unit: str, agreement_every: int | None) -> None:
    def loss() -> TrainerLoss:
        criterion = RankClipLoss(open_clip.ClipLoss(), schedule="rankclip")
        log = RankClipLog(agreement_every)
        return TrainerLoss(criterion, unit=unit, sums_every_value=False, evaluate=log)

    eager = loss()
    expected = losses_of_a_run(eager, Step(eager))
    lambdas = {row[3] for row in expected}
    assert len(lambdas) > (10 if unit == "step" else 2)
    compiled = loss()
    with torch._dynamo.config.patch(error_on_recompile=True):
        seen = losses_of_a_run(compiled, torch.compile(Step(compiled), backend="eager"))
    assert seen == expected
    assert sum(counters["graph_break"].values()) == 1
