"""The frame of losses that write their own terms: the call, its checks, the base's entries and the sum."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from rankloss.distributed import GatherOption, gather_once
from rankloss.losses.composition import TEACHER, Base, base_entries, check_base, combined, own_inputs
from rankloss.losses.gathering import GatheringLoss, Number
from rankloss.precision import outside_graphs

Inputs: TypeAlias = tuple[Tensor, Tensor, Number, Number | None]
"""Image features, text features, the scale, and a bias or None."""


class OwnTerms(GatheringLoss):
    r"""A loss that is the sum of its own terms, on no other loss. A subclass writes :meth:`own_terms`.

    The rest is written here: the forward convention of open_clip's losses, checks of the inputs with errors
    that all processes raise, a graph's break under ``torch.compile``, and ``extra_repr``. Terms on a base
    are :class:`AddedTerms`.

    The options are keyword-only arguments of the subclass's constructor, which keeps each as an attribute of
    its name.

    Args:
        gather: as in :class:`GatheringLoss`.

    Shapes:
        As those of :class:`rankloss.ClipLoss`. A ``logit_bias`` changes nothing. ``output_dict=True`` gives
        the terms by name; the loss is their sum.

    Raises:
        ValueError: in ``forward`` for inputs that are not as :meth:`GatheringLoss.check_inputs` demands.
        TypeError: in ``forward`` for an input that :meth:`own_terms` does not name.

    Example:
        >>> import torch
        >>> class AlignmentLoss(OwnTerms):
        ...     def __init__(self, *, power: float = 2.0, gather=None):
        ...         super().__init__(gather)
        ...         self.power = power
        ...
        ...     def own_terms(self, image_features, text_features, scale):
        ...         distances = (image_features - text_features).norm(dim=-1)
        ...         return {"alignment_loss": distances.pow(self.power).mean()}
        >>> loss = AlignmentLoss()
        >>> loss, loss(torch.eye(2), torch.eye(2).flip(0), logit_scale=10.0)
        (AlignmentLoss(power=2), tensor(2.0000))
    """

    one_space: ClassVar[bool] = True
    """True if the terms compare images with texts, whose features then need one width."""

    def own_terms(self, *features: Any, **inputs: Any) -> dict[str, Tensor]:
        """The weighted terms by name.

        A name ends in ``_loss``; trainers log an entry of another name, which must have no gradient, and a
        call without ``output_dict`` adds it to the sum.

        Called as ``own_terms(image_features, text_features, scale, **inputs)``, with the multiplier s and the
        features of this process alone; ``self.gather(image_features, text_features)`` gives those of all.
        The keyword-only arguments name further inputs: a teacher's features, which are checked, or others
        that the data have. Without a default they are required.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method own_terms")

    @outside_graphs
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = None,
        output_dict: bool = False,
        **inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: passed on to the base, if there is one.
            output_dict: return the summands by name instead of their sum.
            **inputs: those that :meth:`own_terms` names; the others are the base's, such as ``pair_ids``,
                which refuses unknown ones. A teacher's features are given to both.
        """
        of_terms = {name: inputs.pop(name) for name in own_inputs(self) if name in inputs}
        of_base = inputs  # all that the terms do not name
        self.check_inputs(
            image_features,
            text_features,
            logit_scale,
            one_space=self.one_space,
            base_inputs=of_base,
            **self._teacher_among(of_terms),
        )
        checked = image_features, text_features, logit_scale, logit_bias
        with gather_once():  # the base and the terms gather the same features
            entries, terms = self._entries_and_terms(checked, of_terms, of_base)
        return combined(entries, terms, output_dict)

    def _teacher_among(self, of_terms: Mapping[str, Any]) -> dict[str, Any]:
        """A teacher's features that :meth:`own_terms` names, None for those that are not given."""
        return {name: of_terms.get(name) for name in TEACHER if name in own_inputs(self)}

    def _entries_and_terms(
        self, inputs: Inputs, of_terms: Mapping[str, Any], of_base: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The base's entries, here none, and the loss's own terms, of checked inputs.

        ``of_terms`` are the further inputs that :meth:`own_terms` names, ``of_base`` those that it does not.
        """
        if of_base:
            name = next(iter(of_base))
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
        image_features, text_features, scale, bias = inputs
        if bias is not None:  # changes nothing, but is a parameter of which DDP expects a gradient
            scale = scale + 0.0 * bias
        return {}, self.own_terms(image_features, text_features, scale, **of_terms)

    def extra_repr(self) -> str:
        """The options: keyword-only arguments of the constructor that are attributes, but for ``gather``."""
        arguments = inspect.signature(type(self)).parameters.values()
        options = [argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
        kept = [name for name in options if name != "gather" and hasattr(self, name)]
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in kept)


def _shown(value: Any) -> str:
    """An option's value in ``repr``."""
    return f"{value:g}" if isinstance(value, float) else repr(value)


class AddedTerms(OwnTerms):
    r"""A base loss, and terms added to it: ``L_base + Σ terms``. A subclass writes :meth:`own_terms`.

    Beside all that :class:`OwnTerms` does, the base is called with the same inputs, and with those that
    :meth:`own_terms` does not name; the features that both gather are gathered once.

    Args:
        base: The loss to which the terms are added: a module or function with the forward convention of
            open_clip's losses. None: :class:`rankloss.ClipLoss`.
        gather: as in :class:`GatheringLoss`, for the terms and for the default base.

    Shapes:
        As those of :class:`rankloss.ClipLoss`. ``output_dict=True`` gives the base's entries, then the terms;
        they add up to the loss.

    Raises:
        ValueError: for a base that cannot be called; in ``forward`` as :class:`OwnTerms`, and for a base with
            an entry of a term's name.

    Example:
        >>> import torch
        >>> from rankloss.losses import check_weight
        >>> class DistanceLoss(AddedTerms):
        ...     def __init__(self, base=None, *, weight: float = 0.5, gather=None):
        ...         super().__init__(base, gather=gather)
        ...         self.weight = check_weight("weight", weight)
        ...
        ...     def own_terms(self, image_features, text_features, scale):
        ...         distances = (image_features - text_features).square().sum(-1)
        ...         return {"distance_loss": self.weight * distances.mean()}
        >>> v = torch.eye(2)
        >>> entries = DistanceLoss()(v, v.flip(0), logit_scale=1.0, output_dict=True)
        >>> {name: round(x.item(), 4) for name, x in entries.items()}
        {'contrastive_loss': 1.3133, 'distance_loss': 1.0}
    """

    def __init__(self, base: Base | None = None, *, gather: GatherOption = None) -> None:
        super().__init__(gather)
        self.base = check_base(base, self.gather)

    def entries_of_base(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """The base's entries, as :func:`base_entries` gives them for the same arguments but the base.

        A subclass overrides it to refuse a base by its entries, with a ValueError.
        """
        return base_entries(self.base, *inputs, **named)

    def _entries_and_terms(
        self, inputs: Inputs, of_terms: Mapping[str, Any], of_base: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The base's entries, and the loss's own terms, of checked inputs."""
        image_features, text_features, scale, _ = inputs  # the bias is the base's
        terms = self.own_terms(image_features, text_features, scale, **of_terms)
        teacher = self._teacher_among(of_terms) or None  # None: the terms name no teacher's features
        return self.entries_of_base(*inputs, teacher=teacher, **of_base), terms
