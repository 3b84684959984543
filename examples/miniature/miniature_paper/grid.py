"""Which models are trained: settings, the two presets, and what each table and figure needs.

One setting is one trained model. Exhibits share settings: plain CLIP with seed 0 is in almost all of them
and is trained once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

LOSSES = ("clip", "cyclip", "alip", "rankclip", "rankclip-cross", "rankclip-in")
BACKBONES = ("resnet", "vit")

# What the tables and figures are called on the command line and in the report.
EXHIBITS = ("table1", "table2", "table3", "table4", "figure3", "figure4", "figure6", "figure7")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one model is trained with.

    Attributes:
        loss: What is passed to ``--loss``.
        backbone: ``resnet`` or ``vit``: a model folder beside this package.
        pairs: Number of training pairs; a smaller number is a part of a larger one.
        lambda_cross: What multiplies λ in the cross-modal rank term; 0 for a loss without that term.
        lambda_in: The same for the in-modal term.
        seed: The trainer's seed: initial weights, order of the data, crops. They are the same for every loss,
            so that two losses can be compared seed by seed.
        preset: The preset that fixes everything else.
    """

    loss: str
    backbone: str
    pairs: int
    lambda_cross: float
    lambda_in: float
    seed: int
    preset: str

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: must be one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.loss != loss_name(self.lambda_cross, self.lambda_in, self.loss):
            raise ValueError(
                f"lambda_cross and lambda_in: {self.loss} with {self.lambda_cross:g} and {self.lambda_in:g} "
                "is trained by another --loss"
            )

    @property
    def name(self) -> str:
        """A short name for people and files."""
        name = f"{self.loss}-{self.backbone}-{self.pairs}"
        if (self.lambda_cross, self.lambda_in) not in ((0.0, 0.0), *_ONES.values()):
            name += f"-cross{self.lambda_cross:g}-in{self.lambda_in:g}"
        return f"{name}-seed{self.seed}"


_ONES = {"rankclip": (1.0, 1.0), "rankclip-cross": (1.0, 0.0), "rankclip-in": (0.0, 1.0)}


def loss_name(lambda_cross: float, lambda_in: float, otherwise: str) -> str:
    """Return the ``--loss`` whose rank terms have these weights; ``otherwise`` where there are none.

    Every model has one name only, by which it is found again: λ's sweep ends in the ablations.
    """
    if lambda_cross and lambda_in:
        return "rankclip"
    if lambda_cross or lambda_in:
        return "rankclip-cross" if lambda_cross else "rankclip-in"
    return "clip" if otherwise in _ONES else otherwise


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of the whole experiment.

    Attributes:
        name: Its name.
        note: What the report has to say of it.
        steps: Optimizer steps of every run, whatever its data size and loss.
        batch_size: Pairs in a batch, which is also the length of the ranking lists.
        warmup: Steps over which the learning rate grows.
        sizes: Numbers of training pairs, where that is the subject.
        pairs: The one that is used wherever it is not.
        seeds: How many seeds.
        sweep_seeds: How many of them λ's sweep uses.
        lambdas: The multipliers of λ in the sweep, each with the other one at 1.
        retrieval_items: At most so many held-out pictures are searched among.
        class_items: At most so many held-out pictures of each labelled set are classified.
        probe_items: At most so many training pictures of each labelled set go into its probe.
        probe_strengths: What the probe's regularisation is chosen from.
        umap_pairs: Pairs in the picture of the embeddings.
    """

    name: str
    note: str
    steps: int
    batch_size: int
    warmup: int
    sizes: tuple[int, ...]
    pairs: int
    seeds: int
    sweep_seeds: int
    lambdas: tuple[float, ...]
    retrieval_items: int
    class_items: int
    probe_items: int
    probe_strengths: tuple[float, ...]
    umap_pairs: int

    def __post_init__(self) -> None:
        if self.pairs not in self.sizes:
            raise ValueError(f"pairs: must be one of the sizes, got {self.pairs}")
        for pairs in self.sizes:
            # The trainer counts in epochs, and drops what does not fill a batch.
            if pairs % self.batch_size or self.steps * self.batch_size % pairs:
                raise ValueError(f"sizes: {self.steps} steps are no whole number of epochs over {pairs}")

    def epochs(self, pairs: int) -> int:
        """Return how often each of ``pairs`` is seen in the preset's steps."""
        return self.steps * self.batch_size // pairs


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="full",
            note="",
            steps=1120,
            batch_size=256,
            warmup=200,
            sizes=(8960, 17920, 35840, 71680, 143360),
            pairs=71680,
            seeds=5,
            sweep_seeds=3,
            lambdas=(0.0, 0.25, 1.0, 4.0, 16.0),
            retrieval_items=10_000,
            class_items=10_000,
            probe_items=2000,
            probe_strengths=(1e-4, 1e-3, 1e-2, 1e-1),
            umap_pairs=300,
        ),
        Preset(
            name="quick",
            note="This is the quick preset, a smoke test of the whole path, with trainings of a few seconds: "
            "its numbers say nothing about the losses.",
            steps=32,
            batch_size=128,
            warmup=8,
            sizes=(512, 1024, 2048, 4096),
            pairs=2048,
            seeds=2,
            sweep_seeds=2,
            lambdas=(0.0, 1.0, 16.0),
            retrieval_items=500,
            class_items=200,
            probe_items=200,
            probe_strengths=(1e-3, 1e-1),
            umap_pairs=100,
        ),
    )
}


def _setting(preset: Preset, loss: str, seed: int, **changes: object) -> Setting:
    cross, inside = _ONES.get(loss, (0.0, 0.0))
    setting = Setting(loss, "resnet", preset.pairs, cross, inside, seed, preset.name)
    return dataclasses.replace(setting, **changes)


def _every_loss(preset: Preset, seed: int) -> list[Setting]:
    return [_setting(preset, loss, seed) for loss in LOSSES]


def _shown(preset: Preset, seed: int) -> list[Setting]:
    return _every_loss(preset, seed) if seed == 0 else []


def _both_backbones(preset: Preset, seed: int) -> list[Setting]:
    return [
        _setting(preset, loss, seed, backbone=backbone)
        for backbone in BACKBONES
        for loss in ("clip", "rankclip")
    ]


def _sizes(preset: Preset, seed: int) -> list[Setting]:
    return [
        _setting(preset, loss, seed, pairs=pairs) for pairs in preset.sizes for loss in ("clip", "rankclip")
    ]


def _sweep(preset: Preset, seed: int) -> list[Setting]:
    if seed >= preset.sweep_seeds:
        return []
    weights = [(x, 1.0) for x in preset.lambdas] + [(1.0, x) for x in preset.lambdas]
    return [
        _setting(preset, "clip", seed),
        *(
            _setting(preset, loss_name(cross, inside, "clip"), seed, lambda_cross=cross, lambda_in=inside)
            for cross, inside in weights
        ),
    ]


_OF_EXHIBIT: dict[str, Callable[[Preset, int], list[Setting]]] = {
    "table1": _every_loss,
    "table2": _every_loss,
    "table3": _every_loss,
    "table4": _both_backbones,
    "figure3": _sweep,
    "figure4": _sizes,
    "figure6": _shown,
    "figure7": _shown,
}


def settings_of(preset: Preset, exhibit: str, seeds: Iterable[int]) -> list[Setting]:
    """Return the settings that one exhibit shows, seed by seed.

    Raises:
        ValueError: For an exhibit that there is not.
    """
    if exhibit not in _OF_EXHIBIT:
        raise ValueError(f"exhibit: must be one of {', '.join(EXHIBITS)}, got {exhibit!r}")
    found = [setting for seed in seeds for setting in _OF_EXHIBIT[exhibit](preset, seed)]
    return list(dict.fromkeys(found))


def plan(
    preset: Preset, exhibits: Sequence[str] = EXHIBITS, seeds: Sequence[int] | None = None
) -> list[Setting]:
    """Return every setting to train, in an order that makes an interrupted run most useful.

    The models of Table 1 come first, seed by seed: Tables 2 and 3 and Figures 6 and 7 are made of them, too.
    The other exhibits follow, again seed by seed. So whatever has been reached, all losses have the same
    seeds, give or take one.
    """
    seeds = range(preset.seeds) if seeds is None else seeds
    wanted = [s for seed in seeds for exhibit in exhibits for s in settings_of(preset, exhibit, [seed])]
    base = [s for seed in seeds for s in _every_loss(preset, seed)]
    return list(dict.fromkeys([*(s for s in base if s in wanted), *wanted]))


def is_shown(setting: Setting) -> bool:
    """Say whether Figures 6 and 7 show this very model, so that its pictures are kept."""
    return setting in _shown(PRESETS[setting.preset], 0)
