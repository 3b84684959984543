"""The runtime of a loss in any trainer: its progress, its teacher, its entries, its state.

A trainer's plug-in, here a host, describes itself by a :class:`Host` and translates its trainer's calls::

    run = Runtime(HOST, given_loss("rankclip", {"top_k": 8}), base=base, gather=gather)
    run.begin(epochs)                                # before the first step; logs nothing
    run.set_epoch(epoch, epochs)                     # at each epoch, counted from 1
    run.set_progress(step, total_steps)              # once before each optimizer step, counted from 1
    terms, metrics = run(image_features=…, text_features=…, logit_scale=…, reference_image_features=…)
    terms, metrics = run.evaluate(image_features=…, text_features=…, logit_scale=…)   # the base alone

A host makes all of these calls for any loss: the runtime tells each part of the loss by the method that it
has. It refuses, by name, a loss that needs more than the host serves, a teacher that nobody uses, a teacher
that is missing, and a step of which the loss was not told. ``run.saved()`` and ``run.restore(…)`` serve
checkpoints. :func:`tried` refuses a loss before any of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import types
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather, GatherOption, gather_once
from rankloss.losses import TEACHER, base_entries, takes_teacher
from rankloss_features.folder import Features
from rankloss_trainers.catalog import choose
from rankloss_trainers.logging import RankClipLog, remark_on_products
from rankloss_trainers.named import NamedLoss, OptionError, Options, did_you_mean, naming_options
from rankloss_trainers.ranked_lists import OF_LISTS, RankedListsTerm

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
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)


def with_folder(loss: Any, folder: str) -> NamedLoss:
    """The loss with the folder of its teacher's features, which have been computed."""
    if loss.parts != (loss,):
        parts = tuple(with_folder(part, folder) if part.teacher else part for part in loss.parts)
        joined: NamedLoss = dataclasses.replace(loss, joined=parts)
        return joined
    found: NamedLoss = dataclasses.replace(loss, teacher=None, reference_features=folder)
    return found


def given_loss(loss: str | NamedLoss | nn.Module, options: Options | None = None) -> NamedLoss:
    """The loss that a user of a trainer gives.

    Args:
        loss: The name of a loss of the catalogue, a chosen loss, or a module with the forward convention of
            open_clip's losses.
        options: Options of a named loss; the others have their defaults.

    Raises:
        TypeError: An option does not exist, or options come beside a module or a chosen loss.
        ValueError: The loss does not exist, or cannot have these options.
    """
    if isinstance(loss, str):
        return choose(loss, options or {})
    if options:
        raise TypeError("options are for a loss that is given by its name; another has its own")
    return loss if isinstance(loss, NamedLoss) else GivenModule(module=loss)


class GivenModule(NamedLoss):
    """A module that a trainer is given in place of a name."""

    module: Any = None
    name = property(lambda self: type(self.module).__name__)

    def build(self, base: Any, gather: Any) -> Any:  # noqa: ARG002
        """The module."""
        return self.module

    def unit(self, epochs: float) -> str:  # noqa: ARG002
        """Steps, for a part of the module that goes by either."""
        return "step"

    def log(self) -> RankClipLog | None:
        """λ and raw terms of RankCLIP."""
        return RankClipLog() if isinstance(self.module, rankloss.RankClipLoss) else None


NEEDS = {
    "caption": "a second caption of each image",
    "folder": "a folder of a teacher's features (reference_features)",
    "lists": "a list of graded candidates of each query",
    "state": "a state in checkpoints",
    "teacher": "a teacher that computes its features before the first step (teacher)",
    "parameters": "parameters of its own, which an optimizer has to train",
}
"""The needs of a loss that not every host serves."""


def two_steps(host: Host, spec: str) -> str:
    """Advice in a host that does not compute a teacher's features."""
    from rankloss_features.caching import Spec

    command = Spec.of(spec).command("--data", "PAIRS", "--output", "FOLDER")
    return f"compute them, `{command}`, and {host.teacher}"


def tried(host: Host, loss: NamedLoss, gather: Gather, *, sigmoid: bool) -> None:
    """Read the loss's folder and build it once, before the trainer reads its data and builds a model.

    Args:
        host: The trainer.
        loss: The loss.
        gather: The run's gathering.
        sigmoid: True if the trainer's own loss is a sigmoid loss.

    Raises:
        ValueError: The loss does not work in the host.
    """
    base = rankloss.SigLipLoss if sigmoid else rankloss.ClipLoss
    alone = dataclasses.replace(gather, rank=0, world_size=1)  # which warns of nothing
    Runtime(host, loss, base=base(gather=False), gather=alone)


def _check_own_loss(host: Host, loss: NamedLoss, *, sigmoid: bool) -> None:
    for part in loss.parts:
        if sigmoid and part.no_sigmoid:
            raise ValueError(f"{part.name} does not work with {host.biased}: {part.no_sigmoid}")
        if part.only_sigmoid and not sigmoid:
            raise ValueError(f"{part.name} needs {host.biased}: {part.only_sigmoid}")


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


def innermost_of(loss: Any) -> Any:
    """The loss under all others, by their attribute ``base``; the loss itself where it has none."""
    while (below := getattr(loss, "base", None)) is not None:
        loss = below
    return loss


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
        takes_lists: True if a part of the loss takes a list of graded candidates of each query.
        columns: The columns of the training data, where a host names them (:meth:`name_columns`).
        unit: ``"epoch"`` or ``"step"``, the way in which a part that has both methods is told.
        step: The optimizer step of the run, counted from 0.
        has_fixed_entries: Give an entry to log that has no value in a call as NaN instead of leaving it out:
            a compiled caller would be compiled again when it appears.

    Raises:
        TypeError: The loss builds no module.
        ValueError: The loss does not work in this host, or its folder is no teacher's; an ``OptionError``
            where it is about an option.
    """

    def __init__(
        self, host: Host, chosen: NamedLoss, *, base: Any = None, gather: GatherOption = None
    ) -> None:
        super().__init__()
        self.host, self.chosen, self.name, self._gather = host, chosen, chosen.name, Gather.of(gather)
        base = rankloss.ClipLoss(gather=gather) if base is None else base
        sigmoid = any(each.__name__ == "SigLipLoss" for each in type(base).__mro__)
        _check_own_loss(host, chosen, sigmoid=sigmoid)
        with naming_options(chosen):
            loss = chosen.build(base, self._gather)
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, or the name of one; {self.name} is {loss!r}")
        self.criterion: nn.Module = loss
        self.columns: Collection[str] = ()
        self.takes_lists = bool(self._arguments("candidate_features"))
        needs = {
            "caption": chosen.caption_key is not None,
            "folder": chosen.reference_features is not None,
            "lists": self.takes_lists,
            "parameters": any(parameter.requires_grad for parameter in loss.parameters()),
            "state": bool(loss.state_dict()),
            "teacher": chosen.teacher is not None,
        }
        for need in [need for need in needs if needs[need] and need not in host.serves]:
            text = f"{self.name} needs {NEEDS[need]}, which {host.name} does not serve"
            advice = two_steps(host, chosen.teacher) if need == "teacher" else host.instead.get(need)
            raise ValueError("; ".join([text, *filter(None, [advice])]))
        self.teacher, self.features = self._use_of_a_teacher(), self._folder()
        self.unit, self.step = "step", 0
        self._log, self.has_fixed_entries = chosen.log(), False
        innermost = innermost_of(loss)
        # Evaluation data have no ids, so the trainer's own loss is evaluated.
        self._base = base if innermost is loss or getattr(innermost, "same_id", None) else innermost
        if isinstance(innermost, RankedListsTerm):  # without a base
            self._base = None
        self._first_state = deepcopy(loss.state_dict())
        self._is_told = not any(map(units_of, loss.modules()))
        self._has_remarked = False
        self._found: list[str] = []  # the teacher's features of the last batch

    def _arguments(self, *names: str) -> list[inspect.Parameter]:
        """The arguments of these names of all parts of the loss."""
        forwards = [inspect.signature(part.forward).parameters for part in self.criterion.modules()]
        return [forward[name] for forward in forwards for name in names if name in forward]

    def _use_of_a_teacher(self) -> str:
        uses = self.chosen.use_of_teacher
        if uses == "required" or any(x.default is x.empty for x in self._arguments(*TEACHER)):
            return "required"
        return "optional" if takes_teacher(self.criterion) and uses is None else "none"

    def _folder(self) -> Features | None:
        where = self.chosen.reference_features
        try:
            return None if where is None else Features(where).check()
        except (OSError, ValueError) as error:
            raise OptionError("reference_features", str(error)) from error

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
            self._find_components(inputs["image_features"].shape[1], inputs[found[0]].shape[1])
        # Always by name: only the names tell which entry is a term.
        with gather_once():
            entries: dict[str, Tensor] = dict(self.criterion(**inputs, output_dict=True))
            logged = {} if self._log is None else self._log(self.criterion, entries, self.step, inputs)
        for name, value in logged.items():
            if value is not None:
                entries[name] = value
            elif self.has_fixed_entries:
                entries[name] = torch.full((), math.nan, device=inputs["image_features"].device)
        return Entries.of(self.criterion, entries)

    def _remark(self, device: torch.device | None) -> None:
        """Log once, on the first process, when TF32 products rank the lists."""
        ranks = any(isinstance(x, rankloss.RankConsistency) for x in self.criterion.modules())
        if device is None or self._has_remarked or not ranks:
            return
        self._has_remarked = True
        text = remark_on_products(device)
        if text is not None and self.gather.place[0] == 0:
            _logger.info("%s: %s", self.name, text)

    def evaluate(self, **features: Any) -> Entries:
        """The terms of the innermost base, without those that a schedule weighs, and of graded lists.

        A single pair counts 0.
        """
        lists = {name: features.pop(name) for name in OF_LISTS if name in features}
        parts = [x for x in self.criterion.modules() if isinstance(x, RankedListsTerm)]
        if lists and not parts:  # a module of one's own
            return Entries.of(self.criterion, dict(self.criterion(**features, **lists, output_dict=True)))
        terms: dict[str, Tensor] = {}
        if (images := features.get("image_features")) is not None and self._base is not None:
            terms = {"contrastive_loss": images.new_zeros(())}
            if len(images) > 1 or self.gather.place[1] > 1:
                terms = Entries.of(self._base, base_entries(self._base, **features)).terms
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
        check_use_of_teacher(self.name, self.teacher, self.host.teacher, found, self.columns)
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
