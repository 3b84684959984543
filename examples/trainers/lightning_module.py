"""A module of Lightning with RankCLIP's loss: train, evaluate on held-out pairs, save.

Run ``python examples/trainers/lightning_module.py``. Put in your model and your data.
"""

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import rankloss_trainers
from rankloss.metrics import recall
from rankloss_trainers.lightning import Progress


class Towers(torch.nn.Module):
    """Yours: a model that returns unit-norm features of images and texts, and the scale."""

    def __init__(self):
        super().__init__()
        self.image = torch.nn.Linear(64, 32)
        self.text = torch.nn.Linear(48, 32)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))

    def forward(self, images, texts):
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.logit_scale.exp()


def made_pairs():
    """Yours: images and texts, for training and held out. Here two noisy views of random vectors."""
    generator = torch.Generator().manual_seed(0)
    concepts, to_images, to_texts = (torch.randn(16, n, generator=generator) for n in (1200, 64, 48))
    images = concepts.T @ to_images + 4 * torch.randn(1200, 64, generator=generator)
    texts = concepts.T @ to_texts + 4 * torch.randn(1200, 48, generator=generator)
    return TensorDataset(images[:1000], texts[:1000]), TensorDataset(images[1000:], texts[1000:])


class Clip(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = rankloss_trainers.create("rankclip")
        self.validated = []  # the features of each batch

    def training_step(self, batch, batch_idx):
        terms = self.loss(*self.model(*batch), output_dict=True)
        self.log_dict({**terms, "rank_lambda": self.loss.schedule_value}, sync_dist=True)
        return sum(terms.values())

    def validation_step(self, batch, batch_idx):
        images, texts, scale = self.model(*batch)
        self.log("val_loss", self.loss.base(images, texts, scale), sync_dist=True)  # without rank terms
        self.validated.append((images, texts))

    def on_validation_epoch_end(self):
        images = torch.cat([images for images, _ in self.validated])
        texts = torch.cat([texts for _, texts in self.validated])
        self.validated.clear()
        self.log("val_R@1", recall(images, texts, 1)["image_to_text_R@1"].float())  # on one device

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model, batches, held_out, **options):
    """Train a model that returns image features, text features and the scale, and return the trainer."""
    trainer = lightning.Trainer(max_epochs=3, callbacks=[Progress()], **options)
    trainer.fit(Clip(model), batches, held_out)
    return trainer


def main(output="outputs/trainers/lightning"):
    """Train, and save the module."""
    torch.manual_seed(0)
    pairs, held_out = made_pairs()
    batches = DataLoader(pairs, 100, shuffle=True, drop_last=True)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    trainer = train(Towers(), batches, DataLoader(held_out, len(held_out)), **options)
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})
    trainer.save_checkpoint(f"{output}/module.ckpt")


if __name__ == "__main__":
    main()
