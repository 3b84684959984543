from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from devices import DEVICE
from process_pool import Pool, Pools

if DEVICE.type == "cpu" and importlib.util.find_spec("triton") is not None:
    # Triton decides when a function is decorated whether it is interpreted, its own library included. So this
    # comes before any test imports torch's compiler, which imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("sorted_rows", "binned_rows"):
        importlib.import_module(f"rankloss.kernels.device.{name}")
    del os.environ["TRITON_INTERPRET"]

# Examples are drawn from the test's own name, so that a red run is red again. A deadline would time the
# machine, not us.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.manual_seed(0)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Real gloo processes by world size, up for the whole session."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(params=[2, 3, 4])
def pool(request: pytest.FixtureRequest, pools: Pools) -> Pool:
    """The gloo processes of each world size in turn."""
    return pools[request.param]
