"""The options: what they are called, what they refuse, and that each reaches the loss."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import open_clip.factory
import pytest
from open_clip_train.params import parse_args
from rankloss_trainers.named import NamedLoss, option
from stand_ins import Base, ready
from torch import nn

import rankloss
from rankloss import schedules
from rankloss_open_clip import arguments, bootstrap
from rankloss_open_clip.training import build_loss
from rankloss_trainers import catalog
from rankloss_trainers.command_line import dest, flag

ALIP = "--loss alip --alip-caption-key synthetic"
SIGMOID_STUDENT = "--siglip --distill-model RN50 --distill-pretrained x"


# Entry points of other packages refer to these.
class Captioned(NamedLoss):
    caption_key = "blip"

    def build(self, base: nn.Module, gather: Any) -> nn.Module:
        return base


class Deep(NamedLoss):
    depth: int = option(3, "how deep")

    def build(self, base: nn.Module, gather: Any) -> nn.Module:
        return base


def built(base: nn.Module, gather: Any) -> nn.Module:
    """The first line is the help."""
    return base


def number(base: nn.Module, gather: Any) -> Any:
    return 3


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
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
        catalog.known.cache_clear()

    yield register
    catalog.known.cache_clear()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_args(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def loss_of(command: str, base: nn.Module | None = None) -> Any:
    args = ready(parse_args([*command.split(), "--device", "cpu"]))
    return build_loss(Base() if base is None else base, args, sums_every_value=True)


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
    assert "--train-data" in shown
    assert "plain: The first line is the help;" in shown
    assert "broken: cannot be used (q 1.0): ModuleNotFoundError" in shown
    for name in (*catalog.BUILT_IN, "alip", "cyclip"):
        loss = catalog.load(name)
        assert f"{name}: {loss.help()}" in shown
        for each in loss.options().values():
            assert flag(loss, each) in shown


def test_arguments_have_what_the_loss_asked_for_depends_on_and_no_more() -> None:
    args = vars(parse_args([]))
    assert not [name for name in args if name == "loss" or name.startswith(("rankclip", "cyclip", "alip"))]
    assert vars(parse_args(["--loss", "clip"])) == {**args, "loss": "clip"}
    loss = catalog.load("rankclip")
    filled = {dest(loss, each): each.default for each in loss.options().values()}
    assert vars(parse_args(["--loss=rankclip"])) == {**args, "loss": "rankclip", **filled}
    for name in ("--loss-d", "--loss-dist-impl"):
        args = vars(parse_args([name, "gather", "--loss", "rankclip"]))
        assert (args["loss_dist_impl"], args["loss"]) == ("gather", "rankclip")


def test_name_that_was_swallowed_by_the_trainers_own_option_is_noticed(register: Register) -> None:
    register(("p", "x", "built"), ("p", "gather", "built"))
    for name in ("rankclip", "alip", "x"):
        with pytest.raises(RuntimeError, match=f"--loss-dist-impl {name}"):
            arguments.requested(SimpleNamespace(loss_dist_impl=name))
    assert arguments.requested(SimpleNamespace(loss_dist_impl="gather")) is None


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("--loss siglip", "'siglip'"),
        ("--loss rankclp", "did you mean rankclip?"),
        ("--rankclip-top-k 5 --rankclip-lambda-in 1", "--rankclip-lambda-in, --rankclip-top-k: only with"),
        ("--loss rankclip --rankclip-lamda-in 1", "did you mean --rankclip-lambda-in?"),
        ("--loss rankclip --rankclip_top_k 3", "did you mean --rankclip-top-k?"),
        ("--loss rankclip --rankclip-ties random", "--rankclip-ties: there is no such option"),
        ("--loss rankclip --rankclip-orders x", "--rankclip-orders: there is no such option"),
        ("--loss mimicry --mimicry-contrast 1", "--mimicry-contrast: there is no such option"),
        ("--loss rankclip --loss-teacher samples", "-features: samples is no folder of"),
        ("--loss rankclip --horovod", "--horovod"),
        ("--loss rankclip --model naflexgenlip_b16", "naflexgenlip_b16"),
        ("--loss rankclip --loss-teacher given", "--loss-teacher"),
        (
            "--loss rankclip-distill",
            "--distill-pretrained, or give --loss-teacher or --loss-teacher",
        ),
        (f"--loss rankclip {SIGMOID_STUDENT}", "--siglip and --distill-model"),
        (
            f"--loss rankclip --loss-teacher given {SIGMOID_STUDENT}",
            "",
        ),
        ("--loss alip", "--alip-caption-key"),
        (f"{ALIP} --model coca_ViT-B-32", "CoCa"),
        (f"{ALIP} --dataset-type synthetic", "--dataset-type synthetic"),
        (f"{ALIP} --torchscript", "--torchscript"),
        ("--loss siglip-streamed", "--siglip"),
    ],
)
def test_what_cannot_work_is_refused(capsys: pytest.CaptureFixture[str], command: str, named: str) -> None:
    assert named in refused(capsys, *command.split())


def test_trainer_that_was_not_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bootstrap.failures, "open_clip.factory", AttributeError("no create_loss"))
    with pytest.raises(ImportError, match="no create_loss"):
        parse_args(["--loss", "rankclip"])
    parse_args([])
    parse_args(["--loss", "clip"])


# --- what reaches the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("rankclip --rankclip-schedule cosine", {"schedule": schedules.cosine, "gather_with_grad": False}),
        ("rankclip-cross --local-loss", {"lambda_cross": 1.0, "lambda_in": 0.0, "local_loss": True}),
        (f"rankclip-distill {SIGMOID_STUDENT}", {"lambda_in": 64.0, "local_loss": True}),
        ("rankclip --siglip --rankclip-top-k 3", {"top_k": 3, "local_loss": True, "gather_with_grad": True}),
        ("cyclip --cyclip-lambda-cross 1", {"lambda_cross": 1.0, "lambda_in": 0.25, "local_loss": False}),
        ("alip --alip-caption-key x --alip-gamma-pair 1", {"gamma_sample": 2.0, "gamma_pair": 1.0}),
    ],
)
def test_option_reaches_the_loss(command: str, expected: dict[str, Any]) -> None:
    criterion = loss_of(f"--loss {command}").criterion
    terms = getattr(criterion, "consistency", criterion)
    parts = (criterion, terms, terms.gather, getattr(terms, "options", None))
    seen = {key: getattr(x, key) for key in expected for x in parts if hasattr(x, key)}
    assert seen == expected


@pytest.mark.parametrize("options", [[], ["--siglip"]])
def test_terms_stand_on_the_trainers_loss_as_rankloss_has_it(options: list[str]) -> None:
    ours, stock = rankloss.SigLipLoss if options else rankloss.ClipLoss, parse_args(options)
    own = open_clip.create_loss(ready(stock))
    siglip = " ".join(options)
    assert type(loss_of(f"--loss cyclip {siglip}", own).criterion.base) is ours
    criterion = loss_of(f"--loss rankclip --rankclip-memory-budget 5 {siglip}", own).criterion
    assert repr(criterion.base) == f"{ours.__name__}(memory_budget=5)"
    streamed = f"--loss {'siglip' if options else 'clip'}-streamed --streamed-memory-budget 7 {siglip}"
    assert repr(loss_of(streamed, own).criterion) == f"{ours.__name__}(memory_budget=7)"
    with pytest.raises(ValueError, match=r"the trainer trains with Base|needs --siglip"):
        loss_of(streamed, Base())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (ALIP, r"Loss: alip \(rankloss.*\), caption-key synthetic, open_clip"),
        ("--loss x", r"Loss: x \(p 1.0\), open_clip"),
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
    (message,) = caplog.messages
    assert re.search(said, message)


# --- what other packages register -----------------------------------------------------------------------


def test_registered_loss_and_its_options_are_taken(register: Register) -> None:
    register(("b", "deep", "Deep"))
    assert parse_args(["--loss", "deep"]).deep_depth == 3
    assert parse_args(["--loss=deep", "--deep-depth", "5"]).deep_depth == 5
    assert not hasattr(parse_args(["--loss", "cyclip"]), "deep_depth")


def test_what_cannot_be_used_stops_only_runs_that_ask(
    register: Register, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    register(("p", "x", "missing:X"))
    assert "No module named 'missing'" in refused(capsys, "--loss", "x")
    for argv in ([], ["--loss", "clip", "--name", "x"], ["--loss", "cyclip"]):
        parse_args(argv)
    assert not caplog.records


def test_second_caption_that_nothing_would_read_is_refused(
    register: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    register(("p", "x", "Captioned"))
    assert "x needs a second caption" in refused(capsys, "--loss", "x")


def test_what_is_no_loss_is_refused(register: Register) -> None:
    register(("p", "x", "built"), ("p", "y", "number"))
    base = Base()
    base.weight = nn.Parameter(base.scale.clone())
    with pytest.raises(ValueError, match=r"x needs parameters"):
        loss_of("--loss x", base)
    with pytest.raises(TypeError, match="y is 3"):
        loss_of("--loss y")
