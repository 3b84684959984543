"""The catalogue's options on the parser of a script of one's own."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from rankloss_trainers import catalog
from rankloss_trainers.catalog import flag
from rankloss_trainers.transformers import LossOptions
from rankloss_trainers.transformers import choice as module


def parsed(*argv: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    parser = HfArgumentParser(TrainingArguments)
    options = LossOptions(parser, *names)
    args, given = parser.parse_args_into_dataclasses(["--output_dir", "x", *argv], look_for_args_file=False)
    assert args.output_dir == "x"
    return options.keywords(given)


def test_every_option_of_the_catalogue_is_an_argument() -> None:
    parser = HfArgumentParser(TrainingArguments)
    LossOptions(parser, *catalog.candidates())
    found = {option for action in parser._actions for option in action.option_strings}
    entries = {name: candidate.load() for name, candidate in catalog.candidates().items()}
    assert found >= {flag(name, entry, option) for name, entry in entries.items() for option in entry.options}


def test_what_is_typed_arrives_and_the_losses_can_be_chosen() -> None:
    assert parsed() == {"loss": "rankclip", "loss_options": {}}
    assert parsed(names=("cyclip", "rankclip")) == {"loss": "cyclip", "loss_options": {}}
    argv = ["--loss", "rankclip-in", "--rankclip-diagonal", "exclude", "--rankclip-lambda-in", "0.5"]
    expected = {"loss": "rankclip-in", "loss_options": {"lambda_in": 0.5, "diagonal": "exclude"}}
    assert parsed(*argv) == expected
    with pytest.raises(ValueError, match=r"names .*rankclap"):
        parsed(names=("rankclap",))
    with pytest.raises(ValueError, match="--alip-caption-key"):
        parsed("--loss", "alip")


def test_example_runs() -> None:
    assert doctest.testmod(module) == (0, 3)
