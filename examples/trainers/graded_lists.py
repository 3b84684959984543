"""A small CLIP of emojis that learns grades of captions, given by a rule, with Hugging Face's Trainer.

Run ``python examples/trainers/graded_lists.py``.
"""

import random
from pathlib import Path

import emojis
from datasets import Dataset
from transformers import TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainer


def grade(query, other):
    """2 for an animal of the same class, 1 for a common keyword, else 0."""
    return 2 if other.subgroup == query.subgroup else int(not set(query.tags).isdisjoint(other.tags))


def lists_of(found):
    """Each picture, its own caption, and eight others' captions with their grades."""
    draw, rows = random.Random(0), []
    for emoji in found:
        others = draw.sample([other for other in found if other is not emoji], 8)
        rows.append(
            {
                "query": emojis.picture_of(emoji),
                "own": emojis.caption_of(emoji),
                "candidates": [emojis.caption_of(other) for other in others],
                "grades": [grade(emoji, other) for other in others],
            }
        )
    return Dataset.from_list(rows)


def main(folder="outputs/trainers/graded_lists"):
    """Train on the lists, and on the pairs of a picture and its caption."""
    model, processor = emojis.hugging_face_clip(Path(folder, "model"))
    args = TrainingArguments(folder, num_train_epochs=8, **emojis.SHORT_RUN)
    lists = lists_of(emojis.chosen())
    trainer = ContrastiveTrainer(
        model,
        args,
        train_dataset=lists,
        processing_class=processor,
        loss="ranked-lists",
        loss_options={"model": "pairwise", "weight": 4.0},
    )
    trainer.train()
    print(trainer.evaluate(lists))  # eval_ndcg, eval_kendall_tau_b, …


if __name__ == "__main__":
    main()
