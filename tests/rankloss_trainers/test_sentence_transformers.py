"""RankCLIP's loss in sentence-transformers' trainer, on a tiny model of random weights."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("sentence_transformers") is None or importlib.util.find_spec("datasets") is None:
    pytest.skip("sentence-transformers[train] is not installed", allow_module_level=True)

import datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_sentences import WORDS, pairs, tiny, train, weights
from tiny_transformers import Terminated
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import ConcatDataset

import rankloss
import rankloss_baselines
from rankloss import schedules
from rankloss_trainers.sentence_transformers import CachedRankClipLoss, Progress, RankClipLoss

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw"]
BOTH = pytest.mark.parametrize("kind", [RankClipLoss, CachedRankClipLoss])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bert")


def columns(model: Any, number: int = 8) -> list[dict[str, Any]]:
    rows = pairs(number)
    return [model.preprocess(list(rows[name])) for name in ("image", "text")]


def at(loss: Any, step: int, total_steps: int = 4) -> Any:
    """The loss in the middle of a training."""
    for part in loss.modules():
        if isinstance(part, RankClipLoss):
            part.driven_loss.clock.start_step(step, total_steps)
    return loss


def steps(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@BOTH
def test_trainer_logs_the_terms_and_the_schedule_of_optimizer_steps(
    tmp_path: Path, bert: Path, kind: Any
) -> None:
    model = tiny(bert)
    lines = steps(train(tmp_path, kind(model, schedule="linear"), model))
    assert len(lines) == 8
    for number, line in enumerate(lines, start=1):
        assert set(line) >= {*TERMS, *METRICS}
        # The trainer rounds what it logs of a loss to four digits.
        assert line["rank_lambda"] == pytest.approx(schedules.linear(number, 8), abs=1e-4)
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), abs=2e-4)
        assert line["cross_modal_loss"] == pytest.approx(
            line["cross_modal_raw"] * (number - 1) / 7 / 16, abs=1e-4
        )
    assert lines[-1]["in_modal_loss"] > 0


@BOTH
def test_first_step_is_the_step_of_an_own_loop(tmp_path: Path, bert: Path, kind: Any) -> None:
    model, own = tiny(bert), tiny(bert)
    options = {"schedule": "constant", "lambda_in": 0.5, "top_k": 3}
    train(tmp_path, kind(model, scale=30.0, **options), model, max_steps=1, learning_rate=0.1)
    images, texts = (F.normalize(own(column)["sentence_embedding"]) for column in columns(own))
    rankloss.RankClipLoss(**options)(images, texts, 30.0).backward()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    optimizer.step()
    assert not torch.allclose(weights(own), weights(tiny(bert)), atol=1e-4)
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mini_batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("output_dict", [True, False])
def test_cached_loss_is_the_plain_one(bert: Path, mini_batch_size: int, output_dict: bool) -> None:
    """With dropout, a learnable scale, and the upstream gradient that accumulation or a scaler would give."""
    results = []
    for kind, more in ((RankClipLoss, {}), (CachedRankClipLoss, {"mini_batch_size": mini_batch_size})):
        model = tiny(bert).double()
        loss = at(kind(model, learn_scale=True, output_dict=output_dict, **more).double(), step=2)
        value = loss(columns(model), None)
        total = torch.stack(list(value.values())).sum() if output_dict else value
        (0.37 * total).backward()
        shown = dict(value.items()) if output_dict else {"loss": value}
        gradients = [p.grad for p in loss.parameters() if p.grad is not None]
        results.append(
            (torch.stack(list(shown.values())).detach(), torch.cat([g.flatten() for g in gradients]))
        )
        assert list(shown) == ([*TERMS, *METRICS] if output_dict else ["loss"])
    (plain, plain_gradient), (cached, cached_gradient) = results
    assert plain_gradient.norm() > 0.01
    torch.testing.assert_close(cached, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(cached_gradient, plain_gradient, rtol=1e-8, atol=1e-10)


def test_cached_loss_embeds_a_mini_batch_at_a_time(bert: Path) -> None:
    model = tiny(bert)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]["input_ids"])))
    loss = at(CachedRankClipLoss(model, mini_batch_size=3), step=2)
    sum(loss(columns(model, 8), None).values()).backward()
    assert rows == [3, 3, 2] * 4  # both columns, without gradients and again with them


def test_cached_loss_repeats_the_dropout_of_its_first_pass(bert: Path) -> None:
    model = tiny(bert, dropout=0.3).train()
    loss = at(
        CachedRankClipLoss(model, mini_batch_size=8), step=2
    )  # one mini-batch: the plain loss's own draws
    plain = at(RankClipLoss(model), step=2)
    gradients = []
    for each in (loss, plain):
        model.zero_grad()
        torch.manual_seed(3)
        sum(each(columns(model), None).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@BOTH
def test_columns_may_come_in_either_order(bert: Path, kind: Any) -> None:
    model = tiny(bert)
    loss = at(kind(model), step=3)
    there, back = loss(columns(model), None), loss(columns(model)[::-1], None)
    for term in TERMS:
        torch.testing.assert_close(there[term], back[term])
    assert all(there[term] > 0 for term in TERMS)


@BOTH
def test_scale_is_learned_within_its_limits(tmp_path: Path, bert: Path, kind: Any) -> None:
    model = tiny(bert)
    loss = kind(model, learn_scale=True, scale=99.9)
    train(tmp_path, loss, model, learning_rate=0.0, max_steps=1)
    assert loss.logit_scale.exp().item() == pytest.approx(99.9)
    with torch.no_grad():
        loss.logit_scale += 1
    at(loss, step=1)(columns(model), None)
    assert loss.logit_scale.exp().item() == pytest.approx(100)
    assert kind(model, scale=200.0, learn_scale=True).scale_limits == (1.0, 200.0)
    assert [name for name, _ in kind(model).named_parameters() if not name.startswith("model.")] == []


@BOTH
def test_accumulated_batches_are_averaged(tmp_path: Path, bert: Path, kind: Any) -> None:
    """Three times the same batch: three accumulated are one, for the model and for the scale."""
    ended = []
    for count in (1, 3):
        model = tiny(bert)
        loss = kind(model, schedule="linear", learn_scale=True)
        repeated = datasets.concatenate_datasets([pairs(8)] * 6)
        options = {"max_steps": 2, "gradient_accumulation_steps": count, "learning_rate": 0.01}
        trainer = train(tmp_path / str(count), loss, model, train_dataset=repeated, **options)
        assert [line["rank_lambda"] for line in steps(trainer)] == [0, 1]
        ended.append(weights(loss))
    torch.testing.assert_close(ended[1], ended[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save_strategy", ["epoch", "best"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, bert: Path, save_strategy: str) -> None:
    given = {"save_strategy": save_strategy, "num_train_epochs": 3, "optim": "adamw_torch"}
    given |= {"eval_strategy": "epoch", "eval_dataset": pairs(8), "metric_for_best_model": "loss"}
    given["restore_callback_states_from_checkpoint"] = True
    ended, lambdas = [], []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = tiny(bert)
        loss = RankClipLoss(model, learn_scale=True)
        lambdas.append(
            [line["rank_lambda"] for line in steps(train(tmp_path, loss, model, resume=resume, **given))]
        )
        ended.append(weights(loss))
        assert abs(loss.logit_scale.item() - math.log(20)) > 1e-3
    assert torch.equal(*ended)
    assert lambdas[0] == lambdas[1]


def test_checkpoint_at_sigterm_has_the_learned_scale(tmp_path: Path, bert: Path) -> None:
    ended = []
    jit = {"enable_jit_checkpoint": True, "callbacks": [Terminated()]}
    for given in ({}, jit, {"resume": str(tmp_path / "checkpoint-3")}):
        model = tiny(bert)
        loss = RankClipLoss(model, learn_scale=True)
        train(tmp_path, loss, model, learning_rate=0.01, **given)
        ended.append(weights(loss))
    whole, _, resumed = ended
    assert torch.equal(resumed, whole)


def test_checkpoint_without_the_learned_scale_is_reported(
    tmp_path: Path, bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(bert)
    train(tmp_path, RankClipLoss(model), model, save_strategy="epoch", save_only_model=True)
    model = tiny(bert)
    loss = RankClipLoss(model, learn_scale=True)
    train(tmp_path / "fresh", loss, model, max_steps=1, learning_rate=0.0)
    assert not caplog.records
    train(tmp_path, loss, model, resume=str(tmp_path / "checkpoint-4"), num_train_epochs=1)
    assert caplog.messages == ["The checkpoint of step 4 holds no learned scale: it starts anew at 20"]


@BOTH
def test_evaluation_is_the_base_loss_whatever_lambda_is(tmp_path: Path, bert: Path, kind: Any) -> None:
    model = tiny(bert)
    rows = pairs(17)  # a last batch of one
    options = {"eval_strategy": "epoch", "eval_on_start": True, "eval_dataset": rows}
    trainer = train(tmp_path, kind(model), model, **options)
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 3
    assert all(not any("modal" in name for name in line) for line in evaluated)
    total = 0.0
    with torch.no_grad():
        images, texts = (F.normalize(x) for x in (model(x)["sentence_embedding"] for x in columns(model, 17)))
        for part in (slice(0, 8), slice(8, 16)):
            total += 8 * rankloss.ClipLoss()(images[part], texts[part], 20.0).item()
    assert evaluated[-1]["eval_loss"] == pytest.approx(total / 17, rel=1e-4)


def test_metrics_of_a_base_are_no_part_of_the_evaluation(tmp_path: Path, bert: Path) -> None:
    class Reporting(rankloss.ClipLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {**super().forward(*args, **kwargs), "hits": torch.tensor(100.0)}

    model = tiny(bert)
    losses = []
    for base in (rankloss.ClipLoss(), Reporting()):
        loss = RankClipLoss(model, base=base, schedule="linear")
        trainer = train(tmp_path, loss, model, eval_dataset=pairs(), max_steps=1, learning_rate=0.0)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


@BOTH
def test_several_datasets_on_several_processes_do_not_gather(bert: Path, kind: Any) -> None:
    """Each process has a batch of another one at the same step."""
    model = tiny(bert)
    several, single = (SimpleNamespace(dataset=x) for x in (ConcatDataset([pairs(), pairs()]), pairs()))
    state = SimpleNamespace(stateful_callbacks={}, global_step=0)
    gathers = Progress(kind(model, gather=rankloss.Gather(rank=0, world_size=2)))
    with pytest.raises(ValueError, match=r"with several datasets on several processes .* gather=False"):
        gathers.on_train_begin(None, state, None, train_dataloader=several)
    gathers.on_train_begin(None, state, None, train_dataloader=single)
    Progress(kind(model, gather=False)).on_train_begin(None, state, None, train_dataloader=several)


def test_several_datasets_take_turns(tmp_path: Path, bert: Path) -> None:
    model = tiny(bert)
    losses = {name: RankClipLoss(model, schedule="linear", agreement_every=2) for name in "ab"}
    sets = {name: pairs(16) for name in losses}
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            save_strategy="no",
            multi_dataset_batch_sampler="round_robin",
        ),
        datasets.DatasetDict(sets),
        loss=losses,
        callbacks=[Progress(*losses.values())],
    )
    trainer.train()
    expected = pytest.approx([schedules.linear(i, 4) for i in range(1, 5)], abs=1e-4)
    assert [line["rank_lambda"] for line in steps(trainer)] == expected
    assert [loss.driven_loss.evaluate._measured for loss in losses.values()] == [2, 3]


def test_wrapped_loss_gives_a_scalar(tmp_path: Path, bert: Path) -> None:
    for kind in (RankClipLoss, CachedRankClipLoss):
        model = tiny(bert)
        loss = MatryoshkaLoss(model, kind(model, output_dict=False), [16, 8])
        lines = steps(train(tmp_path, loss, model, max_steps=2))
        assert all(math.isfinite(line["loss"]) for line in lines)
    loss = at(MatryoshkaLoss(model, CachedRankClipLoss(model), [16, 8]), step=2)
    with pytest.raises(
        ValueError, match="calculated 2 times: inside of another loss, give output_dict=False"
    ):
        loss(columns(model), None)


@pytest.mark.parametrize("matryoshka_weights", [[1, 1], [1, 0.25], [3, 0.0]])
def test_matryoshka_weights_reach_the_scale(bert: Path, matryoshka_weights: list[float]) -> None:
    results = []
    for kind, more in ((RankClipLoss, {}), (CachedRankClipLoss, {"mini_batch_size": 3})):
        model = tiny(bert).double()
        inner = kind(model, learn_scale=True, output_dict=False, **more).double()
        value = at(MatryoshkaLoss(model, inner, [16, 4], matryoshka_weights), step=2)(columns(model), None)
        (0.37 * value).backward()
        gradients = [p.grad.flatten() for p in inner.parameters() if p.grad is not None]
        results.append((value.detach(), inner.logit_scale.grad, torch.cat(gradients)))
    for plain, cached in zip(*results, strict=True):
        assert plain.norm() > 0.01
        torch.testing.assert_close(cached, plain, rtol=1e-8, atol=1e-10)


def test_model_card_has_configuration_and_citation(tmp_path: Path, bert: Path) -> None:
    model = tiny(bert)
    loss = CachedRankClipLoss(model, mini_batch_size=4, top_k=5, base=rankloss_baselines.CyClipLoss())
    config = loss.get_config_dict()
    assert config == json.loads(json.dumps(config))
    assert {"scale": 20, "base": "CyClipLoss", "schedule": "rankclip", "top_k": 5}.items() <= config.items()
    assert config["mini_batch_size"] == 4
    train(tmp_path, loss, model, max_steps=1).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Ranking-Consistent Language-Image Pretraining" in card
    assert "CachedRankClipLoss" in card
    assert '"top_k": 5' in card


@BOTH
def test_without_progress_the_loss_says_what_is_missing(bert: Path, kind: Any) -> None:
    model = tiny(bert)
    with pytest.raises(
        RuntimeError, match=r"does not know where training stands: .*callbacks=\[Progress\(loss\)\]"
    ):
        kind(model)(columns(model), None)
    assert sum(kind(model, schedule="constant")(columns(model), None).values()) > 0
    with pytest.raises(RuntimeError, match="does not know where training stands"):
        kind(model, schedule="constant", agreement_every=2)(columns(model), None)


@BOTH
@pytest.mark.parametrize("count", [1, 3])
def test_two_columns_are_asked_for(bert: Path, kind: Any, count: int) -> None:
    model = tiny(bert)
    given = (columns(model) * 2)[:count]
    with pytest.raises(ValueError, match=f"must have two columns of pairs; got {count}"):
        kind(model, schedule="constant")(given, None)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RankClipLoss, {"scale": 0.0}, "scale must be positive and finite; got 0.0"),
        (RankClipLoss, {"scale": math.nan}, "scale must be positive and finite; got nan"),
        (RankClipLoss, {"lists": "column"}, "lists must be"),
        (RankClipLoss, {"base": torch.nn.Linear(2, 2)}, "has parameters, which the trainer would neither"),
        (CachedRankClipLoss, {"mini_batch_size": 0}, "mini_batch_size must be at least 1; got 0"),
    ],
)
def test_wrong_option_is_named(bert: Path, kind: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(tiny(bert), **options)


def test_static_embedding_trains_with_the_plain_loss_and_is_refused_by_the_cached(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(
        ValueError, match="StaticEmbedding cannot be split into mini-batches; use RankClipLoss"
    ):
        CachedRankClipLoss(model)
    lines = steps(train(tmp_path, RankClipLoss(model), model, learning_rate=0.1))
    assert lines[-1]["contrastive_loss"] < lines[0]["contrastive_loss"] + 1


def test_progress_wants_a_loss_of_ours() -> None:
    with pytest.raises(
        ValueError, match="losses must hold a RankClipLoss or CachedRankClipLoss; got Identity"
    ):
        Progress(torch.nn.Identity())


def test_learned_scales_want_one_progress(tmp_path: Path, bert: Path) -> None:
    model = tiny(bert)
    loss, other = (RankClipLoss(model, learn_scale=True) for _ in range(2))
    train(tmp_path, loss, model, callbacks=[Progress(RankClipLoss(model))], max_steps=1)
    with pytest.raises(ValueError, match=r"to one Progress: Progress\(loss, other\)"):
        train(tmp_path, loss, model, callbacks=[Progress(other)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RankClipLoss", "CachedRankClipLoss"])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path, kind: str) -> None:
    results = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        tiny(directory)  # written once, for all of them to read
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
        script = str(Path(__file__).with_name("tiny_sentences.py"))
        command = [sys.executable, *launcher, script, str(directory), str(16 // processes), kind]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(json.loads((directory / "result.json").read_text()))
    (whole, whole_weights, whole_scale), (two, two_weights, two_scale) = results
    assert len(whole) == len(two) == 4
    for a, b in zip(two, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert {name: a[name] for name in TERMS} == pytest.approx({name: b[name] for name in TERMS}, abs=2e-4)
    assert two_scale == pytest.approx(whole_scale, abs=1e-6)
    assert abs(whole_scale - math.log(20)) > 1e-4
    torch.testing.assert_close(torch.tensor(two_weights), torch.tensor(whole_weights), rtol=1e-3, atol=1e-5)
