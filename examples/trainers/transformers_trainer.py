"""Hugging Face's CLIP and Trainer with RankCLIP's loss: train, evaluate on held-out pairs, save.

Run ``rankloss sample --output outputs/sample``, then
``python examples/trainers/transformers_trainer.py``; or put in your model and your data.
"""

from datasets import Image, load_dataset
from transformers import AutoModel, AutoProcessor, TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainer


def main(folder="outputs/sample", output="outputs/trainers/transformers"):
    """Train on ``train.csv`` of a folder, evaluate on ``val.csv``, and save the model."""
    name = f"{folder}/transformers"  # yours: "openai/clip-vit-base-patch32"
    model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)

    def encoded(rows):
        return processor(
            images=rows["filepath"],
            text=rows["title"],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
        )

    files = {"train": f"{folder}/train.csv", "test": f"{folder}/val.csv"}
    data = load_dataset("csv", data_files=files, sep="\t").cast_column("filepath", Image())
    data = data.with_transform(encoded)
    pairs, held_out = data["train"], data["test"]
    args = TrainingArguments(
        output,
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        dataloader_drop_last=True,
        remove_unused_columns=False,  # the transform needs them
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = ContrastiveTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, loss="rankclip")
    trainer.train()
    print(trainer.evaluate())  # recall, and CLIP's loss alone: with the rank terms it would grow with λ
    trainer.save_model()
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
