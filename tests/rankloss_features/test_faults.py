"""A folder is refused or whole, whatever came while it was written."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_teacher import data_of, files, in_process, teacher, written
from torch import Tensor

from rankloss_features import Features
from rankloss_features.data import Data

CALLS = {"open", "write", "flush", "truncate", "posix_fallocate", "fsync", "replace"}
SIZE = 700  # bytes of the largest file, about
FAULTS = st.one_of(
    st.tuples(st.just("full"), st.integers(0, SIZE)),
    st.tuples(st.just("killed"), st.integers(0, 100)),
    st.tuples(st.just("second"), st.integers(0, 9)),
)


def disturbed(output: Path, data: Data, fault: str, at: int) -> None:
    """Write a folder until the disk is full or the process killed, or while another process tries to."""
    calls = count()

    def killing(_: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in CALLS and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def second(_: str, features: Tensor) -> Tensor:
        if fault == "second" and next(calls) == at:
            assert in_process(refused, output, data) == 0
        return features

    if fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    if fault == "killed":
        sys.setprofile(killing)
    written(output, data, teacher(second))


def refused(output: Path, data: Data) -> None:
    with pytest.raises(ValueError, match=r"written by 'process \d+ on .+ since .+'"):
        written(output, data, teacher())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    data = data_of("webdataset", folder / "data")
    written(folder / "whole", data, teacher())
    return data, files(folder / "whole")


@settings(max_examples=8)
@given(st.lists(FAULTS, min_size=1, max_size=3))
@example([("full", 0), ("full", 130), ("full", 610)])
@example([("second", 2), ("killed", 40)])
def test_faults_leave_a_folder_that_is_refused_or_whole(
    undisturbed: tuple[Data, dict[str, bytes]], faults: list[tuple[str, int]]
) -> None:
    data, whole = undisturbed
    with tempfile.TemporaryDirectory() as place:
        output = Path(place, "output")
        for fault, at in faults:
            assert in_process(disturbed, output, data, fault, at) in (0, 1, -signal.SIGKILL)
            try:
                Features(str(output)).check()
            except ValueError:
                continue
            assert files(output) == whole
        written(output, data, teacher()).check()
        assert files(output) == whole
