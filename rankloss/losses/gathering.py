"""The base classes of the losses: gathering, checks of the inputs, and the streamed terms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from rankloss import checks
from rankloss.batch import Batch
from rankloss.distributed import Gather, GatherOption
from rankloss.engine import weighted_terms
from rankloss.losses.score_rows import Differentiated, mean_of_rows
from rankloss.options import RankOptions, check_choice, check_count, check_position
from rankloss.precision import arithmetic_dtype, can_be_read, in_arithmetic, nan_unless_finite, outside_graphs

Number: TypeAlias = Tensor | float
"""A number, or a tensor of one element."""

SameId = Literal["ignore", "share"]
"""Use of the pairs of one id: left out of each other's terms, or right for each other."""


class GatheringLoss(nn.Module):
    """A loss of features gathered from all processes.

    Args:
        gather: see :class:`rankloss.Gather`. None: the default process group, with both flags, if one of
            several processes is initialised at the call. False: the pairs of this process only.
    """

    min_pairs: ClassVar[int] = 2
    """The smallest number of pairs in a batch of all processes: a list needs two items."""

    def __init__(self, gather: GatherOption = None) -> None:
        super().__init__()
        self.gather = Gather.of(gather)
        self._checked_once: set[str] = set()  # names of the arguments whose values were read

    @outside_graphs
    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Epoch ``epoch`` of ``epochs`` begins, counted from 1: a base whose weights change is told.

        The loss itself does not depend on it, unless its class says so.

        Raises:
            ValueError: unless both are integers and 1 ≤ epoch ≤ epochs.
        """
        self._tell_losses_within("set_epoch", *check_position("epoch", epoch, "epochs", epochs))

    @outside_graphs
    def set_progress(self, step: int, total_steps: int) -> None:
        """Optimizer step ``step`` of ``total_steps`` begins, counted from 1, as :meth:`set_epoch`.

        Raises:
            ValueError: unless both are integers and 1 ≤ step ≤ total_steps.
        """
        self._tell_losses_within("set_progress", *check_position("step", step, "total_steps", total_steps))

    def _tell_losses_within(self, method: str, now: int, end: int) -> None:
        """Call a method, ``set_epoch`` or ``set_progress``, of the base and other parts that have it."""
        for part in self.children():
            tell: Any = getattr(part, method, None)
            if callable(tell):
                tell(now, end)

    @outside_graphs
    def check_inputs(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = None,
        *,
        one_space: bool = True,
        pair_ids: Tensor | None = None,
        base_inputs: Collection[str] = (),
        **references: Tensor | None,
    ) -> None:
        """Raise an error that names a wrong input; warn of a suspicious one.

        The values of an argument are read at its first call, which waits for an accelerator once, but not
        while a graph is captured; on a CPU the scale and a teacher's features are read at every call. Several
        processes raise the same error: that of the first which has one, see
        :meth:`rankloss.Gather.agreement`.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: one number, or None.
            one_space: True if images are compared with texts.
            pair_ids: ``[N]`` integers, equal for pairs that belong together, or None.
            base_inputs: the names of further inputs, which the base checks.
            **references: a teacher's features of the same pairs, or None.

        Raises:
            TypeError: for an argument that is no tensor or number.
            ValueError: for all else.
        """
        features = {"image_features": image_features, "text_features": text_features}
        with self.gather.agreement(self, *sorted(base_inputs), **features, **references, pair_ids=pair_ids):
            # Two processes of one pair each have two.
            min_pairs = 1 if self.gather.place.world_size > 1 else self.min_pairs
            checks.check_features(image_features, text_features, min_pairs=min_pairs, one_space=one_space)
            checks.check_scale(logit_scale, image_features)
            if logit_bias is not None:
                checks.check_is_number("logit_bias", logit_bias, image_features)
            if pair_ids is not None:
                checks.check_ids("pair_ids", pair_ids, image_features)
            for name, of_teacher in references.items():
                if of_teacher is not None:
                    self._check_teacher(name, of_teacher, image_features)
            for name, of_modality in features.items():
                if name not in self._checked_once and can_be_read(of_modality):
                    checks.warn_of_norms(name, of_modality)
                    self._checked_once.add(name)
            if "logit_scale" not in self._checked_once:
                is_read = checks.warn_of_scale("logit_scale", logit_scale, image_features)
                if is_read:
                    self._checked_once.add("logit_scale")

    def _check_teacher(self, name: str, features: Tensor, image_features: Tensor) -> None:
        """Raise an error for wrong features of a teacher; warn of suspicious ones at the first look."""
        first_look = name not in self._checked_once
        are_read = checks.check_teacher(name, features, image_features, first_look=first_look)
        if are_read:
            checks.warn_of_one_row(name, features)
            self._checked_once.add(name)

    def weighted_terms(
        self,
        inputs: tuple[Tensor, Tensor, Number, Number | None],
        options: RankOptions,
        weights: Sequence[float],
        teacher: Sequence[Tensor | None] = (None, None),
    ) -> Sequence[Tensor]:
        """CLIP's cross-entropy and the two rank terms times ``weights``, from one gathering and one pass.

        Args:
            inputs: image features, text features, scale, and a bias of the logits or None, checked by
                :meth:`check_inputs`. The bias moves all logits alike; it stays in the graph, as DDP requires
                for a parameter.
            options: of the rank terms.
            weights: of the three terms; a term of weight 0 is not computed, but zero, or NaN unless all
                features are finite.
            teacher: a teacher's features, image and text, or None for each.
        """
        image_features, text_features, logit_scale, bias = inputs
        wanted = [weight != 0 for weight in weights]
        if not any(wanted):
            zeros = image_features.new_zeros(3, dtype=arithmetic_dtype(image_features, text_features))
            return nan_unless_finite(zeros, image_features, text_features).unbind()
        batch = self._batch(image_features, text_features, logit_scale, teacher)
        contrastive, *terms = weighted_terms(batch, options, weights, wanted)
        if wanted[0] and isinstance(bias, Tensor):
            contrastive = contrastive + 0 * bias.sum()
        return contrastive, *terms

    @outside_graphs
    def streamed(
        self,
        row_loss: Callable[[Tensor, int], Tensor],
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = None,
        *,
        chunk_size: int | None = None,
    ) -> Tensor:
        r"""The mean of a loss of rows of scores, over the images' and the texts' rows, in linear memory.

            L = (1/2N)·Σ_i [ℓ(s·V·tᵀ + b)_i + ℓ(s·T·Vᵀ + b)_i]

        Rows of all processes' scores are computed in chunks, each with its gradient, and no matrix is kept.
        The gradients of features, scale and bias are exact; a second derivative takes whole matrices. Scores
        are in float32 at least, under autocast too.

        Args:
            row_loss: ℓ, a function (scores ``[n, N]``, first_row) → values ``[n]`` of torch's operations.
                Row i has its own pair in column ``first_row + i``, so ``scores.diagonal(first_row)`` are the
                scores of own pairs. It must depend on the scores alone.
            image_features: ``[N, D]``, of this process.
            text_features: ``[N, D]``, of this process.
            logit_scale: the multiplier s.
            logit_bias: b; None for 0.
            chunk_size: rows computed at a time; None chooses from the sizes and the device.

        Returns:
            A scalar, float32 at least. NaN unless all features are finite.

        Raises:
            ValueError: as :meth:`check_inputs`, which it calls; if ``row_loss`` does not give one value per
                row, or depends on another tensor that requires a gradient.

        Example:
            >>> def hardest(scores, first_row):  # the distance to the hardest negative, at a margin of 1
            ...     own = scores.diagonal(first_row)
            ...     others = scores.diagonal_scatter(torch.full_like(own, -torch.inf), first_row)
            ...     return (1 + others.amax(-1) - own).relu()
            >>> v, t = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
            >>> GatheringLoss().streamed(hardest, v, t, logit_scale=1.0)
            tensor(0.4000)
        """
        self.check_inputs(image_features, text_features, logit_scale, logit_bias)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        batch = self._batch(image_features, text_features, logit_scale)
        inputs = batch.inputs._asdict()
        if logit_bias is not None:
            image = batch.inputs.image
            inputs["bias"] = in_arithmetic(logit_bias, image.dtype, image.device).reshape(())
        return mean_of_rows(Differentiated(row_loss), inputs, batch.first_row, chunk_size)

    def _batch(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        teacher: Sequence[Tensor | None] = (None, None),
    ) -> Batch:
        """The pairs of all processes, ranked by a teacher's features if there are any."""
        return Batch.of(
            *self.gather(image_features, text_features),
            logit_scale,
            # This process's own features, if only they have lists.
            anchors=(image_features, text_features) if self.gather.anchors_are_local else None,
            first_row=self.gather.first_row(len(image_features)),
            teacher=self.gather.constants(*teacher),
        )


class StreamedLoss(GatheringLoss):
    """A loss of all pairs: the formula for logits within a budget, else a pass over chunks of rows.

    Args:
        same_id: the use of pairs of one id, or None for a loss without ids.
        gather: as in :class:`GatheringLoss`.
        chunk_size: see :class:`rankloss.RankOptions`.
        memory_budget: see :class:`rankloss.RankOptions`.
    """

    min_pairs = 1  # open_clip's losses give a number for a single pair

    _whole: Callable[..., Tensor]
    """The formula, bit-equal to open_clip's: the order of operations and the dtypes are the same."""

    _streamed: Callable[..., Tensor]
    """The same in chunks of rows."""

    warn_of_bias: Callable[[Number | None], None]
    """Warns once of a bias, or of a missing one, that does not fit the loss."""

    def __init__(
        self,
        *,
        same_id: SameId | None = None,
        gather: GatherOption = None,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(gather)
        check_choice("same_id", same_id, (None, *get_args(SameId)))
        self.same_id = same_id
        self._options = RankOptions(chunk_size=chunk_size, memory_budget=memory_budget)

    @property
    def streaming(self) -> dict[str, Any]:
        """``chunk_size`` and ``memory_budget``, where they were given."""
        return self._options.changed

    @outside_graphs
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = None,
        output_dict: bool = False,
        *,
        pair_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` a dict of it.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: b, added to all logits.
            output_dict: return a dict.
            pair_ids: ``[N]`` integers, equal for pairs that belong together; with ``same_id``.
        """
        self.check_inputs(image_features, text_features, logit_scale, logit_bias, pair_ids=pair_ids)
        self.warn_of_bias(logit_bias)
        self._check_ids_are_used(pair_ids)
        ids = None if pair_ids is None else self.gather.items(pair_ids.detach().long())
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        image_features, text_features = image_features.to(dtype), text_features.to(dtype)
        columns = len(image_features) * self.gather.place.world_size
        rows = len(image_features) if self.gather.anchors_are_local else columns
        fits = self._options.fits(rows, columns, image_features.device, arithmetic_dtype(image_features))
        may_overflow = dtype == torch.float16  # in a sum over a large batch
        is_one_logit = columns == 1  # of which chunks save nothing
        is_whole = is_one_logit or (fits and not may_overflow)
        loss = self.compute(is_whole, image_features, text_features, logit_scale, logit_bias, ids)
        return {"contrastive_loss": loss} if output_dict else loss

    def _check_ids_are_used(self, pair_ids: Tensor | None) -> None:
        """Raise a ValueError unless ids and ``same_id`` are given together."""
        name = type(self).__name__
        if pair_ids is None and self.same_id is not None:
            raise ValueError(f"{name}(same_id={self.same_id!r}) needs pair_ids, an integer for every pair")
        if pair_ids is not None and self.same_id is None:
            choices = " or ".join(map(repr, get_args(SameId)))
            raise ValueError(f"pair_ids needs same_id={choices}; got {name}(same_id=None)")

    def compute(
        self,
        is_whole: bool,
        images: Tensor,
        texts: Tensor,
        scale: Number,
        bias: Number | None,
        ids: Tensor | None,
    ) -> Tensor:
        """The loss of checked inputs, by the formula or in chunks."""
        if is_whole:
            return self._whole(images, texts, scale, bias, ids)
        return self._streamed(images, texts, scale, bias, ids)

    @property
    def _changed_options(self) -> dict[str, Any]:
        """The options with other values than their defaults."""
        same_id = {} if self.same_id is None else {"same_id": self.same_id}
        return {**same_id, **self._options.changed}

    def extra_repr(self) -> str:
        """The options with other values than their defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self._changed_options.items())


def scaled_cosines(scale: Number, anchors: Tensor, items: Tensor) -> Tensor:
    """``s·a·bᵀ`` in open_clip's order of operations."""
    scaled = scale * anchors  # in the scale's dtype, if that is wider and the scale has a dimension
    return scaled @ items.T.to(scaled.dtype)


def equal_ids(ids: Tensor, first_row: int, rows: int) -> Tensor:
    """True at the columns with a row's id: ``[rows, N]``; row i has its own pair in column first_row + i.

    Example:
        >>> equal_ids(torch.tensor([7, 3, 7]), 1, 2).int().tolist()
        [[0, 1, 0], [1, 0, 1]]
    """
    return ids[first_row : first_row + rows, None] == ids


def partners(ids: Tensor, first_row: int, rows: int) -> Tensor:
    """As :func:`equal_ids`, without a row's own pair."""
    same = equal_ids(ids, first_row, rows)
    same.diagonal(first_row).fill_(False)
    return same
