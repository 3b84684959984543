"""A small CLIP of emojis, trained with accelerate and RankCLIP's loss.

Run ``python examples/trainers/accelerate_loop.py``, or on several processes
``accelerate launch --cpu --num_processes 2 examples/trainers/accelerate_loop.py``.
"""

import emojis
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import rankloss_trainers


def train(accelerator, model, batches, optimizer, epochs):
    """Train, and return the last step's loss as the mean over the processes."""
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    criterion = rankloss_trainers.create("rankclip")
    step, total_steps = 0, epochs * len(batches)  # after prepare, which shares the batches
    for epoch in range(epochs):
        for images, texts in batches:
            step += 1
            criterion.set_progress(step, total_steps)
            loss = criterion(*model(images, texts))  # image features, text features, the scale
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        value = accelerator.reduce(loss.detach(), "mean")
        accelerator.print(f"epoch {epoch + 1}: loss {value:.3f}, rank_lambda {criterion.schedule_value:.2f}")
    return value


def main():
    """Train on the emojis."""
    accelerator, model = Accelerator(cpu=True), emojis.clip()
    batches = DataLoader(emojis.tensors(), 32 // accelerator.num_processes, shuffle=True, drop_last=True)
    train(accelerator, model, batches, torch.optim.AdamW(model.parameters(), lr=1e-3), epochs=3)
    accelerator.end_training()


if __name__ == "__main__":
    main()
