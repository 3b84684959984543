"""The catalogue's options on the parser of a script of one's own."""

from __future__ import annotations

import doctest
import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

from transformers import HfArgumentParser, TrainingArguments

from rankloss_trainers import catalog
from rankloss_trainers.catalog import flag
from rankloss_trainers.transformers import LossOptions
from rankloss_trainers.transformers import arguments as module


def parsed(*argv: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    parser = HfArgumentParser(TrainingArguments)
    options = LossOptions(parser, *names)
    args, given = parser.parse_args_into_dataclasses(["--output_dir", "x", *argv], look_for_args_file=False)
    assert args.output_dir == "x"
    return options.keywords(given)


def test_every_option_of_the_catalogue_is_an_argument() -> None:
    parser = HfArgumentParser(TrainingArguments)
    LossOptions(parser)
    found = {option for action in parser._actions for option in action.option_strings}
    entries = {name: candidate.load() for name, candidate in catalog.candidates().items()}
    assert found >= {flag(name, entry, option) for name, entry in entries.items() for option in entry.options}


@pytest.mark.parametrize(
    ("argv", "keywords"),
    [
        ([], {"loss": "rankclip", "loss_options": {}}),
        (["--rankclip-lambda-in", "0.5"], {"loss": "rankclip", "loss_options": {"lambda_in": 0.5}}),
        (
            ["--loss", "rankclip-in", "--rankclip-diagonal", "exclude", "--rankclip-schedule", "linear"],
            {"loss": "rankclip-in", "loss_options": {"schedule": "linear", "diagonal": "exclude"}},
        ),
        (
            ["--loss", "alip", "--alip-caption-key", "caption", "--alip-momentum", "0"],
            {"loss": "alip", "loss_options": {"caption_key": "caption", "momentum": 0.0}},
        ),
        (["--loss", "cyclip"], {"loss": "cyclip", "loss_options": {}}),
    ],
)
def test_what_is_typed_arrives(argv: list[str], keywords: dict[str, Any]) -> None:
    assert parsed(*argv) == keywords


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "rankclap"], "--loss: invalid choice: 'rankclap'"),
        (["--rankclip-ties", "breslow"], "--rankclip-ties: invalid choice"),
        (["--rankclip-top-k", "many"], "--rankclip-top-k: must be a whole number"),
        (["--rankclip-lambda-in", "-1"], "--rankclip-lambda-in: must be a finite number"),
        (["--help"], ""),
    ],
)
def test_parser_refuses_what_no_loss_takes(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parsed(*argv)
    said = capsys.readouterr()
    assert message in said.err
    if argv == ["--help"]:
        text = " ".join(said.out.split())
        own = "1.0; rankclip-cross: 0.0; rankclip-distill: 64.0"
        assert f"multiplies lambda in the in-modal term (default: {own})" in text
        assert "a run of one epoch has no ramp over epochs and goes by steps (default: step)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "cyclip", "--rankclip-top-k", "3"], "--rankclip-top-k: only with --loss rankclip or"),
        (["--rankclip-diagonal", "exclude", "--rankclip-ties", "random"], "--rankclip-diagonal"),
        (["--loss", "alip"], "--alip-caption-key"),
        (["--rankclip_top_k", "3"], "rankclip_top_k"),
    ],
)
def test_what_the_loss_does_not_take_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*argv)


def test_losses_can_be_chosen() -> None:
    assert parsed(names=("cyclip", "rankclip")) == {"loss": "cyclip", "loss_options": {}}
    with pytest.raises(ValueError, match=r"names .*rankclap"):
        parsed(names=("rankclap",))


def test_example_runs() -> None:
    assert doctest.testmod(module) == (0, 3)
