"""A run of transformers' Trainer on the tiny pairs, and a plain loop."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_pairs import Pairs, tiny_clip
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainerMixin

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw"]
LOG_ROUNDING = 5e-5 if int(transformers.__version__.partition(".")[0]) < 5 else 0.0
"""The rounding of a logged ``loss``: releases before 5 give it four decimals. Entries have all."""


class PictureProcessor:
    """A processor of 16 × 16 pictures, and of texts that are numbers."""

    def tokenizer(self, texts: list[str], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[1 + int(x)] * 7 + [49] for x in texts])}

    def image_processor(self, pictures: list[Any], **_: Any) -> dict[str, Tensor]:
        pixels = torch.tensor(np.stack([np.asarray(x) for x in pictures])).movedim(3, 1)
        return {"pixel_values": pixels / 255}


def graded_table(*, queries_are_texts: bool, number: int = 8, **more: Any) -> Any:
    """Lists of one to four candidates, some in several lists; grades are tied or −∞ here and there.

    Args:
        queries_are_texts: Whether the queries are texts and the candidates pictures, or the other way round.
        number: How many lists there are.
        more: Columns; None leaves one of the table's own out.
    """
    noise = np.random.default_rng(1)
    pixels = noise.integers(0, 256, (number + 3, 16, 16, 3), dtype=np.uint8)
    pictures, texts = [Image.fromarray(x) for x in pixels], [f"{n}" for n in range(12)]
    queries, pool = (texts, pictures) if queries_are_texts else (pictures, texts)
    cycle = [3.0, 1.0, 1.0, -math.inf]
    candidates, grades = [], []
    for n in range(number):
        size = 1 + n % 4
        candidates.append([pool[(n + 2 * k) % (number + 2)] for k in range(size)])
        grades.append([cycle[(n + k) % 4] for k in range(size)])
    columns = {"query": queries[:number], "candidates": candidates, "grades": grades, **more}
    return datasets.Dataset.from_dict({name: x for name, x in columns.items() if x is not None})


class Theirs(transformers.Trainer):
    """A Trainer of one's own, which takes the pairs as they come."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(range(len(self.train_dataset)))


class InOrder(ContrastiveTrainerMixin, Theirs):
    """The tested Trainer, on the pairs as they come."""


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": 1e-2}
"""Steps proportional to gradients: AdamW's would be signs of rounding errors as well."""


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a quiet run on the CPU, by default two epochs of batches of eight, with changes."""
    given = {
        **{"output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 2},
        **{"logging_steps": 1, "learning_rate": 1e-2, "seed": 0},
        **{"dataloader_pin_memory": False, "save_strategy": "no"},
        **changes,
    }
    # Releases before 5 keep the precision, and the compiler, of the process's first Trainer.
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    return TrainingArguments(**given)


def build_trainer(directory: Path, *, model: Any = None, pairs: Any = None, **given: Any) -> InOrder:
    """A Trainer of a linear RankCLIP, or of what is given: its own keywords, and training arguments."""
    own = given.keys() - {x.name for x in dataclasses.fields(TrainingArguments)}
    keywords = {name: given.pop(name) for name in own}
    keywords.setdefault("loss_options", {"schedule": "linear"} if "loss" not in keywords else None)
    if "model_init" not in keywords:
        keywords["model"] = tiny_clip() if model is None else model
    pairs = Pairs() if pairs is None else pairs
    return InOrder(args=arguments(directory, **given), train_dataset=pairs, **keywords)


def train(directory: Path, *, resume: Any = None, **given: Any) -> InOrder:
    """Train what :func:`build_trainer` builds, from the beginning or from a checkpoint."""
    trained = build_trainer(directory, **given)
    trained.train(resume_from_checkpoint=resume)
    return trained


def leave_process_group() -> None:
    """End the process group of a process that has let its trainer go.

    DDP's reducer must not be the last that holds the group. It destroys it with the GIL held and waits for
    gloo's threads, while one of them may wait for the GIL to let the tensor of the last collective go.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process leaves while another still needs it
        torch.distributed.destroy_process_group()


def logged_lines(trained: Any, key: str = "loss") -> list[dict[str, float]]:
    """The lines of the log that have an entry."""
    return [line for line in trained.state.log_history if key in line]


def logged_values(trained: Any, key: str) -> list[float]:
    """One entry of the log, of all lines that have it."""
    return [line[key] for line in logged_lines(trained, key)]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_in_plain_loop(
    model: Any, loss: nn.Module, pairs: Pairs, micro_batches: Iterable[int], steps: int = 3
) -> list[dict[str, float]]:
    """Train in a plain loop: at each step a batch, or several whose losses are averaged.

    Args:
        model: The model, which is trained.
        loss: The loss.
        pairs: The pairs, as they come.
        micro_batches: The sizes of the batches of one step.
        steps: Optimizer steps.

    Returns:
        The terms of each step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sizes, start, log = [*micro_batches], 0, []
    for step in range(1, steps + 1):
        if hasattr(loss, "set_progress"):
            loss.set_progress(step, steps)
        of_batches = []
        for size in sizes:
            columns = pairs.batch(start, start + size)
            start += size
            of_loss = {name: x for name, x in columns.items() if name.startswith(("reference_", "pair_ids"))}
            output = model(**{name: x for name, x in columns.items() if name not in of_loss})
            features = (output.image_embeds, output.text_embeds, model.logit_scale.exp())
            entries = loss(*features, output_dict=True, **of_loss)
            terms = {name: value for name, value in entries.items() if name.endswith("_loss")}
            (sum(terms.values()) / len(sizes)).backward()
            of_batches.append({name: value.item() for name, value in terms.items()})
        optimizer.step()
        optimizer.zero_grad()
        names = of_batches[0]
        log.append({name: sum(terms[name] for terms in of_batches) / len(of_batches) for name in names})
    return log
