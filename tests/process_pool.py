"""Real gloo processes that stay up between tests: all run the same function and return what they saw."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._pytree import tree_map

TIMEOUT = 120  # seconds a task may take; a rank that waits for another in vain gives up sooner

# A server imports these once, and each process is forked from it. One that is not installed is passed over.
# (Windows has no such server; there every process imports for itself.)
_METHOD = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
_PRELOADED = ["torch.distributed", "rankloss", "pytest", "hypothesis", "open_clip"]


def _work(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    threading.Thread(target=_leave_with_the_session, daemon=True).start()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT * 3 / 4)
    )
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            value = function(rank, world_size, *arguments)
            # A queue's thread would fail, unheard, to pickle a tensor that has a graph.
            value = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)
            results.put((rank, value, None))
        except Exception:  # handed to the test, which raises it
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


def _leave_with_the_session() -> None:
    """If the tests are killed, nobody else ends processes that wait for a task or for each other."""
    session = mp.parent_process()
    assert session is not None
    session.join()
    os._exit(1)


class Pool:
    """The processes of one world size, started at the first task."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []

    def _start(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context(_METHOD)
        if _METHOD == "forkserver":
            context.set_forkserver_preload(_PRELOADED)
        self._tasks = [context.Queue() for _ in range(self.world_size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(
                target=_work, args=(r, self.world_size, port, self._tasks[r], self._results), daemon=True
            )
            for r in range(self.world_size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, world_size, *arguments)`` on every rank; the results in the order of the ranks."""
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, arguments))
        values: dict[int, Any] = {}
        give_up = time.monotonic() + TIMEOUT
        while len(values) < self.world_size:
            try:
                rank, values[rank], error = self._results.get(timeout=1)
            except queue.Empty:
                codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
                if time.monotonic() < give_up and not any(codes.values()):
                    continue
                silent = sorted(codes.keys() - values.keys())
                error = f"no answer from ranks {silent}; exit codes {codes}"
            if error:
                # The other ranks may be waiting for this one; the next task gets new processes.
                for process in self._processes:
                    process.terminate()
                self._processes = []
                raise AssertionError(error)
        return [values[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        if self._processes:
            for tasks in self._tasks:
                tasks.put(None)
        for process in self._processes:
            process.join(30)


class Pools(dict[int, Pool]):
    """Pools by world size."""

    def __missing__(self, world_size: int) -> Pool:
        self[world_size] = pool = Pool(world_size)
        return pool

    def close(self) -> None:
        for pool in self.values():
            pool.close()
