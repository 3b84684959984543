"""Fused GPU kernels for blocks of ranked lists, in Triton.

:func:`evaluate` takes a block of cosines and gives cross-entropy, NLL and gradient of every row in one
launch, as :func:`rankloss.lists.evaluate` does; :func:`first_equal` finds the items that are equal;
:func:`why_not` says whether the kernels serve a case. Triton is imported when a kernel is first launched, not
before. With ``TRITON_INTERPRET=1`` in the environment the same kernels take CPU tensors, which is how they
are tested without a GPU.
"""

from rankloss.kernels.equal_rows import first_equal as first_equal
from rankloss.kernels.rows import evaluate as evaluate
from rankloss.kernels.rows import why_not as why_not

__all__ = ["evaluate", "first_equal", "why_not"]
