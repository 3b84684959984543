"""The catalogue's options as arguments of HfArgumentParser."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

from tiny_transformers import Pairs, arguments, clip
from transformers import HfArgumentParser, TrainingArguments

from rankloss_trainers import catalog
from rankloss_trainers.catalog import dest
from rankloss_trainers.transformers import ContrastiveTrainer, LossArguments
from rankloss_trainers.transformers import arguments as module
from rankloss_trainers.transformers.arguments import loss_arguments


def parsed(*argv: str, type_: Any = LossArguments) -> Any:
    (values,) = HfArgumentParser(type_).parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    return values


def test_every_option_of_the_catalogue_is_a_field() -> None:
    fields = {field.name for field in dataclasses.fields(LossArguments)}
    found = catalog.candidates()
    entries = {name: candidate.load() for name, candidate in found.items()}
    assert fields == {
        "loss",
        *(dest(name, entry, option) for name, entry in entries.items() for option in entry.options),
    }


def test_nothing_given_is_rankclip_with_its_defaults() -> None:
    assert parsed().keywords() == {"loss": "rankclip", "loss_options": {}}


@pytest.mark.parametrize(
    ("argv", "keywords"),
    [
        (["--rankclip-lambda-in", "0.5"], {"loss": "rankclip", "loss_options": {"lambda_in": 0.5}}),
        (["--rankclip_top_k", "3"], {"loss": "rankclip", "loss_options": {"top_k": 3}}),
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
    assert parsed(*argv).keywords() == keywords


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "rankclap"], "--loss: invalid choice: 'rankclap'"),
        (["--rankclip-ties", "breslow"], "invalid choice: 'breslow'"),
        (["--rankclip-top-k", "many"], "invalid int value: 'many'"),
    ],
)
def test_parser_refuses_what_it_can(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "cyclip", "rankclip_top_k": 3}, "--rankclip-top-k: only with --loss rankclip or"),
        (
            {"rankclip_lambda_in": -1.0},
            "rankclip_lambda_in must be a finite number of at least 0, got '-1.0'",
        ),
        ({"rankclip_agreement_every": 0}, "rankclip_agreement_every must be a whole number of at least 1"),
    ],
)
def test_wrong_values_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossArguments(**given).keywords()


def test_help_shows_the_default_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "multiplies lambda in the in-modal term; 1.0 if not given" in text
    assert "count only the best ranks of each list; all if not given" in text
    assert "a run of one epoch has no ramp over epochs and goes by steps; step if not given" in text


def test_arguments_build_a_trainer(tmp_path: Path) -> None:
    parser = HfArgumentParser((LossArguments, TrainingArguments))
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--rankclip-discount", "log"]
    loss, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    trainer = ContrastiveTrainer(clip(), arguments(tmp_path), train_dataset=Pairs(), **loss.keywords())
    assert trainer.driven_loss.criterion.consistency.options.discount == "log"


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names must be among rankclip, .*; got rankclap"):
        loss_arguments("rankclap")
    with pytest.raises(ValueError, match="got none"):
        loss_arguments()


def test_example_runs() -> None:
    assert doctest.testmod(module) == (0, 2)
