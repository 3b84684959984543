"""The device of the features that the core's tests draw: ``RANKLOSS_TEST_DEVICE``, the CPU by default.

What a test compares with (NumPy, float64 oracles) stays on the CPU; so do features that a test writes out.
A torch whose FSDP 2 does not work on a CPU leaves its tests out.
"""

from __future__ import annotations

import os

import pytest
import torch

__all__ = ["DEVICE", "needs_fsdp2"]

DEVICE = torch.device(os.environ.get("RANKLOSS_TEST_DEVICE", "cpu"))

needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="FSDP 2 has no backward pass on a CPU in this torch, as in 2.6",
)
