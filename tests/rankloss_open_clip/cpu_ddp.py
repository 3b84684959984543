"""Start open_clip's trainer, distributed over CPUs: ``torchrun … -- cpu_ddp.py <the trainer's arguments>``.

open_clip 3.x passes ``device_ids=[device]``, which DistributedDataParallel refuses for a CPU, so the trainer
cannot run distributed without GPUs. Here that one argument is dropped; the trainer is otherwise what it is.
"""

from __future__ import annotations

import runpy
from typing import Any

import torch

Original = torch.nn.parallel.DistributedDataParallel


class WithoutDeviceIds(Original):  # type: ignore[misc, valid-type]
    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **keywords: Any) -> None:
        super().__init__(module, **keywords)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = WithoutDeviceIds
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
