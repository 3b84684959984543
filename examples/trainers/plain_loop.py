"""A small CLIP of emojis, trained in a loop of one's own with RankCLIP's loss.

Run ``python examples/trainers/plain_loop.py``, or on several processes
``torchrun --nproc-per-node 2 examples/trainers/plain_loop.py``.
"""

import os

import emojis
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import rankloss_trainers


def train(model, batches, optimizer, epochs):
    """Train, and return the last step's loss."""
    criterion = rankloss_trainers.create("rankclip")
    step, total_steps = 0, epochs * len(batches)
    for epoch in range(epochs):
        if isinstance(batches.sampler, DistributedSampler):
            batches.sampler.set_epoch(epoch)  # or every epoch has the same batches
        for images, texts in batches:
            step += 1
            criterion.set_progress(step, total_steps)
            loss = criterion(*model(images, texts))  # image features, text features, the scale
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, rank_lambda {criterion.schedule_value:.2f}")
    return loss


def main():
    """Train on the emojis; each process of torchrun has its share of every batch."""
    model, pairs, processes = emojis.clip(), emojis.tensors(), int(os.environ.get("WORLD_SIZE", "1"))
    sampler = None
    if processes > 1:
        torch.distributed.init_process_group("gloo")
        model, sampler = DistributedDataParallel(model), DistributedSampler(pairs)
    batches = DataLoader(pairs, 32 // processes, shuffle=sampler is None, sampler=sampler, drop_last=True)
    train(model, batches, torch.optim.AdamW(model.parameters(), lr=1e-3), epochs=3)
    if processes > 1:
        del model  # or DDP may not end, with gloo and torch 2.13
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
