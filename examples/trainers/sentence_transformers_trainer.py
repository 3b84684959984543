"""A sentence encoder and its trainer with RankCLIP's loss: train, evaluate on held-out pairs, save.

Run ``rankloss sample --output outputs/sample``, then
``python examples/trainers/sentence_transformers_trainer.py``; or put in your model and your data.
"""

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.evaluation import SentenceEvaluator

from rankloss.metrics import recall
from rankloss_trainers.sentence_transformers import ContrastiveLoss, Progress


def title_and_keywords(row):
    """The two texts of a pair: a title and the keywords of its product."""
    return {"title": row["title"], "keywords": row["product"].replace("-", " ")}


class Recall(SentenceEvaluator):
    """Recall of held-out keywords by their titles; equal keywords are partners of the same titles."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs

    def __call__(self, model, *args, **kwargs):
        options = {"convert_to_tensor": True, "normalize_embeddings": True}
        titles = model.encode(list(self.pairs["title"]), **options)
        ids = list(self.pairs["keywords"])
        keywords = model.encode(ids, **options)
        values = recall(titles, keywords, (1, 5), image_ids=ids, text_ids=ids)
        return {f"R@{k}": values[f"image_to_text_R@{k}"].item() for k in (1, 5)}


def main(folder="outputs/sample", output="outputs/trainers/sentence_transformers"):
    """Train on ``train.csv`` of a folder, evaluate on ``val.csv``, and save the model."""
    model = SentenceTransformer(f"{folder}/text_encoder", device="cpu")  # yours: "all-MiniLM-L6-v2"
    files = {"train": f"{folder}/train.csv", "test": f"{folder}/val.csv"}
    data = load_dataset("csv", data_files=files, sep="\t")
    data = data.map(title_and_keywords).select_columns(["title", "keywords"])
    pairs, held_out = data["train"], data["test"]
    args = SentenceTransformerTrainingArguments(
        output,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=2e-5,
        dataloader_drop_last=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    loss = ContrastiveLoss(model, "rankclip", scale=20.0)
    trainer = SentenceTransformerTrainer(
        model, args, pairs, held_out, loss=loss, evaluator=Recall(held_out), callbacks=[Progress(loss)]
    )
    trainer.train()
    print(trainer.evaluate())  # CLIP's loss alone: with the rank terms it would grow with λ
    model.save(output)


if __name__ == "__main__":
    main()
