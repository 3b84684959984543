"""The runtime of losses in any trainer: their progress, entries and state.

A trainer's plug-in, here a host, describes itself by a :class:`~rankloss_trainers.host.Host` and translates
its trainer's calls::

    losses = read_losses("rankclip", {"top_k": 8})
    run = Runtime(HOST, losses, RunOptions(teacher=…), base=base, gather=gather)
    run.begin(epochs, total_steps)                   # before the first step
    run.set_epoch(epoch, epochs)                     # at each epoch, counted from 1
    run.set_progress(step, total_steps)              # once before each optimizer step, counted from 1
    terms, metrics = run(image_features=…, text_features=…, logit_scale=…, reference_image_features=…)
    terms, metrics = run.evaluate(image_features=…, text_features=…, logit_scale=…)   # the base alone

A host makes all of these calls for any loss: the runtime tells each part of the loss by the method that it
has, and learns its needs from the attributes that docs/writing.md lists. ``run.teaching`` has the teacher;
``run.saved()`` and ``run.restore(…)`` serve checkpoints; ``run.end()`` ends a training.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather, GatherOption, gather_once
from rankloss.losses import base_entries
from rankloss_trainers.catalog import JOIN
from rankloss_trainers.composing import OF_TARGETS, PAIRS, arguments_of, base_of, composed, innermost
from rankloss_trainers.declared import Loss
from rankloss_trainers.entries import Entries
from rankloss_trainers.graded.term import OF_LISTS
from rankloss_trainers.host import Host
from rankloss_trainers.logging import RunLog
from rankloss_trainers.option import naming_options
from rankloss_trainers.progress import METHODS, course, listeners, one_line, units_of, warn_of_change
from rankloss_trainers.run_options import GIVEN, RunOptions
from rankloss_trainers.teaching import Teaching

_logger = logging.getLogger("rankloss_trainers")


class Runtime(nn.Module):
    """Losses in a trainer.

    Args:
        host: The trainer.
        losses: The losses with their options, the innermost first: each stands on the one before.
        options: The options of the run.
        base: The loss of the trainer, to stand on or to replace; or its class,
            :class:`rankloss.ClipLoss` or :class:`rankloss.SigLipLoss`. None: the class that the losses need.
        gather: The gathering of the losses and of the default base.

    Attributes:
        losses: The losses with their options.
        options: The options of the run.
        name: The names of the losses, or the class of a module.
        own_base: The loss of the trainer.
        criterion: The module.
        teaching: The teacher, and its use by the loss.
        takes_lists: True if a part of the loss takes a list of graded candidates of each query.
        unit: ``"epoch"`` or ``"step"``, the way in which a part that has both methods is told.
        step: The optimizer step of the run, counted from 0.
        has_fixed_entries: Give an entry to log that has no value in a call as NaN instead of leaving it out:
            a compiled caller would be compiled again when it appears.

    Raises:
        ValueError: A loss does not work in this host, or a folder is no teacher's; an ``OptionError`` where
            it is about an option.
    """

    def __init__(
        self,
        host: Host,
        losses: Sequence[Loss],
        options: RunOptions | None = None,
        *,
        base: Any = None,
        gather: GatherOption = None,
    ) -> None:
        super().__init__()
        # The module.
        self.host, self.losses = host, losses
        self.options = RunOptions() if options is None else options
        self.name = JOIN.join(loss.name for loss in losses)
        self._gather = Gather.of(gather)
        is_built = base is not None and not isinstance(base, type)
        self.own_base: Any = base if is_built else base_of(losses, self._gather, base)
        self.criterion = composed(losses, self.own_base, self._gather, host.biased)
        self.takes_lists = bool(arguments_of(self.criterion, "candidate_features"))

        # The teacher, which is looked up once the host is known to serve the losses.
        self.teaching = Teaching(host, self.name, losses, self.criterion, self.options)
        host.check_serves(self.name, self._needs(), self._advice_on_teacher())
        self.teaching.look_up()

        # Progress.
        self.unit, self.step = "step", 0
        self._has_progress = any(units_of(part) for part in self.criterion.modules())
        self._is_told = not self._has_progress

        # The batches of a training, and their log.
        self.has_fixed_entries = False
        self._log = RunLog(self.name, losses, self.criterion, self.options)
        self._has_contrasted = False  # a batch of this training
        self._has_met_single = False  # a batch of one pair, which is logged once

        # Checkpoints.
        self._first_state = deepcopy(self.criterion.state_dict())
        self._training: str | None = None  # the losses with their course, once a training has begun
        self._training_before: str | None = None  # that of the checkpoint that is resumed from

    def _needs(self) -> list[str]:
        """The needs of the losses, of :data:`rankloss_trainers.host.NEEDS`."""
        columns = (loss.named.columns_class for loss in self.losses)
        needs = [getattr(column, "need", "columns") for column in columns if column is not None]
        if self.takes_lists:
            needs.append("lists")
        if any(parameter.requires_grad for parameter in self.criterion.parameters()):
            needs.append("parameters")
        if self.criterion.state_dict():
            needs.append("state")
        teacher = self.teaching.teacher
        if teacher is not None and teacher.folder is not None:
            needs.append("folder")
        if self.teaching.spec is not None:
            needs.append("teacher")
        return needs

    def _advice_on_teacher(self) -> dict[str, str]:
        """Advice by the need: where a host computes no teacher, the two steps that give its features."""
        teacher_to_compute = self.teaching.spec
        if teacher_to_compute is None:
            return {}
        return {"teacher": teacher_to_compute.two_steps(self.host.teacher)}

    def on(self, base: Any) -> Runtime:
        """These losses on the loss of a trainer that is built only now: this object if it fits already.

        Args:
            base: The loss that the trainer built, or the class of its loss.
        """
        class_of_base = base if isinstance(base, type) else type(base)
        if class_of_base is type(self.own_base):
            return self
        return type(self)(self.host, self.losses, self.options, base=base, gather=self._gather)

    @property
    def id_key(self) -> str | None:
        """The source of the pairs' ids: captions, or a column; None for losses without ids."""
        for loss in self.losses:
            if getattr(loss.named.columns_class, "need", None) == "ids":
                return str(loss.columns.key)
        return None

    @property
    def gather(self) -> Gather:
        """The gathering of the loss: that of its outermost part that has one, else the given one.

        A module that is given as the loss has a gathering of its own.
        """
        gathers = (part.gather for part in self.criterion.modules() if hasattr(part, "gather"))
        return next((gather for gather in gathers if isinstance(gather, Gather)), self._gather)

    # --- what the losses need of a batch ---

    @property
    def min_pairs(self) -> int:
        """The smallest number of pairs, in a batch of all processes, that all parts of the loss take."""
        return max(getattr(part, "min_pairs", 1) for part in self.criterion.modules())

    def check_device(self, device: torch.device, pairs: int) -> None:
        """Raise an error if a part of the loss does not work on a device.

        Args:
            device: The device of the training.
            pairs: The pairs of a batch of all processes.

        Raises:
            OptionError: An option of a loss does not work there.
            ValueError: The loss does not.
        """
        with contextlib.ExitStack() as contexts:
            # A message may begin with the name of an option of any loss: it is an OptionError then.
            for loss in self.losses:
                contexts.enter_context(naming_options(loss.given, loss.name))
            for part in self.criterion.modules():
                check: Any = getattr(part, "check_device", None)
                if check is not None:
                    check(device, pairs)

    # --- progress ---

    def summary(self, epochs: float) -> str:
        """The line of the log about a run of so many epochs; infinity where its data have no length."""
        of_rankloss = f"rankloss {rankloss.__version__}"
        packages = [loss.package or of_rankloss for loss in self.losses if loss.package is not None]
        distinct_packages = dict.fromkeys(packages)
        by = f" ({', '.join(distinct_packages)})" if packages else ""
        texts = [f"Loss: {self.name}{by}"]
        for loss in self.losses:
            if loss.summary:
                texts.append(f"{loss.name}: {loss.summary}" if len(self.losses) > 1 else loss.summary)
        has_choice_of_unit = any(len(units_of(part)) == len(METHODS) for part in self.criterion.modules())
        if has_choice_of_unit:
            length = f" over {epochs:g} epoch(s)" if math.isfinite(epochs) else ""
            texts.append(f"schedule per {self.options.unit(epochs)}{length}")
        if self.teaching.use == "required":
            teacher = self.teaching.teacher
            texts.append(f"teacher {GIVEN if teacher is None else teacher.text}")
        return ", ".join(texts)

    def begin(self, epochs: float, total_steps: float) -> None:
        """A training begins; a checkpoint of one with another loss, option, length or schedule is warned of.

        Args:
            epochs: Its epochs; infinity where its data have no length.
            total_steps: Its optimizer steps.

        Raises:
            ValueError: A part goes by epochs, and their number is not known; or the state is not of tensors.
        """
        self.unit = self.options.unit(epochs)
        for key, value in self._first_state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the state of {self.name} must be of tensors; {key} is {value!r:.60}")
        if math.isinf(epochs) and any(listeners(self.criterion, "epoch", self.unit)):
            text = "but data without a length have no known number of epochs; give schedule_unit 'step'"
            raise ValueError(f"{self.name} goes by epochs, {text}")
        self.end()  # the losses are told again at the first epoch and step
        self._has_contrasted = self._has_met_single = False
        courses = course(self.criterion, self.unit, {"epoch": epochs, "step": total_steps})
        self._training = ": ".join(filter(None, [self._described(), courses]))
        warn_of_change(self._training_before, self._training)
        self._training_before = None

    def _described(self) -> str:
        """The losses with the options that were given, a module by its own text; and the named teacher."""
        texts = []
        for loss in self.losses:
            is_module_of_the_user = loss.package is None
            text = str(self.criterion) if is_module_of_the_user else loss.name
            texts.append(f"{text} ({loss.summary})" if loss.summary else text)
        teacher = self.teaching.teacher
        taught = [] if teacher is None else [f"teacher {teacher.text}"]
        return one_line(", ".join([JOIN.join(texts), *taught]))

    def end(self) -> None:
        """The training ends: a call in another one, which does not tell the loss, is an error."""
        self._is_told = not self._has_progress

    def go_on(self) -> None:
        """A further batch of the present step comes: for a host that calls :meth:`end` after each batch."""
        self._is_told = True

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Epoch ``epoch`` of ``epochs`` begins, counted from 1."""
        self._is_told = True
        for tell in listeners(self.criterion, "epoch", self.unit):
            tell(epoch, epochs)

    def set_progress(self, step: int, total_steps: int) -> None:
        """Optimizer step ``step`` of ``total_steps`` begins, counted from 1."""
        self._is_told, self.step = True, step - 1
        for tell in listeners(self.criterion, "step", self.unit):
            tell(step, total_steps)

    # --- batches ---

    # The step moves at every call, which would recompile a compiled caller: the graph breaks here, once.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, **inputs: Any) -> Entries:
        """Compute the loss of a batch.

        Args:
            **inputs: ``image_features``, ``text_features``, ``logit_scale``, and other inputs of the loss.

        A single pair after others counts 0, which the log says once.

        Raises:
            RuntimeError: The loss has a schedule and was not told where training stands.
            ValueError: As :meth:`Entries.of` and :meth:`Teaching.inputs`.
        """
        if not self._is_told:
            raise RuntimeError(f"{self.name} is not told where training stands: {self.host.progress}")
        if self._is_single(inputs):
            return self._of_single(inputs)
        # On every process: checks that the loss may use these features, which stay among its inputs, and
        # gives the parts that copy them what they need. Below, only the names are logged.
        teacher = self.teaching.inputs(inputs)
        rank, _world_size = self.gather.place
        if rank == 0:
            self._log.remark_on_teacher(list(teacher))
            self._log.remark_on_tf32(inputs.get("image_features"))
        with gather_once():  # for the loss, and for the metrics that the log adds
            # Always by name: only the names tell which entry is a term.
            entries = dict(self.criterion(**inputs, output_dict=True))
            logged = self._log.entries(entries, inputs, self.gather, self.step)
        for name, value in logged.items():
            if value is not None:
                entries[name] = value
            elif self.has_fixed_entries:
                entries[name] = torch.full((), math.nan, device=inputs["image_features"].device)
        self._has_contrasted = True
        return Entries.of(self.criterion, entries)

    def _is_single(self, inputs: Mapping[str, Any]) -> bool:
        """True for the one pair that a stream's last batch may have; a first batch of one is refused.

        Without a length nobody knows of it before the first step, and an error would end a long training.
        """
        images = inputs.get("image_features")
        if not isinstance(images, Tensor) or len(images) != 1:
            return False
        _rank, world_size = self.gather.place
        needs_two = self.min_pairs > 1 and not self.takes_lists
        return world_size == 1 and needs_two and self._has_contrasted

    def _of_single(self, inputs: Mapping[str, Any]) -> Entries:
        """The loss of a single pair, without negatives: 0, as in an evaluation."""
        if not self._has_met_single:
            self._has_met_single = True
            _logger.warning("A batch of one pair counts 0: %s contrasts two pairs at least", self.name)
        zero = inputs["image_features"].new_zeros(())
        for value in inputs.values():
            if isinstance(value, Tensor) and value.requires_grad:
                # In the graph of all inputs, of whose parameters DDP expects gradients; NaN stays NaN.
                zero = zero + 0.0 * value.sum()
        return Entries({"contrastive_loss": zero}, {})

    # --- evaluation ---

    @property
    def base_to_evaluate(self) -> Any:
        """The loss of pairs under all others, by their attribute ``base``; None under lists without one.

        The trainer's own where a named loss replaces it, and where it has ids or smoothed targets.
        """
        of_pairs = innermost(self.criterion)
        if hasattr(of_pairs, "list_terms"):
            return None
        if any(loss.replaces for loss in self.losses):
            return self.own_base
        has_other_targets = any(getattr(of_pairs, key, None) for key in OF_TARGETS)
        if has_other_targets:
            return self.own_base
        if of_pairs is self.criterion and type(of_pairs).__name__ not in PAIRS:
            return self.own_base  # a module of one's own may need more than features
        return of_pairs

    def evaluate(self, **features: Any) -> Entries:
        """The terms of :attr:`base_to_evaluate`, and of graded lists; no rank terms, which a schedule weighs.

        A module of one's own that takes lists is evaluated whole instead.

        Args:
            **features: As in a call, those of the lists too; without a teacher's or other data of the pairs.
        """
        lists = {name: features.pop(name) for name in OF_LISTS if name in features}
        if not lists:
            return Entries(self._pair_terms(features), {})
        parts_with_lists: list[Any] = [
            part for part in self.criterion.modules() if hasattr(part, "list_terms")
        ]
        if not parts_with_lists:  # a module of one's own, which is evaluated whole
            entries = dict(self.criterion(**features, **lists, output_dict=True))
            return Entries.of(self.criterion, entries)
        terms = self._pair_terms(features)
        for part in parts_with_lists:
            terms.update(part.list_terms(features["logit_scale"], **lists))
        return Entries(terms, {})

    def _pair_terms(self, features: Mapping[str, Any]) -> dict[str, Tensor]:
        """The terms of :attr:`base_to_evaluate`; none where there are no pairs or no such base.

        A single pair counts 0 in one process; of several processes it has the others' pairs as negatives.
        """
        images, base = features.get("image_features"), self.base_to_evaluate
        if images is None or base is None:
            return {}
        if len(images) == 1:
            _rank, world_size = self.gather.place
            if world_size == 1:
                return {"contrastive_loss": images.new_zeros(())}
        return Entries.of(base, base_entries(base, **features)).terms

    # --- checkpoints ---

    def saved(self) -> dict[str, Any]:
        """The name of the loss, a copy of its state on the CPU, and its options and course, as text.

        Of tensors, texts, None and containers only; ``training`` is None before the first training begins.
        """
        copies = {}
        for key, tensor in self.criterion.state_dict().items():
            copies[key] = tensor.detach().to("cpu", copy=True)
        return {"loss": self.name, "state_dict": copies, "training": self._training}

    def restore(self, state: Mapping[str, Any] | None, *, warn: bool = True) -> None:
        """Load a state of :meth:`saved`, whose tensors may have become lists, or begin anew.

        Args:
            state: The state in the checkpoint that is resumed from, or None.
            warn: True on the process that warns: now of a state that is not this loss's, which starts anew;
                and when the training begins, if its loss, options or course are others than before.

        Raises:
            ValueError: It is no state of :meth:`saved`, or one that does not fit the loss.
        """
        if state is not None:
            check_saved(state)
        self._training_before = self._training_of(state) if warn else None
        if state is not None and state["loss"] == self.name:
            self._load(state["state_dict"])
            return
        if warn and self._first_state:
            in_checkpoint = (
                "no state of a loss" if state is None else f"the state of the loss {state['loss']}"
            )
            text = "The checkpoint resumed from holds %s: the state of %s starts anew"
            _logger.warning(text, in_checkpoint, self.name)
        self.criterion.load_state_dict(self._first_state)

    def _training_of(self, state: Mapping[str, Any] | None) -> str | None:
        """A saved state's training in words, or None where nothing is to be warned of."""
        if state is not None:
            return state.get("training")
        # Of a loss with a state, restore() itself warns that it starts anew.
        return None if self._first_state else "no loss of rankloss"

    def _load(self, saved: Mapping[str, Any]) -> None:
        """Load the state that a loss of this name has saved."""
        try:
            self.criterion.load_state_dict(_as_tensors(saved, self._first_state))
        except (RuntimeError, TypeError, ValueError) as error:
            text = f"the checkpoint resumed from holds a state of {self.name} that does not fit the loss"
            raise ValueError(f"{text}: {error}") from error


def check_saved(state: object) -> None:
    """Raise a ValueError unless an object has the form of :meth:`Runtime.saved`.

    Example:
        >>> check_saved({"loss": "rankclip"})
        Traceback (most recent call last):
        ValueError: the checkpoint resumed from holds no state of rankloss; got {'loss': 'rankclip'}
    """
    is_right = (
        isinstance(state, Mapping)
        and isinstance(state.get("loss"), str)
        and isinstance(state.get("state_dict"), Mapping)
        and isinstance(state.get("training"), str | None)
    )
    if not is_right:
        raise ValueError(f"the checkpoint resumed from holds no state of rankloss; got {state!r:.60}")


def _as_tensors(state: Mapping[str, Any], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a checkpoint as tensors, with the dtypes of the first state.

    Some trainers keep them as lists, in which an empty tensor has lost its shape: it is the first state's.
    """
    tensors = {}
    for key, value in state.items():
        of_first = first.get(key)
        if of_first is None:  # an error when it is loaded
            tensors[key] = torch.as_tensor(value)
            continue
        tensor = torch.as_tensor(value, dtype=of_first.dtype)
        are_empty = tensor.numel() == of_first.numel() == 0
        tensors[key] = of_first if are_empty else tensor
    return tensors
