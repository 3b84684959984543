"""Two clouds, of pictures and of captions, in spaces of their own and in the one space of the closed form."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from style import SMALL, WIDTH, Colors

from rankloss_features.cca import CanonicalCorrelation

PAIRS = 60
JOINED = 7  # pairs with a line between picture and caption
FLATNESS, NOISE, DISTANCE = 0.45, 0.12, 2.5  # of the circle: one axis, deviation, above the sphere's centre


def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-norm features in three dimensions, an illustration: subjects on a circle, seen by two encoders."""
    generator = torch.Generator().manual_seed(3)
    angle = 2 * math.pi * torch.rand(PAIRS, generator=generator)
    subject = torch.stack([angle.cos(), angle.sin()], dim=1)

    def features(turn: float, offset: tuple[float, float]) -> torch.Tensor:
        """The circle turned and flattened, with noise, on the sphere around a place beside its pole."""
        cos, sin = math.cos(turn), math.sin(turn)
        ellipse = subject @ torch.tensor([[cos, sin], [-FLATNESS * sin, FLATNESS * cos]])
        noisy = ellipse + NOISE * torch.randn(PAIRS, 2, generator=generator) + torch.tensor(offset)
        height = torch.full((PAIRS, 1), DISTANCE)
        return torch.nn.functional.normalize(torch.cat([noisy, height], dim=1), dim=-1)

    return features(turn=0.5, offset=(0.6, 0.2)), features(turn=2.3, offset=(-0.5, 0.1))


def draw(colors: Colors) -> Figure:
    """On the left both spaces as they are, on the right the two first canonical directions."""
    pictures, captions = clouds()
    cca = CanonicalCorrelation.fit(
        pictures, captions, dimensions=2, image_ridge=0.01, text_ridge=0.01, power=0.5
    )
    panels = {
        "two encoders": (pictures[:, :2], captions[:, :2]),
        "one space": (cca.images(pictures), cca.texts(captions)),
    }
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    for axes, (title, (v, t)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for pair in range(JOINED):
            x, y = torch.stack([v[pair], t[pair]]).T.tolist()
            axes.plot(x, y, color=colors.mark, linewidth=1.4, zorder=1)
        axes.scatter(*v.T.tolist(), s=18, color=colors.ours, label="pictures", zorder=2)
        axes.scatter(*t.T.tolist(), s=18, color=colors.ours_too, marker="s", label="captions", zorder=2)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, loc="left", fontsize=SMALL)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=SMALL)
    return figure
