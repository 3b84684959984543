"""A trainer as the runtime knows it, and the losses that its user gives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from rankloss_trainers.catalog import choose
from rankloss_trainers.declared import Loss, Named, Options

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

    def check_serves(self, loss: str, needs: Iterable[str], advice: Mapping[str, str]) -> None:
        """Raise a ValueError for the first need of a loss that this trainer does not serve.

        Args:
            loss: The name of the loss.
            needs: Its needs, of :data:`NEEDS`.
            advice: Advice for needs, in addition to :attr:`instead`.
        """
        for need in needs:
            if need not in self.serves:
                text = f"{loss} needs {NEEDS[need]}, which {self.name} does not serve"
                remedy = advice.get(need) or self.instead.get(need)
                raise ValueError(f"{text}; {remedy}" if remedy else text)


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
    named = Named(lambda: loss)  # whose constructor gives the module as it is
    return [Loss(type(loss).__name__, named, package=None)]
