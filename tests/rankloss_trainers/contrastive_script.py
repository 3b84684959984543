"""A script laid out like transformers' run_clip.py that knows nothing of rankloss; it makes its data."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass, field

os.environ["HF_HUB_CACHE"] = "/set/by/the/script"

import torch
import transformers
from tiny_pairs import Pairs, tiny_clip
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    kind: str = field(default="clip", metadata={"help": "clip, or a model without embeddings"})
    trainer: str = field(default="Trainer", metadata={"help": "which Trainer the script builds"})


def collate_fn(examples: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    columns = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return {**columns, "return_loss": True}


class OwnLoss(Trainer):
    """Trains the model's own loss, in place of the Trainer's."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, object], *_: object, **__: object
    ) -> object:
        return model(**inputs).loss


class WrappedLoss(Trainer):
    """Trains the loss of the Trainer that it is derived from."""

    def compute_loss(self, *args: object, **kwargs: object) -> object:
        return super().compute_loss(*args, **kwargs)


class OwnStep(Trainer):
    """Trains the model's own loss, in a step that does not ask the Trainer for one."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, object], *_: object) -> torch.Tensor:
        loss: torch.Tensor = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Derived(Trainer):
    """Changes nothing."""


class Classifier(torch.nn.Module):
    """A model without embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)

    def forward(self, pixel_values: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(pixel_values).square().mean()}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    model = tiny_clip() if model_args.kind == "clip" else Classifier()
    if model_args.trainer == "none":
        sys.exit()
    if model_args.trainer == "loop":  # whose step is to be stopped where a loss is asked for
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**collate_fn([Pairs(4)[i] for i in range(4)]))["loss"].backward()
        optimizer.step()
        raise AssertionError("an optimizer took a step")
    trainers = {
        "Trainer": Trainer,
        "OwnLoss": OwnLoss,
        "WrappedLoss": WrappedLoss,
        "OwnStep": OwnStep,
        "Derived": Derived,
    }
    trainer = trainers[model_args.trainer](
        model=model,
        args=training_args,
        train_dataset=Pairs(32) if training_args.do_train else None,
        eval_dataset=Pairs(16) if training_args.do_eval else None,
        data_collator=collate_fn,
    )
    if training_args.do_train:
        result = trainer.train()
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    # In the process of a test transformers had been imported before.
    assert "pytest" in sys.modules or transformers.utils.hub.constants.HF_HUB_CACHE == "/set/by/the/script"


if __name__ == "__main__":
    main()
    gc.collect()  # the trainer's DDP must not outlive the group, see tiny_transformers.leave_process_group
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
