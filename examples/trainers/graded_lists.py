"""Grades of captions, given by a rule, with Hugging Face's Trainer: train, evaluate on held-out lists, save.

Run ``rankloss sample --output outputs/sample``, then ``python examples/trainers/graded_lists.py``;
or put in your model and your lists.
"""

import csv
import random

from datasets import Dataset, Image
from transformers import AutoModel, AutoProcessor, TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainer


def grade(query, other):
    """2 for the same shape, 1 for the same colour, else 0."""
    if other["class"] == query["class"]:
        return 2
    color, other_color = query["product"].split("-")[0], other["product"].split("-")[0]
    return 1 if other_color == color else 0


def lists_of(file):
    """Each picture, its own caption, and eight others' captions with their grades."""
    with open(file, encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    generator = random.Random(0)
    lists = []
    for row in rows:
        others = generator.sample([other for other in rows if other is not row], 8)
        lists.append(
            {
                "query": row["filepath"],
                "own": row["title"],
                "candidates": [other["title"] for other in others],
                "grades": [grade(row, other) for other in others],
            }
        )
    return Dataset.from_list(lists).cast_column("query", Image())


def main(folder="outputs/sample", output="outputs/trainers/graded_lists"):
    """Train on the lists, and on the pairs of a picture and its caption."""
    name = f"{folder}/transformers"  # yours: "openai/clip-vit-base-patch32"
    model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    lists, held_out = lists_of(f"{folder}/train.csv"), lists_of(f"{folder}/val.csv")
    args = TrainingArguments(
        output,
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        dataloader_drop_last=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = ContrastiveTrainer(
        model,
        args,
        train_dataset=lists,
        processing_class=processor,
        loss="ranked-lists",
        loss_options={"model": "pairwise", "weight": 4.0},
    )
    trainer.train()
    print(trainer.evaluate(held_out))  # eval_ndcg, eval_kendall_tau_b, …
    trainer.save_model()


if __name__ == "__main__":
    main()
