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
        self._steps_are_announced = True
        self._step_begins = True

    def end_training(self) -> None:
        """The training ends: until the next one announces its steps, each call in training mode is a step."""
        self._steps_are_announced = False
        self._step_begins = True

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
        image_features = image_features.to(dtype)
        text_features = text_features.to(dtype)
        caption_features = caption_features.to(dtype)
        all_images = self.gather.items(image_features)
        # Both captions in one collective.
        both_captions = torch.stack([text_features, caption_features], dim=1)
        all_texts, all_captions = self.gather.items(both_captions).unbind(1)
        text_weights, caption_weights = self._weights(all_images, all_texts, all_captions)
        if not self.gather.anchors_are_local:  # every process computes all rows
            image_features, text_features, caption_features = all_images, all_texts, all_captions
        pairs = torch.arange(len(image_features), device=all_images.device)
        pairs = pairs + self.gather.first_row(len(pairs))
        of_texts = _cross_entropy(scale, image_features, text_features, all_images, all_texts, pairs)
        of_captions = _cross_entropy(scale, image_features, caption_features, all_images, all_captions, pairs)
        return {
            "contrastive_loss": (of_texts * text_weights[pairs]).mean(),
            "caption_contrastive_loss": (of_captions * caption_weights[pairs]).mean(),
        }

    def _check_captions(self, text_features: Tensor, caption_features: Tensor) -> None:
        """Raise a ValueError, on all processes, unless the second captions are like the first."""
        needed = _shape_dtype_device(text_features)
        given = _shape_dtype_device(caption_features)
        with self.gather.agreement(self, text_features=text_features, caption_features=caption_features):
            if given != needed:
                raise ValueError(f"caption_features must be like text_features, {needed}; got {given}")

    @torch.no_grad()
    def _weights(self, images: Tensor, texts: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """The weights w_s·w_r and w_s·w_c of all pairs, ``[N]`` each.

        The first call of a training step moves the histories before.

        Raises:
            ValueError: for histories that a wrapper has cast to half precision.
        """
        is_half_precision = self.histories.dtype.itemsize < torch.float32.itemsize
        if is_half_precision:
            raise ValueError(
                f"histories must not be rounded to {self.histories.dtype}, in which they stand still: leave "
                "FSDP's buffer_dtype out"
            )
        dtype = torch.promote_types(images.dtype, torch.float32)
        v, t, c = images.to(dtype), texts.to(dtype), captions.to(dtype)
        cosines = torch.stack([(t * c).sum(-1), (t * v).sum(-1), (c * v).sum(-1)])
        if self.training and self._step_begins:
            self._move_histories(cosines.mean(-1))
            self._step_begins = not self._steps_are_announced
        above_history = cosines - self.histories.to(dtype)[:, None]
        text_caption, image_text, image_caption = above_history.unbind(0)
        g = torch.exp(self.gamma_sample * text_caption)
        sample_weight = g.clamp_max(1)
        text_weight = torch.where(g < 1, torch.exp(self.gamma_pair * image_text), 1.0)
        caption_weight = torch.where(g < 1, torch.exp(self.gamma_pair * image_caption), 1.0)
        return sample_weight * text_weight, sample_weight * caption_weight

    def _move_histories(self, batch_means: Tensor) -> None:
        """A step of the moving averages towards the means of a batch, ``[3]``."""
        batch_means = batch_means.to(self.histories.dtype)
        moved = self.momentum * self.histories + (1 - self.momentum) * batch_means
        # A GradScaler skips the step of an overflow; the histories must skip it too.
        self.histories.copy_(torch.where(batch_means.isfinite(), moved, self.histories))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AlipLoss:
        """Move or cast the module, as ``to()`` and ``half()`` do; the histories change their device alone."""
        unrounded = self.histories
        self.histories = unrounded.float()  # a dtype that every device has
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.histories.device
        if unrounded.is_meta:  # without values: to_empty() has given the buffer memory
            unrounded = self.histories
        self.histories = unrounded.to(device, widest_dtype(device))
        return self


def _cross_entropy(
    scale: Tensor | float,
    images: Tensor,
    captions: Tensor,
    all_images: Tensor,
    all_captions: Tensor,
    pairs: Tensor,
) -> Tensor:
    """``½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]`` of every pair k of the rows: ``[n]``.

    Args:
        scale: s.
        images: ``[n, D]``, the rows of the images.
        captions: ``[n, D]``, the rows of their captions.
        all_images: ``[N, D]``, the columns of the captions' rows.
        all_captions: ``[N, D]``, the columns of the images' rows.
        pairs: ``[n]``, the column of every row's own pair.
    """
    of_images = F.cross_entropy(scale * images @ all_captions.T, pairs, reduction="none")
    of_captions = F.cross_entropy(scale * captions @ all_images.T, pairs, reduction="none")
    return (of_images + of_captions) / 2


def _shape_dtype_device(x: object) -> list[object]:
    """Shape, dtype and device, which an image's captions share; None for each that an object lacks."""
    return [getattr(x, name, None) for name in ("shape", "dtype", "device")]


def alip_log(criterion: nn.Module, *_: Any) -> dict[str, Tensor]:
    """ALIP's histories: of the two captions, and of the image with each."""
    alip = next(loss for loss in criterion.modules() if isinstance(loss, AlipLoss))
    # A copy, also of histories in float32, since the next step moves them in place.
    text_caption, image_text, image_caption = alip.histories.to(torch.float32, copy=True).unbind()
    return {
        "alip_text_caption": text_caption,
        "alip_image_text": image_text,
        "alip_image_caption": image_caption,
    }


ALIP = Named(
    AlipLoss,
    columns="rankloss_open_clip.columns.second_caption:SecondCaption",
    kind="softmax",
    log=lambda: alip_log,  # a callable that makes the function
    help="CLIP's loss on two captions of each image, weighted by how well they fit (ALIP)",
)
