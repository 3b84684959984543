"""The log of a run: values beside the entries of its loss, the rank agreement, and remarks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather
from rankloss_trainers.declared import Loss
from rankloss_trainers.option import OptionError
from rankloss_trainers.run_options import RunOptions

_logger = logging.getLogger("rankloss_trainers")
_AGREEMENT_ANCHORS = 256


class RunLog:
    """The log of a run.

    Args:
        name: The name of the loss.
        losses: The losses with their options.
        criterion: Their module.
        options: The options of the run.
    """

    def __init__(self, name: str, losses: Sequence[Loss], criterion: nn.Module, options: RunOptions) -> None:
        self.name, self.criterion = name, criterion
        self._agreement = Agreement(options.agreement_every)
        makers = [loss.named.log_maker for loss in losses]
        self._logs = [make() for make in makers if make is not None]
        self._teacher: list[str] = []  # the names of its features in the last batch
        ranks_items = any(getattr(part, "ranks_items", False) for part in criterion.modules())
        self._may_remark_on_tf32 = ranks_items  # at the first batch

    def entries(
        self, entries: Mapping[str, Tensor], inputs: Mapping[str, Any], gather: Gather, step: int
    ) -> dict[str, Tensor | None]:
        """Entries to log beside those of a call; None has no value in this call.

        Args:
            entries: The entries of the loss.
            inputs: Its inputs.
            gather: Its gathering.
            step: The optimizer step, counted from 0.

        Raises:
            OptionError: The agreement of pairs is asked for, and there are none.
        """
        logged: dict[str, Tensor | None] = {}
        part: Any
        for part in self.criterion.modules():
            if hasattr(part, "logged_entries"):
                logged.update(part.logged_entries(entries))
        if "image_features" in inputs:
            logged.update(self._agreement(gather, inputs, step))
        elif self._agreement.every is not None:
            text = "compares the rankings of pairs, and the batch has lists alone; leave it out"
            raise OptionError("agreement_every", text)
        for log in self._logs:
            logged.update(log(self.criterion, entries, step, inputs))
        return logged

    def remark_on_teacher(self, features: list[str]) -> None:
        """Log the names of a teacher's features where the last batch had no such ones."""
        if features and features != self._teacher:
            _logger.info("%s uses a teacher: %s", self.name, " and ".join(features))
        self._teacher = features

    def remark_on_tf32(self, features: Tensor | None) -> None:
        """Log at the first batch with pairs, whose features these are, if TF32 products rank the lists."""
        if features is None or not self._may_remark_on_tf32:
            return
        self._may_remark_on_tf32 = False
        text = remark_on_tf32(features.device)
        if text is not None:
            _logger.info("%s: %s", self.name, text)


class Agreement:
    """The rank agreement of the batch of all processes, from at most 256 of its rows: Kendall's τ.

    ``cross_modal_tau`` and ``in_modal_tau`` compare an image's ranking with its text's
    (:func:`rankloss.metrics.rank_agreement`). Between two measurements they keep the last value: a gap, or a
    NaN, would spoil a trainer's averages, and the processes must log the same names at every step. The first
    step that a process takes is therefore measured, wherever a resumed run begins.

    Args:
        every: Measure at every so many optimizer steps, and at the first step that the process takes; where
            the loss is not called for such a step, at the next one. None never does.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._values: dict[str, Tensor] = {}
        self._multiple: int | None = None  # of ``every``, at or below the last step

    def __call__(self, gather: Gather, inputs: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """The entries of one call with these inputs of the loss."""
        if self._is_due(step):
            # With gradients this is the call that the loss has made, whose result gather_once() has kept.
            both = gather(inputs["image_features"], inputs["text_features"])
            with torch.no_grad():
                tau = rankloss.metrics.rank_agreement(*both, max_anchors=_AGREEMENT_ANCHORS)
            self._values = {name: tau[name].float() for name in ("cross_modal_tau", "in_modal_tau")}
        return self._values

    def _is_due(self, step: int) -> bool:
        """True at a step that is a multiple of ``every``, and at the first step after a multiple was skipped.

        The first call of all is such a step.
        """
        if self.every is None:
            return False
        multiple, steps_since = divmod(step, self.every)
        has_passed_a_multiple = multiple != self._multiple
        self._multiple = multiple
        return steps_since == 0 or has_passed_a_multiple


def remark_on_tf32(device: torch.device) -> str | None:
    """A remark for the log where a GPU computes products of float32 matrices in TF32; None elsewhere.

    open_clip's trainer allows TF32, also on cards without it.
    """
    if device.type != "cuda" or not _allows_tf32() or not _has_tf32(device):
        return None
    return (
        "float32 products are computed in TF32, which changes places of neighbouring items in a list and the "
        "gradient by about 0.1 %; torch.backends.cuda.matmul.allow_tf32 = False ranks exactly"
    )


def _allows_tf32() -> bool:
    """True if this process allows TF32, by either of torch's settings."""
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # torch refuses to read it once the newer setting has been used
        return bool(matmul.fp32_precision == "tf32")


def _has_tf32(device: torch.device) -> bool:
    """As ``torch.cuda.is_tf32_supported``, which asks the current device."""
    if torch.version.hip:
        return bool(torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95")))
    return torch.cuda.get_device_capability(device) >= (8, 0)
