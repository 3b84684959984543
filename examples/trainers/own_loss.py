"""A loss of one's own, with options and a teacher of the captions, and Hugging Face's Trainer.

Run ``rankloss sample --output outputs/sample``, then ``python examples/trainers/own_loss.py``; or
put in your model and your data.
"""

from datasets import Image, load_dataset
from transformers import AutoModel, AutoProcessor, TrainingArguments

from rankloss.losses import AddedTerms, check_weight
from rankloss_trainers.transformers import ContrastiveTrainer


class SoftLoss(AddedTerms):
    """The trainer's own plus the softmax of a teacher's similarities of the captions.

    Args:
        weight: Weight of the term.
    """

    def __init__(self, base=None, *, weight: float = 1.0, gather=None):
        super().__init__(base, gather=gather)
        self.weight = check_weight("weight", weight)

    def own_terms(self, image_features, text_features, scale, *, reference_text_features):
        texts = self.gather.items(text_features)  # of all processes, with gradients
        (teacher,) = self.gather.constants(reference_text_features)
        targets = (20 * teacher @ teacher.T).softmax(-1)
        log_probabilities = (20 * texts @ texts.T).log_softmax(-1)
        term = -(targets * log_probabilities).sum(-1).mean()
        return {"soft_loss": self.weight * term}


def main(folder="outputs/sample", output="outputs/trainers/own_loss"):
    """Train on ``train.csv`` of a folder, evaluate on ``val.csv``, and save the model."""
    name = f"{folder}/transformers"  # yours: "openai/clip-vit-base-patch32"
    model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)

    def encoded(rows):
        inputs = processor(
            images=rows["image"],
            text=rows["caption"],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
        )
        if "reference_pair" in rows:  # the trainer's column with the rows of the teacher's features
            inputs["reference_pair"] = rows["reference_pair"]
        return inputs

    files = {"train": f"{folder}/train.csv", "test": f"{folder}/val.csv"}
    data = load_dataset("csv", data_files=files, sep="\t").cast_column("filepath", Image())
    data = data.rename_columns({"filepath": "image", "title": "caption"}).with_transform(encoded)
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
    trainer = ContrastiveTrainer(
        model,
        args,
        train_dataset=pairs,
        eval_dataset=held_out,
        loss=SoftLoss(weight=2.0),
        teacher=f"text={folder}/text_encoder",  # yours: "text=minilm"
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
