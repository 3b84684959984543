"""The runtime of a loss in any trainer: its progress, its teacher, its entries, its state.

A trainer's plug-in, here a host, describes itself by a :class:`Host` and translates its trainer's calls::

    run = Runtime(HOST, HOST.chosen("rankclip", {"top_k": 8}), base=base, gather=gather)
    run.begin(epochs)                                # before the first step; logs nothing
    run.set_epoch(epoch, epochs)                     # at each epoch, counted from 1
    run.set_progress(step, total_steps)              # once before each optimizer step, counted from 1
    terms, metrics = run(image_features=…, text_features=…, logit_scale=…, reference_image_features=…)
    terms, metrics = run.evaluate(image_features=…, text_features=…, logit_scale=…)   # the base alone

A host makes all of these calls for any loss: the runtime tells each part of the loss by the method that it
has. It refuses, by name, a loss that needs more than the host serves, a teacher that nobody uses, a teacher
that is missing, and a step of which the loss was not told. ``run.saved()`` and ``run.restore(…)`` serve
checkpoints.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import types
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather, GatherOption, gather_once
from rankloss.losses import TEACHER, base_entries, takes_teacher
from rankloss_features.folder import Features
from rankloss_trainers.catalog import choose
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.named import NamedLoss, Options, did_you_mean

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
        defaults: Defaults of options, by key, that differ from the catalogue's.
    """

    name: str
    biased: str
    teacher: str
    progress: str
    serves: Collection[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def chosen(self, loss: str | nn.Module, options: Options | None = None) -> NamedLoss:
        """The loss that a user of the trainer gives.

        Args:
            loss: The name of a loss of the catalogue, or a module with the forward convention of open_clip's
                losses.
            options: Options of a named loss; the others have their defaults.

        Raises:
            TypeError: An option does not exist, or options come beside a module.
            ValueError: The loss does not exist, or cannot have these options.
        """
        if isinstance(loss, str):
            return choose(loss, options or {}, defaults=self.defaults)
        if options:
            raise TypeError("options are for a loss that is given by its name; a module has its own")
        return GivenModule(module=loss)


class GivenModule(NamedLoss):
    """A module that a trainer is given in place of a name."""

    module: Any = None
    name = property(lambda self: type(self.module).__name__)  # type: ignore[assignment]

    def build(self, base: Any, gather: Any) -> Any:  # noqa: ARG002
        return self.module

    def unit(self, epochs: float) -> str:  # noqa: ARG002
        return "step"

    def log(self) -> RankClipLog | None:
        return RankClipLog() if isinstance(self.module, rankloss.RankClipLoss) else None


BY_STEPS = {"schedule_unit": "step"}
"""Defaults of hosts whose number of epochs may be a fraction."""

NEEDS = {
    "caption": "a second caption of each image",
    "folder": "a folder of a teacher's features (reference_features)",
    "lists": "a list of graded candidates of each query",
    "state": "a state in checkpoints",
    "parameters": "parameters of its own, which an optimizer has to train",
}
"""The needs of a loss that not every host serves."""


def reason_against(host: Host, loss: NamedLoss, gather: Gather, *, sigmoid: bool) -> str | None:
    """The reason why a loss does not work in a host, which may begin with an option; or None.

    Args:
        host: The host.
        loss: The loss.
        gather: The run's gathering.
        sigmoid: True if the trainer's own loss is a sigmoid loss.
    """
    for part in loss.parts:
        if sigmoid and part.no_sigmoid:
            return f"{part.name} does not work with {host.biased}: {part.no_sigmoid}"
        if part.only_sigmoid and not sigmoid:
            return f"{part.name} needs {host.biased}: {part.only_sigmoid}"
    return loss.refuse(gather)


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


def _check_teacher(
    name: str, use: str, remedy: str, found: Collection[str], columns: Collection[str] = ()
) -> None:
    if found and use == "none":
        raise ValueError(f"the data have {', '.join(found)}, but {name} does not use a teacher")
    similar = [column for column in columns if column.startswith("reference_") and column not in found]
    if use == "required" and (not found or (similar and len(found) < len(TEACHER))):
        has = f"; the data have {', '.join(columns)}" if columns else ""
        raise ValueError(f"{name} needs a teacher's features: {remedy}{has}")
    dropped = [column for column in columns if column in TEACHER and column not in found]
    if use == "optional" and dropped:
        raise ValueError(f"the data have {dropped[0]}, and the batch has not: let its collator pass it on")


class Runtime(nn.Module):
    """A loss in a trainer.

    Args:
        host: The trainer.
        chosen: The loss with its options.
        base: The loss of the trainer, to stand on or to replace. None: :class:`rankloss.ClipLoss`.
        gather: The gathering of the loss and of the default base.

    Attributes:
        chosen: The loss with its options.
        name: The name in the catalogue, or the class of a module.
        criterion: The module.
        teacher: ``"required"``, ``"optional"``, or ``"none"``.
        features: The folder of the teacher's features, or None.
        captions: The key of a second caption, or None.
        takes_lists: True if a part of the loss takes a list of graded candidates of each query.
        columns: The columns of the training data, where a host names them (:meth:`name_columns`).
        unit: ``"epoch"`` or ``"step"``, the way in which a part that has both methods is told.
        step: The optimizer step of the run, counted from 0.

    Raises:
        TypeError: The loss builds no module.
        ValueError: The loss cannot work with its options, or in this host; the error begins with an option
            that it is about.
    """

    def __init__(
        self, host: Host, chosen: NamedLoss, *, base: Any = None, gather: GatherOption = None
    ) -> None:
        super().__init__()
        self.host, self.chosen, self.name, self._gather = host, chosen, chosen.name, Gather.of(gather)
        base = rankloss.ClipLoss(gather=gather) if base is None else base
        sigmoid = any(each.__name__ == "SigLipLoss" for each in type(base).__mro__)
        reason = reason_against(host, chosen, self._gather, sigmoid=sigmoid)
        if reason is not None:
            raise ValueError(reason)
        loss = chosen.build(base, self._gather)
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, or the name of one; {self.name} is {loss!r}")
        self.criterion: nn.Module = loss
        self.columns: Collection[str] = ()
        self.captions = chosen.caption_key
        self.takes_lists = bool(self._arguments("candidate_features"))
        needs = {
            "caption": self.captions is not None,
            "folder": chosen.reference_features is not None,
            "lists": self.takes_lists,
            "parameters": any(parameter.requires_grad for parameter in loss.parameters()),
            "state": bool(loss.state_dict()),
        }
        unserved = [NEEDS[need] for need in needs if needs[need] and need not in host.serves]
        if unserved:
            raise ValueError(f"{self.name} needs {unserved[0]}, which {host.name} does not serve")
        self.teacher, self.features = self._use_of_a_teacher(), self._folder()
        self.unit, self.step = "step", 0
        self._log = chosen.log()
        self._base = loss  # the innermost, or the trainer's own
        while (below := getattr(self._base, "base", None)) is not None:
            self._base = below
        self._base = base if self._base is loss else self._base
        self._first_state = deepcopy(loss.state_dict())
        self._is_told = not any(map(units_of, loss.modules()))
        self._found: list[str] = []  # the teacher's features of the last batch

    def _arguments(self, *names: str) -> list[inspect.Parameter]:
        """The arguments of these names of all parts of the loss."""
        forwards = [inspect.signature(part.forward).parameters for part in self.criterion.modules()]
        return [forward[name] for forward in forwards for name in names if name in forward]

    def _use_of_a_teacher(self) -> str:
        uses = self.chosen.teacher
        if uses == "required" or any(x.default is x.empty for x in self._arguments(*TEACHER)):
            return "required"
        return "optional" if takes_teacher(self.criterion) and uses is None else "none"

    def _folder(self) -> Features | None:
        where = self.chosen.reference_features
        try:
            return None if where is None else Features(where).check()
        except ValueError as error:
            raise ValueError(f"reference_features: {error}") from error

    def described(self, epochs: float) -> str:
        """The line of the log about a run of so many epochs."""
        text, package = self.chosen.describe(epochs), self.chosen.package
        if not package and not isinstance(self.chosen, GivenModule):
            package = f"rankloss {rankloss.__version__}"
        return f"Loss: {self.name}" + f" ({package})" * bool(package) + f", {text}" * bool(text)

    def begin(self, epochs: float) -> None:
        """A training of so many epochs begins; infinity where its data have no length.

        Raises:
            ValueError: The loss goes by epochs, and their number is not known.
        """
        self.unit = self.chosen.unit(epochs) or "epoch"
        if math.isinf(epochs) and any(listeners(self.criterion, "epoch", self.unit)):
            text = "but data without a length have no known number of epochs; give schedule_unit 'step'"
            raise ValueError(f"{self.name} goes by epochs (schedule_unit 'epoch'), {text}")

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
        if found:
            self._find_components(inputs["image_features"].shape[1], inputs[found[0]].shape[1])
        # Always by name: only the names tell which entry is a term.
        with gather_once():
            entries: dict[str, Tensor] = dict(self.criterion(**inputs, output_dict=True))
            if self._log is not None:
                entries.update(self._log(self.criterion, entries, self.step, inputs))
        return Entries.of(self.criterion, entries)

    def evaluate(self, **features: Any) -> Entries:
        """The terms of the base, without the terms that a schedule weighs; 0 for a single pair."""
        images: Tensor = features["image_features"]
        if len(images) == 1 and self.gather.place[1] == 1:
            return Entries({"contrastive_loss": images.new_zeros(())}, {})
        return Entries(Entries.of(self._base, base_entries(self._base, **features)).terms, {})

    @property
    def gather(self) -> Gather:
        """The gathering of the loss."""
        given = (part.gather for part in self.criterion.modules() if hasattr(part, "gather"))
        return next((gather for gather in given if isinstance(gather, Gather)), self._gather)

    def name_columns(self, columns: Collection[str]) -> None:
        """The columns of a training's data, see :attr:`columns`.

        Raises:
            ValueError: A teacher's column is misspelt, and the loss would train without it.
        """
        self.columns = columns
        for column in columns if self.teacher == "optional" else ():
            hint = did_you_mean(column, TEACHER, cutoff=0.8)
            if hint and column not in TEACHER:
                raise ValueError(f"the data have {column}, which {self.name} does not use{hint}")

    def check_teacher(self, found: list[str]) -> None:
        """Raise a ValueError unless a teacher's features are there just where the loss uses them.

        Args:
            found: The names of the features that a batch has, of :data:`TEACHER`.
        """
        _check_teacher(self.name, self.teacher, self.host.teacher, found, self.columns)
        if found not in ([], self._found) and self.gather.place[0] == 0:
            _logger.info("%s uses a teacher: %s", self.name, " and ".join(found))
        self._found = found

    def _find_components(self, width: int, of_teacher: int) -> None:
        """Give the principal components of the folder to the parts that compare features of other widths."""
        where = self.chosen.reference_features
        parts = [x for x in self.criterion.modules() if getattr(x, "components", self) is None]
        if parts and width > of_teacher:
            raise ValueError(
                f"the teacher has {of_teacher} dimensions, fewer than the student's {width}, which "
                "cannot copy them; rankclip-distill ranks by a teacher of any width"
            )
        if parts and width < of_teacher and where is not None and os.path.isdir(where):
            found = (self.features or Features(where)).components(width)
            for part in parts:
                part.components = found.matrix

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
        elif own and warn:
            found = "no state of a loss" if state is None else f"the state of the loss {state['loss']}"
            text = "The checkpoint resumed from holds %s: the state of %s starts anew"
            _logger.warning(text, found, self.name)
        self.criterion.load_state_dict(own)


# --- a loop of one's own --------------------------------------------------------------------------------

OWN_LOOP = Host(
    name="a loop of one's own",
    biased="a SigLipLoss as base",
    teacher=f"call it with {' and '.join(TEACHER)}",
    progress="call set_epoch or set_progress",
    serves=("caption", "lists", "state", "parameters"),
)


def own_loop(name: str, base: Any, gather: GatherOption, options: Options) -> nn.Module:
    """See :func:`rankloss_trainers.create`."""
    chosen = OWN_LOOP.chosen(name, options)
    run = Runtime(OWN_LOOP, chosen, base=base, gather=gather)
    for part in chosen.parts:
        own = options if part is chosen else options.get(part.name, {})
        for key in (key for key, option in part.options().items() if option.for_trainer and key in own):
            raise ValueError(f"{key} is for a trainer's plug-in, which acts on it; got {own[key]!r}")
    loss = run.criterion
    if "required" in (run.teacher, chosen.teacher) or chosen.teacher == "none":
        hook = functools.partial(_check_call, name, run.teacher)  # which can be pickled
        loss.register_forward_pre_hook(hook, with_kwargs=True)
    for unit, method in METHODS.items():
        setattr(loss, method, functools.partial(_tell, loss, unit))
    return loss


def _tell(loss: nn.Module, unit: str, now: int, end: int) -> None:
    """Tell all parts of a loss that have the method where training stands."""
    for part in loss.modules():
        units_of(part).get(unit, lambda *_: None)(part, now, end)


def _check_call(name: str, use: str, module: nn.Module, args: Any, inputs: Mapping[str, Any]) -> None:  # noqa: ARG001
    found = [x for x in TEACHER if inputs.get(x) is not None]
    _check_teacher(name, use, OWN_LOOP.teacher, found)
