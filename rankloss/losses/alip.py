"""ALIP: CLIP's loss on two captions of each image, every pair weighted by how well it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.checks import check_bias
from rankloss.distributed import GatherOption
from rankloss.losses.clip import pair_logits
from rankloss.losses.composition import combined
from rankloss.losses.gathering import GatheringLoss
from rankloss.losses.weights import as_number, check_weight
from rankloss.options import check_names
from rankloss.precision import arithmetic_dtype, dtype_of_numbers

if TYPE_CHECKING:
    from typing_extensions import Never

__all__ = ["AlipLoss"]


class AlipLoss(GatheringLoss):
    r"""ALIP: ``A(v, t, w_r) + A(v, c, w_c)``, t the raw and c the synthetic caption of image v.

        A(v, u, w) = (1/N)·Σ_k w_s,k · w_k · ½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]

    The weights come from the cosines of the three pairs, measured against their histories H, Hʳ and Hᶜ
    (exponential moving averages of the batch means, updated before they are used):

        g   = exp(γ_s·(t·c − H)),   w_s = min(1, g),
        w_r = exp(γ_p·(t·v − Hʳ)),  w_c = exp(γ_p·(c·v − Hᶜ))  where g < 1, else 1.

    They carry no gradient. They are computed from the whole batch, gathered from all processes, which
    therefore hold the same histories.

    The histories move once per training step. By default each call in training mode is a step. A trainer that
    calls the loss several times for one step (gradient accumulation) passes ``update_histories=True`` in one
    of the calls and False in the others. A batch mean that is not finite leaves its history unchanged.
    Activation checkpointing around the loss would compute each call, and so move the histories, twice.

    Args:
        gamma_sample: γ_s, how steeply a sample's weight falls with the similarity of its two captions.
        gamma_pair: γ_p, how steeply a pair's weight changes with its similarity.
        momentum: share of a history that an update keeps, in [0, 1].
        initial_history: where all three histories start. The published 1 closes almost every gate at first,
            and makes the loss small until the histories have come down.
        gather: how features of other processes are gathered. None: from the default process group, if one of
            more than one process is initialised, exactly. False: not at all. Else a :class:`rankloss.Gather`.

    Attributes:
        histories: H, Hʳ and Hᶜ, ``[3]``: a buffer, and so part of ``state_dict()``. It stays float64 when the
            module is cast (float32 where a device has no float64): in a short dtype the small steps of a
            moving average would round to nothing. It has values from the start, also where the module is
            built on the meta device; moved from there by ``to_empty()`` it starts again.

    Shapes:
        ``image_features``, ``text_features`` and ``caption_features``: ``[N, D]``, unit-norm;
        ``logit_scale``: the multiplier s itself, not its logarithm. The result is a scalar in nats, float32
        at least. ``output_dict=True`` gives ``contrastive_loss`` (the raw captions) and
        ``caption_contrastive_loss``, which add up to it. A ``logit_bias`` is added to all logits and changes
        nothing.

    Raises:
        ValueError: for a γ that is negative or not finite, a momentum outside [0, 1], or an initial history
            that is not finite; in ``forward`` for features that are not three floating-point matrices of one
            shape with at least two rows in the whole batch, or a scale that is not positive.
        TypeError: for an argument that does not exist.
        RuntimeError: in ``forward``, where the histories are on the meta device and the features are not.

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
        **unexpected: Never,
    ) -> None:
        check_names(type(self), unexpected)
        super().__init__(gather)
        self.gamma_sample = check_weight("gamma_sample", gamma_sample)
        self.gamma_pair = check_weight("gamma_pair", gamma_pair)
        if not 0 <= as_number(momentum) <= 1:
            raise ValueError(f"momentum must be in [0, 1]; got {momentum!r}")
        self.momentum = momentum
        if not math.isfinite(as_number(initial_history)):
            raise ValueError(f"initial_history must be finite; got {initial_history!r}")
        self.initial_history = initial_history
        self.register_buffer("histories", self._initial_histories())

    def reset_parameters(self) -> None:
        """Start the histories again from ``initial_history``."""
        self.histories = self._initial_histories(self.histories.device)

    def _initial_histories(self, device: torch.device | None = None) -> Tensor:
        if device is None:
            device = torch.empty(0).device
            if device.type == "meta":
                # Left there, the values would be up to whoever materialises the module.
                device = torch.device("cpu")
        # Not an inference tensor: those cannot be updated outside inference mode.
        with torch.inference_mode(False):
            return torch.full((3,), self.initial_history, dtype=dtype_of_numbers(device), device=device)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        caption_features: Tensor,
        update_histories: bool | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its two parts.

        Args:
            image_features: ``[N, D]``.
            text_features: the raw captions, ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: added to all logits.
            output_dict: return the parts by name instead of their sum.
            caption_features: the synthetic captions, ``[N, D]``.
            update_histories: whether this call moves the histories; None: in training mode.
        """
        self.check_inputs(image_features, text_features, logit_scale)
        check_bias(logit_bias, image_features)
        _check_captions(caption_features, text_features)
        if self.histories.is_meta and not image_features.is_meta:
            raise RuntimeError("histories are on the meta device and have no values: call to_empty() first")
        # Both captions in one collective.
        images, captions = self.gather(image_features, torch.stack([text_features, caption_features], dim=1))
        texts, synthetic = captions.unbind(1)
        text_weights, caption_weights = self._weights(
            images, texts, synthetic, self.training if update_histories is None else update_histories
        )

        def part(own: Tensor, everyone: Tensor, weights: Tensor) -> Tensor:
            logits, rows = pair_logits(
                self.gather, image_features, own, (images, everyone), logit_scale, logit_bias
            )
            nll = F.cross_entropy(logits[0], rows, reduction="none")
            nll = (nll + F.cross_entropy(logits[1], rows, reduction="none")) / 2
            return (nll * weights[rows]).mean()

        raw = {"contrastive_loss": part(text_features, texts, text_weights)}
        caption = {"caption_contrastive_loss": part(caption_features, synthetic, caption_weights)}
        return combined(raw, caption, output_dict)

    @torch.no_grad()
    def _weights(
        self, images: Tensor, texts: Tensor, captions: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        """The weights of the raw and of the caption pairs, ``[N]`` each."""
        dtype = arithmetic_dtype(images)
        # Detached too: no_grad alone leaves forward-mode tangents in place.
        v, t, c = (x.detach().to(dtype) for x in (images, texts, captions))
        cosines = torch.stack([(t * c).sum(-1), (t * v).sum(-1), (c * v).sum(-1)])
        if update:
            mean = cosines.mean(-1).to(self.histories.dtype)
            moved = self.momentum * self.histories + (1 - self.momentum) * mean
            # A GradScaler skips the step of an overflow; the histories must skip it too.
            self.histories.copy_(torch.where(mean.isfinite(), moved, self.histories))
        sample, text, caption = (cosines - self.histories.to(dtype)[:, None]).unbind(0)
        gate = torch.exp(self.gamma_sample * sample)
        pairs = (torch.where(gate < 1, torch.exp(self.gamma_pair * x), 1.0) for x in (text, caption))
        of_text, of_caption = (gate.clamp_max(1) * pair for pair in pairs)
        return of_text, of_caption

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AlipLoss:
        # What to(), half(), to_empty() and so on do to a buffer. The device is fn's choice, the dtype is not.
        histories = self.histories
        self.histories = histories.float()  # a dtype that every device has
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except BaseException:
            self.histories = histories
            raise
        device = self.histories.device
        if histories.is_meta and device.type != "meta":
            self.histories = self._initial_histories(device)
        else:
            self.histories = histories.to(device, dtype_of_numbers(device))
        return self

    def extra_repr(self) -> str:
        """The options of the weights."""
        return (
            f"gamma_sample={self.gamma_sample:g}, gamma_pair={self.gamma_pair:g}, momentum={self.momentum:g}"
        )


def _check_captions(caption_features: Tensor, text_features: Tensor) -> None:
    if not isinstance(caption_features, Tensor):
        raise ValueError(f"caption_features must be a torch.Tensor; got {type(caption_features).__name__}")
    if caption_features.device != text_features.device:
        raise ValueError(
            "caption_features and text_features must be on one device; got "
            f"{caption_features.device} and {text_features.device}"
        )
    if not caption_features.is_floating_point():
        raise ValueError(f"caption_features must be floating point; got {caption_features.dtype}")
    if caption_features.shape != text_features.shape:
        raise ValueError(
            "caption_features and text_features must have one shape [N, D]; "
            f"got {tuple(caption_features.shape)} and {tuple(text_features.shape)}"
        )
