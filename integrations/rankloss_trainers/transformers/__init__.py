"""Hugging Face's Trainer with a loss of the catalogue.

In a script of one's own::

    from rankloss_trainers.transformers import ContrastiveTrainer

    trainer = ContrastiveTrainer(model, args, train_dataset=pairs, loss="rankclip")

An unmodified script that builds ``transformers.Trainer``::

    python -m rankloss_trainers.transformers run_clip.py … --loss rankclip --rankclip-lambda-in 0.5

The model is any whose output has ``image_embeds`` and ``text_embeds`` and that holds its ``logit_scale`` as a
logarithm (CLIP, SigLIP, ChineseCLIP, AltCLIP, VisionTextDualEncoder, …) or its ``temperature`` (ALIGN).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankloss_trainers.transformers.trainer import ContrastiveTrainer as ContrastiveTrainer
    from rankloss_trainers.transformers.trainer import ContrastiveTrainerMixin as ContrastiveTrainerMixin

__all__ = ["ContrastiveTrainer", "ContrastiveTrainerMixin"]


# A script that `python -m` runs may set environment variables before it imports transformers, so running it
# must not import transformers first.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.trainer"), name)
