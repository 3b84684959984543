"""A loop of one's own with RankCLIP's loss: train, evaluate on held-out pairs, save.

Run ``python examples/trainers/plain_loop.py``, or on several processes
``torchrun --nproc-per-node 2 examples/trainers/plain_loop.py``. Put in your model and your data.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import rankloss_trainers
from rankloss.metrics import recall


class Towers(torch.nn.Module):
    """Yours: a model that returns unit-norm features of images and texts, and the scale."""

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(64, 32), torch.nn.Linear(48, 32)
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


def on_this_process(model, pairs, batch_size):
    """Return the model on this process's device, and its share of every batch, which is of all processes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):  # a GPU for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model = model.cuda()
    if processes == 1:
        return model, DataLoader(pairs, batch_size, shuffle=True, drop_last=True)
    torch.distributed.init_process_group()  # NCCL on GPUs, gloo on CPUs
    sampler = DistributedSampler(pairs)
    batches = DataLoader(pairs, batch_size // processes, sampler=sampler, drop_last=True)
    return DistributedDataParallel(model), batches


def train(model, log_scale, batches, optimizer, epochs):
    """Train, and return the last step's loss. ``log_scale`` is the model's parameter."""
    device = log_scale.device
    criterion = rankloss_trainers.create("rankclip")
    step, total_steps = 0, epochs * len(batches)
    for epoch in range(epochs):
        if isinstance(batches.sampler, DistributedSampler):
            batches.sampler.set_epoch(epoch)  # or every epoch has the same batches
        for images, texts in batches:
            step += 1
            criterion.set_progress(step, total_steps)
            image_features, text_features, scale = model(images.to(device), texts.to(device))
            loss = criterion(image_features, text_features, scale)  # unit-norm features, log_scale.exp()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                log_scale.clamp_(max=math.log(100))  # as open_clip does
        print(f"epoch {epoch + 1}: loss {loss:.3f}, rank_lambda {criterion.schedule_value:.2f}")
    return loss


@torch.no_grad()
def evaluate(model, held_out):
    """R@1: the share of images whose own text is the most similar one."""
    device = next(model.parameters()).device
    images, texts, _ = model(*(x.to(device) for x in held_out[:]))
    return recall(images, texts, 1)["image_to_text_R@1"].item()


def main(output="outputs/trainers/plain_loop"):
    """Train; each process of torchrun has its share of every batch, and the first one saves the model."""
    torch.manual_seed(0)
    towers, (pairs, held_out) = Towers(), made_pairs()
    model, batches = on_this_process(towers, pairs, batch_size=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, towers.logit_scale, batches, optimizer, epochs=3)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"held-out R@1: {evaluate(towers, held_out):.3f}")
        os.makedirs(output, exist_ok=True)
        torch.save(towers.state_dict(), f"{output}/model.pt")
    if torch.distributed.is_initialized():
        del model  # or DDP may not end, with gloo and torch 2.13
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
