"""The options: what they are called, what they refuse, and that each reaches the loss."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip.factory
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import LossOfTrainer, completed_args, random_features, refusal_of_command
from teacher_features import unit_rows
from torch import nn

import rankloss
import rankloss_open_clip
from rankloss import schedules
from rankloss_features.folder import NAMES
from rankloss_open_clip import arguments
from rankloss_open_clip.training import build_loss, run_of
from rankloss_trainers import catalog
from rankloss_trainers.command_line import RUN, dest, flag, prefix_of, typed_options
from rankloss_trainers.declared import _REPLACED
from rankloss_trainers.option import options_of
from rankloss_trainers.run_options import RunOptions
from registered import NAMES as LOSSES
from registered import register
from stored_features import features_folder

CAPTIONS = "--loss tiny-caption --second-caption-key synthetic"
LISTS = "--loss ranked-lists --ranked-lists"
OPTION = "--loss-teacher"
FOUR_ROWS = unit_rows(4, 2)
DISTILLED = "--distill-model RN50 --distill-pretrained x"
SIGMOID_STUDENT = f"--siglip {DISTILLED}"
THIRD_PARTY = Path(__file__).parent / "third_party_loss"


def loss_with_depth(base: nn.Module, *, depth: int = 3) -> nn.Module:
    """A loss of another package, which has an option and adds nothing to its base."""
    return base


def base_alone(base: nn.Module, gather: Any) -> nn.Module:
    """The first line is the help.

    This one is not.
    """
    return base


def number_in_place_of_a_loss(base: nn.Module, gather: Any) -> Any:
    """A constructor of another package that returns no module."""
    return 3


def loss_of(command: str, base: nn.Module | None = None) -> Any:
    """The loss that the trainer gets for a command line; on ``base`` where one takes its own loss's place."""
    args = completed_args(parse_args([*command.split(), "--device", "cpu"]))
    return open_clip.create_loss(args) if base is None else build_loss(base, args, sums_every_value=True)


# --- what is there --------------------------------------------------------------------------------------


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The print of ``--help``, on one line, where another package registers a loss and a broken one."""
    monkeypatch.setenv("COLUMNS", "100000")  # no word is broken at a hyphen
    register(monkeypatch, plain=base_alone, broken="missing:X")  # there is no such module
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_still_shows_the_trainers_options(help_text: str) -> None:
    assert "--train-data" in help_text


def test_help_describes_every_loss(help_text: str) -> None:
    summaries = [f"{name}: {catalog.load(name).summary}" for name in LOSSES]
    assert [summary for summary in summaries if summary not in help_text] == []


def test_help_shows_every_option_of_every_loss(help_text: str) -> None:
    losses = {name: catalog.load(name) for name in LOSSES}
    flags = [flag(prefix_of(name, loss), key) for name, loss in losses.items() for key in typed_options(loss)]
    assert [option for option in flags if option not in help_text] == []


def test_help_shows_every_option_of_a_run(help_text: str) -> None:
    flags = [flag(RUN, key) for key in options_of(RunOptions)]
    assert [option for option in flags if option not in help_text] == []


def test_help_describes_another_packages_loss_by_the_first_line_of_its_docstring(help_text: str) -> None:
    assert "plain: The first line is the help" in help_text
    assert "This one is not" not in help_text


def test_help_says_why_a_loss_cannot_be_used(help_text: str) -> None:
    package = r"\(p 1\.0\)"  # the made-up one that registers it
    assert re.search(rf"broken: .*{package}: ModuleNotFoundError", help_text)


def defaults_of_rankclip_and_run() -> dict[str, Any]:
    """The arguments that ``--loss rankclip`` adds, by their names in the namespace."""
    options_of_loss, options_of_run = typed_options(catalog.load("rankclip")), options_of(RunOptions)
    of_loss = {dest("rankclip", key): option.default for key, option in options_of_loss.items()}
    of_run = {dest(RUN, key): option.default for key, option in options_of_run.items()}
    return {**of_loss, **of_run}


def test_without_a_loss_the_arguments_have_none_of_its_options() -> None:
    assert not vars(parse_args([])).keys() & {"loss", *defaults_of_rankclip_and_run()}


def test_the_trainers_own_loss_adds_only_its_name_to_the_arguments() -> None:
    assert vars(parse_args(["--loss", "clip"])) == {**vars(parse_args([])), "loss": "clip"}


def test_a_loss_adds_its_name_its_options_and_those_of_a_run_to_the_arguments() -> None:
    expected = {**vars(parse_args([])), "loss": "rankclip", **defaults_of_rankclip_and_run()}
    assert vars(parse_args(["--loss=rankclip"])) == expected


@pytest.mark.parametrize("typed", ["--loss-d", "--loss-dist-impl"])
def test_the_trainers_option_that_begins_like_loss_keeps_its_value(typed: str) -> None:
    args = parse_args([typed, "gather", "--loss", "rankclip"])
    assert (args.loss_dist_impl, args.loss) == ("gather", "rankclip")


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda args: Namespace(**vars(args))],
    ids=["copy", "deep copy", "new namespace"],
)
def test_the_losses_of_a_run_are_found_at_its_arguments_and_built_anew_for_a_copy(copied: Any) -> None:
    args = parse_args(["--device", "cpu", "--loss", "rankclip", "--rankclip-top-k", "3"])
    changed_copy = copied(args)
    changed_copy.rankclip_top_k = 5
    assert run_of(args) is run_of(args)
    assert run_of(changed_copy).args is changed_copy
    (of_run,), (of_copy,) = run_of(args).losses, run_of(changed_copy).losses
    assert (of_run.values["top_k"], of_copy.values["top_k"]) == (3, 5)


def test_the_losses_of_a_run_are_no_argument_that_the_trainer_would_write_down() -> None:
    args = parse_args(["--device", "cpu", "--loss", "rankclip"])
    assert run_of(args) not in vars(args).values()


def test_name_that_was_swallowed_by_the_trainers_own_option_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A parser that rankloss did not reach takes ``--loss`` for an abbreviation of ``--loss-dist-impl``."""
    register(monkeypatch, x=base_alone, gather=base_alone)
    for name in ("rankclip", "tiny", "x"):
        with pytest.raises(RuntimeError, match=f"--loss-dist-impl {name}"):
            arguments.requested(SimpleNamespace(loss_dist_impl=name))
    # A value of the trainer's own option stays one, also where a loss has that name.
    assert arguments.requested(SimpleNamespace(loss_dist_impl="gather")) is None


# --- what is refused ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by a name in capitals: a file of pairs, and folders of a teacher's features.

    RIGHT has the features of the file's pairs, FOLDER those of the pairs in another order, and WIDTHS
    images of another width than captions.
    """
    place = tmp_path_factory.mktemp("places")
    pairs = [("0.png", "a0"), ("1.png", "a1")]
    of_pairs = {"image_features": FOUR_ROWS[:2], "text_features": FOUR_ROWS[:2]}
    right = features_folder(place / "right", pairs, **of_pairs)
    other_order = features_folder(place / "other_order", pairs[::-1], **of_pairs)
    widths = features_folder(place / "widths", image_features=FOUR_ROWS, text_features=unit_rows(4, 3))
    file = place / "data.csv"
    file.write_text(
        "filepath\ttitle\tcandidates\tgrades\n"
        '0.png\ta0\t["x"]\t[1]\n'
        '1.png\ta1\t["x"]\t[1, 2]\n'  # one grade too many
    )
    return {
        "RIGHT": right,
        "FOLDER": other_order,
        "WIDTHS": widths,
        "FILE": str(file),
        "DATA": f"--train-data {file}",
    }


def test_a_folder_of_the_datas_pairs_is_taken(places: dict[str, str]) -> None:
    args = parse_args([*places["DATA"].split(), "--loss", "rankclip", OPTION, places["RIGHT"]])
    assert args.loss_teacher == places["RIGHT"]


def test_a_folder_of_two_widths_is_taken_for_the_in_modal_lists(places: dict[str, str]) -> None:
    args = parse_args(["--loss", "rankclip-in", OPTION, places["WIDTHS"]])
    assert run_of(args).teaching.features is not None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--loss siglip", "'siglip'"),
        ("--rankclip-top-k 5 --rankclip-lambda-in 1", "--rankclip-lambda-in: --loss"),
        ("--loss rankclip --rankclip-lamda-in 1", "--rankclip-lamda-in --rankclip-lambda-in?"),
        ("--loss rankclip --rankclip_top_k 3", "--rankclip_top_k --rankclip-top-k?"),
        ("--loss rankclip --rankclip-orders x", "--rankclip-orders:"),
        ("--loss clip-ids --clip-ids-same x", "--clip-ids-same: --clip-ids-same-id?"),
        ("--loss rankclip --loss-teacher image=", "--loss-teacher: 'image='"),
        ("--loss rankclip --loss-teachr x", "--loss-teacher?"),
        # An option that ends like an old one; and right ones beside unknown ones.
        ("--loss rankclip --rankclip-fixed-reference image", "--rankclip-fixed-reference not --loss-teacher"),
        ("--loss rankclip --logs y --bogus 1", "--bogus 1 not --logs"),
        ("--loss rankclip --logs y --logz x", "--logz x not --logs"),
        ("--loss rankclip --logs y word", "word not --logs"),
        ("--loss-teacher x", "--loss-teacher: --loss"),
        ("--loss rankclip --horovod", "--horovod"),
        ("--loss rankclip --model naflexgenlip_b16", "naflexgenlip_b16"),
        ("--loss rankclip --loss-teacher given", "--loss-teacher"),
        ("--loss rankclip-distill", "--distill-pretrained --loss-teacher"),
        (
            "--loss rankclip-distill --distill-model ViT-L-14 --distill-pretrained openai",
            "--distill-model ViT-L-14: QuickGELU ViT-L-14-quickgelu",
        ),
        (f"--loss rankclip {SIGMOID_STUDENT}", "--siglip --distill-model"),
        ("--loss tiny-caption", "--second-caption-key"),
        (f"{CAPTIONS} --model coca_ViT-B-32", "tiny-caption CoCa"),
        ("--loss clip-smooth --model coca_ViT-B-32", "--loss: clip-smooth CoCa"),
        ("--loss siglip-streamed --siglip --model coca_ViT-B-32", "--loss: siglip-streamed CoCa"),
        (f"--loss clip-streamed {DISTILLED}", "--loss: clip-streamed --distill-model replace"),
        (f"{CAPTIONS} --dataset-type synthetic", "tiny-caption --dataset-type synthetic"),
        (f"{CAPTIONS} --torchscript", "tiny-caption --torchscript"),
        ("--loss clip-ids --dataset-type synthetic", "clip-ids --dataset-type synthetic"),
        ("--loss siglip-streamed", "siglip-streamed --siglip"),
        ("--loss rankclip --model local-dir:x --pretrained y.pt", "argument --pretrained y.pt:"),
        ("--loss rankclip --model hf-hub:x/y --pretrained y.pt", "argument --pretrained y.pt:"),
        (f"{LISTS}-own-caption top --ranked-lists-model top_one", "--ranked-lists-own-caption top"),
        (f"{LISTS}-max-candidates 0", "--ranked-lists-max-candidates 0"),
        ("--loss ranked-lists --model coca_ViT-B-32", "ranked-lists CoCa"),
        (f"--loss ranked-lists {DISTILLED}", "ranked-lists --distill-model"),
        ("--loss ranked-lists --dataset-type synthetic", "ranked-lists --dataset-type synthetic"),
        ("--loss mimicry+rankclip-in --loss-teacher text=minilm", "argument --loss: mimicry"),
        # Of two widths, which rank the in-modal lists alone.
        (f"--loss rankclip {OPTION} WIDTHS", "--rankclip-lambda-cross: "),
        (f"--loss tiny+rankclip {OPTION} WIDTHS", "--rankclip-lambda-cross: "),
        # What is not the data's, before the trainer makes a folder.
        (f"DATA --loss rankclip {OPTION} FOLDER", "FILE, '0.png' 'a0', FOLDER"),
        (f"DATA --loss rankclip-distill {OPTION} FOLDER", "FILE, '0.png' 'a0', FOLDER"),
        (f"DATA --loss rankclip {OPTION} FOLDER {DISTILLED}", f"{OPTION}: --distill-model"),
        (f"DATA --loss tiny {OPTION} FOLDER", f"{OPTION}: tiny"),
        (f"DATA --loss rankclip {OPTION} FOLDER/none", f"{OPTION}: FOLDER/none"),
        (f"DATA --loss rankclip-in {OPTION} text=FOLDER --csv-caption-key nope", "--csv-caption-key nope: "),
        (f"DATA --loss mimicry {OPTION} local-dir:no", f"{OPTION}: --model local-dir:no: "),
        ("DATA --loss clip-ids --clip-ids-key nope", "--train-data: FILE 'nope' filepath, title, grades"),
        ("DATA --loss tiny-caption --second-caption-key nope", "--train-data: FILE 'nope'"),
        ("DATA --loss ranked-lists", "--train-data: candidates grade 1"),
        ("DATA --loss clip-ids --train-data no.csv", "--train-data: no.csv"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str], places: dict[str, str], command: str, words: str
) -> None:
    """The error has each of the words that stand beside the command, and none of those after ``not``.

    Names in capitals stand for the paths of the fixture ``places``.
    """
    for name, path in places.items():
        command, words = command.replace(name, path), words.replace(name, path)
    present, _, absent = words.partition(" not ")
    error = refusal_of_command(capsys, *command.split())
    assert [word for word in present.split() if word not in error] == []
    assert [word for word in absent.split() if word in error] == []


class NeedsRoom(nn.Module):
    """A loss of another package, which takes three pairs or more, on a device of its own."""

    min_pairs = 3

    def __init__(self, base: nn.Module, *, only_on: str = "cpu", gather: Any = None) -> None:
        super().__init__()
        self.base, self.only_on = base, only_on

    def check_device(self, device: torch.device, pairs: int) -> None:
        if device.type != self.only_on:
            raise ValueError(f"only_on={self.only_on!r}, not {device}, for {pairs} pairs")


FIRST_BATCHES = [
    ("rankclip --batch-size 1", "--loss: rankclip needs at least 2 pairs in a batch; got 1: --batch-size 1,"),
    ("spread --batch-size 1", "--loss: spread needs at least 2 pairs in a batch; got 1: --batch-size 1,"),
    ("tiny --batch-size 1", "--loss: tiny needs at least 2 pairs in a batch; got 1: --batch-size 1,"),
    (
        "room --batch-size 1 --accum-freq 2",
        "--loss: room needs at least 3 pairs in a batch; got 2: --batch-size 1, --accum-freq 2, 1 process",
    ),
    ("room --room-only-on cuda --batch-size 5", "--room-only-on: only_on='cuda', not cpu, for 5 pairs"),
    (
        "rankclip --rankclip-kernel triton --batch-size 6 --device cuda",  # where there is none, the CPU
        "--rankclip-kernel: kernel='triton' does not serve here: the kernels run on CUDA, not on cpu",
    ),
]


@pytest.mark.parametrize(("command", "reason"), FIRST_BATCHES)
def test_a_loss_that_would_refuse_the_first_batch_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, reason: str
) -> None:
    register(monkeypatch, room=NeedsRoom)
    forget_processes(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with a GPU as well
    assert f"argument {reason}" in refusal_of_command(capsys, "--device", "cpu", "--loss", *command.split())


def forget_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what tells open_clip of other processes, such as those of a job that runs the tests."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["clip-streamed", "ranked-lists"])
def test_one_pair_is_enough_for_a_loss_that_contrasts_none(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    forget_processes(monkeypatch)
    assert run_of(parse_args(["--device", "cpu", "--loss", name, "--batch-size", "1"])).name == name


@pytest.mark.parametrize(
    ("options", "variables", "pairs"),
    [
        pytest.param("--accum-freq 2", {}, 6, id="two batches, given at once"),
        pytest.param(
            "", {"WORLD_SIZE": "2", "SLURM_NTASKS": "1"}, 6, id="two processes of torchrun in a task of SLURM"
        ),
        pytest.param("", {"SLURM_NTASKS": "2"}, 6, id="two tasks of SLURM"),
        pytest.param("--accum-freq 2", {"WORLD_SIZE": "3"}, 18, id="three processes, two batches"),
    ],
)
def test_the_pairs_of_a_batch_are_counted_over_processes_and_accumulation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    variables: dict[str, str],
    pairs: int,
) -> None:
    """The loss refuses the device, and names the number that it was given."""
    register(monkeypatch, room=NeedsRoom)
    forget_processes(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = f"--device cpu --loss room --room-only-on cuda --batch-size 3 {options}"
    assert f"not cpu, for {pairs} pairs" in refusal_of_command(capsys, *command.split())


def test_enough_pairs_of_all_processes_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, room=NeedsRoom)
    forget_processes(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "3")  # three pairs, which the loss needs
    assert run_of(parse_args(["--device", "cpu", "--loss", "room", "--batch-size", "1"])).name == "room"


# By the name that somebody may type as a loss's option, the option of a run that does this: options that
# losses had once, and those of a run themselves.
OPTION_OF_RUN = {**_REPLACED, **{key: key for key in options_of(RunOptions)}}


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("distill_loss", "a loss that has a teacher leaves it out"),
        *((key, f"it is an option of the run, {flag(RUN, of_run)}") for key, of_run in OPTION_OF_RUN.items()),
    ],
)
def test_an_option_that_no_loss_has_is_refused_and_its_place_is_named(
    capsys: pytest.CaptureFixture[str], key: str, advice: str
) -> None:
    with_hyphens, with_underscores = f"--mimicry-{key.replace('_', '-')}", f"--mimicry_{key}"
    for typed, words in (
        (with_hyphens, [with_hyphens, "x"]),
        (with_hyphens, [f"{with_hyphens}=x"]),
        (with_underscores, [with_underscores, "x"]),
    ):
        error = refusal_of_command(capsys, "--loss", "clip-ids+mimicry", *words)
        _, after_the_option, *_ = error.split(f" {typed}")
        assert advice in after_the_option


@pytest.mark.parametrize("code", [None, 0, 2], ids=["returns", "exits with 0", "exits with 2"])
def test_words_of_the_trainers_parser_are_shown_at_once_and_once(
    capsys: pytest.CaptureFixture[str], code: int | None
) -> None:
    """They are neither held back until the parser ends, nor printed a second time."""
    shown_within: list[str] = []  # the parser

    def trainers_parser(argv: list[str]) -> Any:
        print("a word of the trainer", argv, file=sys.stderr, flush=True)
        shown_within.append(capsys.readouterr().err)
        if code is not None:
            raise SystemExit(code)
        return SimpleNamespace()

    with contextlib.suppress(SystemExit):
        arguments.parsed(trainers_parser, ["--workers", "3"])
    assert shown_within == ["a word of the trainer ['--workers', '3']\n"]
    shown_after = capsys.readouterr().err
    assert shown_after == ""


def test_trainer_that_was_not_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rankloss_open_clip.failures, "open_clip.factory", AttributeError("no create_loss"))
    with pytest.raises(ImportError, match="no create_loss"):
        parse_args(["--loss", "rankclip"])
    # Runs that ask for no loss of rankloss begin.
    parse_args([])
    parse_args(["--loss", "clip"])


# --- what reaches the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("rankclip --rankclip-schedule cosine", {"schedule": schedules.cosine, "gather_with_grad": False}),
        # The preset leaves the cross-modal term out.
        ("rankclip-in --local-loss", {"lambda_cross": 0.0, "lambda_in": 1.0, "local_loss": True}),
        # λ of the preset. Beside --siglip all terms gather exactly, as with both flags.
        (f"rankclip-distill {SIGMOID_STUDENT}", {"lambda_in": 64.0, "local_loss": True}),
        (f"rankclip --loss-teacher given {SIGMOID_STUDENT}", {"lambda_in": 1.0, "local_loss": True}),
        ("rankclip --siglip --rankclip-top-k 3", {"top_k": 3, "local_loss": True, "gather_with_grad": True}),
        (f"rankclip-encoders --mimicry-weight 2 --loss-teacher given {SIGMOID_STUDENT}", {"weight": 2.0}),
        ("tiny --tiny-weight 1", {"weight": 1.0, "local_loss": False}),
        ("tiny-caption --second-caption-key x --second-momentum 1", {"momentum": 1.0}),
    ],
)
def test_option_reaches_the_loss(command: str, expected: dict[str, Any]) -> None:
    criterion = loss_of(f"--loss {command}").criterion
    rank_terms = getattr(criterion, "consistency", criterion)  # which a loss without ranks has not
    options_of_terms = getattr(rank_terms, "options", None)
    for key, value in expected.items():
        # An option is an attribute of one of these.
        holders = (criterion, rank_terms, rank_terms.gather, options_of_terms)
        reached = [getattr(holder, key) for holder in holders if hasattr(holder, key)]
        assert reached, key
        assert reached[-1] == value, key


class Pairing(NamedTuple):
    """The trainer's loss of pairs for its flag, as the trainer builds it, and rankloss's in its place."""

    flag: str
    of_trainer: nn.Module
    ours: type[nn.Module]
    streamed: str  # the name of rankloss's loss that takes its place on request


@pytest.fixture(params=["softmax", "sigmoid"])
def pairing(request: pytest.FixtureRequest) -> Pairing:
    if request.param == "softmax":
        return Pairing(
            "", open_clip.create_loss(completed_args(parse_args([]))), rankloss.ClipLoss, "clip-streamed"
        )
    of_trainer = open_clip.create_loss(completed_args(parse_args(["--siglip"])))
    return Pairing("--siglip", of_trainer, rankloss.SigLipLoss, "siglip-streamed")


def test_terms_stand_on_the_trainers_loss_as_rankloss_has_it(pairing: Pairing) -> None:
    base = loss_of(f"--loss tiny {pairing.flag}", pairing.of_trainer).criterion.base
    assert type(base) is pairing.ours


def test_the_memory_budget_of_the_terms_is_the_bases_too(pairing: Pairing) -> None:
    command = f"--loss rankclip --rankclip-memory-budget 5 {pairing.flag}"
    base = loss_of(command, pairing.of_trainer).criterion.base
    assert repr(base) == f"{pairing.ours.__name__}(memory_budget=5)"


def test_a_streamed_loss_takes_the_place_of_the_trainers(pairing: Pairing) -> None:
    command = f"--loss {pairing.streamed} --streamed-memory-budget 7 {pairing.flag}"
    criterion = loss_of(command, pairing.of_trainer).criterion
    assert repr(criterion) == f"{pairing.ours.__name__}(memory_budget=7)"


def test_a_streamed_loss_takes_the_place_of_no_other_loss(pairing: Pairing) -> None:
    reasons = {
        "clip-streamed": "clip-streamed replaces the trainer's loss, and cannot replace LossOfTrainer",
        "siglip-streamed": "siglip-streamed needs --siglip",  # which made no sigmoid loss here
    }
    with pytest.raises(ValueError, match=reasons[pairing.streamed]):
        loss_of(f"--loss {pairing.streamed} {pairing.flag}", LossOfTrainer())


def test_terms_stand_on_the_loss_itself_where_the_command_did_not_ask_for_it() -> None:
    unasked = open_clip.loss.SigLipLoss()  # the command has no --siglip
    assert loss_of("--loss rankclip", unasked).criterion.base is unasked


def test_the_log_names_the_loss_and_its_package_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(monkeypatch, x=loss_with_depth)
    args = completed_args(parse_args(["--loss", "x", "--x-depth", "4", "--device", "cpu"]))
    with caplog.at_level("INFO", logger="rankloss_open_clip"):
        args.rank, args.world_size = 0, 1
        open_clip.create_loss(args)
        args.rank, args.world_size = 1, 2  # a second process logs nothing
        open_clip.create_loss(args)
    (message,) = caplog.messages
    assert message.startswith("Loss: x (p 1.0), depth 4, open_clip ")


# --- what other packages register -----------------------------------------------------------------------


def test_a_loss_that_cannot_be_imported_stops_only_runs_that_ask_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    register(monkeypatch, x="missing:X")  # there is no such module
    assert "'missing'" in refusal_of_command(capsys, "--loss", "x")
    for argv in ([], ["--loss", "clip", "--name", "x"], ["--loss", "tiny"]):
        parse_args(argv)
    assert not caplog.records


def test_a_third_partys_loss_has_its_options_a_teacher_and_a_place_among_joined_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package's term is ``weight · Σ over modalities of |u(student) − u(teacher)|``, u its uniformity.

    This holds at the end of training, to which its weight grows.
    """
    monkeypatch.syspath_prepend(THIRD_PARTY)
    declared = (THIRD_PARTY / "pyproject.toml").read_text()
    (entry_point,) = re.findall('^uniform = "(.*)"$', declared, re.MULTILINE)
    register(monkeypatch, uniform=entry_point)
    teacher = {name: unit_rows(7, 5, seed) for seed, name in enumerate(NAMES)}
    options = f"--uniform-weight 0.5 --loss-teacher {features_folder(tmp_path / 'teacher', **teacher)}"
    loss = loss_of(f"--loss clip-smooth+uniform+rankclip {options}")
    loss.start_epoch(1, 2, 1, 1)  # the second of two epochs, each of one batch: the last step
    student = random_features()
    references = {f"reference_{name}": torch.from_numpy(rows) for name, rows in teacher.items()}
    entries = loss(**student, **references, output_dict=True)
    uniformity = importlib.import_module("uniform_clip").uniformity
    gaps = [abs(uniformity(student[key]) - uniformity(references[f"reference_{key}"])) for key in NAMES]
    assert entries["uniform_loss"].item() == pytest.approx(0.5 * sum(gaps).item(), rel=1e-5)
    assert entries["uniform_weight"].item() == 0.5
    joined_with = {"contrastive_loss", "cross_modal_loss", "in_modal_loss"}
    assert joined_with <= entries.keys()


def test_a_loss_with_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, x=base_alone)
    base = LossOfTrainer()
    base.weight = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="x needs parameters"):
        loss_of("--loss x", base)


def test_a_constructor_that_returns_no_module_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, y=number_in_place_of_a_loss)
    with pytest.raises(SystemExit):
        loss_of("--loss y")
    assert re.search("y .* 3", capsys.readouterr().err), "names the loss, and the number"
