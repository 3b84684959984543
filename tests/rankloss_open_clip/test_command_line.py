"""The options: what they are called, what they refuse, and that each reaches the loss."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import open_clip.factory
import pytest
from open_clip_train.params import parse_args
from stand_ins import Base, ready
from torch import nn

import rankloss
from rankloss import schedules
from rankloss_open_clip import bootstrap, command_line, patches
from rankloss_open_clip.training import build_loss
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry, Option

ALIP = "--loss alip --alip-caption-key synthetic"
SIGMOID_STUDENT = "--siglip --distill-model RN50 --distill-pretrained x"

# Entry points of other packages refer to these.
ENTRY = LossEntry(build=lambda base, *_: base, options=(Option("depth", 3, "how deep", {"type": int}),))
CLASHING = LossEntry(build=lambda base, *_: base, prefix="rankclip")
TRAINERS = LossEntry(build=lambda base, *_: base, prefix="train", options=(Option("data", "", "taken"),))
NOTHING = "not callable"


def built(base: nn.Module, options: Any, gather: Any) -> nn.Module:
    """The first line is the help."""
    return base


def number(base: nn.Module, options: Any, gather: Any) -> Any:
    return 3


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


def loss_of(command: str, base: nn.Module | None = None) -> Any:
    args = ready(parse_args([*command.split(), "--device", "cpu"]))
    return build_loss(Base() if base is None else base, args, sums_every_value=True)


def stock(*options: str) -> nn.Module:
    """The loss of a run without --loss."""
    loss: nn.Module = open_clip.create_loss(ready(parse_args(list(options))))
    return loss


# --- what is there --------------------------------------------------------------------------------------


def test_help_shows_every_loss_with_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, register: Register
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")  # no word is broken at a hyphen
    register(("p", "plain", "built"), ("q", "broken", "missing:X"))
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--loss {{clip,{','.join(catalog.candidates())}}}" in shown
    assert {"alip", "cyclip", "broken", "plain", *catalog.BUILT_IN} == catalog.candidates().keys()
    assert "plain: The first line is the help." in shown
    assert "broken: cannot be used: ModuleNotFoundError" in shown
    assert f"--rankclip-schedule {{{','.join(schedules.NAMES)}}}" in shown
    for name in (*catalog.BUILT_IN, "alip", "cyclip"):
        entry = catalog.candidates()[name].load()
        assert f"{name}: {entry.help}" in shown
        for option in entry.options:
            assert catalog.flag(name, entry, option) in shown
    assert "(default: all; rankclip-distill: 8)" in shown


def test_defaults_of_the_loss_asked_for_are_filled_in() -> None:
    args = parse_args(["--loss=rankclip"])
    entry = catalog.candidates()["rankclip"].load()
    filled = {catalog.dest("rankclip", entry, option) for option in entry.options}
    assert set(vars(args)) == {*vars(parse_args([])), "loss", *filled}
    assert (args.loss, args.loss_dist_impl) == ("rankclip", None)


def test_arguments_without_loss_are_those_of_the_trainer() -> None:
    args = vars(parse_args([]))
    assert not [name for name in args if name == "loss" or name.startswith(("rankclip", "cyclip", "alip"))]
    assert vars(parse_args(["--loss", "clip"])) == {**args, "loss": "clip"}
    for name in ("--loss-d", "--loss-dist-impl"):
        args = vars(parse_args([name, "gather", "--loss", "rankclip"]))
        assert (args["loss_dist_impl"], args["loss"]) == ("gather", "rankclip")


def test_name_that_was_swallowed_by_the_trainers_own_option_is_noticed(register: Register) -> None:
    register(("p", "x", "built"), ("p", "gather", "built"))
    for name in ("rankclip", "alip", "x"):
        with pytest.raises(RuntimeError, match=f"--loss-dist-impl {name}"):
            command_line.requested(SimpleNamespace(loss_dist_impl=name))
    assert command_line.requested(SimpleNamespace(loss_dist_impl="gather")) is None


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("--los rankclip", "--los"),
        ("--loss siglip", "'siglip'"),
        ("--rankclip-top-k 5 --rankclip-lambda-in 1", "--rankclip-lambda-in, --rankclip-top-k"),
        ("--loss clip --rankclip-top-k 5", "--rankclip-top-k"),
        ("--loss cyclip --rankclip-top-k 3", "--rankclip-top-k"),
        ("--cyclip-lambda-in 1", "--cyclip-lambda-in"),
        ("--streamed-memory-budget 0", "--streamed-memory-budget"),
        ("--loss rankclip --rankclip-schedule steep", "--rankclip-schedule"),
        ("--loss rankclip --rankclip-lambda-cross -1", "--rankclip-lambda-cross"),
        ("--loss rankclip --rankclip-top-k 0", "--rankclip-top-k"),
        ("--loss rankclip --rankclip-weight 1", "--rankclip-weight"),
        ("--loss rankclip --rankclip-lamda-in 1", "did you mean --rankclip-lambda-in?"),
        ("--accum-frq=2 --rankclip_top_k 3", "did you mean --accum-freq, --rankclip-top-k?"),
        ("--loss rankclip --horovod", "--horovod"),
        ("--loss rankclip --model naflexgenlip_b16", "naflexgenlip_b16"),
        ("--loss rankclip --rankclip-reference teacher", "--distill-model"),
        ("--loss rankclip --rankclip-reference-scale 2", "--rankclip-reference-scale: "),
        ("--loss rankclip --rankclip-distill-loss exclude", "--rankclip-distill-loss: "),
        (f"--loss rankclip {SIGMOID_STUDENT}", "--siglip and --distill-model"),
        (f"--loss rankclip --rankclip-reference teacher {SIGMOID_STUDENT}", "--rankclip-distill-loss: "),
        ("--loss alip", "--alip-caption-key"),
        (f"{ALIP} --alip-momentum 1.5", "--alip-momentum: "),
        (f"{ALIP} --siglip", "--siglip"),
        (f"{ALIP} --distill-model RN50 --distill-pretrained x", "--distill-model"),
        (f"{ALIP} --model coca_ViT-B-32", "CoCa"),
        (f"{ALIP} --dataset-type synthetic", "--dataset-type synthetic"),
        (f"{ALIP} --torchscript", "--torchscript"),
        ("--loss clip-streamed --siglip", "--siglip"),
        ("--loss siglip-streamed", "--siglip"),
    ],
)
def test_what_cannot_work_is_refused(capsys: pytest.CaptureFixture[str], command: str, named: str) -> None:
    assert named in refused(capsys, *command.split())


@pytest.mark.parametrize(
    "command",
    [
        f"--loss rankclip-distill {SIGMOID_STUDENT}",
        f"--loss rankclip --rankclip-reference teacher --rankclip-distill-loss exclude {SIGMOID_STUDENT}",
    ],
)
def test_what_can_work_is_not(command: str) -> None:
    assert parse_args(command.split()).siglip


def test_trainer_that_was_not_reached_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import open_clip_train.train

    with monkeypatch.context() as changed:
        changed.setattr(open_clip_train.train, "train_one_epoch", lambda data, args: None)
        assert "open_clip_train.train.train_one_epoch" in refused(capsys, "--loss", "rankclip")
    monkeypatch.setitem(bootstrap.failures, "open_clip.factory", AttributeError("no create_loss"))
    for name in ("--loss", "--los"):
        with pytest.raises(ImportError, match="no create_loss"):
            parse_args([name, "clip"])
    parse_args([])
    assert "no create_loss" in caplog.text


# --- what reaches the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--rankclip-schedule cosine", {"schedule": schedules.cosine}),
        ("--rankclip-lambda-cross 0.5 --rankclip-lambda-in 0", {"lambda_cross": 0.5, "lambda_in": 0.0}),
        ("--rankclip-lists batch --rankclip-worth shifted", {"lists": "batch", "worth": "shifted"}),
        ("--rankclip-discount none --rankclip-top-k 5", {"discount": None, "top_k": 5}),
        ("--rankclip-chunk-size 8 --rankclip-memory-budget 0", {"chunk_size": 8, "memory_budget": 0}),
        ("--loss rankclip-cross", {"lambda_cross": 1.0, "lambda_in": 0.0}),
        ("--loss rankclip-in", {"lambda_cross": 0.0, "lambda_in": 1.0}),
        ("", {"local_loss": False, "gather_with_grad": False}),
        ("--local-loss --gather-with-grad", {"local_loss": True, "gather_with_grad": True}),
        ("--siglip", {"local_loss": True, "gather_with_grad": True}),
        ("--siglip --rankclip-lists batch", {"local_loss": False}),
        ("--local-loss --gather-with-grad --rankclip-lists batch", {"local_loss": False}),
    ],
)
def test_option_reaches_the_loss(command: str, expected: dict[str, Any]) -> None:
    base = Base()
    criterion = loss_of(f"--loss rankclip {command}", base).criterion
    assert criterion.base is base
    options = criterion.consistency.options
    of_options = {name: getattr(options, name) for name in expected if hasattr(options, name)}
    seen = {**vars(criterion), **vars(criterion.consistency.gather), **of_options}
    seen.update({name: getattr(criterion, name) for name in ("schedule", "lambda_cross", "lambda_in")})
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--loss cyclip", {"lambda_cross": 0.25, "lambda_in": 0.25, "local_loss": False}),
        ("--loss cyclip --cyclip-lambda-cross 1 --local-loss", {"lambda_cross": 1.0, "local_loss": True}),
        ("--loss cyclip --siglip", {"local_loss": True, "gather_with_grad": True}),
        (ALIP, {"gamma_sample": 2.0, "gamma_pair": 2.0, "momentum": 0.99, "history": 1.0}),
        (f"{ALIP} --alip-gamma-sample 1 --alip-initial-history -0.2", {"gamma_sample": 1.0, "history": -0.2}),
        (f"{ALIP} --local-loss --gather-with-grad", {"local_loss": True, "gather_with_grad": True}),
    ],
)
def test_options_reach_the_other_losses(command: str, expected: dict[str, Any]) -> None:
    criterion = loss_of(command).criterion
    seen = {**vars(criterion), **vars(criterion.gather)}
    if "history" in expected:
        seen["history"] = pytest.approx(criterion.histories[0].item())
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize("options", [[], ["--siglip"]])
def test_terms_stand_on_the_trainers_loss_as_rankloss_has_it(options: list[str]) -> None:
    ours = rankloss.SigLipLoss if options else rankloss.ClipLoss
    siglip = " ".join(options)
    assert type(loss_of(f"--loss cyclip {siglip}", stock(*options)).criterion.base) is ours
    criterion = loss_of(f"--loss rankclip --rankclip-memory-budget 5 {siglip}", stock(*options)).criterion
    assert repr(criterion.base) == f"{ours.__name__}(memory_budget=5)"
    streamed = f"--loss {'siglip' if options else 'clip'}-streamed --streamed-memory-budget 7 {siglip}"
    assert repr(loss_of(streamed, stock(*options)).criterion) == f"{ours.__name__}(memory_budget=7)"
    with pytest.raises(ValueError, match="the trainer trains with Base"):
        loss_of(streamed, Base())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--loss cyclip", r"Loss: cyclip \(rankloss.*\) on Base, open_clip"),
        (ALIP, r"Loss: alip \(rankloss.*\) in place of Base, caption-key synthetic, open_clip"),
        ("--loss x", r"Loss: x \(p 1.0\) on Base, open_clip"),
    ],
)
def test_log_names_the_loss_once(
    register: Register, caplog: pytest.LogCaptureFixture, command: str, said: str
) -> None:
    register(("p", "x", "built"))
    with caplog.at_level("INFO", logger="rankloss_open_clip"):
        loss_of(command)
        args = ready(parse_args([*command.split(), "--device", "cpu"]))
        args.rank, args.world_size = 1, 2  # only the first process says it
        build_loss(Base(), args, sums_every_value=True)
    (record,) = caplog.records
    assert re.search(said, record.message)


# --- what other packages register -----------------------------------------------------------------------


def test_registered_loss_and_its_options_are_taken(register: Register) -> None:
    register(("b", "deep", "ENTRY"))
    assert parse_args(["--loss", "deep"]).deep_depth == 3
    assert parse_args(["--loss=deep", "--deep-depth", "5"]).deep_depth == 5
    assert not hasattr(parse_args(["--loss", "cyclip"]), "deep_depth")


@pytest.mark.parametrize(
    ("registrations", "message"),
    [
        ([("p", "x", "missing:X")], "No module named 'missing'"),
        ([("p", "x", "NOTHING")], "LossEntry"),
        ([("p", "x", "CLASHING")], "'rankclip'"),
        ([("p", "x", "TRAINERS")], "--train-data"),
        ([("p", "x", "ENTRY"), ("q", "x", "built")], "both p 1.0 and q 1.0"),
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


@pytest.mark.parametrize("name", ["rankclip", "clip"])
def test_own_names_cannot_be_taken(register: Register, caplog: pytest.LogCaptureFixture, name: str) -> None:
    before = catalog.candidates().get(name)
    register(("p", name, "built"))
    parse_args([])
    assert not caplog.records
    assert catalog.candidates().get(name) == before


def test_what_is_no_loss_is_refused(register: Register) -> None:
    register(("p", "x", "built"), ("p", "y", "number"))
    base = Base()
    base.weight = nn.Parameter(base.scale.clone())
    with pytest.raises(ValueError, match="--loss x"):
        loss_of("--loss x", base)
    with pytest.raises(TypeError, match="--loss y"):
        loss_of("--loss y")


def test_trainer_with_a_loss_option_of_its_own_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    module = type(open_clip)("open_clip_train.params")
    source = (
        "import argparse\n"
        "def parse_args(args):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--loss', choices=['clip', 'sigmoid'], default='sigmoid')\n"
        "    return parser.parse_args(args)\n"
    )
    exec(source, vars(module))
    patches.patch(module)
    assert vars(module.parse_args([])) == {"loss": "sigmoid"}
    assert vars(module.parse_args(["--loss", "clip"])) == {"loss": "clip"}
    with pytest.raises(SystemExit):
        module.parse_args(["--loss", "rankclip"])
    assert "rankclip cannot be used" in capsys.readouterr().err
