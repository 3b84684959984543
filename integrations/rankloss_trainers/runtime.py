"""The runtime of losses in any trainer: their progress, teacher, entries and state.

A trainer's plug-in, here a host, describes itself by a :class:`Host` and translates its trainer's calls::

    losses = read_losses("rankclip", {"top_k": 8})
    run = Runtime(HOST, losses, RunOptions(teacher=…), base=base, gather=gather)
    run.begin(epochs)                                # before the first step; logs nothing
    run.set_epoch(epoch, epochs)                     # at each epoch, counted from 1
    run.set_progress(step, total_steps)              # once before each optimizer step, counted from 1
    terms, metrics = run(image_features=…, text_features=…, logit_scale=…, reference_image_features=…)
    terms, metrics = run.evaluate(image_features=…, text_features=…, logit_scale=…)   # the base alone

A host makes all of these calls for any loss: the runtime tells each part of the loss by the method that it
has. ``run.saved()`` and ``run.restore(…)`` serve checkpoints.
"""

from __future__ import annotations

import inspect
import logging
import math
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather, GatherOption, gather_once
from rankloss.losses import TEACHER, base_entries, takes_teacher
from rankloss_features.folder import Features
from rankloss_trainers.catalog import JOIN, choose
from rankloss_trainers.composing import OF_TARGETS, PAIRS, base_of, composed
from rankloss_trainers.declared import Loss, Named, OptionError, Options, did_you_mean
from rankloss_trainers.graded.term import OF_LISTS, RankedListsTerm
from rankloss_trainers.logging import Agreement, rank_clip_entries, remark_on_products
from rankloss_trainers.run_options import GIVEN, RunOptions, Teacher

_logger = logging.getLogger("rankloss_trainers")


@dataclass(frozen=True)
class Host:
    """A trainer as the runtime knows it, in its user's words.

    Attributes:
        name: The trainer.
        biased: A set-up whose own loss is a sigmoid loss: ``"--siglip"``.
        teacher: The ways to give a teacher's features: ``"give the columns …"``.
        progress: The remedy where the loss is not told where training stands.
        serves: The needs of losses that it serves, of :data:`NEEDS`.
        instead: Advice for needs that something else here serves.
    """

    name: str
    biased: str
    teacher: str
    progress: str
    serves: Collection[str] = ()
    instead: Mapping[str, str] = field(default_factory=dict)


NEEDS = {
    "columns": "a column of the training data",
    "ids": "ids of the pairs",
    "lists": "a list of graded candidates of each query",
    "folder": "a folder of a teacher's features",
    "state": "a state in checkpoints",
    "teacher": "a teacher that computes its features before the first step",
    "parameters": "parameters of its own, which an optimizer has to train",
}
"""The needs of losses that not every host serves."""


def read_losses(loss: str | nn.Module, options: Options | None = None) -> list[Loss]:
    """The losses that a user of a trainer gives, the innermost first.

    Args:
        loss: A name, or several joined by ``+``; or a module with the forward convention of open_clip's
            losses.
        options: Options of a named loss; those of joined ones by loss.

    Raises:
        TypeError: An option does not exist, or options come beside a module.
        ValueError: The loss does not exist.
    """
    if isinstance(loss, str):
        return choose(loss, options or {})
    if options:
        raise TypeError("options are for a loss that is given by its name; a module has its own")
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss must be a module, or the name of a loss; got {loss!r}")
    return [Loss(type(loss).__name__, Named(lambda: loss), package=None)]


# --- entries --------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """The entries of a loss for one batch: scalars on the device of the features.

    Attributes:
        terms: The trained terms; their names end in ``_loss``.
        metrics: Logged values beside them, detached.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the terms."""
        first, *others = self.terms.values()
        return sum(others, first)

    @classmethod
    def of(cls, loss: object, entries: Mapping[str, Tensor]) -> Entries:
        """Separate the terms from the metrics, by their names.

        Args:
            loss: The loss, for the errors.
            entries: All of them.

        Raises:
            ValueError: There is no term, or an entry takes a gradient that nobody would see.
        """
        name_of_loss = getattr(loss, "__name__", type(loss).__name__)
        for name, value in entries.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"{name_of_loss} must give each entry as a tensor of one value; {name} is {got}"
                )
        terms = {name: value for name, value in entries.items() if name.endswith("_loss")}
        metrics = {name: value for name, value in entries.items() if name not in terms}
        if not terms:
            raise ValueError(f"{name_of_loss} gives no entry ending in _loss to train; got {list(entries)}")
        lost = [name for name, value in metrics.items() if value.requires_grad]
        if lost:
            text = f"call it {lost[0]}_loss to train it, or detach it to log it"
            raise ValueError(f"{name_of_loss} gives {lost[0]!r} with a gradient: {text}")
        # A rank term is a constant while λ is 0. A compiled trainer would be compiled again when it is none.
        trained = next((value for value in terms.values() if value.requires_grad), None)
        if trained is not None:
            terms = {name: x if x.requires_grad else x + 0 * trained for name, x in terms.items()}
        return cls(terms, metrics)


class LoggedTerms(dict[str, Tensor]):
    """The terms of a loss together with metrics that are logged but not trained.

    open_clip 3.x and sentence-transformers add up ``values()`` and log ``items()``; the first therefore
    leaves the metrics out.

    Args:
        terms: The terms.
        metrics: The metrics.
    """

    def __init__(self, terms: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        super().__init__({**terms, **metrics})
        self._metrics = frozenset(metrics)

    def values(self) -> Any:
        """The terms only."""
        return [value for name, value in self.items() if name not in self._metrics]


# --- progress -------------------------------------------------------------------------------------------

METHODS = {"epoch": "set_epoch", "step": "set_progress"}


def listeners(loss: nn.Module, unit: str, preferred: str = "step") -> Iterator[Any]:
    """The methods by which the parts of a loss are told of the beginning of an epoch or step.

    Args:
        loss: The loss, or a module that holds it.
        unit: ``"epoch"`` or ``"step"``.
        preferred: The unit of a part that has both methods.
    """
    for part in loss.modules():
        has = units_of(part)
        if unit in has and (unit == preferred or len(has) == 1):
            yield types.MethodType(has[unit], part)


def units_of(part: nn.Module) -> dict[str, Any]:
    """The methods of METHODS that the class of a part has, by unit."""
    found = {unit: getattr(type(part), method, None) for unit, method in METHODS.items()}
    return {unit: method for unit, method in found.items() if callable(method)}


# --- a run ----------------------------------------------------------------------------------------------


def check_use_of_teacher(
    name: str, use: str, remedy: str, found: Collection[str], columns: Collection[str] = ()
) -> None:
    """Raise a ValueError unless a teacher's features are there just where a loss uses them.

    Args:
        name: The loss.
        use: ``"required"``, ``"optional"`` or ``"none"``.
        remedy: The ways to give them.
        found: The features that a batch has, of :data:`TEACHER`.
        columns: The columns of the data, where they are known.
    """
    if found and use == "none":
        raise ValueError(f"the data have {', '.join(found)}, but {name} does not use a teacher")
    similar = [column for column in columns if column.startswith("reference_") and column not in found]
    if use == "required" and (not found or (similar and len(found) < len(TEACHER))):
        has = f"; the data have {', '.join(columns)}" if columns else ""
        raise ValueError(f"{name} needs a teacher's features: {remedy}{has}")
    dropped = [column for column in columns if column in TEACHER and column not in found]
    if use == "optional" and dropped:
        raise ValueError(f"the data have {dropped[0]}, and the batch has not: let its collator pass it on")


def set_components(loss: nn.Module, features: Features | None, student: Any, teacher: Any) -> None:
    """Give the principal components of a folder to the parts that compare features of other widths.

    Raises:
        ValueError: The teacher is narrower than the student, which cannot copy it.
    """
    parts: list[Any] = [x for x in loss.modules() if getattr(x, "components", loss) is None]
    shapes = [tuple(getattr(x, "shape", ())) for x in (student, teacher)]
    if not parts or any(len(shape) != 2 for shape in shapes):  # the loss names wrong inputs
        return
    width, of_teacher = (shape[1] for shape in shapes)
    if parts and width > of_teacher:
        raise ValueError(
            f"the teacher has {of_teacher} dimensions, fewer than the student's {width}, which "
            "cannot copy them; rankclip-distill ranks by a teacher of any width"
        )
    if parts and width < of_teacher and features is not None:
        matrix = features.components(width).matrix
        for part in parts:
            part.components = matrix


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
        use_of_teacher: ``"required"``, ``"optional"``, or ``"none"``.
        teacher: The teacher that the run names, or None.
        features: The folder of the teacher's features, or None while there is none.
        takes_lists: True if a part of the loss takes a list of graded candidates of each query.
        data_columns: The columns of the training data, where a host names them (:meth:`name_columns`).
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
        self.host, self.losses, self.options = host, losses, options or RunOptions()
        self.name, self._gather = JOIN.join(loss.name for loss in losses), Gather.of(gather)
        is_built = base is not None and not isinstance(base, type)
        self.own_base: Any = base if is_built else base_of(losses, self._gather, base)
        self.teacher = self._named_teacher()
        if self.teacher is not None and self.teacher.are_encoders:  # whatever else is wrong
            self._check_copies(x.named.constructor for x in losses)
        self.criterion = composed(losses, self.own_base, self._gather, host.biased)
        self.use_of_teacher = self._use_of_a_teacher()
        self.takes_lists = bool(self._arguments("candidate_features"))
        self._check_needs()
        self.features: Features | None = None
        if self.teacher is not None:
            self.teacher.check()
            if self.teacher.are_encoders:
                self._check_spaces()
            if self.teacher.folder is not None:
                self.open_folder(self.teacher.folder)
        self.data_columns: Collection[str] = ()
        self.unit, self.step, self.has_fixed_entries = "step", 0, False
        self._agreement = Agreement(self.options.agreement_every)
        self._logs = [log() for loss in losses if (log := loss.named.log_maker) is not None]
        self._first_state = deepcopy(self.criterion.state_dict())
        self._is_told = not any(map(units_of, self.criterion.modules()))
        self._has_remarked = False
        self._found: list[str] = []  # the teacher's features of the last batch

    # --- construction ---

    def _named_teacher(self) -> Teacher | None:
        """The teacher of the run's option, else the one that a loss has where the trainer computes it."""
        if self.options.teacher is not None:
            return None if self.options.teacher == GIVEN else Teacher(self.options.teacher)
        if "teacher" not in self.host.serves:
            return None
        found = sorted({x for loss in self.losses if (x := loss.named.teacher)} - {"required"})
        if len(found) > 1:
            raise ValueError(f"{self.name} has two teachers, {' and '.join(found)}: name one")
        return Teacher(found[0]) if found else None

    def _arguments(self, *names: str) -> list[inspect.Parameter]:
        """The arguments of these names of all parts of the loss."""
        forwards = [inspect.signature(part.forward).parameters for part in self.criterion.modules()]
        return [forward[name] for forward in forwards for name in names if name in forward]

    def _use_of_a_teacher(self) -> str:
        takes = takes_teacher(self.criterion)
        if self.options.teacher is not None and not takes:
            raise OptionError("teacher", f"{self.name} does not use a teacher; got {self.options.teacher}")
        needs = any(loss.named.teacher is not None for loss in self.losses)
        needs = needs or any(x.default is x.empty for x in self._arguments(*TEACHER))
        return "required" if needs or self.options.teacher is not None else "optional" if takes else "none"

    def _check_needs(self) -> None:
        columns = [x for loss in self.losses if (x := loss.named.columns_class) is not None]
        found = {
            **{getattr(x, "need", "columns"): True for x in columns},
            "lists": self.takes_lists,
            "parameters": any(parameter.requires_grad for parameter in self.criterion.parameters()),
            "state": bool(self.criterion.state_dict()),
            "folder": self.teacher is not None and self.teacher.folder is not None,
            "teacher": self.spec is not None,
        }
        for need in [need for need, holds in found.items() if holds and need not in self.host.serves]:
            text = f"{self.name} needs {NEEDS[need]}, which {self.host.name} does not serve"
            advice = self.host.instead.get(need)
            if need == "teacher":
                advice = self.spec.two_steps(self.host.teacher)
            raise ValueError("; ".join([text, *filter(None, [advice])]))

    @property
    def _encoders(self) -> str:
        """A teacher without a common space, in words."""
        one = self.teacher is not None and self.teacher.is_one_encoder
        return "an encoder of one modality" if one else "two encoders that have no common space"

    def _check_copies(self, kinds: Iterable[Any]) -> None:
        if any(isinstance(x, type) and issubclass(x, rankloss.MimicryLoss) for x in kinds):
            raise ValueError(f"mimicry cannot copy {self._encoders}")

    def _check_spaces(self) -> None:
        """Raise a ValueError if a part compares images with texts, of a teacher without a common space."""
        self._check_copies(map(type, self.criterion.modules()))
        if any(isinstance(x, rankloss.RankConsistency) and x.cross_modal for x in self.criterion.modules()):
            text = f"must be 0: this teacher is {self._encoders}, so it can rank only in-modal lists; "
            text += "rankclip-in and rankclip-encoders do"
            of_ranks = (x.name for x in self.losses if x.named.constructor is rankloss.RankClipLoss)
            raise OptionError("lambda_cross", text, next(of_ranks, ""))

    def open_folder(self, folder: str) -> None:
        """Take the features of a folder for the teacher's.

        Raises:
            OptionError: It is no complete folder of features, or its encoders have no common space that a
                loss needs.
        """
        try:
            self.features = Features(folder).check()
        except (OSError, ValueError) as error:
            raise OptionError("teacher", str(error)) from error
        if not self.features.common_space:
            self._check_spaces()

    def on(self, base: Any) -> Runtime:
        """These losses on the loss that the trainer built: the same object where it is the expected one."""
        if (base if isinstance(base, type) else type(base)) is type(self.own_base):
            return self
        return type(self)(self.host, self.losses, self.options, base=base, gather=self._gather)

    @property
    def spec(self) -> Any:
        """The teacher to compute, of :class:`rankloss_features.caching.Spec`; or None."""
        return None if self.teacher is None else self.teacher.spec

    @property
    def id_key(self) -> str | None:
        """The source of the pairs' ids: captions, or a column; None for losses without ids."""
        columns = [x.columns for x in self.losses if getattr(x.named.columns_class, "need", None) == "ids"]
        return str(columns[0].key) if columns else None

    # --- progress ---

    def summary(self, epochs: float) -> str:
        """The line of the log about a run of so many epochs; infinity where its data have no length."""
        several = len(self.losses) > 1
        texts = [f"{x.name}: {x.summary}" if several else x.summary for x in self.losses if x.summary]
        if any(len(units_of(part)) == len(METHODS) for part in self.criterion.modules()):
            length = f" over {epochs:g} epoch(s)" * math.isfinite(epochs)
            texts.append(f"schedule per {self.options.unit(epochs)}{length}")
        if self.use_of_teacher == "required":
            texts.append(f"teacher {GIVEN if self.teacher is None else self.teacher.text}")
        own = f"rankloss {rankloss.__version__}"
        packages = ", ".join(dict.fromkeys(x.package or own for x in self.losses if x.package is not None))
        return ", ".join([f"Loss: {self.name}" + f" ({packages})" * bool(packages), *texts])

    def begin(self, epochs: float) -> None:
        """A training of so many epochs begins; infinity where its data have no length.

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

        Raises:
            RuntimeError: The loss has a schedule and was not told where training stands.
            ValueError: As :meth:`Entries.of` and :meth:`check_teacher`.
        """
        if not self._is_told:
            raise RuntimeError(f"{self.name} is not told where training stands: {self.host.progress}")
        found = [name for name in TEACHER if inputs.get(name) is not None]
        self.check_teacher(found)
        self._remark(inputs["image_features"].device if "image_features" in inputs else None)
        if found:
            set_components(self.criterion, self.features, inputs.get("image_features"), inputs[found[0]])
        # Always by name: only the names tell which entry is a term.
        with gather_once():
            entries: dict[str, Tensor] = dict(self.criterion(**inputs, output_dict=True))
            logged = self._logged(entries, inputs)
        for name, value in logged.items():
            if value is not None:
                entries[name] = value
            elif self.has_fixed_entries:
                entries[name] = torch.full((), math.nan, device=inputs["image_features"].device)
        return Entries.of(self.criterion, entries)

    def _logged(self, entries: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """Entries to log beside those of a call; None has no value in this call."""
        found: dict[str, Tensor | None] = dict(rank_clip_entries(self.criterion, entries))
        if "image_features" in inputs:
            found.update(self._agreement(self.gather, inputs, self.step))
        for log in self._logs:
            found.update(log(self.criterion, entries, self.step, inputs))
        return found

    def _remark(self, device: torch.device | None) -> None:
        """Log once, on the first process, when TF32 products rank the lists."""
        ranks = any(isinstance(x, rankloss.RankConsistency) for x in self.criterion.modules())
        if device is None or self._has_remarked or not ranks:
            return
        self._has_remarked = True
        text = remark_on_products(device)
        if text is not None and self.gather.place[0] == 0:
            _logger.info("%s: %s", self.name, text)

    @property
    def base_to_evaluate(self) -> Any:
        """The loss of pairs under all others, by their attribute ``base``; None under lists without one.

        The trainer's own where a named loss replaces it, and where it has ids or smoothed targets.
        """
        innermost = self.criterion
        while (below := getattr(innermost, "base", None)) is not None:
            innermost = below
        if isinstance(innermost, RankedListsTerm):
            return None
        is_other = any(getattr(innermost, key, None) for key in OF_TARGETS)
        if innermost is self.criterion:  # a module of one's own, which may need more than features
            is_other = is_other or type(innermost).__name__ not in PAIRS
        return self.own_base if is_other or any(loss.replaces for loss in self.losses) else innermost

    def evaluate(self, **features: Any) -> Entries:
        """The terms of the innermost base, without those that a schedule weighs, and of graded lists.

        A single pair counts 0.
        """
        lists = {name: features.pop(name) for name in OF_LISTS if name in features}
        parts = [x for x in self.criterion.modules() if isinstance(x, RankedListsTerm)]
        if lists and not parts:  # a module of one's own
            return Entries.of(self.criterion, dict(self.criterion(**features, **lists, output_dict=True)))
        terms: dict[str, Tensor] = {}
        base = self.base_to_evaluate
        if (images := features.get("image_features")) is not None and base is not None:
            terms = {"contrastive_loss": images.new_zeros(())}
            if len(images) > 1 or self.gather.place[1] > 1:
                terms = Entries.of(base, base_entries(base, **features)).terms
        for part in parts if lists else ():
            loss = part.lists(**lists, logit_scale=features["logit_scale"])
            terms["ranked_lists_loss"] = part.weight * loss
        return Entries(terms, {})

    @property
    def gather(self) -> Gather:
        """The gathering of the loss."""
        given = (part.gather for part in self.criterion.modules() if hasattr(part, "gather"))
        return next((gather for gather in given if isinstance(gather, Gather)), self._gather)

    def name_columns(self, columns: Collection[str]) -> None:
        """The columns of a training's data, see :attr:`data_columns`.

        Raises:
            ValueError: A teacher's column is misspelt, and the loss would train without it.
        """
        self.data_columns = columns
        for column in columns if self.use_of_teacher == "optional" else ():
            hint = did_you_mean(column, TEACHER, cutoff=0.8)
            if hint and column not in TEACHER:
                raise ValueError(f"the data have {column}, which {self.name} does not use{hint}")

    def check_teacher(self, found: list[str]) -> None:
        """Raise a ValueError unless a teacher's features are there just where the loss uses them.

        Args:
            found: The names of the features that a batch has, of :data:`TEACHER`.
        """
        check_use_of_teacher(self.name, self.use_of_teacher, self.host.teacher, found, self.data_columns)
        if found not in ([], self._found) and self.gather.place[0] == 0:
            _logger.info("%s uses a teacher: %s", self.name, " and ".join(found))
        self._found = found

    # --- checkpoints ---

    def saved(self) -> dict[str, Any] | None:
        """A copy of the loss's state on the CPU, of tensors and containers only; None if it has none."""
        state = {key: x.detach().to("cpu", copy=True) for key, x in self.criterion.state_dict().items()}
        return {"loss": self.name, "state_dict": state} if state else None

    def restore(self, state: Mapping[str, Any] | None, *, warn: bool = True) -> None:
        """Load a state of :meth:`saved`, whose tensors may have become lists, or begin anew.

        Args:
            state: The state in the checkpoint that is resumed from, or None.
            warn: True to warn, on this process, of another state than this loss's, which then starts anew.
        """
        own = self._first_state
        if state is not None and state["loss"] == self.name:
            dtypes = {key: x.dtype for key, x in own.items()}
            own = {key: torch.as_tensor(x, dtype=dtypes.get(key)) for key, x in state["state_dict"].items()}
            empty = {key: x for key, x in self._first_state.items() if x.numel() == 0}  # lists have no shape
            own.update({key: x for key, x in empty.items() if key in own and own[key].numel() == 0})
        elif own and warn:
            found = "no state of a loss" if state is None else f"the state of the loss {state['loss']}"
            text = "The checkpoint resumed from holds %s: the state of %s starts anew"
            _logger.warning(text, found, self.name)
        self.criterion.load_state_dict(own)
