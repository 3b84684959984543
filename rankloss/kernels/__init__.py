"""Fused GPU kernels for blocks of ranked lists, in Triton.

:func:`evaluate_rows` takes cosines and gives cross-entropy, NLL and gradient of every row in one
launch; :func:`hash_rows` and :func:`confirm_equals` find the items that are equal; :func:`why_not` says
whether the kernels serve a case. Triton is imported when a kernel is first launched, not before. With
``TRITON_INTERPRET=1`` in the environment the same kernels take CPU tensors, which is how they are tested
without a GPU.
"""

from rankloss.kernels.equal_rows import confirm_equals as confirm_equals
from rankloss.kernels.equal_rows import first_equal as first_equal
from rankloss.kernels.equal_rows import hash_rows as hash_rows
from rankloss.kernels.rows import evaluate as evaluate
from rankloss.kernels.rows import evaluate_rows as evaluate_rows
from rankloss.kernels.rows import why_not as why_not

__all__ = [
    "confirm_equals",
    "evaluate",
    "evaluate_rows",
    "first_equal",
    "hash_rows",
    "why_not",
]
