"""Tiny models of transformers with random weights, generated pairs, and a run of the Trainer on both."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainerMixin

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw"]
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "pad_token_id": 0}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
CONVOLUTIONS = {
    **{"image_size": 16, "hidden_dim": 8, "width_coefficient": 0.25, "depth_coefficient": 0.25},
    **{"kernel_sizes": [3], "in_channels": [16], "out_channels": [16], "strides": [1]},
    **{"num_block_repeats": [1], "expand_ratios": [1]},
}
CONFIGS: dict[str, Any] = {
    "CLIP": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8},
    "Align": {"text_config": TEXT, "vision_config": CONVOLUTIONS, "projection_dim": 8},
    "Siglip": {
        "text_config": {**TEXT, "projection_size": 16},
        "vision_config": {**VISION, "vision_use_head": True},
    },
    "Siglip2": {
        "text_config": {**TEXT, "projection_size": 16},
        "vision_config": {**TOWER, "num_patches": 4, "patch_size": 8},
    },
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind])
    return getattr(transformers, f"{kind}Model")(config)


def clip() -> Any:
    return build("CLIP")


class Pairs(Dataset[dict[str, Tensor]]):
    """Generated pairs, with more columns on request.

    Args:
        number: How many there are.
        more: ``image`` and ``text``, a teacher's features of these; ``patches``, images as SigLIP 2 takes
            them.
    """

    def __init__(self, number: int = 32, *more: str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(number, 3, 16, 16, generator=generator)
        texts = torch.randint(1, 48, (number, 8), generator=generator)
        texts[:, -1] = 49
        mask = torch.ones(number, 8)
        self.columns = {"pixel_values": images, "input_ids": texts, "attention_mask": mask}
        for modality in sorted({"image", "text"} & {*more}):  # of another dimension than the model's
            features = F.normalize(torch.randn(number, 6, generator=generator), dim=-1)
            self.columns[f"reference_{modality}_features"] = features
        if "patches" in more:
            patches = {"pixel_values": F.unfold(images, 8, stride=8).mT}
            shapes = torch.tensor([2, 2]).expand(number, 2)
            self.columns.update(
                patches, pixel_attention_mask=torch.ones(number, 4).long(), spatial_shapes=shapes
            )

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}

    def batch(self, start: int = 0, end: int | None = None) -> dict[str, Tensor]:
        return {name: column[start:end] for name, column in self.columns.items()}


class Pictures:
    """A processor of 16 × 16 pictures, and of texts that are numbers."""

    def tokenizer(self, texts: list[str], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[1 + int(x)] * 7 + [49] for x in texts])}

    def image_processor(self, pictures: list[Any], **_: Any) -> dict[str, Tensor]:
        pixels = torch.tensor(np.stack([np.asarray(x) for x in pictures])).movedim(3, 1)
        return {"pixel_values": pixels / 255}


class Theirs(transformers.Trainer):
    """A Trainer of one's own, which takes the pairs as they come."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(range(len(self.train_dataset)))


class InOrder(ContrastiveTrainerMixin, Theirs):
    pass


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": 1e-2}
"""Steps proportional to gradients: AdamW's would be signs of rounding errors as well."""


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
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


_KEYWORDS = {
    *{"loss", "loss_options", "teacher", "schedule_unit", "agreement_every"},
    *{"mini_batch_size", "eval_dataset", "callbacks"},
    *{"model_init", "compute_loss_func", "compute_metrics", "data_collator", "processing_class"},
}


def trainer(directory: Path, *, model: Any = None, pairs: Any = None, **given: Any) -> InOrder:
    """A Trainer of a linear RankCLIP, or of what is given: its own keywords, and training arguments."""
    keywords = {name: given.pop(name) for name in _KEYWORDS & given.keys()}
    keywords.setdefault("loss_options", {"schedule": "linear"} if "loss" not in keywords else None)
    if "model_init" not in keywords:
        keywords["model"] = clip() if model is None else model
    pairs = Pairs() if pairs is None else pairs
    return InOrder(args=arguments(directory, **given), train_dataset=pairs, **keywords)


def train(directory: Path, *, resume: Any = None, **given: Any) -> InOrder:
    trained = trainer(directory, **given)
    trained.train(resume_from_checkpoint=resume)
    return trained


def leave() -> None:
    """End the process group of a process that has let its trainer go.

    DDP's reducer must not be the last that holds the group. It destroys it with the GIL held and waits for
    gloo's threads, while one of them may wait for the GIL to let the tensor of the last collective go.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process leaves while another still needs it
        torch.distributed.destroy_process_group()


def lines(trained: Any, key: str = "loss") -> list[dict[str, float]]:
    """The lines of the log that have an entry."""
    return [line for line in trained.state.log_history if key in line]


def column(trained: Any, key: str) -> list[float]:
    """One entry of the log, of all lines that have it."""
    return [line[key] for line in lines(trained, key)]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def own_loop(
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
    optimizer, start, sizes, log = torch.optim.SGD(model.parameters(), lr=1e-2), 0, [*micro_batches], []
    for step in range(1, steps + 1):
        if hasattr(loss, "set_progress"):
            loss.set_progress(step, steps)
        seen = []
        for size in sizes:
            inputs, start = pairs.batch(start, start + size), start + size
            of_loss = {name for name in inputs if name.startswith("reference_")} | (
                {"pair_ids"} & inputs.keys()
            )
            given = {name: inputs.pop(name) for name in of_loss}
            output = model(**inputs)
            entries = loss(
                *(output.image_embeds, output.text_embeds, model.logit_scale.exp()), output_dict=True, **given
            )
            terms = {name: value for name, value in entries.items() if name.endswith("_loss")}
            (sum(terms.values()) / len(sizes)).backward()
            seen.append({name: value.item() for name, value in terms.items()})
        optimizer.step()
        optimizer.zero_grad()
        log.append({name: sum(terms[name] for terms in seen) / len(seen) for name in seen[0]})
    return log
