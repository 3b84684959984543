"""A small CLIP of emojis, trained with Lightning and RankCLIP's loss.

Run ``python examples/trainers/lightning_module.py``.
"""

import emojis
import lightning
import torch
from torch.utils.data import DataLoader, random_split

import rankloss_trainers
from rankloss_trainers.lightning import Progress


class Clip(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, rankloss_trainers.create("rankclip")

    def training_step(self, batch, batch_idx):
        terms = self.loss(*self.model(*batch), output_dict=True)
        self.log_dict({**terms, "rank_lambda": self.loss.schedule_value}, sync_dist=True)
        return sum(terms.values())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss.base(*self.model(*batch)), sync_dist=True)  # without rank terms

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model, batches, held_out, **options):
    """Train a model that returns image features, text features and the scale, and return the trainer."""
    trainer = lightning.Trainer(max_epochs=3, callbacks=[Progress()], **options)
    trainer.fit(Clip(model), batches, held_out)
    return trainer


def main():
    """Train on the emojis."""
    pairs, held_out = random_split(emojis.tensors(), [0.8, 0.2], torch.Generator().manual_seed(0))
    batches = DataLoader(pairs, 32, shuffle=True, drop_last=True)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    trainer = train(emojis.clip(), batches, DataLoader(held_out, len(held_out)), **options)
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})


if __name__ == "__main__":
    main()
