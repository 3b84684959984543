"""The device of the features that the core's tests draw: ``RANKLOSS_TEST_DEVICE``, the CPU by default.

What a test compares with (NumPy, float64 oracles) stays on the CPU; so do features that a test writes out.
"""

from __future__ import annotations

import os

import torch

__all__ = ["DEVICE"]

DEVICE = torch.device(os.environ.get("RANKLOSS_TEST_DEVICE", "cpu"))
