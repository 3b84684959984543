from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import interpreter  # noqa: F401  -- before a test imports Triton, through a compiler of torch's
from process_pool import Pool, Pools

# Examples are drawn from the test's own name, so that a red run is red again; those of the thorough profile
# from the seed that `make test-properties` prints. A deadline would time the machine, not us.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "thorough", settings.get_profile("default"), derandomize=False, max_examples=2000, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.manual_seed(0)

# A data loader whose worker raised waits for the worker when it is let go: five seconds, for nothing.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


@pytest.fixture(scope="module", autouse=True)
def _collect_the_garbage_of_this_file_alone() -> None:
    """accelerate collects all garbage at every training: half a second for what other files have imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extension modules report a leak when the interpreter ends


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Real gloo processes by world size, up for the whole session."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(params=[2, 3])
def pool(request: pytest.FixtureRequest, pools: Pools) -> Pool:
    """The gloo processes of each world size in turn."""
    return pools[request.param]


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``rankloss sample``, which tests leave as it is."""
    from rankloss_features import sample

    folder = tmp_path_factory.mktemp("of_sample") / "sample"
    sample.write(folder)
    return folder
