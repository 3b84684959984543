"""Fused GPU kernels for blocks of ranked lists, in Triton: the losses' option ``kernel="triton"``.

:func:`evaluate` gives cross-entropy, NLL and gradient of every row of a block of cosines in one launch;
:func:`first_equal` finds the items that are equal; :func:`why_not` says why a case is not served. Triton is
imported when a kernel is first launched, not before. With ``TRITON_INTERPRET=1`` in the environment the same
kernels take CPU tensors, which is how they are tested without a GPU.
"""

from rankloss_triton.equal_rows import first_equal as first_equal
from rankloss_triton.rows import evaluate as evaluate
from rankloss_triton.rows import why_not as why_not

__all__ = ["evaluate", "first_equal", "why_not"]
