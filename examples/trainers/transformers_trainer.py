"""A small CLIP of emojis, trained with Hugging Face's Trainer and RankCLIP's loss.

Run ``python examples/trainers/transformers_trainer.py``.
"""

from pathlib import Path

import emojis
from transformers import TrainingArguments

from rankloss_trainers.transformers import ContrastiveTrainer


def main(folder="outputs/trainers/transformers"):
    """Train on the emojis."""
    # Yours: CLIPModel.from_pretrained("openai/clip-vit-base-patch32"), and CLIPProcessor.
    model, processor = emojis.hugging_face_clip(Path(folder, "model"))

    def encoded(rows):
        return processor(
            images=rows["image"], text=rows["caption"], return_tensors="pt", padding="max_length"
        )

    data = emojis.table().with_transform(encoded).train_test_split(0.2, seed=0)
    pairs, held_out = data["train"], data["test"]
    args = TrainingArguments(
        folder,
        num_train_epochs=8,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        dataloader_drop_last=True,
        remove_unused_columns=False,  # the transform needs them
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = ContrastiveTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, loss="rankclip")
    trainer.train()
    print(trainer.evaluate())  # CLIP's loss alone: with the rank terms it would grow with λ


if __name__ == "__main__":
    main()
