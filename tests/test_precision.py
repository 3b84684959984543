from __future__ import annotations

import pytest
import torch

from rankloss import precision


@pytest.mark.parametrize("has_it", [True, False])
def test_an_xpu_device_is_asked_for_float64(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("xpu", 1)
    capabilities = {device: {"has_fp64": has_it, "has_fp16": True}}
    monkeypatch.setattr(torch.xpu, "get_device_capability", capabilities.__getitem__)
    assert precision.has_float64(device) is has_it


def test_other_devices_have_float64_except_mps() -> None:
    kinds = {kind: precision.has_float64(torch.device(kind)) for kind in ("cpu", "cuda", "meta", "mps")}
    assert kinds == {"cpu": True, "cuda": True, "meta": True, "mps": False}
