"""A LightningModule that trains with RankCLIP's loss, and the callback that tells it of its progress."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lightning's own
    import lightning
    from lightning.pytorch.callbacks import (
        GradientAccumulationScheduler,
        ModelCheckpoint,
        StochasticWeightAveraging,
    )

    from rankloss_trainers.lightning import Progress

import rankloss
from rankloss import schedules

pytestmark = pytest.mark.filterwarnings("ignore")  # lightning's own, of tiny runs
TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]


class Module(lightning.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.loss = rankloss.RankClipLoss(**{"schedule": "linear", **options})
        self.seen: list[dict[str, float]] = []
        self.validated: list[float] = []

    def features(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        images, texts = batch
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.logit_scale.exp()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        terms = self.loss(*self.features(batch), output_dict=True)
        self.log_dict(terms)
        self.seen.append({"lambda": self.loss.schedule_value, **{k: v.item() for k, v in terms.items()}})
        return sum(terms.values())

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.validated.append(self.loss(*self.features(batch)).item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pairs(number: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(number, 6, generator=generator), torch.randn(number, 5, generator=generator)
    )


class Stream(IterableDataset[Any]):
    """Pairs without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(pairs())


def fit(
    directory: Path,
    module: Module,
    *,
    batch_size: int = 8,
    data: Any = None,
    progress: Any = None,
    resume: Any = None,
    callbacks: Sequence[lightning.Callback] = (),
    **given: Any,
) -> lightning.Trainer:
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
    options |= {"enable_checkpointing": False, **given}
    trainer = lightning.Trainer(
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Progress() if progress is None else progress, *callbacks],
        **options,
    )
    loader = DataLoader(pairs() if data is None else data, batch_size)
    trainer.fit(module, loader, DataLoader(pairs(8), 8), ckpt_path=resume)
    return trainer


def lambdas(module: Module) -> list[float]:
    return [line["lambda"] for line in module.seen]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_lambda_follows_the_optimizer_steps(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(tmp_path, module)
    assert lambdas(module) == [schedules.linear(step, 8) for step in range(1, 9)]
    assert trainer.logged_metrics.keys() >= {*TERMS}
    assert module.seen[-1]["cross_modal_loss"] > 0


def test_sanity_validation_runs_before_the_first_step(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, num_sanity_val_steps=1)
    assert len(module.validated) == 3
    expected = rankloss.ClipLoss()(*Module().features(list(pairs(8).tensors)))
    assert module.validated[0] == pytest.approx(expected.item(), rel=1e-5), "λ is 0 at the first step"


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, accumulate_grad_batches=2)
    assert lambdas(module) == [schedules.linear(step, 4) for step in (1, 1, 2, 2, 3, 3, 4, 4)]


def test_epochs_are_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, progress=Progress("epoch"), max_epochs=3)
    assert lambdas(module) == [0] * 4 + [0.5] * 4 + [1] * 4


@pytest.mark.parametrize(("given", "epochs"), [({}, 3), ({"accumulate_grad_batches": 2}, 5)])
def test_epochs_are_those_that_max_steps_lets_the_run_have(
    tmp_path: Path, given: dict[str, int], epochs: int
) -> None:
    module = Module()
    fit(tmp_path, module, progress=Progress("epoch"), max_epochs=100, max_steps=10, **given)
    expected = [schedules.linear(epoch, epochs) for epoch in range(1, epochs + 1) for _ in range(4)]
    assert lambdas(module) == expected[: len(lambdas(module))]
    assert lambdas(module)[-1] == 1
    with pytest.raises(ValueError, match="with max_steps, unit='epoch' needs data with a length"):
        fit(tmp_path, Module(), data=Stream(), progress=Progress("epoch"), max_steps=10)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, unit: Any) -> None:
    whole = Module()
    fit(tmp_path, whole, progress=Progress(unit), max_epochs=3)
    trainer = fit(tmp_path, Module(), progress=_Stopping(unit), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    resumed = Module()
    fit(tmp_path, resumed, progress=Progress(unit), max_epochs=3, resume=tmp_path / "one.ckpt")
    assert lambdas(resumed) == lambdas(whole)[4:]
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("step", [4, 6])
def test_run_resumed_within_an_epoch_goes_on_where_it_was(tmp_path: Path, step: int) -> None:
    """After its last batch, and in its middle. (Lightning 2.4 repeats the batch before the checkpoint.)"""
    whole, resumed = Module(), Module()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    options = {"max_epochs": 3, "enable_checkpointing": True}
    fit(tmp_path, whole, progress=Progress("epoch"), callbacks=[saving], **options)
    fit(tmp_path, resumed, progress=Progress("epoch"), max_epochs=3, resume=tmp_path / f"step={step}.ckpt")
    left = 12 - step
    assert lambdas(resumed)[-left:] == lambdas(whole)[-left:]


class _Stopping(Progress):
    """Ends the run after its first epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def test_run_without_a_known_end_is_refused_unless_its_steps_are_given(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no known end: give the Trainer max_steps, or Progress its total_steps"
    ):
        fit(tmp_path, Module(), data=Stream())
    given, counted = Module(), Module()
    fit(tmp_path, given, data=Stream(), progress=Progress(total_steps=5))
    assert lambdas(given) == [schedules.linear(min(step, 5), 5) for step in range(1, 9)]
    fit(tmp_path, counted, data=Stream(), max_epochs=-1, max_steps=6)
    assert lambdas(counted) == [schedules.linear(step, 6) for step in range(1, 7)]
    with pytest.raises(ValueError, match="unit='epoch' needs a Trainer with max_epochs; got max_epochs=-1"):
        fit(tmp_path, Module(), max_epochs=-1, max_steps=6, progress=Progress("epoch"))


class Manual(Module):
    """Accumulates two batches by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index) / 2)
        if index % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def test_steps_that_the_trainer_does_not_know_have_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with manual optimization .* give Progress its total_steps"):
        fit(tmp_path, Manual())
    known = [schedules.linear(step, 4) for step in (1, 1, 2, 2, 3, 3, 4, 4)]
    for options in ({"progress": Progress(total_steps=4)}, {"max_epochs": -1, "max_steps": 4}):
        module = Manual()
        assert fit(tmp_path, module, **options).global_step == 4
        assert lambdas(module) == known


def test_steps_that_the_trainer_does_not_count_are_an_error(tmp_path: Path) -> None:
    class Raw(Manual):
        def optimizers(self, use_pl_optimizer: bool = False) -> Any:
            return super().optimizers(use_pl_optimizer)

    module = Raw()
    with pytest.raises(RuntimeError, match=r"an optimizer has stepped.* not with use_pl_optimizer=False"):
        fit(tmp_path, module, progress=Progress(total_steps=4))
    assert len(module.seen) == 2


@pytest.mark.parametrize(
    ("scheduling", "of_batches"),
    [({0: 2}, [1, 1, 2, 2, 3, 3, 4, 4]), ({0: 1, 1: 2}, [1, 2, 3, 4, 5, 5, 6, 6])],
)
def test_scheduled_accumulation_needs_total_steps(
    tmp_path: Path, scheduling: dict[int, int], of_batches: list[int]
) -> None:
    scheduler = GradientAccumulationScheduler(scheduling)
    with pytest.raises(
        ValueError, match=r"with a GradientAccumulationScheduler .* give Progress its total_steps"
    ):
        fit(tmp_path, Module(), callbacks=[scheduler])
    module, total_steps = Module(), of_batches[-1]
    fit(tmp_path, module, progress=Progress(total_steps=total_steps), callbacks=[scheduler])
    assert lambdas(module) == [schedules.linear(step, total_steps) for step in of_batches]
    plain = Module()
    fit(tmp_path, plain, callbacks=[GradientAccumulationScheduler({0: 1})])
    assert lambdas(plain) == [schedules.linear(step, 8) for step in range(1, 9)]


class Normed(Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))


def averaging() -> lightning.Callback:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


def test_epoch_without_steps_after_weight_averaging_needs_total_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with StochasticWeightAveraging .* give Progress its total_steps"):
        fit(tmp_path, Normed(), callbacks=[averaging()])
    normed, plain = Normed(), Module()
    fit(tmp_path, normed, progress=Progress(total_steps=8), callbacks=[averaging()])
    fit(tmp_path, plain, callbacks=[averaging()])
    assert lambdas(plain) == [schedules.linear(step, 8) for step in range(1, 9)]
    assert lambdas(normed) == [*lambdas(plain), 1, 1, 1, 1]


def test_epoch_without_steps_after_weight_averaging_is_not_counted(tmp_path: Path) -> None:
    module = Normed()
    fit(tmp_path, module, progress=Progress("epoch"), callbacks=[averaging()])
    assert lambdas(module) == [schedules.linear(min(epoch, 2), 2) for epoch in (1, 2, 3) for _ in range(4)]


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.image.parameters(), 0.1),
                torch.optim.SGD(self.text.parameters(), 0.1),
            ]

    two = Two()
    two.automatic_optimization = False
    with pytest.raises(ValueError, match="counts the steps of 2 optimizers together"):
        fit(tmp_path, two)
    module = Module()
    module.loss = rankloss.ClipLoss()
    with pytest.raises(ValueError, match="no part of Module has the method set_progress"):
        fit(tmp_path, module)
    with pytest.raises(ValueError, match="total_steps must be an integer of at least 1; got 0"):
        Progress(total_steps=0)


# --- several processes ----------------------------------------------------------------------------------


def run_as_a_process(directory: str, processes: str) -> None:
    warnings.simplefilter("ignore")
    count, rank = int(processes), int(os.environ["RANK"])
    # The i-th batches of two processes are the i-th batch of one; Lightning's own sampler shuffles.
    mine = Subset(pairs(), range(rank, 32, count))
    module = Module(schedule="rankclip")
    fit(
        Path(directory),
        module,
        batch_size=16 // count,
        devices=count,
        strategy="ddp" if count > 1 else "auto",
        data=mine,
        use_distributed_sampler=False,
    )
    if module.global_rank == 0:
        Path(directory, f"{count}.json").write_text(json.dumps([lambdas(module), weights(module).tolist()]))


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    results = []
    for count in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(count),
        ]
        command += ["--", __file__, str(tmp_path), str(count)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(json.loads((tmp_path / f"{count}.json").read_text()))
    (one, whole), (two, halves) = results
    assert one == two
    assert max(one) == 2
    assert math.dist(whole, weights(Module()).tolist()) > 0.01
    assert halves == pytest.approx(whole, rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    run_as_a_process(*sys.argv[1:])
