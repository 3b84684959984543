r"""Metrics of retrieval, of an embedding space, and of graded lists. Nothing here is differentiated.

Functions of features take unit-norm rows, functions of lists ``[..., N]`` with one value per list. Values are
float64. On a device without it, such as MPS, they are float32; integers are at most 2²⁴ there.
"""

from rankloss.metrics.features import alignment as alignment
from rankloss.metrics.features import modality_gap as modality_gap
from rankloss.metrics.features import rank_agreement as rank_agreement
from rankloss.metrics.features import uniformity as uniformity
from rankloss.metrics.lists import kendall_tau as kendall_tau
from rankloss.metrics.lists import ndcg as ndcg
from rankloss.metrics.lists import pairwise_accuracy as pairwise_accuracy
from rankloss.metrics.lists import reciprocal_rank as reciprocal_rank
from rankloss.metrics.lists import spearman_rho as spearman_rho
from rankloss.metrics.retrieval import partner_ranks as partner_ranks
from rankloss.metrics.retrieval import recall as recall

__all__ = [
    "alignment",
    "kendall_tau",
    "modality_gap",
    "ndcg",
    "pairwise_accuracy",
    "partner_ranks",
    "rank_agreement",
    "recall",
    "reciprocal_rank",
    "spearman_rho",
    "uniformity",
]
