"""A LightningModule that trains with RankCLIP's loss, and the callback that tells it of its progress."""

from __future__ import annotations

import functools
import json
import logging
import math
import operator
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import torchrun
from named_inputs import D, inputs_of
from other_values import OTHER_VALUES
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

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
import rankloss_trainers
from rankloss import schedules
from rankloss_trainers.progress import one_line
from registered import NAMES

pytestmark = pytest.mark.filterwarnings("ignore")  # lightning's own, of tiny runs
TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_options_of_a_run_are_refused_by_their_names(name: str, value: Any) -> None:
    """The callback's own ``unit`` is the schedules' unit, and the module's loss has the teacher."""
    with pytest.raises(TypeError, match=name):
        Progress(**{name: value})


class Module(lightning.LightningModule):
    """Two linear towers that train with RankClipLoss, and keep what each step had."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.loss: Any = rankloss.RankClipLoss(**{"schedule": "linear", **options})
        self.steps: list[dict[str, float]] = []
        """λ and the loss's terms of each training step."""
        self.validated: list[float] = []
        """The loss of each validation step."""

    def features(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        images, texts = batch
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.logit_scale.exp()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        terms = self.loss(*self.features(batch), output_dict=True)
        self.log_dict(terms)
        self.steps.append({"lambda": self.loss.schedule_value, **{k: v.item() for k, v in terms.items()}})
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
    directory: Path, module: Module, *, size: int = 8, data: Any = None, resume: Any = None, **options: Any
) -> lightning.Trainer:
    """Train, by default two epochs of four batches with the callback, and validate after each.

    Args:
        directory: The Trainer's.
        module: The module to train.
        size: Pairs in a batch.
        data: Pairs, 32 by default.
        resume: A checkpoint to resume from.
        options: Options of the Trainer, before the defaults.
    """
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet}
    with_callback = {**defaults, "callbacks": [Progress()], **options}
    trainer = lightning.Trainer(default_root_dir=directory, **with_callback)
    loader = DataLoader(pairs() if data is None else data, size)
    trainer.fit(module, loader, DataLoader(pairs(8), 8), ckpt_path=resume)
    return trainer


def lambdas(module: Module) -> list[float]:
    return [line["lambda"] for line in module.steps]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def linear(*steps: int) -> list[float]:
    """λ of the linear schedule at steps of a training that has as many as the last of them."""
    return [schedules.linear(step, max(steps)) for step in steps]


def averaging() -> lightning.Callback:
    """A callback that may add an epoch to a training, so that its number of steps is not known before."""
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


# By default a training has two epochs of four batches.
@pytest.mark.parametrize(
    ("options", "unit", "expected"),
    [
        pytest.param({}, "step", linear(*range(1, 9)), id="two epochs"),
        pytest.param(
            {"accumulate_grad_batches": 2}, "step", linear(1, 1, 2, 2, 3, 3, 4, 4), id="accumulated batches"
        ),
        pytest.param(
            {"max_epochs": 10}, "epoch", [epoch / 9 for epoch in range(10) for _ in range(4)], id="ten epochs"
        ),
        pytest.param(
            {"max_epochs": 10, "max_steps": 6}, "step", linear(*range(1, 7)), id="ten epochs or six steps"
        ),
        pytest.param(
            {"callbacks": [Progress("step")], "max_epochs": 10},
            "step",
            linear(*range(1, 41)),
            id="ten epochs by steps",
        ),
        pytest.param(
            {"callbacks": [Progress("epoch")], "max_epochs": 3},
            "epoch",
            [0] * 4 + [0.5] * 4 + [1] * 4,
            id="three epochs by epochs",
        ),
        pytest.param(
            {"callbacks": [Progress("epoch")], "max_epochs": 1},
            "step",
            linear(*range(1, 5)),
            id="one epoch by epochs, which has no ramp and goes by steps",
        ),
        pytest.param(
            {"callbacks": [Progress(total_steps=5)], "data": Stream()},
            "step",
            linear(1, 2, 3, 4, 5, 5, 5, 5),
            id="a stream that is longer than said",
        ),
        pytest.param(
            {"data": Stream(), "max_epochs": -1, "max_steps": 6},
            "step",
            linear(*range(1, 7)),
            id="six steps of a stream",
        ),
        pytest.param(
            {"callbacks": [Progress(total_steps=6), GradientAccumulationScheduler({1: 2})]},
            "step",
            linear(1, 2, 3, 4, 5, 5, 6, 6),
            id="batches accumulated in the second epoch",
        ),
        pytest.param(
            {"callbacks": [Progress(total_steps=8), averaging()]},
            "step",
            linear(*range(1, 9)),
            id="averaged weights",
        ),
    ],
)
def test_lambda_follows_the_steps_or_the_epochs_and_the_log_says_which(
    tmp_path: Path,
    options: dict[str, Any],
    unit: str,
    expected: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Module()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(tmp_path, module, **options)
    assert lambdas(module) == pytest.approx(expected, rel=1e-12)
    assert caplog.text.count(f"Loss: lambda per {unit} over ") == 1


def test_a_module_can_log_the_terms_that_it_trains(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(tmp_path, module)
    last_step = module.steps[-1]
    assert {term: trainer.logged_metrics[term].item() for term in TERMS} == {x: last_step[x] for x in TERMS}
    assert last_step["cross_modal_loss"] > 0, "λ is no longer 0"


class Manual(Module):
    """A module that steps its optimizer itself, so that the callback sees no step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Plain(Module):
    """A module whose loss has no schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = rankloss_trainers.create("clip-streamed")

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss: Tensor = self.loss(*self.features(batch))
        return loss


class Epochs(nn.Module):
    """A part of a loss that is told of epochs alone; here before any, the run is refused."""

    def set_epoch(self, epoch: int, epochs: int) -> None:
        raise AssertionError


class AtEpochs(Plain):
    """A module with such a part beside its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Epochs()


@pytest.mark.parametrize(
    ("module_class", "options", "message"),
    [
        pytest.param(
            Module, {"data": Stream()}, "a run without a known end .* total_steps", id="a stream by steps"
        ),
        pytest.param(
            Module,
            {"callbacks": [Progress(), GradientAccumulationScheduler({1: 2})]},
            "GradientAccumulationScheduler .* total_steps",
            id="batches accumulated in the second epoch, by steps",
        ),
        pytest.param(
            Module,
            {"callbacks": [Progress(), averaging()]},
            "StochasticWeightAveraging .*total_steps",
            id="averaged weights, by steps",
        ),
        pytest.param(
            Module,
            {"max_epochs": -1, "max_steps": 6, "callbacks": [Progress("epoch")]},
            "unit='epoch' needs .* got max_epochs=-1, max_steps=6",
            id="endless epochs, by epochs",
        ),
        pytest.param(
            Module,
            {"callbacks": [averaging(), Progress("epoch")]},
            "unit='epoch' needs .* got max_epochs=2, StochasticWeightAveraging",
            id="averaged weights, by epochs",
        ),
        pytest.param(
            Manual,
            {"callbacks": [Progress(total_steps=4)]},
            "with manual optimization call set_progress",
            id="optimized by hand",
        ),
        pytest.param(
            AtEpochs,
            {},
            r"Epochs has set_epoch alone: .*Progress\(\'epoch\'\)",
            id="a part by epochs in a run by steps",
        ),
    ],
)
def test_run_whose_steps_or_epochs_cannot_be_told_is_refused(
    tmp_path: Path, module_class: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module_class(), **options)


def test_a_last_batch_of_one_pair_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Module()
    before = weights(module)
    message = r"last batch .* 1 pair.* 33 pairs in batches of 8; .*drop_last=True"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, data=pairs(33))
    assert torch.equal(weights(module), before)
    assert module.steps == []


@pytest.mark.parametrize("option", ["limit_train_batches", "max_steps"])
def test_a_last_batch_of_one_pair_that_a_run_does_not_reach_is_no_error(tmp_path: Path, option: str) -> None:
    module, batches_of_eight = Module(), 4
    fit(tmp_path, module, data=pairs(8 * batches_of_eight + 1), **{option: batches_of_eight})
    assert module.steps


def test_a_last_batch_of_one_pair_is_no_error_of_a_loss_that_needs_no_other(tmp_path: Path) -> None:
    module = Plain()
    fit(tmp_path, module, data=pairs(4 * 8 + 1))
    assert not torch.equal(weights(module), weights(Plain()))


def test_a_single_pair_of_a_stream_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    class Odd(Stream):
        def __iter__(self) -> Iterator[Any]:
            return iter(pairs(9))

    with pytest.raises(ValueError, match=r"at least two pairs; got shape \(1, 4\)\. .* drop_last=True"):
        fit(tmp_path, Module(), data=Odd(), callbacks=[Progress(total_steps=4)])


def test_a_loss_without_a_schedule_trains_in_a_run_without_a_known_end(tmp_path: Path) -> None:
    module = Plain()
    fit(tmp_path, module, data=Stream(), max_epochs=1)
    assert not torch.equal(weights(module), weights(Plain()))


def test_sanity_validation_runs_before_the_first_step(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, num_sanity_val_steps=1)
    assert len(module.validated) == 1 + 2, "before the first step, and after each of two epochs"
    expected = rankloss.ClipLoss()(*Module().features(list(pairs(8).tensors)))
    assert module.validated[0] == pytest.approx(expected.item(), rel=1e-5), "λ is 0 at the first step"


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("64-true", 8 * torch.finfo(torch.float32).eps),  # the training that it is compared with rounds
        ("bf16-true", torch.finfo(torch.bfloat16).eps),
        ("16-true", 2 * torch.finfo(torch.float16).eps),
        ("bf16-mixed", torch.finfo(torch.bfloat16).eps),
    ],
)
def test_a_training_of_another_precision_has_the_loss_but_for_its_rounding(
    tmp_path: Path, precision: Any, tolerance: float
) -> None:
    def totals(precision: Any) -> list[float]:
        module = Module(schedule="constant")
        fit(tmp_path, module, max_steps=3, precision=precision)
        return [sum(line[term] for term in TERMS) for line in module.steps]

    assert totals(precision) == pytest.approx(totals("32-true"), rel=tolerance)


@pytest.mark.parametrize("name", ["text_features", "logit_scale"])
def test_an_input_on_another_device_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    class Scattered(Module):
        def features(self, batch: list[Tensor]) -> Any:
            names = ("image_features", "text_features", "logit_scale")
            inputs = dict(zip(names, super().features(batch), strict=True))
            inputs[name] = inputs[name].to("meta")
            return tuple(inputs.values())

    with pytest.raises(ValueError, match=f"^{name} must be on the device of image_features, cpu; got meta"):
        fit(tmp_path, Scattered(schedule="constant"), num_sanity_val_steps=0)


class Remembering(Module):
    """A loss whose state is part of the module, under rank terms."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = rankloss_trainers.create("tiny-caption+rankclip", rankclip={"schedule": "linear"})

    def training_step(self, batch: list[Tensor], _: int) -> Any:
        captions = F.normalize(self.text(batch[1].flip(1)))
        return self.loss(*self.features(batch), caption_features=captions)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        pass


class Every(Module):
    """Registered losses with their defaults; inputs that the towers do not compute are fixed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, D), nn.Linear(5, D)
        self.loss = rankloss_trainers.create(name)
        inputs = functools.reduce(operator.or_, map(inputs_of, name.split("+")))
        self.inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}

    def training_step(self, batch: list[Tensor], _: int) -> Any:
        images, texts, scale = self.features(batch)
        of_model = {
            "image_features": images,
            "text_features": texts,
            "logit_scale": scale,
            "query_features": images,
            "caption_features": F.normalize(self.text(batch[1].flip(1))),
        }
        value = self.loss(**{key: of_model.get(key, x) for key, x in self.inputs.items()})
        self.steps.append({"loss": value.item()})
        return value

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        pass


@pytest.mark.parametrize("name", [*NAMES, "spread+clip-ids"])
def test_every_registered_loss_trains_with_its_defaults(tmp_path: Path, name: str) -> None:
    module = Every(name)
    before = weights(module)
    fit(tmp_path, module, max_epochs=1)
    assert len(module.steps) == 4, "the batches of an epoch"
    assert all(math.isfinite(step["loss"]) for step in module.steps)
    assert not torch.equal(weights(module), before)


def whole_and_resumed(
    directory: Path, module_class: Any, unit: Any, *, step: int, **saves: Any
) -> tuple[Any, Any]:
    """The modules of a training of three epochs of four steps, and of one resumed from its checkpoint.

    Args:
        directory: A folder for the checkpoints.
        module_class: The class of both modules.
        unit: The callback's unit of schedules.
        step: The step after which the checkpoint was saved.
        saves: Options of Lightning's ``ModelCheckpoint``, which say when it saves.
    """
    whole, resumed = module_class(), module_class()
    saving = ModelCheckpoint(directory, **saves, save_top_k=-1, filename="{step}")
    fit(directory, whole, callbacks=[Progress(unit), saving], max_epochs=3, enable_checkpointing=True)
    checkpoint = directory / f"step={step}.ckpt"
    fit(directory, resumed, callbacks=[Progress(unit)], max_epochs=3, resume=checkpoint)
    return whole, resumed


def test_a_run_that_is_resumed_within_an_epoch_has_the_remaining_lambdas(tmp_path: Path) -> None:
    """They come first: after such a checkpoint Lightning 2.4 repeats a batch."""
    whole, resumed = whole_and_resumed(tmp_path, Module, "step", step=6, every_n_train_steps=6)
    assert lambdas(resumed)[:6] == lambdas(whole)[6:]


@pytest.mark.parametrize(("module_class", "unit"), [(Module, "epoch"), (Remembering, "step")])
def test_a_run_that_is_resumed_after_an_epoch_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, module_class: Any, unit: Any
) -> None:
    saves = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    steps_of_an_epoch = 4  # 32 pairs in batches of 8
    whole, resumed = whole_and_resumed(tmp_path, module_class, unit, step=steps_of_an_epoch, **saves)
    assert lambdas(resumed) == lambdas(whole)[steps_of_an_epoch:]
    # A new module has the weights from which both began: its constructor sets the seed.
    actual, expected, untrained = (module.state_dict() for module in (resumed, whole, module_class()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert all(not torch.equal(actual[key], untrained[key]) for key in actual)


@pytest.fixture
def checkpoint_of_two_epochs(tmp_path: Path) -> Path:
    """The checkpoint in the middle of a training of eight steps."""
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(tmp_path, Module(), callbacks=[Progress(), saving], enable_checkpointing=True)
    return tmp_path / "step=4.ckpt"


@pytest.mark.parametrize(
    ("options", "epochs", "now"),
    [
        pytest.param({}, 2, None, id="the same, no warning"),
        pytest.param({}, 3, "linear per step over 12 step(s)", id="another length"),
        pytest.param({"lambda_in": 8.0}, 2, "linear per step over 8 step(s)", id="another option"),
    ],
)
def test_resumed_run_of_another_length_or_option_is_one_warning_that_shows_both(
    checkpoint_of_two_epochs: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, float],
    epochs: int,
    now: str | None,
) -> None:
    caplog.clear()
    module = Module(**options)
    place, checkpoint = checkpoint_of_two_epochs.parent, checkpoint_of_two_epochs
    fit(place, module, resume=checkpoint, max_epochs=epochs, num_sanity_val_steps=1)
    before = f"trained with {one_line(Module().loss)}: linear per step over 8 step(s); "
    after = f"this run trains with {one_line(module.loss)}: {now}"
    assert caplog.text.count("this run trains with") == (now is not None)
    assert (before + after in caplog.text) == (now is not None)


class OneNumber(nn.Linear):
    """A layer whose ``set_epoch`` takes no number of epochs, as some samplers have it."""

    def set_epoch(self, epoch: int) -> None:
        raise AssertionError(epoch)


class TwoNumbers(nn.Linear):
    """A layer whose ``set_epoch`` takes something else beside the epoch."""

    def set_epoch(self, epoch: int, rank: int) -> None:
        raise AssertionError(epoch, rank)


class OneOfTwoNumbers(nn.Linear):
    """A layer whose ``set_epoch`` takes an option beside the epoch."""

    def set_epoch(self, epoch: int, verbose: bool = False) -> None:
        raise AssertionError(epoch, verbose)


@pytest.mark.parametrize("backbone", [OneNumber, TwoNumbers, OneOfTwoNumbers])
def test_backbone_with_a_set_epoch_of_its_own_is_no_loss(tmp_path: Path, backbone: Any) -> None:
    """Its method has other parameters than a loss's, and is not called."""
    for callback, expected in ((Progress(), linear(*range(1, 9))), (Progress("epoch"), [0] * 4 + [1] * 4)):
        module = Module()
        module.image = backbone(6, 4)
        fit(tmp_path, module, callbacks=[callback])
        assert lambdas(module) == pytest.approx(expected)


class OtherNames(nn.Module):
    """A loss whose ``set_progress`` names its parameters otherwise, with a part that is told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = rankloss.RankClipLoss(schedule="linear")

    def set_progress(self, now: int, end: int) -> None:
        self.told = (now, end)

    def forward(self, image_features: Tensor, text_features: Tensor, *scale: Any, **options: Any) -> Any:
        step = 1 + round(7 * self.inner.schedule_value)  # of eight, as the part is told: λ is (step − 1) / 7
        assert self.told == (step, 8)
        return self.inner(image_features, text_features, *scale, **options)

    @property
    def schedule_value(self) -> float:
        return self.inner.schedule_value


def test_a_loss_is_told_whatever_names_the_parameters_of_its_method_have(tmp_path: Path) -> None:
    module = Module()
    module.loss = OtherNames()
    fit(tmp_path, module)
    assert lambdas(module) == pytest.approx(linear(*range(1, 9)))


# --- a module that is fitted again ---


class Fault(Exception):
    """The error that ends a training."""


class Failing(lightning.Callback):
    """Ends a training at a step."""

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise Fault


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_module_of_an_earlier_training_does_not_train_without_progress(tmp_path: Path, unit: Any) -> None:
    """Its λ would be the last of the first training."""
    module = Module()
    fit(tmp_path, module, callbacks=[Progress(unit)])
    before = weights(module)
    with pytest.raises(RuntimeError, match=r"training that has ended: .*call .*set_progress"):
        fit(tmp_path, module, callbacks=[], num_sanity_val_steps=1)
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_module_of_an_earlier_training_is_validated_with_its_last_lambda(tmp_path: Path, unit: Any) -> None:
    module = Module()
    trainer = fit(tmp_path, module, callbacks=[Progress(unit)])
    last_of_training = module.validated[-1]
    trainer.validate(module, DataLoader(pairs(8), 8), verbose=False)
    at_one = rankloss.RankClipLoss(schedule="constant")(*module.features(list(pairs(8).tensors)))
    assert module.validated[-1] == last_of_training == pytest.approx(at_one.item(), rel=1e-6)


def test_module_of_a_training_that_an_error_ended_does_not_train_without_progress(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(Fault):
        fit(tmp_path, module, callbacks=[Progress(), Failing()])
    with pytest.raises(RuntimeError, match="training that has ended"):
        fit(tmp_path, module, callbacks=[])


class Telling(Module):
    """A module that tells its loss of each step by itself."""

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        self.loss.set_progress(number + 1, 4)
        return super().training_step(batch, number)


def test_module_that_is_told_again_has_the_lambdas_of_a_new_training(tmp_path: Path) -> None:
    for module_class, callbacks in ((Module, [Progress()]), (Telling, [])):
        module: Any = module_class()
        fit(tmp_path, module, max_epochs=1, callbacks=[Progress()])
        fit(tmp_path, module, max_epochs=1, callbacks=callbacks)
        assert lambdas(module) == pytest.approx(linear(*range(1, 5)) * 2)


class Told(nn.Module):
    """A part of a loss that goes by epochs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[tuple[int, int]] = []

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.epochs.append((epoch, epochs))


class ToldAtEpochs(Plain):
    """A module with such a part beside its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Told()


def test_a_callback_by_epochs_that_served_a_run_of_one_epoch_by_steps_goes_by_epochs_again(
    tmp_path: Path,
) -> None:
    progress, module = Progress("epoch"), ToldAtEpochs()
    fit(tmp_path, Module(), max_epochs=1, callbacks=[progress])
    assert progress.unit == "step"
    fit(tmp_path, module, max_epochs=2, callbacks=[progress])
    before_sanity_validation, *of_training = module.part.epochs
    assert before_sanity_validation == (1, 2)
    assert of_training == [(1, 2), (2, 2)]


# --- several processes ----------------------------------------------------------------------------------


def trained(directory: Path, count: int = 1, rank: int = 0) -> Module:
    """The module after a training by one of ``count`` processes, whose i-th batches make up that of one."""
    module = Module(schedule="rankclip")
    fit(
        directory,
        module,
        size=16 // count,
        devices=count,
        strategy="ddp" if count > 1 else "auto",
        data=Subset(pairs(), range(rank, 32, count)),
        use_distributed_sampler=False,  # which shuffles
    )
    return module


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    torchrun(__file__, tmp_path)
    lambdas_of_two, weights_of_two = json.loads((tmp_path / "two.json").read_text())
    assert lambdas_of_two == lambdas(whole)
    assert max(lambdas_of_two) == 2, "at the end of RankCLIP's schedule"
    assert math.dist(weights(whole).tolist(), weights(Module()).tolist()) > 0.01
    assert weights_of_two == pytest.approx(weights(whole).tolist(), rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    module = trained(Path(sys.argv[1]), count=2, rank=int(os.environ["RANK"]))
    if module.global_rank == 0:
        Path(sys.argv[1], "two.json").write_text(json.dumps([lambdas(module), weights(module).tolist()]))
