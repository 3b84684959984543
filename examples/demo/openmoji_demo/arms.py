"""The trainings that the demo compares: a loss each, with its arguments."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Arm:
    """A training: a value of the trainer's ``--loss``, and arguments of that loss."""

    name: str  # in the command line and in the run's folder
    label: str  # in the tables and the picture
    loss: str
    arguments: tuple[str, ...] = ()


_PER_EPOCH = ("--loss-schedule-unit", "epoch")  # as the results beside this package were trained

_ARMS = (
    Arm("clip", "CLIP", "clip"),
    Arm("rankclip", "RankCLIP", "rankclip", _PER_EPOCH),
    Arm("encoders", "CLIP + two encoders", "rankclip-encoders"),
)
DEFAULT = tuple(arm.name for arm in _ARMS)


def find(name: str) -> Arm:
    """Return the arm of this name; any other name is a loss of the trainer with its defaults."""
    return {arm.name: arm for arm in _ARMS}.get(name) or Arm(name, name, name)
