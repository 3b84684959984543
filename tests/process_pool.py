"""Real gloo processes that stay up between tests: all run the same function and return what they saw."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
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


def _join(rank: int, world_size: int, port: int) -> None:
    """Make a process that has just started one of the group."""
    threading.Thread(target=_leave_with_the_session, daemon=True).start()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT * 3 / 4)  # of a collective, so that it fails before the task does
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)


def _leave_with_the_session() -> None:
    """If the tests are killed, nobody else ends processes that wait for a task or for each other."""
    session: Any = mp.parent_process()
    session.join()
    os._exit(1)


def _result_to_send(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, its tensors without their graphs, with which they cannot be sent."""
    result = function(*arguments)
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, result)


class Pool:
    """The processes of one world size, started at the first task."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[ProcessPoolExecutor] = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _, port = free.getsockname()
        context = mp.get_context(_METHOD)
        if _METHOD == "forkserver":
            context.set_forkserver_preload(_PRELOADED)
        self._ranks = [
            ProcessPoolExecutor(
                max_workers=1,
                mp_context=context,
                initializer=_join,
                initargs=(rank, self.world_size, port),
            )
            for rank in range(self.world_size)
        ]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, world_size, *arguments)`` on every rank; the results in the order of the ranks."""
        if not self._ranks:
            self._start()
        answers = [
            executor.submit(_result_to_send, function, rank, self.world_size, *arguments)
            for rank, executor in enumerate(self._ranks)
        ]
        done, pending = wait(answers, timeout=TIMEOUT, return_when=FIRST_EXCEPTION)
        errors = [error for error in (answer.exception() for answer in done) if error is not None]
        if errors or pending:
            self._terminate()
            first_error = errors[0] if errors else None
            silent_ranks = [rank for rank, answer in enumerate(answers) if answer in pending]
            raise AssertionError(
                f"{function.__name__}: {first_error}; no answer from ranks {silent_ranks}"
            ) from first_error
        return [answer.result() for answer in answers]

    def _terminate(self) -> None:
        """End the processes, which may be waiting for one that failed; the next task gets new ones."""
        for executor in self._ranks:
            for process in executor._processes.values():  # no public method ends a process that is busy
                process.terminate()
        self._ranks = []

    def close(self) -> None:
        """Let the processes leave their group together, and end them."""
        for executor in self._ranks:
            executor.submit(dist.destroy_process_group)
        for executor in self._ranks:
            executor.shutdown()


class Pools(dict[int, Pool]):
    """Pools by world size, each made when it is first asked for."""

    def __missing__(self, world_size: int) -> Pool:
        self[world_size] = pool = Pool(world_size)
        return pool

    def close(self) -> None:
        for pool in self.values():
            pool.close()
