"""Hugging Face's Trainer with a loss of the catalogue, on tiny models of random weights."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

import transformers
from tiny_transformers import (
    METRICS,
    TERMS,
    InOrder,
    Pairs,
    align,
    alt_clip,
    arguments,
    chinese_clip,
    clip,
    dual_encoder,
    leave,
    steps,
    train,
    weights,
)

import rankloss
import rankloss_baselines
from rankloss import schedules
from rankloss_trainers import catalog
from rankloss_trainers.transformers import ContrastiveTrainer, ContrastiveTrainerMixin
from rankloss_trainers.transformers.embeddings import logit_scale

MODELS = pytest.mark.parametrize("model", [clip, chinese_clip, alt_clip, align, dual_encoder])


@MODELS
def test_log_holds_the_terms_and_the_schedule_of_optimizer_steps(tmp_path: Path, model: Any) -> None:
    lines = steps(train(tmp_path, model=model()))
    assert len(lines) == 8
    for number, line in enumerate(lines, start=1):
        assert set(line) >= {*TERMS, *METRICS}
        assert line["rank_lambda"] == pytest.approx(schedules.linear(number, 8), rel=1e-6)
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), rel=1e-4)
        for term in TERMS[1:]:
            raw = line[term.replace("loss", "raw")]
            assert line[term] == pytest.approx(raw * line["rank_lambda"] / 16, rel=1e-5)
    assert lines[0]["cross_modal_loss"] == 0
    assert lines[-1]["cross_modal_loss"] > 0


def test_tensorboard_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    lines = steps(train(tmp_path, report_to="tensorboard"))
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    for name in (*TERMS, *METRICS):
        shown = [event.value for event in events.Scalars(f"train/{name}")]
        assert shown == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_wandb_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb_files import wandb_scalars

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    options = {"schedule": "linear", "agreement_every": 1}
    trainer = train(tmp_path, loss="rankclip", loss_options=options, report_to="wandb", max_steps=4)
    run = wandb.run.id
    wandb.teardown()  # the file is whole once the process that writes it has ended
    shown = wandb_scalars(tmp_path, run)
    taus = ["cross_modal_tau", "in_modal_tau"]
    for name in (*TERMS, *METRICS, *taus):
        values = list(shown[f"train/{name}"].values())
        assert values == pytest.approx([line[name] for line in steps(trainer)], rel=1e-6), name
    assert list(shown["train/rank_lambda"].values()) == pytest.approx([0, 1 / 3, 2 / 3, 1], rel=1e-6)
    if importlib.util.find_spec("matplotlib") is None:
        return
    charts = shown["train/agreement/path"]
    assert [shown["train/global_step"][step] for step in charts] == [1]
    (path,) = charts.values()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/files/{path}"))) == 1


def charts_of(directory: Path) -> dict[int, bytes]:
    """The charts of the rank agreement in the one events file below a directory: step → PNG."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = directory.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    names = events.Tags()["images"]
    return {
        event.step: event.encoded_image_string for name in names for event in events.Images("train/agreement")
    }


def test_tensorboard_has_a_chart_of_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("rankloss.plots")
    titles, draw = [], plots.slope_chart

    def slope_chart(v: Tensor, t: Tensor, *args: Any, **options: Any) -> Any:
        titles.append(options["title"])
        assert v.shape == t.shape == (8, 8)
        return draw(v, t, *args, **options)

    monkeypatch.setattr(plots, "slope_chart", slope_chart)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options = {"loss": "rankclip", "loss_options": {"agreement_every": 3}}
    train(tmp_path, report_to="tensorboard", num_train_epochs=3, **options)
    charts = charts_of(tmp_path)
    # Epochs of four steps, measured at 1, 4, 7 and 10.
    assert titles == ["epoch 1, step 1", "epoch 2, step 7", "epoch 3, step 10"]
    assert list(charts) == [1, 7, 10]
    assert len(set(charts.values())) == 3
    assert all(chart.startswith(b"\x89PNG") for chart in charts.values())


def test_chart_of_a_resumed_run_is_of_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rankloss.plots")
    pytest.importorskip("tensorboard")
    train(tmp_path, save_strategy="steps", save_steps=6, num_train_epochs=3)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    given = {"resume": str(tmp_path / "checkpoint-6"), "report_to": "tensorboard", "num_train_epochs": 3}
    train(tmp_path / "resumed", loss_options={"agreement_every": 4}, **given)
    assert list(charts_of(tmp_path)) == [7, 9]


def test_writer_that_fails_ends_the_charts_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(SummaryWriter, "add_figure", full)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options = {"loss": "rankclip", "loss_options": {"agreement_every": 1}}
    assert len(steps(train(tmp_path, report_to="tensorboard", **options))) == 8
    (record,) = [x for x in caplog.records if x.name == "rankloss_trainers" and x.levelname == "WARNING"]
    assert record.getMessage() == "No more charts of the rank agreement: disk full"


def test_first_step_is_the_step_of_an_own_loop(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)
    model, batch = clip(), [Pairs()[i] for i in range(8)]
    inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
    outputs = model(**inputs)
    loss = rankloss.RankClipLoss(schedule="linear")
    loss.set_progress(1, 1)
    loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-6, atol=1e-7)


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    """Three times the same batch: three accumulated are one."""
    options = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "max_steps": 2}
    pairs = Pairs(48, distinct=8)
    one = train(tmp_path / "one", pairs=pairs, **options)
    three = train(tmp_path / "three", pairs=pairs, gradient_accumulation_steps=3, **options)
    torch.testing.assert_close(weights(three), weights(one), rtol=1e-5, atol=1e-6)
    assert [line["rank_lambda"] for line in steps(three)] == [0, 1], "λ moves once per optimizer step"
    for a, b in zip(steps(three), steps(one), strict=True):
        assert {name: a[name] for name in TERMS} == pytest.approx({name: b[name] for name in TERMS}, rel=1e-4)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    given = {"save_strategy": "epoch", "num_train_epochs": 3}
    whole = train(tmp_path, **given)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-4"), **given)
    assert torch.equal(weights(resumed), weights(whole))
    shown = [line["rank_lambda"] for line in steps(resumed)]
    assert shown == [line["rank_lambda"] for line in steps(whole)]


def test_second_training_logs_its_own_steps_alone(tmp_path: Path) -> None:
    """Of five steps the last two come after the last line of the log."""
    trainer = train(tmp_path, max_steps=5, logging_steps=3)
    trainer.train()
    (line,) = steps(trainer)
    assert line["step"] == 3
    assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), rel=1e-4)
    assert line["rank_lambda"] == pytest.approx(sum(schedules.linear(i, 5) for i in (1, 2, 3)) / 3, rel=1e-6)


def test_resumed_run_measures_the_agreement_at_its_first_step(tmp_path: Path) -> None:
    """Measured at steps 1, 5, 9, …; the checkpoint is of step 6."""

    def resumed(every: int, logging_steps: int) -> dict[int, float]:
        given = {"loss_options": {"agreement_every": every}, "logging_steps": logging_steps}
        directory = tmp_path / f"{every}-{logging_steps}"
        given.update(num_train_epochs=3, save_strategy="steps", save_steps=6)
        train(directory, **given)
        lines = steps(train(directory, resume=str(directory / "checkpoint-6"), **given))
        return {line["step"]: line["cross_modal_tau"] for line in lines if line["step"] > 6}

    each = resumed(every=1, logging_steps=1)
    assert each[7] != each[9]
    held = {7: each[7], 8: each[7], 9: each[9], 10: each[9], 11: each[9], 12: each[9]}
    assert resumed(every=4, logging_steps=1) == held
    means = {9: sum(held[step] for step in (7, 8, 9)) / 3, 12: each[9]}
    assert resumed(every=4, logging_steps=3) == pytest.approx(means, rel=1e-6)


@MODELS
def test_evaluation_is_the_base_loss_whatever_lambda_is(tmp_path: Path, model: Any) -> None:
    pairs = Pairs(17)  # a last batch of one
    given = {"eval_dataset": pairs, "eval_strategy": "epoch", "eval_on_start": True}
    trainer = train(tmp_path, model=model(), **given)
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 3

    def base_loss(model: nn.Module) -> float:
        total, labels = 0.0, torch.arange(8)
        for start in (0, 8):
            batch = [pairs[i] for i in range(start, start + 8)]
            inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
            with torch.no_grad():
                outputs = model.eval()(**inputs, return_loss=True)
            logits = outputs.logits_per_image
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)).item() / 2
            if not isinstance(model, transformers.AlignModel):  # whose own loss smooths the labels
                assert loss == pytest.approx(outputs.loss.item(), rel=1e-5)
            total += 8 * loss
        return total / 17

    assert evaluated[0] == pytest.approx(base_loss(model()), rel=1e-5)
    assert evaluated[-1] == pytest.approx(base_loss(trainer.model), rel=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_model_that_stays_in_one_mode_is_trained_and_evaluated_like_any(tmp_path: Path, mode: bool) -> None:
    class Fixed(transformers.CLIPModel):  # without dropout, so that the mode changes no number
        def train(self, _: bool = True) -> Any:
            return super().train(mode)

    given = {"max_steps": 4, "eval_dataset": Pairs(8), "eval_strategy": "steps", "eval_steps": 1}
    fixed = clip()
    fixed.__class__ = Fixed
    fixed.train()
    kept, usual = (train(tmp_path, model=model, **given) for model in (fixed, clip()))
    assert fixed.training is mode
    assert torch.equal(weights(kept), weights(usual))
    for a, b in zip(kept.state.log_history, usual.state.log_history, strict=True):
        names = {*TERMS, *METRICS, "loss", "eval_loss"} & b.keys()
        assert {name: a.get(name) for name in names} == {name: b[name] for name in names}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, reentrant: bool) -> None:
    model: Any = clip()
    name = "activation_checkpointing_enable"  # what newer releases call it
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    checkpointed, plain = train(tmp_path, model=model, max_steps=2), train(tmp_path, max_steps=2)
    assert torch.equal(weights(checkpointed), weights(plain))
    assert steps(checkpointed)[-1]["cross_modal_loss"] > 0


def test_best_model_is_chosen_by_the_base_loss(tmp_path: Path) -> None:
    given = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = train(tmp_path, eval_dataset=Pairs(16), num_train_epochs=3, **given)
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.best_metric == min(evaluated)


def test_bfloat16_trains(tmp_path: Path) -> None:
    exact, half = (steps(train(tmp_path / str(bf16), bf16=bf16)) for bf16 in (False, True))
    assert half[0]["contrastive_loss"] != exact[0]["contrastive_loss"]
    assert half[0]["contrastive_loss"] == pytest.approx(exact[0]["contrastive_loss"], rel=0.02)


def test_module_of_ones_own_is_a_loss(tmp_path: Path) -> None:
    loss = rankloss.RankClipLoss(rankloss_baselines.CyClipLoss(), schedule="constant", top_k=3)
    trainer = train(tmp_path, loss=loss, max_steps=1, eval_dataset=Pairs(8))
    (line,) = steps(trainer)
    assert {*TERMS, "cyclic_cross_modal_loss", "cyclic_in_modal_loss", "rank_lambda"} <= line.keys()
    assert trainer.driven_loss.criterion is loss
    assert trainer.evaluation_loss is loss.base


@pytest.mark.parametrize(
    "nested",
    [
        lambda base: rankloss.RankClipLoss(rankloss_baselines.CyClipLoss(base), schedule="linear"),
        lambda base: rankloss_baselines.CyClipLoss(rankloss.RankClipLoss(base, schedule="linear")),
    ],
)
def test_evaluation_is_of_what_stands_below_the_rank_terms_without_its_metrics(
    tmp_path: Path, nested: Any
) -> None:
    class Reporting(rankloss.ClipLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {**super().forward(*args, **kwargs), "hits": torch.tensor(100.0)}

    given = {"eval_dataset": Pairs(8), "eval_strategy": "epoch", "eval_on_start": True, "learning_rate": 0.0}
    trainers = (train(tmp_path, loss=nested(base), **given) for base in (rankloss.ClipLoss(), Reporting()))
    plain, reporting = (
        [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        for trainer in trainers
    )
    assert plain == reporting == [plain[0]] * 3


def test_labels_of_a_script_reach_its_metrics(tmp_path: Path) -> None:
    class Labelled(transformers.CLIPModel):
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Numbered(Pairs):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {**super().__getitem__(i), "labels": torch.tensor(i)}

    model: Any = clip()
    model.__class__ = Labelled
    seen: list[Any] = []
    given = {"label_names": ["labels"], "max_steps": 1, "eval_dataset": Numbered(16), "pairs": Numbered()}
    keywords = {"compute_metrics": lambda results: seen.extend(results.label_ids) or {}}
    trainer = train(tmp_path, model=model, **given, **keywords)
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen == list(range(16))


def test_entry_that_comes_only_sometimes_is_averaged_over_the_calls_that_gave_it(tmp_path: Path) -> None:
    class Sometimes(rankloss.ClipLoss):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            entries = super().forward(*args, **kwargs)
            extra = {} if self.calls % 2 else {"of_even_calls": torch.tensor(float(self.calls))}
            return {**entries, **extra}

    lines = steps(train(tmp_path, loss=Sometimes(), max_steps=6, logging_steps=3))
    assert [line["of_even_calls"] for line in lines] == [2, (4 + 6) / 2]


def test_named_loss_with_options(tmp_path: Path) -> None:
    options = {"lambda_in": 0.0, "diagonal": False, "discount": "log", "agreement_every": 2}
    trainer = train(tmp_path, loss="rankclip", loss_options=options, num_train_epochs=0.5)
    criterion = trainer.driven_loss.criterion
    assert criterion.consistency.options == rankloss.options.RankOptions(diagonal=False, discount="log")
    lines = steps(trainer)
    assert [line["rank_lambda"] for line in lines] == [schedules.rankclip(i, 2) for i in (1, 2)]
    assert all("in_modal_raw" not in line and "cross_modal_tau" in line for line in lines)


# The others need columns of their own, or a bias: they are in the tests of captions, teachers and SigLIP.
@pytest.mark.parametrize(
    "name", sorted(catalog.BUILT_IN.keys() - {"alip", "rankclip-distill", "siglip-streamed"})
)
def test_losses_of_the_catalogue_train(tmp_path: Path, name: str) -> None:
    pairs = Pairs(8)
    batch = [pairs[i] for i in range(8)]
    inputs = {column: torch.stack([pair[column] for pair in batch]) for column in batch[0]}
    given = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0}
    first, second = steps(train(tmp_path, pairs=pairs, loss=name, max_steps=2, **given))
    assert first["contrastive_loss"] == pytest.approx(clip()(**inputs, return_loss=True).loss.item())
    assert second["contrastive_loss"] < first["contrastive_loss"]
    for line in (first, second):
        terms = [value for key, value in line.items() if key.endswith("_loss")]
        assert line["loss"] == pytest.approx(sum(terms), rel=1e-4)


def test_schedule_per_epoch(tmp_path: Path) -> None:
    options = {"schedule": "linear", "schedule_unit": "epoch"}
    lines = steps(train(tmp_path, loss="rankclip", loss_options=options, num_train_epochs=3))
    assert [line["rank_lambda"] for line in lines] == [0] * 4 + [0.5] * 4 + [1] * 4


@pytest.mark.parametrize("ignored", [1, 2, 5])
def test_epochs_are_those_that_the_trainer_trains(
    tmp_path: Path, ignored: int, caplog: pytest.LogCaptureFixture
) -> None:
    """``max_steps`` overrides ``num_train_epochs``; the 32 pairs are four steps."""
    caplog.set_level("INFO", logger="rankloss_trainers")
    options = {"schedule": "linear", "schedule_unit": "epoch"}
    given = {"loss_options": options, "num_train_epochs": ignored}
    lines = steps(train(tmp_path, max_steps=11, **given))
    assert [line["rank_lambda"] for line in lines] == [0] * 4 + [0.5] * 4 + [1] * 3
    assert "schedule linear per epoch over 3 epoch(s)" in caplog.text
    lines = steps(train(tmp_path, max_steps=3, **given))
    assert [line["rank_lambda"] for line in lines] == [0, 0.5, 1], "one epoch goes by steps"
    assert "schedule linear per step over 1 epoch(s)" in caplog.text


def test_epoch_that_a_callback_ends_is_an_epoch(tmp_path: Path) -> None:
    class Halving(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step % 2 == 0

    options = {"schedule": "linear", "schedule_unit": "epoch"}
    lines = steps(train(tmp_path, loss_options=options, num_train_epochs=3, callbacks=[Halving()]))
    assert [line["rank_lambda"] for line in lines] == [0, 0, 0.5, 0.5, 1, 1]


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Pairs without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(Pairs().__getitem__, range(32))


def test_data_without_a_length_have_no_number_of_epochs(tmp_path: Path) -> None:
    by_steps, by_epochs = (
        {"pairs": Stream(), "max_steps": 6, "loss_options": {"schedule": "linear", "schedule_unit": unit}}
        for unit in ("step", "epoch")
    )
    lines = steps(train(tmp_path, **by_steps))
    assert [line["rank_lambda"] for line in lines] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    with pytest.raises(
        ValueError, match=r"rankclip goes by epochs \(schedule_unit 'epoch'\), but training data"
    ):
        train(tmp_path, **by_epochs)
    # The catalogue has it go by epochs, but it does not ask for them.
    assert len(steps(train(tmp_path, pairs=Stream(), max_steps=2, loss="cyclip"))) == 2


class Told(rankloss.ClipLoss):
    """CLIP's loss, which logs where training stands."""

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.epoch, self.epochs = epoch, epochs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entries = super().forward(*args, **kwargs)
        return {**entries, "epoch_seen": torch.tensor(self.epoch), "epochs": torch.tensor(self.epochs)}


TOLD = catalog.LossEntry(build=lambda base, options, gather: Told(gather=gather))


LEARNABLE = catalog.LossEntry(build=lambda base, options, gather: nn.Linear(2, 2))


def test_loss_of_another_package_with_parameters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog.BUILT_IN, "learnable", f"{__name__}:LEARNABLE")
    with pytest.raises(ValueError, match="loss 'learnable': Linear has parameters, which the trainer's"):
        ContrastiveTrainer(model=clip(), args=arguments(tmp_path), loss="learnable")


def test_loss_of_another_package_is_told_the_epochs_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog.BUILT_IN, "told", f"{__name__}:TOLD")
    lines = steps(train(tmp_path, loss="told", max_steps=6, num_train_epochs=9))
    assert [(line["epoch_seen"], line["epochs"]) for line in lines] == [(1, 2)] * 4 + [(2, 2)] * 2
    with pytest.raises(ValueError, match="told goes by epochs"):
        train(tmp_path, loss="told", max_steps=6, pairs=Stream())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"loss": "rankclap"}, ValueError, "loss must be one of 'rankclip', .* got 'rankclap'"),
        ({"loss_options": {"topk": 3}}, TypeError, "rankclip has no option 'topk'; it has schedule, "),
        ({"loss_options": {"top_k": 0}}, ValueError, "top_k must be an integer of at least 1; got 0"),
        ({"loss": "alip"}, ValueError, "alip needs a second caption"),
        ({"loss": "siglip-streamed"}, ValueError, "siglip-streamed needs a model that has a logit_bias"),
        (
            {"loss_options": {"reference_features": "samples"}},
            ValueError,
            "reference_features belongs to open_clip's trainer; here a teacher's features are the columns",
        ),
        (
            {"loss": nn.Identity(), "loss_options": {"top_k": 3}},
            TypeError,
            "loss_options is for a loss that is given by its name; the module has its own",
        ),
        (
            {"loss": rankloss.ClipLoss(), "gather": rankloss.Gather(local_loss=False)},
            TypeError,
            "gather is for a loss that is given by its name; the module has its own",
        ),
        (
            {"loss": rankloss_baselines.CyClipLoss(nn.Linear(2, 2))},
            ValueError,
            "loss: CyClipLoss has parameters, which the trainer's optimizer does not know",
        ),
        ({"compute_loss_func": print}, ValueError, "compute_loss_func is ignored by this trainer"),
        ({"model": nn.Linear(2, 2)}, ValueError, "Linear has neither a logit_scale nor a temperature"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ContrastiveTrainer(**{"model": clip(), "args": arguments(tmp_path), **given})


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel over 2 GPUs contrasts each GPU's pairs alone"):
        ContrastiveTrainer(model=clip(), args=args)


def test_zero_stage_3_and_flat_parameters_are_refused(tmp_path: Path) -> None:
    class Sharded(InOrder, transformers.Trainer):
        plugins: ClassVar[dict[str, Any]] = {}

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator = SimpleNamespace(state=SimpleNamespace(**self.plugins))

    class Trainer(ContrastiveTrainerMixin, Sharded):
        pass

    for plugins, message in (
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO stage 3 does not show"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "FSDP version 1 does not show"),
        ({"fsdp_plugin": SimpleNamespace()}, "FSDP version 1 does not show"),
    ):
        Sharded.plugins = plugins
        with pytest.raises(ValueError, match=message):
            Trainer(model=clip(), args=arguments(tmp_path))


def test_output_without_embeddings_is_named(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.zeros(()))

        def forward(self, pixel_values: Tensor, **_: Any) -> dict[str, Tensor]:
            return {"logits": pixel_values.sum() * self.logit_scale}

    with pytest.raises(ValueError, match="output has no image_embeds and no text_embeds, got logits"):
        train(tmp_path, model=Other())


def test_scale_is_the_multiplier() -> None:
    class Model(nn.Module):
        def __init__(self, **parameters: Tensor) -> None:
            super().__init__()
            for name, value in parameters.items():
                self.register_parameter(name, nn.Parameter(value))

    assert torch.equal(logit_scale(Model(logit_scale=torch.tensor(2.0))), torch.tensor(2.0).exp())
    assert logit_scale(Model(logit_scale=torch.zeros(1))).shape == ()
    assert logit_scale(Model(temperature=torch.tensor(0.25))) == 4
    limited = Model(logit_scale=torch.tensor(9.0))
    limited.max_log_logit_scale = 2.0
    assert torch.equal(logit_scale(limited), torch.tensor(2.0).exp())
    with pytest.raises(ValueError, match="logit_scale has 0 elements on this process: ZeRO stage 3"):
        logit_scale(Model(logit_scale=torch.zeros(0)))


def test_mixin_serves_a_trainer_of_ones_own(tmp_path: Path) -> None:
    class Own(ContrastiveTrainerMixin, transformers.Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)
            self.seen = {**getattr(self, "seen", {}), **logs}

    trainer = Own(model=clip(), args=arguments(tmp_path, max_steps=1), train_dataset=Pairs(), loss="cyclip")
    trainer.train()
    assert trainer.seen["cyclic_cross_modal_loss"] > 0


# --- several processes ----------------------------------------------------------------------------------


class Plain(InOrder, transformers.Trainer):
    """The Trainer with the model's own loss."""


def plainly(directory: Path, **options: Any) -> Plain:
    def collate(pairs: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {
            **{name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]},
            "return_loss": True,
        }

    trainer = Plain(
        model=clip(), args=arguments(directory, **options), train_dataset=Pairs(), data_collator=collate
    )
    trainer.train()
    return trainer


def run_as_a_process(directory: str, batch_size: str, kind: str) -> None:
    faulthandler.dump_traceback_later(500, exit=True)  # a process that does not end says where it stands
    # SGD, whose steps are proportional to gradients: AdamW's would be signs of rounding errors as well.
    options = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0, "num_train_epochs": 1}
    trainer: Any = {"ours": train, "plain": plainly}[kind](
        Path(directory), per_device_train_batch_size=int(batch_size), **options
    )
    lines = [{name: line.get(name) for name in (*TERMS, "loss")} for line in steps(trainer)]
    rank, result = trainer.args.process_index, [lines, weights(trainer).tolist(), threads()]
    Path(directory, f"{rank}.json").write_text(json.dumps(result))
    del trainer
    leave()


def threads() -> list[str]:
    """The threads of this process, Python's and others, by their names in the kernel; none outside Linux."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sorted([*names, *(thread.name for thread in threading.enumerate())])


def processes(directory: Path, number: int, kind: str = "ours") -> list[Any]:
    """What each process has seen of a training on batches of 16 pairs in all."""
    directory = directory / f"{kind}-{number}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "--"]
    command = [sys.executable, *launcher, __file__, str(directory), str(16 // number), kind]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(number)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return processes(tmp_path_factory.mktemp("ours"), 2)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path, two_processes: list[Any]) -> None:
    ((whole, whole_weights, _),) = processes(tmp_path, 1)
    (two, two_weights, _), _ = two_processes
    assert len(whole) == len(two) == 2
    for a, b in zip(two, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(torch.tensor(two_weights), torch.tensor(whole_weights), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_loss_leaves_no_thread_that_would_keep_a_process(tmp_path: Path, two_processes: list[Any]) -> None:
    for (*_, ours), (*_, plain) in zip(two_processes, processes(tmp_path, 2, "plain"), strict=True):
        assert ours == plain


if __name__ == "__main__":
    run_as_a_process(*sys.argv[1:])
