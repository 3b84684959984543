r"""The bytes that a launch moves, counted from the loads and stores of the kernels.

Per row of N items, in entries of 4 bytes, with m the depth of an item's bucket (itself included, about 3 on
average), b the number of bins, and e an entry of ``first_equal`` with each y that is read through it:

========================== ================================= ====================================
of                          ``sort``                          ``bin``
========================== ================================= ====================================
x                           3·N (survey, score, gradient)     4·N (survey, two collections, gradient)
y                           3·N (survey, count, fill)         4·N (likewise)
gradient                    1·N                               1·N
scratch                     (25 + m)·N + 3                    10·N + 12·b
========================== ================================= ====================================

Sort's scratch: three passes over the buckets' bounds (3·N + 3); slots by an atomic operation, then places
(7·N); comparing and placing ((7 + m)·N); the two running sums (2·N and 4·N); the gradient (2·N). Bin's: two
atomic operations of 4 bytes and one of 8, each a read and a write, and a load of a bin's largest score (9·N);
the gradient (1·N); twelve passes over bins.

A program works on one row at a time, so only x and y of that row and the scratch are read again. Where those
of all programs fit into the GPU's last cache, memory sees each of x, y and the gradient once, 12 bytes per
element. Where both matrices of a pair are in one launch it is 8: a program takes the two lists that rank each
other one after the other, and x of one is y of the other. With the product that writes x (4 bytes) and the
two products that read the gradient (8), a list then costs 20 bytes per element.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rankloss_triton.rows import CACHE, choose_launch

_ENTRY = 4  # bytes


class Traffic(NamedTuple):
    """Bytes of one launch.

    Attributes:
        cosines: loads of x.
        reference: loads of y, and of the index that it is read through.
        gradient: stores of the gradient.
        scratch: loads, stores and atomic operations on scratch.
        once: x, y and the gradient, each of them once.
        kept: what is read again, at any one time: a row of x and of y and the scratch of every program.
    """

    cosines: int
    reference: int
    gradient: int
    scratch: int
    once: int
    kept: int

    def from_memory(self, cache: int) -> int:
        """Bytes beyond a cache of this size: each once where it holds those that are read again, else all."""
        issued = self.cosines + self.reference + self.gradient + self.scratch
        return self.once if self.kept <= cache else issued


def traffic(
    n: int,
    N: int,
    *,
    bins: int = 0,
    processors: int = 132,
    cache: int = CACHE,
    index_bytes: int = 0,
    mates: float = 3.0,
    matrices: int = 1,
    opposite: bool = False,
) -> Traffic:
    """Count a launch for n rows of N items that writes a gradient.

    Args:
        n: rows.
        N: items of a list.
        bins: number of bins; 0 for the exact order.
        processors: multiprocessors of the GPU; 0 for the interpreter.
        cache: bytes of its last cache.
        index_bytes: of an entry of ``first_equal``; 0 without one.
        mates: depth of an item's bucket, averaged over the items.
        matrices: how many the rows belong to.
        opposite: whether the reference is the cosines, those of the opposite matrix.

    Example:
        >>> moved = traffic(1024, 8192)
        >>> moved.once / (1024 * 8192), moved.from_memory(cache=50 * 2**20) == moved.once
        (12.0, True)
    """
    launch = choose_launch(n // matrices, N, bins, processors, cache)
    # The rows of the table in the docstring of this file, in entries of a list.
    passes = 4 if bins else 3  # over x, and over y
    scratch = 10 * N + 12 * bins if bins else 25 * N + round(mates * N) + 3
    bytes_once = 8 if opposite else 12  # of x, y and the gradient, of each item
    return Traffic(
        cosines=n * _ENTRY * passes * N,
        reference=n * (_ENTRY + index_bytes) * passes * N,
        gradient=n * _ENTRY * N,
        scratch=n * _ENTRY * scratch,
        once=n * bytes_once * N,
        kept=launch.programs * 2 * _ENTRY * N + launch.scratch_bytes,
    )


def feature_bytes(name: str, features: Tensor, others: int = 0) -> int:
    """Bytes that a kernel of :mod:`rankloss_triton.equal_rows` moves.

    Args:
        name: ``"hash_rows"``, which reads all features and writes a hash of 8 bytes for each row; or
            ``"confirm_equals"``, which reads and writes an index of 8 bytes for each row.
        features: ``[n, width]``.
        others: Rows whose candidate is another row, which are compared with it entry by entry.
    """
    n, width = features.shape
    if name == "hash_rows":
        return n * (_ENTRY * width + 8)
    return n * 16 + others * 2 * _ENTRY * width
