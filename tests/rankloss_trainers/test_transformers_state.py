"""A loss that remembers, and its second captions, in Hugging Face's Trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

import transformers
from tiny_transformers import Pairs, Terminated, Trainer, arguments, clip, steps, train, weights
from transformers.trainer_utils import HPSearchBackend

import rankloss_baselines
from rankloss_trainers.transformers.embeddings import with_captions
from rankloss_trainers.transformers.trainer import STATE_FILE

ALIP = {"loss": "alip", "loss_options": {"caption_key": "caption", "initial_history": 0.0}}


class TwoCaptions(Pairs):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pair = super().__getitem__(i)
        other = self.texts[(i + 1) % self.distinct]
        return {**pair, "caption_input_ids": other, "caption_attention_mask": torch.ones(8)}


def test_first_step_is_the_step_of_an_own_loop(tmp_path: Path) -> None:
    pairs = TwoCaptions()
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1}
    trainer = train(tmp_path, pairs=pairs, **ALIP, **options)
    batch = [pairs[i] for i in range(8)]
    inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
    model = clip()
    first = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    second = model(input_ids=inputs["caption_input_ids"], pixel_values=inputs["pixel_values"])
    loss = rankloss_baselines.AlipLoss(initial_history=0.0)
    loss(
        first.image_embeds,
        first.text_embeds,
        model.logit_scale.exp(),
        caption_features=second.text_embeds,
    ).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-5, atol=1e-7)
    (line,) = steps(trainer)
    assert {"caption_contrastive_loss", "alip_text_caption"} <= line.keys()


@pytest.mark.parametrize("last", [False, True])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, last: bool) -> None:
    given = {**ALIP, "save_strategy": "epoch", "num_train_epochs": 3}
    whole = train(tmp_path, pairs=TwoCaptions(), **given)
    checkpoint = tmp_path / ("checkpoint-12" if last else "checkpoint-4")
    saved = torch.load(checkpoint / STATE_FILE, weights_only=True)
    assert saved["loss"] == "alip"
    assert (saved["state_dict"]["histories"] != 0).all()
    resumed = train(tmp_path, pairs=TwoCaptions(), resume=True if last else str(checkpoint), **given)
    histories = resumed.driven_loss.criterion.histories
    assert torch.equal(histories, whole.driven_loss.criterion.histories)
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.skipif(
    not hasattr(transformers.TrainingArguments, "enable_jit_checkpoint"),
    reason="this transformers makes no checkpoint at SIGTERM",
)
def test_checkpoint_at_sigterm_has_the_state(tmp_path: Path) -> None:
    jit = {"enable_jit_checkpoint": True, "callbacks": [Terminated()]}
    whole, _, resumed = (
        train(tmp_path, pairs=TwoCaptions(), **ALIP, **given)
        for given in ({}, jit, {"resume": str(tmp_path / "checkpoint-3")})
    )
    histories = (trainer.driven_loss.criterion.histories for trainer in (resumed, whole))
    assert torch.equal(*histories)
    assert torch.equal(weights(resumed), weights(whole))


def test_trials_of_a_search_have_the_state_in_their_directories(tmp_path: Path) -> None:
    trainer = train(tmp_path, pairs=TwoCaptions(), max_steps=1, **ALIP)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer._save_checkpoint(trainer.model, trial=SimpleNamespace(number=7))
    assert (tmp_path / "run-7" / "checkpoint-1" / STATE_FILE).exists()


def test_checkpoint_without_the_state_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {**ALIP, "save_strategy": "epoch", "num_train_epochs": 1}
    train(tmp_path, pairs=TwoCaptions(), **given)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    train(tmp_path, pairs=TwoCaptions(), resume=str(tmp_path / "checkpoint-4"), **given)
    assert "holds no state of a loss: it starts anew" in caplog.text


def test_loss_without_a_state_writes_no_file(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="epoch", num_train_epochs=1)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert not (tmp_path / "checkpoint-4" / STATE_FILE).exists()


def test_evaluation_takes_the_first_caption(tmp_path: Path) -> None:
    pairs = TwoCaptions(8)
    trainer = train(tmp_path, pairs=pairs, eval_dataset=pairs, eval_on_start=True, max_steps=1, **ALIP)
    (first, *_) = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    batch = [Pairs(8)[i] for i in range(8)]
    inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
    with torch.no_grad():
        assert first == pytest.approx(clip().eval()(**inputs, return_loss=True).loss.item(), rel=1e-5)


def test_missing_captions_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column of the batch begins with caption_, got pixel_values"):
        train(tmp_path, **ALIP)
    with pytest.raises(ValueError, match=r"caption_input_ids must have the shape .* got \(2, 3\) beside"):
        with_captions({"input_ids": torch.ones(2, 4), "caption_input_ids": torch.ones(2, 3)}, "caption")
    with pytest.raises(ValueError, match=r"caption_x must have the shape .* beside None"):
        with_captions({"input_ids": torch.ones(2, 4), "caption_x": torch.ones(2, 3)}, "caption")


def test_columns_of_the_second_caption_are_not_dropped_as_unused(tmp_path: Path) -> None:
    given = {"pairs": TwoCaptions(), "max_steps": 2, **ALIP}
    kept, dropping = (train(tmp_path, remove_unused_columns=drops, **given) for drops in (False, True))
    assert torch.equal(weights(dropping), weights(kept))


def test_model_that_is_made_anew_is_not_given_the_state_of_the_last(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=clip, args=arguments(tmp_path, max_steps=3), train_dataset=TwoCaptions(), **ALIP
    )
    results = []
    for _ in range(2):
        trainer.train()
        results.append((steps(trainer), trainer.driven_loss.criterion.histories.clone()))
    (first, histories), (second, others) = results
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert torch.equal(histories, others)


def test_state_is_there_before_a_checkpoint_is_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def push(_: Any, folder: str) -> None:
        seen.append(Path(folder, STATE_FILE).exists())

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    trainer = train(tmp_path, pairs=TwoCaptions(), max_steps=1, **ALIP)
    trainer.args.push_to_hub = True
    trainer._save_checkpoint(trainer.model, trial=None)
    assert seen == [True]
