"""transformers' Trainer as the runtime knows it."""

from __future__ import annotations

from rankloss.losses import TEACHER
from rankloss_trainers.host import Host

HOST = Host(
    name="transformers' Trainer",
    biased="a model that has a logit_bias",
    teacher=f"give the columns {' and '.join(TEACHER)}, or teacher=FOLDER, of `rankloss features`, "
    "and data that are bound to it",
    progress="train with trainer.train()",
    serves=("ids", "folder", "lists", "state", "teacher"),
)
