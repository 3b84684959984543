"""Tiny models of transformers with random weights, generated pairs, and a run of the Trainer on both."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainer

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw"]
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "pad_token_id": 0}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}


def clip() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    return transformers.CLIPModel(config)


def chinese_clip() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    return transformers.ChineseCLIPModel(config)


def alt_clip() -> nn.Module:
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 12, "project_dim": 8}  # positions begin after the padding's
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return transformers.AltCLIPModel(config)


def align() -> nn.Module:
    torch.manual_seed(0)
    stages = {
        name: [number]
        for name, number in (
            *(("kernel_sizes", 3), ("in_channels", 16), ("out_channels", 16), ("strides", 1)),
            *(("num_block_repeats", 1), ("expand_ratios", 1)),
        )
    }
    sizes = {"image_size": 16, "hidden_dim": 8, "width_coefficient": 0.25, "depth_coefficient": 0.25}
    config = transformers.AlignConfig(text_config=TEXT, vision_config={**sizes, **stages}, projection_dim=8)
    return transformers.AlignModel(config)


def dual_encoder() -> nn.Module:
    torch.manual_seed(0)
    vision = transformers.ViTConfig(**VISION)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, transformers.BertConfig(**TEXT), projection_dim=8
    )
    return transformers.VisionTextDualEncoderModel(config)


def siglip() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": 16}, vision_config={**VISION, "vision_use_head": True}
    )
    return transformers.SiglipModel(config)


def siglip2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Siglip2Config(
        text_config={**TEXT, "projection_size": 16},
        vision_config={**TOWER, "num_patches": 4, "patch_size": 8},
    )
    return transformers.Siglip2Model(config)


class Pairs(Dataset[dict[str, Tensor]]):
    """Generated pairs, the ``repeat``-th time the same ``distinct`` ones."""

    def __init__(self, number: int = 32, distinct: int | None = None) -> None:
        self.number, self.distinct = number, distinct or number
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(self.distinct, 3, 16, 16, generator=generator)
        self.texts = torch.randint(1, 48, (self.distinct, 8), generator=generator)
        self.texts[:, -1] = 49

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        i %= self.distinct
        return {"pixel_values": self.images[i], "input_ids": self.texts[i], "attention_mask": torch.ones(8)}


class Patches(Pairs):
    """Pairs whose images are patches, as SigLIP 2 takes them."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pair = super().__getitem__(i)
        patches = F.unfold(pair["pixel_values"], 8, stride=8).T
        shape = {"pixel_attention_mask": torch.ones(4).long(), "spatial_shapes": torch.tensor([2, 2])}
        return {**pair, "pixel_values": patches, **shape}


class Taught(Pairs):
    """Pairs with a teacher's features of another dimension."""

    def __init__(self, *modalities: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.features = {
            f"reference_{modality}_features": F.normalize(
                torch.randn(len(self), 6, generator=generator), dim=-1
            )
            for modality in ("image", "text")
            if modality in modalities
        }

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {**super().__getitem__(i), **{name: x[i] for name, x in self.features.items()}}


class InOrder:
    """A Trainer that takes the pairs as they come."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(range(len(self.train_dataset)))  # type: ignore[attr-defined]


class Trainer(InOrder, ContrastiveTrainer):
    pass


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    given = {
        **{"output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 2},
        **{"logging_steps": 1, "learning_rate": 1e-2, "remove_unused_columns": False, "seed": 0},
        **{"dataloader_pin_memory": False, "save_strategy": "no"},
        **changes,
    }
    # Releases before 5 keep the precision of the process's first Trainer.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    return TrainingArguments(**given)


def train(directory: Path, *, model: nn.Module | None = None, pairs: Any = None, **given: Any) -> Trainer:
    names = {"loss", "loss_options", "gather", "eval_dataset", "callbacks", "compute_metrics"}
    keywords = {name: given.pop(name) for name in names & given.keys()}
    resume = given.pop("resume", None)
    keywords.setdefault("loss_options", {"schedule": "linear"} if "loss" not in keywords else None)
    trainer = Trainer(
        model=model or clip(), args=arguments(directory, **given), train_dataset=pairs or Pairs(), **keywords
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Terminated(transformers.TrainerCallback):
    """What SIGTERM does after its grace period, here at the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            signal.getsignal(signal.SIGTERM).__self__.is_checkpoint_requested = True


def leave() -> None:
    """End the process group of a process that has let its trainer go.

    DDP's reducer must not be the last that holds the group. It destroys it with the GIL held and waits for
    gloo's threads, while one of them may wait for the GIL to let the tensor of the last collective go.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process leaves while another still needs it
        torch.distributed.destroy_process_group()


def steps(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
