"""RankCLIP's loss in sentence-transformers' trainer, on a tiny model of random weights."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import TestCase

import datasets
import pytest
import torch
import torch.nn.functional as F
from launch import torchrun
from other_values import OTHER_VALUES
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_sentences import (
    BATCH_OF_PROCESS,
    embed,
    pairs,
    rank_clip,
    step,
    tiny_model,
    train,
    train_in_plain_loop,
    trained,
    weights,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import ConcatDataset
from transformers import TrainerState

import rankloss
from rankloss import schedules
from rankloss_trainers.option import options_of
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.sentence_transformers import ContrastiveLoss, Progress

SCALE_OF_RUN = 30.0
TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw"]


def columns(model: Any) -> list[dict[str, Any]]:
    """The two columns of eight pairs, tokenized as the trainer gives them to a loss."""
    chosen = pairs(8)
    return [model.preprocess(list(chosen[name])) for name in ("image", "text")]


def at_step(loss: Any, step: int) -> Any:
    """The loss at a step of a training of four, as the trainer's callback would tell it."""
    for part in loss.modules():
        if isinstance(part, ContrastiveLoss):
            part.run.set_progress(step, 4)
    return loss


def log_of_steps(trainer: Any) -> list[dict[str, float]]:
    """The lines of a trainer's log that are of training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def adapted() -> Any:
    """The model with adapters."""
    peft = pytest.importorskip("peft")
    model = tiny_model()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    model[0].auto_model = peft.get_peft_model(model[0].auto_model, config)
    return model


@dataclass(frozen=True)
class Run:
    """A training of the trainer, and the same steps of an own loop."""

    messages: str
    """What the trainer's run said in the log of ``rankloss_trainers``, a line each."""
    steps: list[dict[str, float]]
    """The trainer's log of each step."""
    terms: list[dict[str, float]]
    """The terms of each step of the own loop."""
    start: torch.Tensor
    """The weights before."""
    trained: torch.Tensor
    """The weights after the trainer's steps."""
    of_own_loop: torch.Tensor
    """The weights after the own loop's steps."""


@pytest.fixture(
    scope="module",
    params=[(tiny_model, None), (tiny_model, 3), (adapted, None), (adapted, 3)],
    ids=["whole", "mini-batches", "adapters", "adapters, mini-batches"],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    make, mini_batch_size = request.param
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)  # peft asks for it
        start, model, own = make(), make(), make()
    options = {"schedule": "linear", "lambda_in": 0.5, "top_k": 3}
    loss = rank_clip(model, scale=SCALE_OF_RUN, mini_batch_size=mini_batch_size, **options)
    with TestCase().assertLogs("rankloss_trainers", logging.INFO) as logs:
        trainer = train(tmp_path_factory.mktemp("run"), loss, model, learning_rate=0.1)
    batches_of_epoch = [range(row, row + 8) for row in (0, 8, 16, 24)]
    own_loss = rankloss.RankClipLoss(**options)
    terms = train_in_plain_loop(own, own_loss, pairs(), 2 * batches_of_epoch, scale=SCALE_OF_RUN)
    return Run(
        messages="\n".join(logs.output),
        steps=log_of_steps(trainer),
        terms=terms,
        start=weights(start),
        trained=weights(model),
        of_own_loop=weights(own),
    )


def test_a_run_trains_as_an_own_loop(run: Run) -> None:
    assert not torch.allclose(run.of_own_loop, run.start, atol=1e-4)
    torch.testing.assert_close(run.trained, run.of_own_loop, rtol=1e-4, atol=1e-5)


def test_a_run_logs_the_terms_of_each_step_and_their_sum(run: Run) -> None:
    for line, terms in zip(run.steps, run.terms, strict=True):
        # The trainer rounds what it logs of a loss to four decimals.
        assert {name: line[name] for name in TERMS} == pytest.approx(terms, abs=1e-4)
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), abs=2e-4)


def test_a_run_logs_its_schedule_and_metrics_of_ranks_once_it_has_left_zero(run: Run) -> None:
    for number, line in enumerate(run.steps):
        assert line["rank_lambda"] == pytest.approx(schedules.linear(number + 1, 8), abs=1e-4)
        assert (line.keys() >= {*METRICS}) == (number > 0)  # λ is 0 at the first step
    assert len(run.steps) == 8


def test_a_run_says_its_loss_and_schedule(run: Run) -> None:
    assert "Loss: rankclip (rankloss" in run.messages
    assert "schedule per step over 2 epoch(s)" in run.messages


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_of_a_model_with_adapters_these_alone_change(tmp_path: Path) -> None:
    model = adapted()
    train(tmp_path, rank_clip(model, schedule="constant"), model, learning_rate=0.1)
    both = zip(adapted().named_parameters(), model.parameters(), strict=True)
    changed = [name for (name, x), y in both if not torch.equal(x, y)]
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_an_evaluation_is_of_the_base_alone(tmp_path: Path, mini_batch_size: int | None) -> None:
    model, scale = tiny_model(), 30.0
    loss = rank_clip(model, scale=scale, mini_batch_size=mini_batch_size, schedule="constant")
    held_out = pairs(8 + 8 + 1)  # the trainer's batches are of 8; the loss of a last one of 1 is 0
    evaluation = {"eval_strategy": "epoch", "eval_dataset": held_out}
    trainer = train(tmp_path, loss, model, learning_rate=0.1, **evaluation)
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    total = 0.0  # over pairs, of the two whole batches
    with torch.no_grad():
        for start in (0, 8):
            batch = held_out.select(range(start, start + 8))
            images, texts = embed(model, batch["image"], batch["text"])
            total += 8 * rankloss.ClipLoss()(images, texts, scale).item()
    assert evaluated[-1]["eval_loss"] == pytest.approx(total / len(held_out), rel=1e-4)
    logged = {name for line in evaluated for name in line}
    assert not [name for name in logged if "modal" in name]  # no rank term


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_every_option_of_a_run_is_a_keyword_of_the_loss(name: str, value: Any) -> None:
    shown = inspect.signature(ContrastiveLoss).parameters[name]
    assert shown.default == options_of(RunOptions)[name].default
    loss = ContrastiveLoss(tiny_model(), **{name: value})
    assert loss.run.options == RunOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "advice"),
    [("agrement_every", "did you mean agreement_every"), ("top_k", "options of the loss .* options=")],
)
def test_a_keyword_that_is_no_option_of_a_run_is_refused(name: str, advice: str) -> None:
    with pytest.raises(TypeError, match=f"ContrastiveLoss has no keyword '{name}'; {advice}"):
        ContrastiveLoss(tiny_model(), **{name: 3})


@pytest.mark.parametrize(("unit", "logging_steps"), [("epoch", 4), ("step", 1), ("step", 6)])
def test_raw_terms_are_logged_where_no_step_of_a_line_lacks_them(
    tmp_path: Path, unit: str, logging_steps: int
) -> None:
    """Without a learning rate, of equal batches: λ is 0 in a third of the training, the term the same."""
    loss = rank_clip(tiny_model(), schedule="official", schedule_unit=unit)
    one_batch = {"train_dataset": pairs(8), "per_device_train_batch_size": 8, "learning_rate": 0.0}
    trainer = train(tmp_path, loss, loss.model, num_train_epochs=24, logging_steps=logging_steps, **one_batch)
    lines = log_of_steps(trainer)
    assert not any("in_modal_raw" in line for line in lines if line["rank_lambda"] == 0)
    raw = [line["in_modal_raw"] for line in lines if "in_modal_raw" in line]
    assert len(lines) / 2 <= len(raw) < len(lines), "in two thirds, but for lines that have both"
    assert raw[0] > 0.1, "there is a term"
    assert raw == pytest.approx([raw[0]] * len(raw), abs=2e-4)  # the trainer rounds to four decimals


def test_cached_loss_embeds_a_mini_batch_at_a_time() -> None:
    model = tiny_model()
    rows: list[int] = []
    model[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]["input_ids"])))
    loss = at_step(rank_clip(model, mini_batch_size=3), 2)
    sum(loss(columns(model), None).values()).backward()
    # Eight rows are 3 + 3 + 2, of two columns, each embedded again in the backward pass.
    assert sorted(rows) == [2] * 4 + [3] * 8


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    """Three times the same batch is one."""
    model, own = tiny_model(), tiny_model()
    loss = rank_clip(model, schedule="linear", mini_batch_size=3)
    repeated = datasets.concatenate_datasets([pairs(8)] * 6)
    options = {"max_steps": 2, "gradient_accumulation_steps": 3, "learning_rate": 0.1}
    trainer = train(tmp_path, loss, model, train_dataset=repeated, **options)
    assert [line["rank_lambda"] for line in log_of_steps(trainer)] == [0, 1]
    train_in_plain_loop(own, rankloss.RankClipLoss(schedule="linear"), pairs(8), [range(8)] * 2)
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-4, atol=1e-5)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(resume: str | None) -> tuple[torch.Tensor, list[float]]:
        model = tiny_model()
        given = {"save_strategy": "epoch", "num_train_epochs": 2, "optim": "adamw_torch"}
        trainer = train(tmp_path, rank_clip(model), model, resume=resume, **given)
        return weights(model), [line["rank_lambda"] for line in log_of_steps(trainer)]

    whole_weights, whole_lambdas = run(None)
    # From the checkpoint of the first of two epochs, whose log it goes on with.
    resumed_weights, resumed_lambdas = run(str(tmp_path / "checkpoint-4"))
    assert torch.equal(resumed_weights, whole_weights)
    assert resumed_lambdas == whole_lambdas


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_a_model_of_another_dtype_has_the_loss_but_for_its_rounding(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    def losses(dtype: torch.dtype) -> list[float]:
        model = tiny_model().to(dtype)
        trainer = train(tmp_path, rank_clip(model, schedule="constant"), model, max_steps=3)
        return [line["loss"] for line in log_of_steps(trainer)]

    assert losses(dtype) == pytest.approx(losses(torch.float32), rel=tolerance)


def test_a_checkpoint_of_another_trainer_is_an_error_that_says_so(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    model = tiny_model()
    train(tmp_path, rank_clip(model), model, **given)
    file = tmp_path / "checkpoint-2/trainer_state.json"
    saved = json.loads(file.read_text())
    (state,) = saved["stateful_callbacks"]["rankloss"]
    saved["stateful_callbacks"]["rankloss"] = state  # as Hugging Face's Trainer has it
    file.write_text(json.dumps(saved))
    model = tiny_model()
    with pytest.raises(ValueError, match=r"the state of another trainer's loss; got .*rankclip"):
        train(tmp_path, rank_clip(model), model, resume=str(file.parent), **{**given, "max_steps": 4})


def test_resumed_run_of_another_length_is_one_warning_that_shows_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"save_strategy": "epoch", "optim": "adamw_torch"}
    # A first run of two epochs; the same, resumed after one; and one of three, resumed there.
    for epochs, resume, count in ((2, None, 0), (2, "checkpoint-4", 0), (3, "checkpoint-4", 1)):
        caplog.clear()
        model, path = tiny_model(), resume and str(tmp_path / resume)
        train(tmp_path, rank_clip(model), model, resume=path, num_train_epochs=epochs, **given)
        assert caplog.text.count("trained with rankclip: rankclip per step over 8 step(s)") == count
    assert "this run trains with rankclip: rankclip per step over 12 step(s)" in caplog.text


@pytest.mark.parametrize("is_plain", [False, True], ids=["of rankloss", "of sentence-transformers"])
def test_resumed_run_of_another_loss_is_one_warning_that_shows_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_plain: bool
) -> None:
    model = tiny_model()
    given: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 1}
    if is_plain:
        before = "no loss of rankloss"
        train(tmp_path, MultipleNegativesRankingLoss(model), model, kind=SentenceTransformerTrainer, **given)
    else:
        before = "spread (weight 1)"
        train(tmp_path, ContrastiveLoss(model, "spread", {"weight": 1}), model, **given)
    model = tiny_model()
    path = str(tmp_path / "checkpoint-4")
    train(tmp_path, ContrastiveLoss(model, "spread"), model, resume=path, num_train_epochs=2)
    told = f"The checkpoint was trained with {before}; this run trains with spread"
    assert [message for message in caplog.messages if "trained with" in message] == [told]


def test_loss_of_an_earlier_training_does_not_train_without_progress(tmp_path: Path) -> None:
    """Its λ would be the last of the first training."""
    model = tiny_model()
    loss = rank_clip(model)
    train(tmp_path, loss, model, max_steps=2)
    with pytest.raises(
        RuntimeError, match=r"not told where training stands: .*callbacks=\[Progress\(loss\)\]"
    ):
        train(tmp_path, loss, model, max_steps=2, kind=SentenceTransformerTrainer)


class Fault(Exception):
    """The error that ends a training."""


def fail(*_: Any) -> None:
    """A hook that ends a training."""
    raise Fault


@pytest.mark.parametrize("place", ["a forward pass", "an optimizer step"])
def test_loss_of_a_training_that_an_error_ended_does_not_train_without_progress(
    tmp_path: Path, place: str
) -> None:
    model = tiny_model()
    loss = rank_clip(model)
    hook = model.register_forward_hook(fail)
    if place == "an optimizer step":
        hook.remove()
        hook = register_optimizer_step_pre_hook(fail)
    with pytest.raises(Fault):
        train(tmp_path, loss, model, max_steps=2)
    hook.remove()
    with pytest.raises(RuntimeError, match="not told where training stands"):
        train(tmp_path, loss, model, max_steps=2, kind=SentenceTransformerTrainer)


def test_several_datasets_on_several_processes_are_refused_unless_their_losses_do_not_gather() -> None:
    """At one step, each process may have a batch of another dataset."""
    model = tiny_model()
    several, single = ConcatDataset([pairs(), pairs()]), pairs()
    args = SimpleNamespace(dataloader_drop_last=True, gradient_accumulation_steps=1)
    state = TrainerState(num_train_epochs=1, max_steps=1)

    def begin(gather: Any, data: Any) -> None:
        loader = torch.utils.data.DataLoader(data, 8)
        Progress(rank_clip(model, gather=gather)).on_train_begin(args, state, None, train_dataloader=loader)

    gather = rankloss.Gather(rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"several datasets on several processes.* gather=False"):
        begin(gather, several)
    begin(gather, single)
    begin(False, several)


def test_the_losses_of_several_datasets_are_told_of_every_step_and_log_in_turns(tmp_path: Path) -> None:
    model = tiny_model()
    losses = {name: rank_clip(model, schedule="linear", agreement_every=2) for name in "ab"}
    sets = datasets.DatasetDict({name: pairs(16) for name in losses})
    given = {"num_train_epochs": 1, "multi_dataset_batch_sampler": "round_robin"}
    trainer = train(tmp_path, losses, model, train_dataset=sets, **given)
    expected = pytest.approx([schedules.linear(i, 4) for i in range(1, 5)], abs=1e-4)
    assert [line["rank_lambda"] for line in log_of_steps(trainer)] == expected
    assert all("in_modal_tau" in line for line in log_of_steps(trainer))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(
            lambda model: ContrastiveLoss(model, "tiny-caption", {"caption_key": "x"}),
            "tiny-caption needs a column",
            id="a loss of a second caption",
        ),
        pytest.param(
            lambda model: ContrastiveLoss(model, torch.nn.BatchNorm1d(16, affine=False)),
            "BatchNorm1d needs a state",
            id="a module with a state",
        ),
        pytest.param(
            lambda model: rank_clip(model, mini_batch_size=0),
            "mini_batch_size must be an integer of at least 1",
            id="mini-batches of no pairs",
        ),
        pytest.param(
            lambda model: ContrastiveLoss(model, "ranked-lists"),
            "^ranked-lists .*RankedListsLoss",
            id="a loss of lists",
        ),
        pytest.param(
            lambda model: ContrastiveLoss(model, "rankclip-in", teacher="text=other"),
            "teacher.*`rankloss features --text-encoder other --data PAIRS --output FOLDER`.*teacher=FOLDER",
            id="a teacher that is no folder",
        ),
        pytest.param(
            lambda _model: Progress(torch.nn.Identity()),
            "losses must hold a loss of rankloss_trainers; got Identity",
            id="progress of another module",
        ),
    ],
)
def test_a_loss_that_cannot_be_built_is_refused_by_its_argument(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny_model())


@pytest.mark.parametrize(("count", "advice"), [(1, ""), (3, ".*RankedListsLoss")])
def test_another_number_of_columns_than_two_is_refused(count: int, advice: str) -> None:
    """Three may be meant as lists of candidates."""
    model = tiny_model()
    features = columns(model)[:1] * count
    with pytest.raises(ValueError, match=f"^sentence_features .*got {count}{advice}"):
        ContrastiveLoss(model, "clip-streamed")(features)


def test_a_scale_of_0_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        at_step(rank_clip(model, scale=0.0), 2)(columns(model))


def test_column_that_cannot_be_split_is_named() -> None:
    model = tiny_model()
    features = columns(model)
    features[1]["pixel_values"] = torch.zeros(11, 3)
    with pytest.raises(ValueError, match=r"mini_batch_size cannot split pixel_values: .* of 8 rows"):
        at_step(rank_clip(model, mini_batch_size=3), 2)(features)


# --- ids of pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["captions", "label"])
def test_a_run_of_sentence_transformers_trains_with_the_ids_of_its_data(tmp_path: Path, key: str) -> None:
    model, own = tiny_model(), tiny_model()
    columns = pairs().select(range(8)).to_dict()
    columns["text"][1] = columns["text"][6] = columns["text"][0]
    data = dict(columns)
    ids = [7, 7, 1, 2, 3, 4, 7, 5]  # as the captions are equal
    if key == "label":
        data["label"] = ids = [0, 1, 0, 2, 2, 3, 4, 5]
    loss = ContrastiveLoss(model, "clip-ids", {"key": key})
    table = datasets.Dataset.from_dict(data)
    train(tmp_path, loss, model, train_dataset=table, max_steps=1, learning_rate=0.1)
    own_loss, default_scale = rankloss.ClipLoss(same_id="ignore"), 20.0
    step(own, own_loss(*embed(own, *columns.values()), default_scale, pair_ids=torch.tensor(ids)))
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_the_spread_stands_on_the_loss_of_ids(tmp_path: Path, mini_batch_size: int | None) -> None:
    model, own = tiny_model(), tiny_model()
    labels = [0, 1, 0, 2, 2, 3, 4, 5]
    rows = pairs().select(range(8)).to_dict()
    options = {"spread": {"weight": 0.5}, "clip-ids": {"key": "label"}}
    loss = ContrastiveLoss(model, "spread+clip-ids", options, mini_batch_size=mini_batch_size)
    data = datasets.Dataset.from_dict({**rows, "label": labels})
    train(tmp_path, loss, model, train_dataset=data, max_steps=1, learning_rate=0.1)
    expected = rankloss.SpreadLoss(rankloss.ClipLoss(same_id="ignore"), weight=0.5)
    step(own, expected(*embed(own, *rows.values()), 20.0, pair_ids=torch.tensor(labels)))
    torch.testing.assert_close(weights(model), weights(own), rtol=1e-4, atol=1e-5)


def bags_of_words() -> SentenceTransformer:
    """A model of a StaticEmbedding, whose texts stand in one row, one behind the other."""
    words = {word: n for n, word in enumerate(["[UNK]", "a", "b", "c"])}
    static = StaticEmbedding(Tokenizer(WordLevel(words, unk_token="[UNK]")), embedding_dim=8)
    static.tokenizer.pre_tokenizer = Whitespace()
    return SentenceTransformer(modules=[static], device="cpu")


def test_bags_of_words_that_no_mini_batch_could_split_are_refused() -> None:
    with pytest.raises(ValueError, match="mini_batch_size cannot split the inputs of a Static"):
        rank_clip(bags_of_words(), mini_batch_size=3)


def test_equal_captions_are_known_in_bags_of_words() -> None:
    model = bags_of_words()
    texts = ["a b", "b a", "b", "a b", "c"]
    columns = [model.preprocess(x) for x in (["a", "b", "c", "a b c", "c b"], texts)]
    entries = ContrastiveLoss(model, "clip-ids")(columns)
    both = [F.normalize(model(column)["sentence_embedding"], dim=-1) for column in columns]
    ids = torch.tensor([1, 2, 3, 1, 4])  # the first and the fourth text are equal
    expected = rankloss.ClipLoss(same_id="ignore")(*both, 20.0, pair_ids=ids)
    torch.testing.assert_close(entries["contrastive_loss"], expected)


def single_pair(model: Any) -> list[dict[str, Any]]:
    """The two columns of one pair, tokenized."""
    return [model.preprocess(list(pairs(1)[name])) for name in ("image", "text")]


def test_a_first_batch_of_one_pair_is_an_error() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="at least two pairs"):
        at_step(rank_clip(model, schedule="constant"), 1)(single_pair(model))


def test_a_last_pair_after_others_counts_0(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    loss = rank_clip(model, schedule="constant")
    single = single_pair(model)
    sum(at_step(loss, 1)(columns(model)).values()).backward()
    model.zero_grad()
    for _ in range(2):
        total = sum(at_step(loss, 2)(single).values())
        assert total == 0
        total.backward()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    assert gradients, "which DDP expects"
    assert all((gradient == 0).all() for gradient in gradients)
    assert caplog.text.count("A batch of one pair counts 0: rankclip") == 1


def test_a_loss_of_another_model_is_refused(tmp_path: Path) -> None:
    """It would embed by its own model, and the trainer's would not change."""
    with pytest.raises(ValueError, match="ContrastiveLoss was built with another model than the trainer's"):
        train(tmp_path, ContrastiveLoss(tiny_model()), tiny_model())


@pytest.mark.parametrize("name", ["rankclip", "clip-ids"])
@pytest.mark.parametrize("label", [0.3, 1])
def test_labels_that_are_not_used_are_one_warning(
    caplog: pytest.LogCaptureFixture, name: str, label: float
) -> None:
    model = tiny_model()
    loss = ContrastiveLoss(model, name)
    for _ in range(2):
        at_step(loss, 1)(columns(model), torch.tensor([label] * 8))
    (message,) = caplog.messages
    assert f"{name} does not use the column label" in message


@pytest.mark.parametrize(
    ("name", "options", "labels"),
    [
        pytest.param("clip-ids", {"key": "label"}, torch.arange(8), id="ids"),
        pytest.param("rankclip", {}, F.normalize(torch.randn(8, 2, 5), dim=-1), id="a teacher's features"),
        pytest.param("rankclip", {}, None, id="missing"),
    ],
)
def test_labels_that_are_used_or_missing_are_no_warning(
    caplog: pytest.LogCaptureFixture, name: str, options: dict[str, Any], labels: torch.Tensor | None
) -> None:
    model = tiny_model()
    at_step(ContrastiveLoss(model, name, options), 1)(columns(model), labels)
    assert not caplog.messages


def test_a_label_of_one_value_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_model()
    before = weights(model)
    data = pairs().add_column("label", [7] * 32)
    loss = ContrastiveLoss(model, "clip-ids", {"key": "label"})
    with pytest.raises(ValueError, match="column label has one value in all 32 rows"):
        train(tmp_path, loss, model, train_dataset=data)
    assert torch.equal(weights(model), before)


def test_ids_of_a_column_that_sentence_transformers_hands_to_no_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^key .*'group'"):
        ContrastiveLoss(tiny_model(), "clip-ids", {"key": "group"})


# --- several processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    torchrun(str(Path(__file__).with_name("tiny_sentences.py")), tmp_path)
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    for kind in results[0]:
        whole = trained(tmp_path, kind, batch_size=2 * BATCH_OF_PROCESS)
        assert len(whole["lines"]) == 4, "two epochs of 32 pairs in batches of 16"
        for of_process in (result[kind] for result in results):
            for line, expected in zip(of_process["lines"], whole["lines"], strict=True):
                for name in {"loss", *TERMS} & expected.keys():
                    assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-4)
            weights_of_process, weights_of_one = (
                torch.tensor(result["weights"]) for result in (of_process, whole)
            )
            torch.testing.assert_close(weights_of_process, weights_of_one, rtol=1e-3, atol=1e-5)
