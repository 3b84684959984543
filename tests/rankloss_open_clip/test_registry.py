"""The catalogue at the trainer's command line: what is found by name, refused, and told."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from torch import Tensor, nn
from torch.nn.functional import normalize

import rankloss
import rankloss_baselines
from rankloss_open_clip import command_line
from rankloss_open_clip.logged_terms import LoggedTerms, TrainerLoss
from rankloss_open_clip.training import build_loss
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry, Option
from rankloss_trainers.clock import Position

ALIP = "--loss alip --alip-caption-key synthetic"

# Entry points of other packages refer to these.
ENTRY = LossEntry(build=lambda base, *_: base, options=(Option("depth", 3, "how deep", {"type": int}),))
CLASHING = LossEntry(build=lambda base, *_: base, prefix="rankclip")
TRAINERS = LossEntry(build=lambda base, *_: base, prefix="train", options=(Option("data", "", "taken"),))
NOTHING = "not callable"


def built(base: nn.Module, *_: Any) -> nn.Module:
    """The first line is the help.

    The rest is not.
    """
    return base


def number(base: nn.Module, *_: Any) -> Any:
    return 3


class Base(nn.Module):
    """A loss with the trainer's calling convention."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        raise NotImplementedError


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Stand-ins for installed packages: (package, name, object of this module or elsewhere)."""

    class Point(importlib.metadata.EntryPoint):
        dist: Any = None

    def register(*registrations: tuple[str, str, str]) -> None:
        points = []
        for package, name, reference in registrations:
            value = reference if ":" in reference else f"{__name__}:{reference}"
            point = Point(name, value, catalog.GROUP)
            vars(point)["dist"] = SimpleNamespace(name=package, version="1.0")
            points.append(point)
        original = importlib.metadata.entry_points
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda **given: [*original(**given), *(points if given.get("group") == catalog.GROUP else [])],
        )

    return register


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_args(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def ready(args: Any) -> Any:
    args.rank, args.world_size, args.distill = 0, 1, False
    return args


# --- what is found --------------------------------------------------------------------------------------


def test_own_losses_are_there_and_load() -> None:
    found = catalog.candidates()
    assert list(found) == [*catalog.BUILT_IN, "alip", "cyclip"]
    for name, candidate in found.items():
        entry = candidate.load()
        assert entry.help
        assert bool(candidate.package) == (name not in catalog.BUILT_IN)
        assert entry.prefix in ("", "rankclip", "streamed")
        assert all(option.help for option in entry.options), name


def test_registered_loss_is_an_entry_or_a_function(register: Register) -> None:
    register(("b", "deep", "ENTRY"), ("a", "plain", "built"))
    found = catalog.candidates()
    assert list(found)[-2:] == ["deep", "plain"]
    assert found["deep"].package == "b 1.0"
    assert found["deep"].load() is ENTRY
    plain = found["plain"].load()
    assert (plain.build, plain.help, plain.options) == (built, "The first line is the help.", ())


def test_registered_loss_and_its_options_are_taken_by_the_parser(register: Register) -> None:
    register(("b", "deep", "ENTRY"))
    assert parse_args(["--loss", "deep"]).deep_depth == 3
    assert parse_args(["--loss=deep", "--deep-depth", "5"]).deep_depth == 5
    assert not hasattr(parse_args(["--loss", "cyclip"]), "deep_depth")


@pytest.mark.parametrize(
    ("registrations", "message"),
    [
        (
            [("p", "x", "missing:X")],
            "x (p 1.0) cannot be used: ModuleNotFoundError: No module named 'missing'",
        ),
        ([("p", "x", "ABSENT")], "x (p 1.0) cannot be used: AttributeError"),
        (
            [("p", "x", "NOTHING")],
            "must be a LossEntry or a function (base, options, gather) → module, got 'not call",
        ),
        ([("p", "x", "CLASHING")], "the prefix 'rankclip' belongs to another loss"),
        ([("p", "x", "TRAINERS")], "x cannot be used: argument --train-data: conflicting option string"),
        ([("p", "x", "ENTRY"), ("q", "x", "built")], "x is registered by both p 1.0 and q 1.0"),
    ],
)
def test_what_cannot_be_used_stops_only_runs_that_ask(
    register: Register,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    registrations: list[tuple[str, str, str]],
    message: str,
) -> None:
    register(*registrations)
    assert message in refused(capsys, "--loss", "x")
    for argv in ([], ["--loss", "clip"], ["--loss", "cyclip"]):
        parse_args(argv)
    assert not caplog.records
    with pytest.raises(SystemExit) as exit_:  # shown, with the reason
        parse_args(["--help"])
    assert exit_.value.code == 0
    assert ",x}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rankclip", "clip"])
def test_own_names_cannot_be_taken(register: Register, caplog: pytest.LogCaptureFixture, name: str) -> None:
    register(("p", name, "built"))
    own = catalog.candidates()
    assert own.keys() == {*catalog.BUILT_IN, "alip", "cyclip"}
    parse_args([])
    assert not caplog.records
    parse_args(["--loss", "cyclip"])
    assert f"{__name__}:built is registered as a loss under the name {name!r}, which is taken" in caplog.text


def test_two_registrations_of_one_object_are_one(register: Register) -> None:
    register(("p", "x", "ENTRY"), ("p", "x", "ENTRY"))
    assert catalog.candidates()["x"].load() is ENTRY


# --- what the own losses refuse -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "--loss rankclip-cross --rankclip-lambda-in 1",
            "-lambda-in: rankclip-cross has no in-modal term, got 1",
        ),
        (
            "--loss rankclip-in --rankclip-lambda-cross 2",
            "-cross: rankclip-in has no cross-modal term, got 2",
        ),
        ("--loss rankclip-in --rankclip-lists batch --local-loss", "--rankclip-lists: batch needs the whole"),
        ("--loss cyclip --horovod", "--loss: cyclip does not work with --horovod, use torchrun"),
        ("--loss cyclip --cyclip-lambda-in -1", "--cyclip-lambda-in: must be a finite number of at least 0"),
        ("--loss cyclip --rankclip-top-k 3", "only with --loss rankclip or rankclip-cross or rankclip-in"),
        ("--cyclip-lambda-in 1", "unrecognized arguments: --cyclip-lambda-in 1"),
        ("--loss alip", "--loss: alip needs a second caption of each image: name it with --alip-caption-key"),
        (f"{ALIP} --siglip", "--loss: alip does not work with --siglip: it weighs the pairs of a softmax"),
        (
            f"{ALIP} --distill-model RN50 --distill-pretrained x",
            "does not work with --distill-model: the teacher",
        ),
        (f"{ALIP} --model coca_ViT-B-32", "alip does not work with CoCa"),
        (f"{ALIP} --dataset-type synthetic", "--dataset-type synthetic has no second caption"),
        (f"{ALIP} --torchscript", "alip does not work with --torchscript"),
        ("--loss clip-streamed --siglip", "--loss: clip-streamed does not work with --siglip: it is CLIP's"),
        (
            "--loss siglip-streamed",
            "--loss: siglip-streamed needs --siglip: the loss is that of a model with",
        ),
        (
            "--loss clip-streamed --streamed-memory-budget -1",
            "--streamed-memory-budget: must be a whole number of at least 0",
        ),
        ("--streamed-memory-budget 0", "only with --loss clip-streamed or siglip-streamed"),
        (f"{ALIP} --alip-momentum 1.5", "--alip-momentum: must be in [0, 1], got 1.5"),
        (f"{ALIP} --alip-initial-history nan", "--alip-initial-history: must be a finite number, got 'nan'"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(
    capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert message in refused(capsys, *command.split())


def test_ablations_are_rankclip_without_a_term() -> None:
    for name, lambdas in (("rankclip-cross", (1.0, 0.0)), ("rankclip-in", (0.0, 1.0))):
        args = parse_args(["--loss", name])
        assert (args.rankclip_lambda_cross, args.rankclip_lambda_in) == lambdas
        loss = build_loss(Base(), ready(args), sums_every_value=True).criterion
        assert (loss.lambda_cross, loss.lambda_in) == lambdas
    # An option that agrees with the name is accepted.
    assert parse_args(["--loss", "rankclip-cross", "--rankclip-lambda-in", "0"]).rankclip_lambda_in == 0


LAYOUT = {"local_loss": True, "gather_with_grad": True}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--loss cyclip", {"lambda_cross": 0.25, "lambda_in": 0.25, "local_loss": False}),
        ("--loss cyclip --cyclip-lambda-cross 1 --local-loss", {"lambda_cross": 1.0, "local_loss": True}),
        ("--loss cyclip --cyclip-lambda-in 0", {"lambda_in": 0.0, "gather_with_grad": False}),
        ("--loss cyclip --siglip", LAYOUT),
        (ALIP, {"gamma_sample": 2.0, "gamma_pair": 2.0, "momentum": 0.99, "history": 1.0}),
        (f"{ALIP} --alip-gamma-sample 1 --alip-gamma-pair 3", {"gamma_sample": 1.0, "gamma_pair": 3.0}),
        (f"{ALIP} --alip-momentum 0.5 --alip-initial-history -0.2", {"momentum": 0.5, "history": -0.2}),
        (f"{ALIP} --local-loss --gather-with-grad", LAYOUT),
    ],
)
def test_options_reach_the_loss(command: str, expected: dict[str, Any]) -> None:
    args = ready(parse_args([*command.split(), "--device", "cpu"]))
    loss = build_loss(Base(), args, sums_every_value=True).criterion
    assert isinstance(
        loss, {"cyclip": rankloss_baselines.CyClipLoss, "alip": rankloss_baselines.AlipLoss}[args.loss]
    )
    seen = {**vars(loss), **vars(loss.gather)}
    if "history" in expected:
        seen["history"] = loss.histories[0].item()
    assert {name: seen[name] for name in expected} == expected


# --- what a loss is told and gives ----------------------------------------------------------------------


class Recorder(nn.Module):
    """A loss that records what it is told."""

    def __init__(self, entries: dict[str, Tensor]) -> None:
        super().__init__()
        self.entries = entries
        self.told: list[tuple[Any, ...]] = []

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.told.append(("epoch", epoch, epochs))

    def set_progress(self, step: int, total_steps: int) -> None:
        self.told.append(("progress", step, total_steps))

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        self.told.append(("call",))
        return dict(self.entries)


def features() -> dict[str, Tensor]:
    rows = normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    return {"image_features": rows[0], "text_features": rows[1], "logit_scale": torch.tensor(10.0)}


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_clock(unit: str) -> None:
    inner = Recorder({"x_loss": torch.tensor(1.0)})
    loss = TrainerLoss(rankloss_baselines.CyClipLoss(inner), unit=unit)
    for epoch in range(2):
        loss.start_epoch(Position(epoch=epoch, epochs=2, steps=2, accum_freq=2))
        for _ in range(4):
            loss(**features(), output_dict=True)
    calls = [("call",), ("call",)]
    expected: list[tuple[Any, ...]] = []
    for epoch in (1, 2):
        expected += [("epoch", epoch, 2)] if unit == "epoch" else []
        for step in (1, 2):
            expected += [("progress", 2 * (epoch - 1) + step, 4)] if unit == "step" else []
            expected += calls
    assert inner.told == expected


def test_terms_are_told_from_metrics_by_their_names() -> None:
    entries = {
        "a_loss": torch.tensor(1.0, requires_grad=True),
        "b_loss": torch.tensor(0.5),
        "depth": torch.tensor(7.0),
    }
    for sums_every_value in (True, False):
        loss = TrainerLoss(Recorder(entries), unit="epoch", sums_every_value=sums_every_value)
        loss.start_epoch(Position(epoch=0, epochs=1, steps=1, accum_freq=1))
        given = loss(**features(), output_dict=True)
        assert list(given) == ["a_loss", "b_loss", "depth"]
        assert (type(given) is LoggedTerms) == sums_every_value
        assert len(given.values()) == (2 if sums_every_value else 3)
        assert loss(**features()) == 1.5
    for more, message in (
        ({}, "Recorder gives no term to train: no name ends in _loss, got depth"),
        ({"a_loss": entries["a_loss"]}, r"Recorder gives 'depth' with a gradient, .* call it depth_loss, or"),
    ):
        depth = torch.tensor(7.0, requires_grad=bool(more)) * 1
        silent = TrainerLoss(Recorder({"depth": depth, **more}), unit="epoch")
        silent.start_epoch(Position(epoch=0, epochs=1, steps=1, accum_freq=1))
        with pytest.raises(ValueError, match=message):
            silent(**features(), output_dict=True)


def test_what_is_no_loss_is_refused(register: Register) -> None:
    register(("p", "x", "built"), ("p", "y", "number"))
    args = ready(parse_args(["--loss", "x"]))
    base = Base()
    base.weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="--loss x: Base has parameters, which the trainer's optimizer"):
        build_loss(base, args, sums_every_value=True)
    args.loss = "y"
    with pytest.raises(TypeError, match="--loss y"):
        build_loss(Base(), args, sums_every_value=True)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--loss cyclip", r"Loss: cyclip \(rankloss [\w.]+\) on Base, weights 0.25 cross-modal"),
        (ALIP, r"Loss: alip \(rankloss [\w.]+\) in place of Base, second caption 'synthetic', gamma 2"),
        ("--loss rankclip-in", r"Loss: rankclip-in .* lambda scale 0 cross-modal and 1 in-modal"),
        ("--loss x", r"Loss: x \(p 1.0\) on Base, open_clip"),
    ],
)
def test_log_names_the_loss(
    register: Register, caplog: pytest.LogCaptureFixture, command: str, said: str
) -> None:
    register(("p", "x", "built"))
    args = ready(parse_args([*command.split(), "--device", "cpu"]))
    with caplog.at_level("INFO", logger="rankloss_open_clip"):
        build_loss(Base(), args, sums_every_value=True)
        args.rank, args.world_size = 1, 2  # only the first process says it
        build_loss(Base(), args, sums_every_value=True)
    (record,) = caplog.records
    assert re.search(said, record.message)


def test_swallowed_name_of_any_loss_is_noticed(register: Register) -> None:
    register(("p", "x", "built"), ("p", "gather", "built"))
    for name in ("cyclip", "alip", "x"):
        with pytest.raises(RuntimeError, match=f"was read as --loss-dist-impl {name}"):
            command_line.requested(SimpleNamespace(loss_dist_impl=name))
    assert command_line.requested(SimpleNamespace(loss_dist_impl="gather")) is None


# --- the trainer's own losses, in linear memory -----------------------------------------------------------


@pytest.mark.parametrize("how", ["rankclip", "cyclip"])
def test_terms_stand_on_the_trainers_loss_as_rankloss_has_it(how: str) -> None:
    for options, ours in (([], rankloss.ClipLoss), (["--siglip"], rankloss.SigLipLoss)):
        args = ready(parse_args(["--loss", how, *options]))
        loss = build_loss(open_clip.create_loss(namespace(*options)), args, sums_every_value=True)
        assert type(loss.criterion.base) is ours


@pytest.mark.parametrize("options", [[], ["--siglip"]])
def test_base_of_rankclip_has_its_budget(options: list[str]) -> None:
    args = ready(parse_args(["--loss", "rankclip", "--rankclip-memory-budget", "5", *options]))
    loss = build_loss(open_clip.create_loss(namespace(*options)), args, sums_every_value=True)
    ours = rankloss.SigLipLoss if options else rankloss.ClipLoss
    assert repr(loss.criterion.base) == f"{ours.__name__}(memory_budget=5)"


def test_streamed_losses_replace_what_they_compute_and_nothing_else() -> None:
    for name, options, ours in (
        ("clip-streamed", [], rankloss.ClipLoss),
        ("siglip-streamed", ["--siglip"], rankloss.SigLipLoss),
    ):
        args = ready(parse_args(["--loss", name, *options, "--streamed-memory-budget", "7"]))
        loss = build_loss(open_clip.create_loss(namespace(*options)), args, sums_every_value=True)
        assert repr(loss.criterion) == f"{ours.__name__}(memory_budget=7)"
        with pytest.raises(ValueError, match=f"{name} computes what .* the trainer trains with Base"):
            build_loss(Base(), args, sums_every_value=True)


def namespace(*options: str) -> Any:
    """The arguments of a run without the plug-in, as the trainer completes them."""
    return ready(parse_args(list(options)))
