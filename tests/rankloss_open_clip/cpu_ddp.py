"""Start open_clip's trainer, distributed over CPUs: ``torchrun … -- cpu_ddp.py <the trainer's arguments>``.

open_clip 3.x passes ``device_ids=[device]``, which DistributedDataParallel refuses for a CPU, so the trainer
cannot run distributed without GPUs. Here that one argument is dropped; the trainer is otherwise what it is.

``KILL_IN_EPOCH`` names an epoch, counted from 0, in whose middle the first process is killed.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
from typing import Any

import torch

Original = torch.nn.parallel.DistributedDataParallel


class WithoutDeviceIds(Original):  # type: ignore[misc, valid-type]
    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **keywords: Any) -> None:
        super().__init__(module, **keywords)


def kill_in_epoch(number: int) -> None:
    train = importlib.import_module("open_clip_train.train")
    kill_at_call = importlib.import_module("trainer_runs").kill_at_call
    original = train.train_one_epoch

    @functools.wraps(original)
    def train_one_epoch(model: Any, data: Any, loss: Any, epoch: int, *rest: Any, **named: Any) -> Any:
        if epoch == number:
            kill_at_call(loss, 3)
        return original(model, data, loss, epoch, *rest, **named)

    train.train_one_epoch = train_one_epoch


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = WithoutDeviceIds
    if "KILL_IN_EPOCH" in os.environ and os.environ["RANK"] == "0":
        kill_in_epoch(int(os.environ["KILL_IN_EPOCH"]))
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
