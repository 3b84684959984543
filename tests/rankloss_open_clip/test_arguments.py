"""The options: what they are called, what they refuse, and that each reaches the loss."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip.factory
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import Base, features, ready
from teacher_features import stored, unit_rows
from torch import nn

import rankloss
from rankloss import schedules
from rankloss_features import caching
from rankloss_features.folder import NAMES
from rankloss_open_clip import arguments, bootstrap
from rankloss_open_clip.training import build_loss
from rankloss_trainers import catalog, create
from rankloss_trainers.command_line import RUN, dest, flag, prefix_of, typed_options
from rankloss_trainers.declared import options_of
from rankloss_trainers.run_options import RunOptions

ALIP = "--loss alip --alip-caption-key synthetic"
SIGMOID_STUDENT = "--siglip --distill-model RN50 --distill-pretrained x"
THIRD_PARTY = Path(__file__).parent / "third_party_loss"


# Entry points of other packages refer to these.
def deep(base: nn.Module, *, depth: int = 3) -> nn.Module:
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
    """The loss of a command line, on the trainer's own or on another."""
    args = ready(parse_args([*command.split(), "--device", "cpu"]))
    return open_clip.create_loss(args) if base is None else build_loss(base, args, sums_every_value=True)


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
    for name in (*catalog.LOSSES, "alip", "cyclip"):
        named = catalog.load(name)
        assert f"{name}: {named.summary}" in shown
        for key in typed_options(named):
            assert flag(prefix_of(name, named), key) in shown
    for key in options_of(RunOptions):
        assert flag(RUN, key) in shown


def test_arguments_have_what_the_loss_asked_for_depends_on_and_no_more() -> None:
    args = vars(parse_args([]))
    filled = {dest("rankclip", key): x.default for key, x in typed_options(catalog.load("rankclip")).items()}
    filled.update({dest(RUN, key): x.default for key, x in options_of(RunOptions).items()})
    assert not args.keys() & {"loss", *filled}
    assert vars(parse_args(["--loss", "clip"])) == {**args, "loss": "clip"}
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
        ("--rankclip-top-k 5 --rankclip-lambda-in 1", "--rankclip-lambda-in: only with"),
        ("--loss rankclip --rankclip-lamda-in 1", "did you mean --rankclip-lambda-in?"),
        ("--loss rankclip --rankclip_top_k 3", "did you mean --rankclip-top-k?"),
        ("--loss rankclip --rankclip-ties random", "--rankclip-ties: there is no such option"),
        ("--loss rankclip --rankclip-orders x", "--rankclip-orders: there is no such option"),
        ("--loss mimicry --mimicry-contrast 1", "--mimicry-contrast: there is no such option"),
        ("--loss rankclip --loss-teacher samples", "--loss-teacher: samples"),
        ("--loss rankclip --loss-teacher image=", "--loss-teacher: 'image='"),
        ("--loss rankclip --loss-agreement-every 0", "--loss-agreement-every"),
        ("--loss rankclip --loss-teachr x", "did you mean --loss-teacher?"),
        ("--loss-teacher x", "--loss-teacher: only with --loss"),
        ("--loss rankclip --horovod", "--horovod"),
        ("--loss rankclip --model naflexgenlip_b16", "naflexgenlip_b16"),
        ("--loss rankclip --loss-teacher given", "--loss-teacher"),
        ("--loss rankclip-distill", "--distill-pretrained, or give --loss-teacher"),
        (f"--loss rankclip {SIGMOID_STUDENT}", "--siglip and --distill-model"),
        ("--loss alip", "--alip-caption-key"),
        (f"{ALIP} --model coca_ViT-B-32", "CoCa"),
        (f"{ALIP} --dataset-type synthetic", "--dataset-type synthetic"),
        (f"{ALIP} --torchscript", "--torchscript"),
        ("--loss siglip-streamed", "needs --siglip"),
        ("--loss clip-smooth --siglip", "--siglip"),
        ("--loss rankclip --model local-dir:x --pretrained y.pt", "argument --pretrained y.pt: "),
        ("--loss rankclip --model hf-hub:x/y --pretrained y.pt", "argument --pretrained y.pt: "),
    ],
)
def test_what_cannot_work_is_refused(capsys: pytest.CaptureFixture[str], command: str, named: str) -> None:
    assert named in refused(capsys, *command.split())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--rankclip-reference-features", "--loss-teacher"),
        ("--rankclip-reference", "--loss-teacher"),
        ("--rankclip-teacher", "--loss-teacher"),
        ("--mimicry-reference-features", "--loss-teacher"),
        ("--mimicry-teacher", "--loss-teacher"),
        ("--rankclip-schedule-unit", "--loss-schedule-unit"),
        ("--rankclip-agreement-every", "--loss-agreement-every"),
        ("--rankclip-distill-loss", "leaves it out"),
        ("--clip-ids-same", "--clip-ids-same-id"),
    ],
)
@pytest.mark.parametrize("loss", ["rankclip", "clip-ids+rankclip-distill+mimicry"])
def test_an_old_option_is_refused_and_the_new_one_is_named(
    capsys: pytest.CaptureFixture[str], loss: str, old: str, new: str
) -> None:
    if loss == "rankclip" and not old.startswith("--rankclip"):
        loss = "clip-ids+mimicry"
    for words in ([old, "x"], [f"{old}=x"], [f"--{old[2:].replace('-', '_')}", "x"]):
        said = refused(capsys, "--loss", loss, *words)
        typed = words[0].partition("=")[0]
        assert typed in said
        assert new in said.partition(typed)[2]


@pytest.mark.parametrize("loss", ["rankclip-encoders+mimicry", "mimicry+rankclip-encoders"])
@pytest.mark.parametrize(
    "options",
    ["", "--mimicry-weight 2", "--rankclip-lambda-cross 1 --rankclip-top-k 3", "--loss-teacher text=minilm"],
)
def test_mimicry_of_encoders_is_refused_for_its_one_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loss: str, options: str
) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("features are computed")

    def missing(*_: Any) -> None:
        raise ValueError("--image-encoder efficientnet-lite0 needs a package")

    monkeypatch.setattr(caching, "cached", computed)
    monkeypatch.setattr(caching.Spec, "check", missing)
    said = refused(capsys, "--loss", loss, *options.split()).partition("error: ")[2]
    assert said == "argument --loss: mimicry cannot copy two encoders that have no common space"


def test_an_unknown_option_is_not_answered_by_another_that_was_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--bogus", "1"], ["--logz", "x"], ["word"]):
        with pytest.raises(SystemExit):
            parse_args(["--loss", "rankclip", "--logs", "x", *words])
        said = capsys.readouterr().err
        assert words[0] in said
        assert "did you mean" not in said


@pytest.mark.parametrize("code", [None, 0, 2])
def test_words_of_the_trainers_parser_are_shown_at_once_and_once(
    capsys: pytest.CaptureFixture[str], code: int | None
) -> None:
    def own(argv: list[str]) -> Any:
        print("a word of the trainer", argv, file=sys.stderr, flush=True)
        shown.append(capsys.readouterr().err)
        if code is not None:
            raise SystemExit(code)
        return SimpleNamespace()

    shown: list[str] = []
    with contextlib.suppress(SystemExit):
        arguments.parsed(own, ["--workers", "3"], lambda *_: None)
    assert shown == ["a word of the trainer ['--workers', '3']\n"]
    assert capsys.readouterr().err == ""


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
        (f"rankclip --loss-teacher given {SIGMOID_STUDENT}", {"lambda_in": 1.0, "local_loss": True}),
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
    with pytest.raises(ValueError, match=r"clip-streamed .*Base|siglip-streamed needs --siglip"):
        loss_of(streamed, Base())


def test_terms_stand_on_a_loss_that_the_options_do_not_tell() -> None:
    own = open_clip.loss.SigLipLoss()
    assert loss_of("--loss rankclip", own).criterion.base is own


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
        open_clip.create_loss(args)
    (message,) = caplog.messages
    assert re.search(said, message)


# --- what other packages register -----------------------------------------------------------------------


def test_registered_loss_and_its_options_are_taken(register: Register) -> None:
    register(("b", "deep", "deep"))
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


def test_a_third_partys_loss_has_its_options_a_teacher_and_a_place_among_joined_ones(
    register: Register,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(THIRD_PARTY)
    (where,) = re.findall('^uniform = "(.*)"$', (THIRD_PARTY / "pyproject.toml").read_text(), re.MULTILINE)
    register(("uniform-clip", "uniform", where))
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"uniform: The trainer's own plus a uniformity term.*--uniform-weight X Weight of", shown
    )
    for value in ("-1", "much"):
        said = refused(capsys, "--loss", "uniform+rankclip", "--uniform-weight", value)
        assert "--uniform-weight" in said
        assert value in said.partition("got ")[2]
    with pytest.raises(ValueError, match=r"^uniform.weight .*-1"):
        create("uniform+rankclip", uniform={"weight": -1})

    inputs = features()
    teacher = {f"reference_{key}": unit_rows(7, 5, seed) for seed, key in enumerate(NAMES)}
    folder = stored(tmp_path / "x", **{key: teacher[f"reference_{key}"] for key in NAMES})
    options = ["--uniform-weight", "0.5", "--loss-teacher", folder]
    args = ready(parse_args(["--loss", "mimicry+uniform+rankclip", *options, "--device", "cpu"]))
    assert (args.uniform_weight, args.loss_teacher) == (0.5, folder)
    loss = open_clip.create_loss(args)
    loss.start_epoch(1, 2, 1, 1)
    taught = {key: torch.from_numpy(x) for key, x in teacher.items()}
    ranked = loss(**inputs, **taught, output_dict=True)
    uniform = importlib.import_module("uniform_clip").uniformity
    distances = [abs(uniform(inputs[key]) - uniform(taught[f"reference_{key}"])).item() for key in NAMES]
    assert ranked["uniform_loss"].item() == pytest.approx(0.5 * sum(distances), rel=1e-5)
    assert ranked["uniform_weight"].item() == 0.5
    assert {"contrastive_loss", "mimicry_loss", "cross_modal_loss", "in_modal_loss"} <= ranked.keys()


def test_what_is_no_loss_is_refused(register: Register, capsys: pytest.CaptureFixture[str]) -> None:
    register(("p", "x", "built"), ("p", "y", "number"))
    base = Base()
    base.weight = nn.Parameter(base.scale.clone())
    with pytest.raises(ValueError, match=r"x needs parameters"):
        loss_of("--loss x", base)
    with pytest.raises(SystemExit):
        loss_of("--loss y")
    assert "y builds no module; got 3" in capsys.readouterr().err
