"""The kernels run on ``RANKLOSS_TEST_DEVICE``; on a CPU that is Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interpreter import HAS_TRITON, interpreted

if not HAS_TRITON:
    collect_ignore = [f"test_{name}.py" for name in ("blocks", "compilation", "equal_rows", "through_losses")]


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """The kernels take CPU tensors, where the device is a CPU."""
    with interpreted():
        yield
