"""The device that the tests of the core run on: ``RANKLOSS_TEST_DEVICE``, the CPU by default."""

from __future__ import annotations

import os

import torch

__all__ = ["DEVICE"]

DEVICE = torch.device(os.environ.get("RANKLOSS_TEST_DEVICE", "cpu"))
