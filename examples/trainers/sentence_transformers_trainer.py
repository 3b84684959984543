"""A sentence encoder and its trainer with RankCLIP's loss: train, evaluate on held-out pairs, save.

Run ``python examples/trainers/emojis.py outputs/emojis``, then
``python examples/trainers/sentence_transformers_trainer.py``; or put in your model and your data.
"""

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from rankloss_trainers.sentence_transformers import ContrastiveLoss, Progress


def name_and_keywords(row):
    """The two texts of a pair, of a caption such as "cat, pet"."""
    name, *keywords = row["title"].split(", ")
    return {"name": name, "keywords": ", ".join([*keywords, row["class"]])}


def main(folder="outputs/emojis", output="outputs/trainers/sentence_transformers"):
    """Train on ``pairs.csv`` of a folder, evaluate on ``held_out.csv``, and save the model."""
    model = SentenceTransformer(f"{folder}/minilm", device="cpu")  # yours: "all-MiniLM-L6-v2"
    files = {"train": f"{folder}/pairs.csv", "test": f"{folder}/held_out.csv"}
    data = load_dataset("csv", data_files=files, sep="\t")
    data = data.map(name_and_keywords).select_columns(["name", "keywords"])
    pairs, held_out = data["train"], data["test"]
    args = SentenceTransformerTrainingArguments(
        output,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=2e-5,
        dataloader_drop_last=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    loss = ContrastiveLoss(model, "rankclip", scale=20.0)
    trainer = SentenceTransformerTrainer(model, args, pairs, held_out, loss=loss, callbacks=[Progress(loss)])
    trainer.train()
    print(trainer.evaluate())  # CLIP's loss alone: with the rank terms it would grow with λ
    model.save(output)


if __name__ == "__main__":
    main()
