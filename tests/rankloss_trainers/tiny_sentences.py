"""A tiny sentence-transformers model of random weights, and trainings of it, also in several processes."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from rankloss_trainers import sentence_transformers as ours

WORDS = [f"word{i}" for i in range(40)]
BATCH_OF_PROCESS = 8
"""Pairs of a batch of each of the processes that this file starts."""
datasets.disable_progress_bars()


@functools.cache
def _tiny() -> SentenceTransformer:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{"vocab_size": 45, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "max_position_embeddings": 16},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    with tempfile.TemporaryDirectory() as path:
        vocabulary = Path(path, "vocab.txt")
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        transformers.BertTokenizer(str(vocabulary)).save_pretrained(path)
        transformers.BertModel(config).save_pretrained(path)
        return SentenceTransformer(modules=[Transformer(path), Pooling(16)], device="cpu")


def tiny_model() -> SentenceTransformer:
    """A Bert of one layer, the same at each call; copies are faster than reading its files again."""
    return copy.deepcopy(_tiny())


def pairs(number: int = 32) -> Any:
    """A table with the columns ``image`` and ``text``, both of random texts of two to five words."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (number, 2, 5), generator=generator).tolist()
    texts = [[" ".join(WORDS[i] for i in ids[: 2 + n % 4]) for ids in row] for n, row in enumerate(rows)]
    return datasets.Dataset.from_dict({"image": [a for a, _ in texts], "text": [b for _, b in texts]})


class Trainer(SentenceTransformerTrainer):
    """Takes the pairs as they come."""

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
        return torch.utils.data.BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def train(
    directory: Path,
    loss: Any,
    model: nn.Module,
    *,
    resume: str | None = None,
    kind: type[SentenceTransformerTrainer] = Trainer,
    **given: Any,
) -> Any:
    """Train, by default two epochs of four batches of :func:`pairs` by SGD; returns the trainer.

    Args:
        directory: The output's.
        loss: The loss, or losses by the name of their dataset.
        model: The model.
        resume: A checkpoint to resume from.
        kind: The class of the trainer; :class:`Trainer` gets the callback of the losses, another does not.
        given: Datasets of the trainer, and training arguments.
    """
    keywords = {name: given.pop(name) for name in ("eval_dataset", "train_dataset") if name in given}
    arguments = {
        **{"output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 2},
        **{"logging_steps": 1, "learning_rate": 1e-3, "seed": 0, "dataloader_pin_memory": False},
        **{"save_strategy": "no", "optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"},
        **given,
    }
    keywords.setdefault("train_dataset", pairs())
    if kind is Trainer:
        keywords["callbacks"] = [ours.Progress(*(loss.values() if isinstance(loss, dict) else [loss]))]
    args = SentenceTransformerTrainingArguments(**arguments)
    trainer = kind(model=model, args=args, loss=loss, **keywords)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rank_clip(model: Any, **given: Any) -> ours.ContrastiveLoss:
    """``rankclip`` with its options, and the keywords of a ContrastiveLoss, side by side."""
    names = inspect.signature(ours.ContrastiveLoss).parameters.keys() & given.keys()
    own = {name: given.pop(name) for name in names}
    return ours.ContrastiveLoss(model, "rankclip", given, **own)


def embed(model: Any, *columns: Any) -> list[Tensor]:
    """Unit-norm embeddings of each column's texts."""
    return [F.normalize(model(model.preprocess(list(x)))["sentence_embedding"], dim=-1) for x in columns]


def step(model: nn.Module, loss: Tensor) -> None:
    """One step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_in_plain_loop(
    model: Any,
    loss: nn.Module,
    data: Any,
    batches: Sequence[Sequence[int]],
    scale: float = 20.0,
    given: Callable[[Any], dict[str, Any]] = lambda rows: {},
) -> list[dict[str, float]]:
    """Train in a plain loop on batches of rows, with more inputs of the loss; the terms of each step."""
    log = []
    for number, rows in enumerate(batches, 1):
        if hasattr(loss, "set_progress"):
            loss.set_progress(number, len(batches))
        batch = data.select(rows)
        features = embed(model, batch["image"], batch["text"])
        terms = loss(*features, scale, output_dict=True, **given(rows))
        step(model, sum(terms.values()))
        log.append({name: value.item() for name, value in terms.items()})
    return log


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def trained(directory: Path, kind: str, batch_size: int) -> dict[str, Any]:
    """Log and weights of a training, to compare numbers of processes.

    Args:
        directory: The output's.
        kind: ``plain``; ``cached``, in mini-batches; or ``ids``, whose ids are of padded captions.
        batch_size: Pairs of a process's batch.
    """
    model, data = tiny_model(), pairs()
    loss = rank_clip(model, schedule="linear", mini_batch_size=3 if kind == "cached" else None)
    if kind == "ids":
        model.tokenizer.padding_side = "left"
        positions = model[0].model.embeddings.position_embeddings  # which would count the padding
        torch.nn.init.zeros_(positions.requires_grad_(False).weight)
        loss = ours.ContrastiveLoss(model, "clip-ids")

        def with_captions(row: dict[str, str], number: int) -> dict[str, str]:
            """One caption in every eighth row; one process has long others beside it, the next short ones."""
            if number % 8 == 0:
                return {"text": "word1"}
            is_of_first_process = number % 16 < 8
            return {"text": row["text"] if is_of_first_process else row["text"][:13]}

        data = data.map(with_captions, with_indices=True)
    given = {"per_device_train_batch_size": batch_size, "learning_rate": 0.01, "train_dataset": data}
    trainer = train(directory, loss, model, **given)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {"lines": lines, "weights": weights(trainer.model).tolist()}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    results = {kind: trained(directory, kind, BATCH_OF_PROCESS) for kind in ("plain", "cached", "ids")}
    (directory / f"result-{os.environ['RANK']}.json").write_text(json.dumps(results))
