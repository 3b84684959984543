"""The options: what they are called, what they refuse, and that each reaches the loss."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import open_clip.factory
import pytest
from open_clip_train.params import parse_args
from torch import Tensor, nn
from trainer_runs import Processes

import rankloss
from rankloss import schedules
from rankloss_open_clip import bootstrap, command_line, patches, training
from rankloss_trainers import catalog

RANKCLIP = ["--loss", "rankclip"]
SIGMOID_STUDENT = ["--siglip", "--distill-model", "RN50", "--distill-pretrained", "x"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_args(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_help_shows_the_group(processes: Processes) -> None:
    done = processes["help"]
    assert done.returncode == 0
    assert "loss (rankloss):" in done.output
    assert f"--loss {{clip,{','.join(catalog.candidates())}}}" in done.output
    assert "--loss rankclip, rankclip-cross, rankclip-in, rankclip-distill:" in done.output
    assert f"--rankclip-schedule {{{','.join(schedules.NAMES)}}}" in done.output
    for name, candidate in catalog.candidates().items():
        entry = candidate.load()
        assert f"{name}: {entry.help}" in " ".join(done.output.split())
        for option in entry.options:
            assert catalog.flag(name, entry, option) in done.output


def test_unknown_loss_ends_the_command_with_a_usage_error(processes: Processes) -> None:
    done = processes["bad value"]
    assert done.returncode == 2
    assert "argument --loss: invalid choice: 'siglip'" in done.output


@pytest.mark.parametrize("argv", [["--loss", "rankclip"], ["--loss=rankclip"]])
def test_both_spellings_select_the_loss_and_fill_in_defaults(argv: list[str]) -> None:
    args = parse_args(argv)
    assert args.loss == "rankclip"
    assert args.loss_dist_impl is None
    entry = catalog.candidates()["rankclip"].load()
    assert {name for name in vars(args) if name.startswith("rankclip_")} == {
        catalog.dest("rankclip", entry, option) for option in entry.options
    }
    assert not [name for name in vars(args) if name.startswith(("cyclip_", "alip_"))]


def test_arguments_without_loss_are_those_of_the_trainer() -> None:
    args = vars(parse_args([]))
    assert not [name for name in args if name == "loss" or name.startswith(("rankclip", "cyclip", "alip"))]


@pytest.mark.parametrize("abbreviation", ["--loss-d", "--loss-dist-impl"])
def test_trainers_own_option_keeps_its_meaning(abbreviation: str) -> None:
    args = parse_args([abbreviation, "gather", *RANKCLIP])
    assert (args.loss_dist_impl, args.loss) == ("gather", "rankclip")


def test_ambiguous_abbreviation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ambiguous option: --los" in refused(capsys, "--los", "rankclip")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rankclip-schedule", "steep"], "--rankclip-schedule: invalid choice"),
        (["--rankclip-schedule-unit", "sample"], "--rankclip-schedule-unit: invalid choice"),
        (
            ["--rankclip-lambda-cross", "-1"],
            "--rankclip-lambda-cross: must be a finite number of at least 0, got '-1'",
        ),
        (
            ["--rankclip-lambda-in", "nan"],
            "--rankclip-lambda-in: must be a finite number of at least 0, got 'nan'",
        ),
        (
            ["--rankclip-lambda-in", "inf"],
            "--rankclip-lambda-in: must be a finite number of at least 0, got 'inf'",
        ),
        (
            ["--rankclip-lambda-in", "x"],
            "--rankclip-lambda-in: must be a finite number of at least 0, got 'x'",
        ),
        (["--rankclip-top-k", "0"], "--rankclip-top-k: must be a whole number of at least 1, got '0'"),
        (
            ["--rankclip-chunk-size", "1.5"],
            "--rankclip-chunk-size: must be a whole number of at least 1, got '1.5'",
        ),
        (["--rankclip-bins", "1"], "--rankclip-bins: must be a whole number of at least 2, got '1'"),
        (
            ["--rankclip-bins", str(2**40)],
            f"--rankclip-bins: must be at most {2**24}, got '{2**40}'",
        ),
        (
            ["--rankclip-memory-budget", "-1"],
            "--rankclip-memory-budget: must be a whole number of at least 0, got '-1'",
        ),
        (["--rankclip-lists", "all"], "--rankclip-lists: invalid choice"),
        (["--rankclip-ties", "breslow"], "--rankclip-ties: invalid choice"),
        (["--rankclip-discount", "exp"], "--rankclip-discount: invalid choice"),
        (["--rankclip-worth", "square"], "--rankclip-worth: invalid choice"),
        (["--rankclip-diagonal", "no"], "--rankclip-diagonal: invalid choice"),
        (
            ["--rankclip-diagonal", "exclude", "--rankclip-ties", "random"],
            "--rankclip-diagonal: diagonal=False makes lists of other items",
        ),
        (["--horovod"], "--loss: rankclip does not work with --horovod"),
        (["--rankclip-lists", "batch", "--local-loss"], "--rankclip-lists: batch needs the whole batch"),
        (
            ["--rankclip-reference", "teacher"],
            "rankclip ranks by a teacher: name it with --distill-model and --distill-pretrained",
        ),
        (["--rankclip-reference-scale", "2"], "--rankclip-reference-scale: "),
        (
            ["--rankclip-distill-loss", "exclude"],
            "--rankclip-distill-loss: exclude leaves a teacher without a use",
        ),
        (
            [*SIGMOID_STUDENT, "--rankclip-reference", "teacher"],
            "--rankclip-distill-loss: --siglip requires exclude",
        ),
        (SIGMOID_STUDENT, "--loss: rankclip does not work with --siglip and --distill-model: the trainer's"),
        (["--rankclip-model", "top_one", "--rankclip-top-k", "2"], "model='top_one' weighs all items"),
        (["--rankclip-weight", "1"], "unrecognized arguments: --rankclip-weight"),
    ],
)
def test_what_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in refused(capsys, *RANKCLIP, *argv)


@pytest.mark.parametrize(
    ("argv", "works"),
    [
        ([*RANKCLIP, "--rankclip-reference", "teacher", "--rankclip-distill-loss", "exclude"], True),
        (["--loss", "rankclip-distill"], True),
        (["--loss", "rankclip-distill", "--rankclip-distill-loss", "include"], False),
        (["--loss", "cyclip"], False),
    ],
)
def test_sigmoid_student_is_taught_where_the_trainers_distillation_is_left_out(
    capsys: pytest.CaptureFixture[str], argv: list[str], works: bool
) -> None:
    assert "logit_bias" not in inspect.signature(open_clip.loss.DistillClipLoss.forward).parameters
    if works:
        assert parse_args([*argv, *SIGMOID_STUDENT]).siglip
    else:
        assert "the trainer's distillation loss" in refused(capsys, *argv, *SIGMOID_STUDENT)


@pytest.mark.parametrize("loss_argument", [[], ["--loss", "clip"]])
def test_options_without_the_ranking_loss_are_refused(
    capsys: pytest.CaptureFixture[str], loss_argument: list[str]
) -> None:
    message = refused(capsys, *loss_argument, "--rankclip-top-k", "5", "--rankclip-lambda-in", "1")
    assert "--rankclip-lambda-in, --rankclip-top-k: only with --loss rankclip" in message


def test_what_the_library_refuses_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("top_k must be at least 2, got 1")

    monkeypatch.setattr(rankloss, "RankClipLoss", refuse)
    assert "argument --rankclip-top-k: must be at least 2, got 1" in refused(capsys, *RANKCLIP)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--rankclip-schedule", "cosine"], "schedule", "cosine"),
        (["--rankclip-lambda-cross", "0.5"], "lambda_cross", 0.5),
        (["--rankclip-lambda-in", "0"], "lambda_in", 0.0),
        (["--rankclip-lists", "batch"], "lists", "batch"),
        (["--rankclip-worth", "shifted"], "worth", "shifted"),
        (["--rankclip-ties", "random"], "ties", "random"),
        (["--rankclip-discount", "log"], "discount", "log"),
        (["--rankclip-discount", "none"], "discount", None),
        (["--rankclip-top-k", "5"], "top_k", 5),
        (["--rankclip-diagonal", "exclude"], "diagonal", False),
        (["--rankclip-fixed-reference", "text"], "fixed_reference", "text"),
        (["--rankclip-fixed-reference", "none"], "fixed_reference", None),
        (["--rankclip-chunk-size", "8"], "chunk_size", 8),
        (["--rankclip-memory-budget", "0"], "memory_budget", 0),
        (["--rankclip-method", "bin", "--rankclip-bins", "2"], "bins", 2),
        (["--local-loss"], "local_loss", True),
        (["--gather-with-grad"], "gather_with_grad", True),
        (["--siglip"], "gather_with_grad", True),
        (["--siglip"], "local_loss", True),
        (["--siglip", "--rankclip-lists", "batch"], "local_loss", False),
        (["--local-loss", "--gather-with-grad", "--rankclip-lists", "batch"], "local_loss", False),
    ],
)
def test_option_reaches_the_loss(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], name: str, value: object
) -> None:
    args = ready(parse_args([*RANKCLIP, *argv]))
    built: dict[str, Any] = {}

    class Recorder(nn.Module):
        def __init__(self, base: nn.Module, **options: Any) -> None:
            super().__init__()
            built.update(options, base=base, **vars(options["gather"]))

    monkeypatch.setattr(rankloss, "RankClipLoss", Recorder)
    base = Base()
    training.build_loss(base, args, sums_every_value=True)
    assert built["base"] is base
    assert {**vars(built["gather"]), **built}[name] == value


def test_every_option_is_accepted_by_the_library() -> None:
    for unit in ("epoch", "step"):
        args = ready(parse_args([*RANKCLIP, "--rankclip-schedule-unit", unit]))
        built = training.build_loss(Base(), args, sums_every_value=True)
        assert built.clock.unit == unit
        assert isinstance(built.criterion, rankloss.RankClipLoss)


def test_broken_library_stops_only_runs_that_ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ImportError("no rankloss")

    monkeypatch.setattr(command_line, "_own_entries", broken)
    assert parse_args([]).loss_dist_impl is None
    assert "--loss is not available in this run" in caplog.text
    assert "rankloss cannot be imported (ImportError: no rankloss)" in refused(capsys, *RANKCLIP)


def test_version_that_is_too_old_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "__version__", "2.24.0")
    assert "argument --loss: open_clip 2.24.0 is older than 2.26.1" in refused(capsys, *RANKCLIP)
    parse_args([])


@pytest.mark.parametrize("model", ["naflexgenlip_b16", "local-dir:/models/GenLap"])
def test_generative_model_is_refused_where_open_clip_has_such_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    argv = [*RANKCLIP, "--model", model]
    monkeypatch.setattr(open_clip.factory, "create_task", None, raising=False)
    monkeypatch.setattr(patches, "unpatched", lambda **_: [])
    assert f"compares images with texts, but {model} is trained to generate" in refused(capsys, *argv)
    monkeypatch.delattr(open_clip.factory, "create_task")
    assert parse_args(argv).model == model


def test_loss_that_takes_no_features_is_refused() -> None:
    args = ready(parse_args(RANKCLIP))
    with pytest.raises(
        ValueError,
        match=r"Identity\.forward takes no image_features, logit_scale, output_dict, text_features",
    ):
        training.build_loss(nn.Identity(), args, sums_every_value=False)


@pytest.mark.parametrize(("version", "warned"), [("2.32.0", True), ("3.3.0", False), ("4.2.0.dev0", True)])
def test_log_remarks_once_on_a_version_that_was_not_tested(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, warned: bool
) -> None:
    monkeypatch.setattr(open_clip, "__version__", version)
    training.build_loss(Base(), ready(parse_args(RANKCLIP)), sums_every_value=True)
    remark = f"open_clip {version}: --loss is tested with 3.0.0 to 3.3.0, and tried with this"
    assert caplog.messages.count(remark) == warned


def test_unpatched_trainer_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "unpatched", lambda data: ["open_clip_train.train.train_one_epoch"])
    assert "did not reach open_clip_train.train.train_one_epoch" in refused(capsys, *RANKCLIP)


def test_failed_patch_is_raised_at_the_command_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(bootstrap.failures, "open_clip.factory", AttributeError("no create_loss"))
    with pytest.raises(
        ImportError, match=r"could not attach .*open_clip\.factory: AttributeError: no create_loss"
    ):
        parse_args(["--loss", "clip"])
    parse_args([])
    assert "no create_loss" in caplog.text


def test_swallowed_option_is_noticed_by_the_factory() -> None:
    swallowed = SimpleNamespace(loss_dist_impl="rankclip")
    with pytest.raises(RuntimeError, match="was read as --loss-dist-impl rankclip"):
        command_line.requested(swallowed)


class Base(nn.Module):
    """A loss with the trainer's calling convention, which the tests here never call."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool
    ) -> Any:
        raise NotImplementedError


def ready(args: Any) -> Any:
    """Arguments as the trainer completes them before it creates the loss."""
    args.rank, args.world_size, args.distill = 0, 1, False
    return args
