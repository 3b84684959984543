"""Losses of the catalogue for sentence-transformers: ``SentenceTransformerTrainer`` and its conventions.

It takes the loss, and the callback that tells it where training stands::

    loss = ContrastiveLoss(model, "rankclip", {"top_k": 8})
    trainer = SentenceTransformerTrainer(model, args, pairs, loss=loss, callbacks=[Progress(loss)])

Lists of graded candidates train by :class:`RankedListsLoss` and :class:`RankedListsTrainer`.
"""

from rankloss_trainers.sentence_transformers.graded_lists import (
    RankedListsCollator,
    RankedListsLoss,
    RankedListsTrainer,
)
from rankloss_trainers.sentence_transformers.pairs import ContrastiveLoss
from rankloss_trainers.sentence_transformers.progress import Progress

__all__ = ["ContrastiveLoss", "Progress", "RankedListsCollator", "RankedListsLoss", "RankedListsTrainer"]
