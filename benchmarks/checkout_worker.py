"""Steps of the loss of one checkout, for ``checkouts.py``: one for each line of standard input.

The argument is a JSON object: ``n`` pairs in the whole batch, ``d``, the number of ``processes`` that share
it, ``options`` of :class:`rankloss.RankClipLoss`, and the ``checkout`` that rankloss must come from. A line
``time`` or ``memory`` runs forward and backward and is answered by their seconds, or by the bytes of resident
memory that they add at their peak.

One of several processes runs without the others: torch's fake process group says that they exist, and
:func:`all_gather` stands in for what they would send. Only public names of rankloss are used, so that any
checkout can be measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import rankloss
from resident import added_bytes

_WARM_UP = 16  # pairs of this process
_SCALE = 1 / 0.07


def all_gather(chunks: list[Tensor], x: Tensor, group: Any = None) -> None:  # noqa: ARG001
    """Fill the other processes' chunks with this one's rows, their columns' signs drawn at random.

    Norms stay, no two rows are equal, and their products are as small as those of independent rows.
    Integers, by which processes compare their calls, are copied.
    """
    for rank, chunk in enumerate(chunks):
        signs = torch.ones(x.shape[1:], dtype=x.dtype)
        if rank and x.is_floating_point():
            signs.bernoulli_(0.5, generator=torch.Generator().manual_seed(rank)).mul_(2).sub_(1)
        torch.mul(x, signs, out=chunk)


def be_one_of(processes: int) -> None:
    """Make this process rank 0 of so many, whose others never run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    dist.all_gather = all_gather


def features(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, t = (F.normalize(torch.randn(n, d, generator=generator), dim=-1).requires_grad_() for _ in "vt")
    return v, t, torch.tensor(_SCALE, requires_grad=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    imported = Path(rankloss.__file__).resolve()
    if not imported.is_relative_to(given["checkout"]):
        raise SystemExit(f"rankloss must come from {given['checkout']}; got {imported}")
    if given["processes"] > 1:
        be_one_of(given["processes"])
    loss = rankloss.RankClipLoss(schedule="constant", **given["options"])
    loss(*features(_WARM_UP, given["d"])).backward()
    inputs = features(given["n"] // given["processes"], given["d"])

    def step() -> None:
        loss(*inputs).backward()

    for line in sys.stdin:
        if line.strip() == "memory":
            answer: float = added_bytes(step)
        else:
            started = time.perf_counter()
            step()
            answer = time.perf_counter() - started
        print(answer, flush=True)


if __name__ == "__main__":
    main()
