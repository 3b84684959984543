"""The base classes of the losses: gathering, checks of the inputs, and the streamed terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloss.batch import Batch
from rankloss.checks import (
    check_features,
    check_one_space,
    check_scale,
    check_teacher,
    look_at_rows,
    look_at_scale,
)
from rankloss.distributed import Gather, Gathered, GatherOption
from rankloss.engine import weighted_terms
from rankloss.options import STREAMING_OPTION_NAMES, RankOptions, check_names
from rankloss.precision import arithmetic_dtype, nan_unless_finite


class GatheringLoss(nn.Module):
    """A loss of features that are gathered from all processes.

    Args:
        gather: see :class:`rankloss.Gather`. None: the default process group if one of more than one process
            is initialised at the call, with both flags. False: the pairs of this process only.
    """

    _min_pairs: ClassVar[int] = 2
    """The pairs that the whole batch must have: a list needs two items."""

    _needs_one_space = True
    """Whether images are compared with texts."""

    def __init__(self, gather: GatherOption = None) -> None:
        super().__init__()
        self.gather = Gather.of(gather)
        self._looked_at: set[str] = set()  # the arguments whose values were read

    def check_inputs(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        **references: Tensor | None,
    ) -> None:
        """Raise an error that names a wrong input; warn of a suspicious one.

        ``references`` are a teacher's features of the same pairs, where they are given.

        The values of an argument are read the first time that it is given, which waits for an accelerator
        once, and not while a graph is captured. Before anything else the processes of the gathering compare
        their inputs.
        """
        self.gather.check_agreement(
            self, image_features=image_features, text_features=text_features, **references
        )
        min_pairs = min(self.gather.min_pairs, self._min_pairs)
        check_features(image_features, text_features, min_pairs=min_pairs)
        if self._needs_one_space:
            check_one_space(image_features, text_features)
        check_scale(logit_scale, image_features)
        looked_at = self._looked_at
        for name, x in references.items():
            if x is not None and check_teacher(name, x, image_features, first_look=name not in looked_at):
                looked_at.add(name)
        for name, x in (("image_features", image_features), ("text_features", text_features)):
            if name not in looked_at and look_at_rows(name, x):
                looked_at.add(name)
        if "logit_scale" not in looked_at and look_at_scale("logit_scale", logit_scale, image_features):
            looked_at.add("logit_scale")

    def whole_batch(self, image_features: Tensor, text_features: Tensor) -> Gathered:
        """The features of all processes, image and text."""
        return self.gather.items(image_features), self.gather.items(text_features)

    def weighted_terms(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | float],
        options: RankOptions,
        weights: Sequence[float],
        teacher: Sequence[Tensor | None] = (None, None),
    ) -> Sequence[Tensor]:
        """CLIP's cross-entropy and the two rank terms times ``weights``, from one gathering and one pass.

        Args:
            inputs: image features, text features and scale, which :meth:`check_inputs` has checked.
            options: of the rank terms.
            weights: of the three terms; one of weight 0 is zero and not computed.
            teacher: a teacher's features, image and text, or None for each.
        """
        image_features, text_features, logit_scale = inputs
        wanted = [weight != 0 for weight in weights]
        if not any(wanted):
            zero = image_features.new_zeros((), dtype=arithmetic_dtype(image_features, text_features))
            zero = nan_unless_finite(zero, image_features, text_features)
            return zero, zero.clone(), zero.clone()
        reference_image, reference_text = self.gather.constants(*teacher)
        batch = Batch.of(
            *self.whole_batch(image_features, text_features),
            logit_scale,
            # This process's own features, where only they have lists.
            anchors=(image_features, text_features) if self.gather.anchors_are_local else None,
            first_row=self.gather.first_row(len(image_features)),
            reference_image=reference_image,
            reference_text=reference_text,
        )
        return weighted_terms(
            batch, options, torch.tensor(weights, dtype=torch.float64, device="cpu"), wanted
        )


class StreamedLoss(GatheringLoss):
    """A loss of all pairs: the formula where its logits are within a budget, else a pass over chunks of rows.

    Args:
        gather: as in :class:`GatheringLoss`.
        options: ``chunk_size`` and ``memory_budget``, see :class:`rankloss.RankOptions`.
    """

    _min_pairs = 1  # open_clip's losses give a number for a single pair

    def __init__(self, gather: GatherOption, options: dict[str, Any]) -> None:
        check_names(type(self), options, STREAMING_OPTION_NAMES)
        super().__init__(gather)
        self._options = RankOptions(**options)

    def fits(self, rows: int, columns: int, image_features: Tensor, text_features: Tensor) -> bool:
        """True if the logits of features like these are within the budget."""
        dtype = arithmetic_dtype(image_features, text_features)
        return columns == 1 or self._options.fits(rows, columns, image_features.device, dtype)

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options.changed.items())


def gather_of_open_clip(
    gather: GatherOption, defaults: Gather, *without_effect: Any, **layout: Any
) -> GatherOption:
    """``gather``, or the layout of open_clip's arguments where any of them is given (is not None).

    Args:
        gather: this library's argument.
        defaults: open_clip's, of the arguments in ``layout``.
        *without_effect: arguments of open_clip's class that change nothing here.
        **layout: those that a :class:`rankloss.Gather` has too.

    Raises:
        ValueError: for arguments of both kinds.
    """
    given = {name: value for name, value in layout.items() if value is not None}
    if not given and all(value is None for value in without_effect):
        return gather
    if gather is not None:
        raise ValueError(f"pass gather= or open_clip's arguments, not both; got gather={gather!r}")
    return replace(defaults, **given)
