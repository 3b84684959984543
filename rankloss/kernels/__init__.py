"""Fused GPU kernels for blocks of ranked lists, in Triton.

:func:`evaluate_rows` takes cosines and gives cross-entropy, NLL and gradient of every row in one
launch; :func:`why_not` says whether it serves a case; :func:`traffic` counts the bytes it moves. Triton is
imported when a kernel is first launched, not before. With ``TRITON_INTERPRET=1`` in the environment the same
kernels take CPU tensors, which is how they are tested without a GPU.
"""

from rankloss.kernels.rows import evaluate_rows as evaluate_rows
from rankloss.kernels.rows import why_not as why_not
from rankloss.kernels.rows import why_not_options as why_not_options
from rankloss.kernels.traffic import Traffic as Traffic
from rankloss.kernels.traffic import traffic as traffic

__all__ = ["Traffic", "evaluate_rows", "traffic", "why_not", "why_not_options"]
