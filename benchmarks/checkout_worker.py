"""Steps of the loss of one checkout, for ``checkouts.py``: one for each line of standard input.

The argument is a JSON object: ``n`` pairs in the whole batch, ``d``, the number of ``processes`` that share
it, ``options`` of :class:`rankloss.RankClipLoss`, and the ``checkout`` that rankloss must come from. A line
``time`` or ``memory`` runs forward and backward and is answered by their seconds, or by the bytes of resident
memory that they add at their peak.

Only public names of rankloss are used, so that any checkout can be measured.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rankloss
from resident import added_bytes
from share import one_of

_WARM_UP = 16  # pairs of this process
_SCALE = 1 / 0.07
_FREED = 31 * 2**20  # bytes: the largest block by which glibc still adapts


def features(n: int, d: int, processes: int) -> list[Tensor]:
    """Features of rank 0 and of all processes (the same where there is one), the scale."""
    generator = torch.Generator().manual_seed(0)
    everyone = [
        F.normalize(torch.randn(n, d, generator=generator), dim=-1).requires_grad_() for _ in range(2)
    ]
    own = everyone if processes == 1 else [x.detach()[: n // processes].clone() for x in everyone]
    return [*(x.requires_grad_() for x in own), *everyone, torch.tensor(_SCALE, requires_grad=True)]


def steps_of(loss: Callable[..., Tensor], n: int, d: int, processes: int, questions: Iterable[str]) -> None:
    """A step of n pairs for each question, and its answer on standard output."""
    v, t, *everyone, s = features(n, d, processes)

    def step() -> None:
        loss(v, t, s).backward()

    def seconds() -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    with one_of(processes, (v, t), everyone):
        for question in questions:
            for x in (v, t, *everyone, s):
                x.grad = None
            print(added_bytes(step) if question.strip() == "memory" else seconds(), flush=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    imported = Path(rankloss.__file__).resolve()
    if not imported.is_relative_to(given["checkout"]):
        raise SystemExit(f"rankloss must come from {given['checkout']}; got {imported}")
    loss = rankloss.RankClipLoss(schedule="constant", **given["options"])
    d, processes = given["d"], given["processes"]
    # As in a training, which has freed blocks as large. Until then glibc returns what is freed to the system,
    # and new pages take a part of a step's time.
    torch.empty(_FREED, dtype=torch.uint8)
    with contextlib.redirect_stdout(None):  # to warm up: threads and libraries
        steps_of(loss, _WARM_UP * processes, d, processes, ["time"])
    steps_of(loss, given["n"], d, processes, sys.stdin)


if __name__ == "__main__":
    main()
