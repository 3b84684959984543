"""A term of one's own: spread the embeddings of each modality over the sphere."""

import torch
from rankloss_trainers.named import NamedLoss, option
from torch import nn

import rankloss
from rankloss.losses import base_entries, combined


class UniformLoss(nn.Module):
    """``base + weight · ramp · [u(V) + u(T)]`` with ``u(X) = log mean_{i<j} exp(−2·‖x_i − x_j‖²)``."""

    def __init__(self, base=None, *, weight=0.1):
        super().__init__()
        self.base = rankloss.ClipLoss() if base is None else base
        self.weight = weight
        self.ramp = 1.0

    def set_progress(self, step, total_steps):
        """Let the weight grow over training; called before every optimizer step."""
        self.ramp = step / total_steps

    def forward(
        self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False, **base_inputs
    ):
        entries = base_entries(
            self.base, image_features, text_features, logit_scale, logit_bias, **base_inputs
        )
        terms = [torch.pdist(x).square().mul(-2).exp().mean().log() for x in (image_features, text_features)]
        return combined(entries, {"uniform_loss": self.weight * self.ramp * sum(terms)}, output_dict)


class LoggedUniformLoss(UniformLoss):
    """The same for the trainer, which logs what does not end in ``_loss``."""

    def forward(self, *inputs, **named):
        entries = super().forward(*inputs, **named)
        entries["uniform_weight"] = torch.tensor(self.weight * self.ramp)
        return entries


class Uniform(NamedLoss):
    """The trainer's own plus a uniformity term."""

    weight: float = option(0.1, "weight of the term", at_least=0)

    def build(self, base, gather):
        return LoggedUniformLoss(base, weight=self.weight)

    def describe(self, epochs):
        return f"weight up to {self.weight:g}"

    def unit(self, epochs):
        return "step"
