"""A term of one's own: spread the embeddings of each modality over the sphere, or as far as a teacher's."""

import torch
from torch import nn

from rankloss.losses import base_entries, check_base, check_weight, combined


class UniformLoss(nn.Module):
    """The trainer's own plus a uniformity term.

    ``base + weight · ramp · [u(V) + u(T)]`` with ``u(X) = log mean_{i<j} exp(−2·‖x_i − x_j‖²)``. With a
    teacher's features X' of a modality ``|u(X) − u(X')|`` takes the place of ``u(X)``.

    Args:
        weight: Weight of the term.
    """

    def __init__(self, base=None, *, weight: float = 0.1, gather=None):
        super().__init__()
        self.base = check_base(base, gather)
        self.weight = check_weight("weight", weight)
        self.ramp = 1.0

    def set_progress(self, step, total_steps):
        """Let the weight grow over training; called before every optimizer step."""
        self.ramp = step / total_steps

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        logit_bias=None,
        output_dict=False,
        *,
        reference_image_features=None,
        reference_text_features=None,
        **base_inputs,
    ):
        teacher = {
            "reference_image_features": reference_image_features,
            "reference_text_features": reference_text_features,
        }
        features = image_features, text_features
        entries = base_entries(self.base, *features, logit_scale, logit_bias, teacher=teacher, **base_inputs)
        terms = [
            uniformity(x) if of_teacher is None else (uniformity(x) - uniformity(of_teacher)).abs()
            for x, of_teacher in zip(features, teacher.values(), strict=True)
        ]
        weight = self.weight * self.ramp
        if output_dict:  # logged, as it does not end in _loss
            entries["uniform_weight"] = torch.tensor(weight)
        return combined(entries, {"uniform_loss": weight * sum(terms)}, output_dict)


def uniformity(x):
    """Wang and Isola's: lower for features that are spread further."""
    return torch.pdist(x).square().mul(-2).exp().mean().log()
