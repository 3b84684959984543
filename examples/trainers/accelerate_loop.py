"""A loop with accelerate and RankCLIP's loss: train, evaluate on held-out pairs, save.

Run ``python examples/trainers/accelerate_loop.py``, or on several processes
``accelerate launch --cpu --num_processes 2 examples/trainers/accelerate_loop.py``. Put in your own model and
data.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import rankloss_trainers
from rankloss.metrics import recall


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


def train(accelerator, model, batches, optimizer, epochs):
    """Train, and return the last step's loss as the mean over the processes."""
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    criterion = rankloss_trainers.create("rankclip")
    step, total_steps = 0, epochs * len(batches)  # after prepare, which shares the batches
    for epoch in range(epochs):
        for images, texts in batches:
            step += 1
            criterion.set_progress(step, total_steps)
            loss = criterion(*model(images, texts))  # unit-norm features of both, and log_scale.exp()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        value = accelerator.reduce(loss.detach(), "mean")
        accelerator.print(f"epoch {epoch + 1}: loss {value:.3f}, rank_lambda {criterion.schedule_value:.2f}")
    return value


@torch.no_grad()
def evaluate(model, held_out):
    """R@1: the share of images whose own text is the most similar one."""
    images, texts, _ = model(*held_out[:])
    return recall(images, texts, 1)["image_to_text_R@1"].item()


def main(output="outputs/trainers/accelerate"):
    """Train; the first process evaluates, and the model is saved."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = Towers()
    pairs, held_out = made_pairs()
    batches = DataLoader(pairs, 100 // accelerator.num_processes, shuffle=True, drop_last=True)
    train(accelerator, model, batches, torch.optim.AdamW(model.parameters(), lr=1e-2), epochs=3)
    accelerator.print(f"held-out R@1: {evaluate(model, held_out):.3f}")
    accelerator.save_model(model, output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
