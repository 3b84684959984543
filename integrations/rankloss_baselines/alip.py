"""ALIP: CLIP's loss on two captions of each image, every pair weighted by how well it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.distributed import GatherOption
from rankloss.losses import OwnTerms, check_weight, widest_dtype
from rankloss_trainers.declared import Named

_KIND = ("shape", "dtype", "device")


class AlipLoss(OwnTerms):
    r"""ALIP: ``A(v, t, w_r) + A(v, c, w_c)``, t the raw and c the synthetic caption of image v.

        A(v, u, w) = (1/N)·Σ_k w_s,k · w_k · ½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]

    The weights come from the cosines of the three pairs, measured against their histories H, Hʳ and Hᶜ
    (exponential moving averages of the batch means, updated before they are used):

        g   = exp(γ_s·(t·c − H)),   w_s = min(1, g),
        w_r = exp(γ_p·(t·v − Hʳ)),  w_c = exp(γ_p·(c·v − Hᶜ))  where g < 1, else 1.

    They carry no gradient. They are computed from the whole batch, gathered from all processes, which
    therefore hold the same histories.

    The histories move once per training step. By default each call in training mode is a step. Where a
    trainer announces its steps by :meth:`set_progress`, the first call after it moves them and further calls
    for the same step, as gradient accumulation makes them, do not. A batch mean that is not finite leaves its
    history unchanged. Activation checkpointing around the loss would compute each call, and so move the
    histories, twice.

    Args:
        gamma_sample: Steepness γ_s of a sample's weight over the similarity of its two captions.
        gamma_pair: Steepness γ_p of a pair's weight over its similarity.
        momentum: Share of the histories that a step keeps, in [0, 1].
        initial_history: Start of all three histories. The published 1 closes almost every gate at first,
            and makes the loss small until the histories have come down.
        gather: Gathering of other processes' features. None: from the default process group, if one of
            more than one process is initialised, exactly. False: not at all. Else a :class:`rankloss.Gather`.

    Attributes:
        histories: H, Hʳ and Hᶜ, ``[3]``: a buffer, and so part of ``state_dict()``. It stays float64 when the
            module is cast (float32 where a device has no float64): in a short dtype the small steps of a
            moving average would round to nothing.

    Shapes:
        ``image_features``, ``text_features`` and ``caption_features``: ``[N, D]``, unit-norm;
        ``logit_scale``: the multiplier s itself, not its logarithm. The result is a scalar in nats, float32
        at least. ``output_dict=True`` gives ``contrastive_loss`` (the raw captions) and
        ``caption_contrastive_loss``, which add up to it. A ``logit_bias``, added to all logits, changes
        nothing.

    Raises:
        ValueError: for a γ that is negative or not finite, a momentum outside [0, 1], or an initial history
            that is not finite; in ``forward`` for features that are not three floating-point matrices of one
            shape with at least two rows in the whole batch, or a scale that is not positive.

    References:
        "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption", ICCV 2023.

    Example:
        >>> v = torch.eye(2)
        >>> loss = AlipLoss(initial_history=0.0)
        >>> round(loss(v, v, logit_scale=1.0, caption_features=v).item(), 4)  # all gates open: twice CLIP's
        0.6265
        >>> loss.state_dict()["histories"]
        tensor([0.0100, 0.0100, 0.0100], dtype=torch.float64)
    """

    histories: Tensor

    def __init__(
        self,
        *,
        gamma_sample: float = 2.0,
        gamma_pair: float = 2.0,
        momentum: float = 0.99,
        initial_history: float = 1.0,
        gather: GatherOption = None,
    ) -> None:
        super().__init__(gather)
        self.gamma_sample = check_weight("gamma_sample", gamma_sample)
        self.gamma_pair = check_weight("gamma_pair", gamma_pair)
        self.momentum = check_weight("momentum", momentum)
        if self.momentum > 1:
            raise ValueError(f"momentum must be in [0, 1]; got {momentum!r}")
        if not (isinstance(initial_history, (int, float)) and math.isfinite(initial_history)):
            raise ValueError(f"initial_history must be finite; got {initial_history!r}")
        self.initial_history = initial_history
        widest = widest_dtype(torch.get_default_device())
        self.register_buffer("histories", torch.empty(3, dtype=widest))
        self.reset_parameters()
        # Without announcements each call in training mode begins a step. Once a trainer announces its steps
        # by set_progress, one begins there: the first call moves the histories, and ends _step_begins.
        self._steps_are_announced = False
        self._step_begins = True

    def reset_parameters(self) -> None:
        """Start the histories anew, as a module built on the meta device needs it after ``to_empty()``."""
        self.histories.fill_(self.initial_history)

    def set_progress(self, step: int, total_steps: int) -> None:
        """A training step begins: the next call in training mode moves the histories, later ones do not."""
        super().set_progress(step, total_steps)
        self._steps_are_announced = self._step_begins = True

    def end_training(self) -> None:
        """The training ends: until the next one announces its steps, each call in training mode is a step."""
        self._steps_are_announced, self._step_begins = False, True

    def own_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        scale: Tensor | float,
        *,
        caption_features: Tensor,
    ) -> dict[str, Tensor]:
        """``A(v, t, w_r)`` and ``A(v, c, w_c)``."""
        self._check_captions(text_features, caption_features)
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        image_features, text_features, caption_features = (
            x.to(dtype) for x in (image_features, text_features, caption_features)
        )
        images = self.gather.items(image_features)
        # Both captions in one collective.
        texts, synthetic = self.gather.items(torch.stack([text_features, caption_features], dim=1)).unbind(1)
        text_weights, caption_weights = self._weights(images, texts, synthetic)
        anchors = images, texts, synthetic
        if self.gather.anchors_are_local:
            anchors = image_features, text_features, caption_features
        rows = torch.arange(len(anchors[0]), device=images.device)
        rows = rows + self.gather.first_row(len(rows))

        def part(own: Tensor, everyone: Tensor, weights: Tensor) -> Tensor:
            nll = F.cross_entropy(scale * anchors[0] @ everyone.T, rows, reduction="none")
            nll = nll + F.cross_entropy(scale * own @ images.T, rows, reduction="none")
            return (nll / 2 * weights[rows]).mean()

        return {
            "contrastive_loss": part(anchors[1], texts, text_weights),
            "caption_contrastive_loss": part(anchors[2], synthetic, caption_weights),
        }

    def _check_captions(self, text_features: Tensor, caption_features: Tensor) -> None:
        """Raise a ValueError, on all processes, unless the second captions are like the first."""
        kinds = [[getattr(x, name, None) for name in _KIND] for x in (text_features, caption_features)]
        with self.gather.agreement(self, text_features=text_features, caption_features=caption_features):
            if kinds[0] != kinds[1]:
                raise ValueError("caption_features must be like text_features, {}; got {}".format(*kinds))

    @torch.no_grad()
    def _weights(self, images: Tensor, texts: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the raw and of the caption pairs, ``[N]`` each."""
        if self.histories.dtype.itemsize < 4:
            raise ValueError(
                f"histories must not be rounded to {self.histories.dtype}, in which they stand still: leave "
                "FSDP's buffer_dtype out"
            )
        dtype = torch.promote_types(images.dtype, torch.float32)
        v, t, c = (x.to(dtype) for x in (images, texts, captions))
        cosines = torch.stack([(t * c).sum(-1), (t * v).sum(-1), (c * v).sum(-1)])
        if self.training and self._step_begins:
            mean = cosines.mean(-1).to(self.histories.dtype)
            moved = self.momentum * self.histories + (1 - self.momentum) * mean
            # A GradScaler skips the step of an overflow; the histories must skip it too.
            self.histories.copy_(torch.where(mean.isfinite(), moved, self.histories))
            self._step_begins = not self._steps_are_announced
        sample, text, caption = (cosines - self.histories.to(dtype)[:, None]).unbind(0)
        gate = torch.exp(self.gamma_sample * sample)
        pairs = [torch.where(gate < 1, torch.exp(self.gamma_pair * x), 1.0) for x in (text, caption)]
        return gate.clamp_max(1) * pairs[0], gate.clamp_max(1) * pairs[1]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AlipLoss:
        # to(), half() and so on. The device is fn's choice, the dtype is not.
        held, self.histories = self.histories, self.histories.float()  # a dtype that every device has
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held, device = self.histories if held.is_meta else held, self.histories.device
        self.histories = held.to(device, widest_dtype(device))
        return self


def alip_log(criterion: nn.Module, *_: Any) -> dict[str, Tensor]:
    """ALIP's histories: of the two captions, and of the image with each."""
    names = ("alip_text_caption", "alip_image_text", "alip_image_caption")
    alip = next(x for x in criterion.modules() if isinstance(x, AlipLoss))
    histories = alip.histories.to(torch.float32, copy=True).unbind()
    return dict(zip(names, histories, strict=True))


ALIP = Named(
    AlipLoss,
    columns="rankloss_open_clip.columns.second_caption:SecondCaption",
    kind="softmax",
    log=lambda: alip_log,
    help="CLIP's loss on two captions of each image, weighted by how well they fit (ALIP)",
)
