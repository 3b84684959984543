"""The table of losses: options by the constructor's signature, on a command line and in Python."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import math
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from other_values import OTHER_VALUES
from torch import nn

import rankloss
from rankloss.distributed import Gather
from rankloss.options import CHOICES, OF_REFERENCE, RankOptions
from rankloss_trainers import catalog, declared
from rankloss_trainers.command_line import (
    RUN,
    LossArguments,
    described,
    flag,
    mentioned,
    typed_options,
    with_flag,
)
from rankloss_trainers.declared import Named
from rankloss_trainers.option import OptionError, options_of
from rankloss_trainers.run_options import RunKeywords, RunOptions, Teacher
from registered import register

if TYPE_CHECKING:
    from torch import Tensor as OfCheckers

ALONE = Gather(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
RANK_OPTIONS = {x.name: x for x in dataclasses.fields(RankOptions)}
RANK_OPTIONS_WITH_A_FLAG = [x for x in RANK_OPTIONS if x not in catalog.LOSSES["rankclip"].python_only]


def parse_command_line(*arguments: str, loss: str = "rankclip") -> Any:
    """The chosen losses, and the options of the run; a command line without ``--loss`` chooses this loss."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    losses = LossArguments(parser, mentioned(["--loss", loss, *arguments]), default=loss)
    return losses.chosen(parser.parse_args(arguments))


def build_on_clip(name: str, **options: Any) -> Any:
    """The module of a named loss with these options, on CLIP's loss of one process."""
    loss, *_brought = catalog.choose(name, options)
    return loss.build(rankloss.ClipLoss(gather=False), ALONE)


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.known())
def test_every_option_is_an_argument_of_a_constructor(name: str) -> None:
    named = catalog.load(name)
    constructors = [named.constructor, rankloss.RankOptions, rankloss.ClipLoss, rankloss.RankedLists]
    if named.columns_class is not None:
        constructors.append(named.columns_class)
    arguments = {key for constructor in constructors for key in inspect.signature(constructor).parameters}
    assert {*named.options, *named.defaults, *named.python_only} <= arguments


@pytest.mark.parametrize("name", catalog.known())
def test_defaults_beside_other_losses_are_of_options_of_the_loss(name: str) -> None:
    named = catalog.load(name)
    for defaults in named.beside.values():
        assert defaults.keys() <= named.options.keys()


@pytest.mark.parametrize("name", catalog.known())
def test_every_loss_has_a_summary_and_its_options_a_help_of_their_own(name: str) -> None:
    named = catalog.load(name)
    assert named.summary
    for key, option in typed_options(named).items():
        assert option.help, key
        assert not option.help.startswith("See "), key


@pytest.mark.parametrize("name", catalog.known())
def test_every_option_that_is_not_for_python_alone_has_a_flag(name: str) -> None:
    named = catalog.load(name)
    assert typed_options(named).keys() == named.options.keys() - named.python_only


def test_defaults_are_those_of_the_library() -> None:
    (loss,), run = parse_command_line()
    assert (loss.given, run) == ({}, RunOptions())
    assert build_on_clip("rankclip").consistency.options == RankOptions()


@given(st.data())
def test_the_typed_value_reaches_the_library(data: st.DataObject) -> None:
    of_another_option = ("reference_scale", "bins")  # refused without model="top_one" and method="bin"
    keys = [key for key in RANK_OPTIONS_WITH_A_FLAG if key not in of_another_option]
    key = data.draw(st.sampled_from(keys))
    if CHOICES[key]:
        value = data.draw(st.sampled_from(CHOICES[key]))
    else:
        bounds = RANK_OPTIONS[key].metadata  # of an integer, where the library has any
        smallest, largest = bounds.get("at_least", 1), bounds.get("at_most", 2**31 - 1)
        value = data.draw(st.integers(smallest, largest))
    (loss,), _ = parse_command_line(
        f"--rankclip-{key.replace('_', '-')}", options_of(RankOptions)[key].spelled(value)
    )
    assert loss.given == {key: value}
    assert build_on_clip("rankclip", **loss.given).consistency.options == RankOptions(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lambda_in", None),
        ("lambda_in", math.nan),
        ("lambda_in", True),
        ("lambda_in", "x"),
        ("top_k", 2.5),
        ("top_k", "2.5"),
        ("top_k", True),
        ("diagonal", 1),
        ("diagonal", "x"),
        ("schedule", "x"),
        ("bins", 9),  # the method of ranking is not "bin"
    ],
)
def test_value_that_an_option_cannot_have_is_refused(key: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        build_on_clip("rankclip", **{key: value})
    assert caught.value.key == key
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher", ""),
        ("teacher", 3),
        ("schedule_unit", "x"),
        ("agreement_every", 0),
        ("agreement_every", 1.5),
        ("agreement_every", True),
        ("agreement_every", "1"),
    ],
)
def test_value_that_an_option_of_a_run_cannot_have_is_refused(key: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        RunOptions(**{key: value})
    assert caught.value.key == key
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("key", "text"), [("lambda_in", "x"), ("top_k", "2.5"), ("diagonal", "x")])
def test_text_that_is_no_value_of_an_option_is_refused_by_the_command_line(key: str, text: str) -> None:
    typed = f"--rankclip-{key.replace('_', '-')}"
    with pytest.raises(argparse.ArgumentError, match=f"argument {typed}: must be .*; got '{text}'"):
        parse_command_line(typed, text)


def test_an_error_about_a_default_of_a_preset_says_so() -> None:
    """The given option does not fit the preset's top_k, which nobody has given."""
    with pytest.raises(OptionError, match=r"got top_k=8 \(top_k: by default of rankclip-distill\)"):
        build_on_clip("rankclip-distill", model="top_one")


def test_an_error_about_a_default_of_joined_losses_says_so() -> None:
    loss, _ = catalog.choose("rankclip-distill+mimicry", {"rankclip-distill": {"model": "top_one"}})
    with pytest.raises(OptionError, match=r"got top_k=4 \(top_k: by default of rankclip-distill\)"):
        loss.build(rankloss.ClipLoss(gather=False), ALONE)


def test_an_option_for_python_alone_has_no_flag() -> None:
    assert build_on_clip("rankclip", fixed_reference="text").consistency.options.fixed_reference == "text"
    typed = ["--rankclip-fixed-reference", "text"]
    _, unknown = LossArguments(argparse.ArgumentParser(), ["rankclip"]).parser.parse_known_args(typed)
    assert unknown == typed


PLACE_IN_REFERENCE = "rankloss.reference.cross_modal and in_modal have it"


@pytest.mark.parametrize("key", OF_REFERENCE)
def test_an_option_of_the_reference_alone_is_refused_with_its_place(key: str) -> None:
    with pytest.raises(TypeError, match=f"rankclip has no option '{key}'; {PLACE_IN_REFERENCE}"):
        build_on_clip("rankclip", **{key: "batch"})


@pytest.mark.parametrize("key", OF_REFERENCE)
def test_a_flag_for_an_option_of_the_reference_alone_is_refused_with_its_place(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = LossArguments(argparse.ArgumentParser(), ["rankclip"])
    with pytest.raises(SystemExit):
        losses.parse(["--loss", "rankclip", f"--rankclip-{key}", "batch"])
    assert f"--rankclip-{key}: there is no such option; {PLACE_IN_REFERENCE}" in capsys.readouterr().err


def test_trainers_know_the_options_of_the_reference_alone() -> None:
    """Their names stand twice, as the catalogue imports no torch."""
    assert {*OF_REFERENCE} == declared.OF_REFERENCE


@pytest.mark.parametrize(
    ("name", "key", "hint"),
    [
        ("rankclip", "topk", "did you mean top_k?"),
        ("mimicry", "reference_features", "it is an option of a trainer's run, teacher"),
        ("rankclip", "reference", "it is an option of a trainer's run, teacher"),
        *(("rankclip", key, f"it is an option of a trainer's run, {key}") for key in OTHER_VALUES),
        ("rankclip", "distill_loss", "a loss that has a teacher leaves it out"),
        ("tiny", "x", "it has weight"),
    ],
)
def test_unknown_option_is_refused_with_a_hint(name: str, key: str, hint: str) -> None:
    with pytest.raises(TypeError) as caught:
        catalog.choose(name, {key: 1})
    assert str(caught.value) == f"{name} has no option {key!r}; {hint}"


def a_loss(base, *, weight=0.5, count: int | None = None, kind: Literal["a", "b"] = "a", gather=None):
    """A loss of a third party.

    Args:
        weight: Weight of the ``term``, see :class:`rankloss.ClipLoss`. More of it.
        count: Number of terms,
            in two lines.
    """
    return nn.ModuleList([base])


def test_options_are_read_from_signature_and_docstring() -> None:
    options = options_of(a_loss)
    assert {key: (option.default, option.metavar, option.help) for key, option in options.items()} == {
        "weight": (0.5, "X", "Weight of the term, see rankloss.ClipLoss"),
        "count": (None, "N", "Number of terms, in two lines"),
        "kind": ("a", "{a,b}", ""),
    }


def test_text_of_an_option_becomes_its_value_or_is_refused() -> None:
    options = options_of(a_loss)
    assert options["weight"].parsed("2") == 2.0
    assert options["count"].parsed("none") is None
    with pytest.raises(ValueError, match="'c'"):
        options["kind"].parsed("c")


def odd_loss(
    base,
    *,
    level: Literal[1, 2] = 2,
    chunk: int | Literal["auto"] = "auto",
    share: float | bool = True,
    start: OfCheckers | None = None,
    betas=(0.9, 0.99),
    gather=None,
):
    """A loss with options that a command line spells in part."""
    return nn.ModuleList([base])


def test_every_type_of_a_union_can_be_typed_and_what_has_no_spelling_is_pythons_alone() -> None:
    options = options_of(odd_loss)
    typed = {key: x.metavar for key, x in options.items() if x.is_typed}
    assert typed == {"level": "{1,2}", "chunk": "{auto,N}", "share": "{include,exclude,X}"}
    for key, text, value in (
        ("level", "1", 1),
        ("chunk", "4", 4),
        ("chunk", "auto", "auto"),
        ("share", "0.3", 0.3),
        ("share", "exclude", False),
    ):
        value_of_text = options[key].parsed(text)
        assert (value_of_text, type(value_of_text)) == (value, type(value))
        with pytest.raises(ValueError, match="'no'"):
            options[key].parsed("no")
    assert [options["share"].spelled(value) for value in (True, 1.0)] == ["include", "1.0"]


def test_options_of_partial_functions_and_of_callable_objects_are_read() -> None:
    class Maker:
        def __call__(self, base: nn.Module, *, top_k: int = 3) -> nn.Module:
            return base

    for make in (functools.partial(Maker.__call__, None), Maker(), functools.partial(Maker())):
        option = options_of(make)["top_k"]
        assert (option.types, option.default) == ((int,), 3)


MODULE_OF_PARENT = """
from __future__ import annotations
from typing import Literal
Kind = Literal["a", "b"]
class Parent:
    def __init__(self, *, kind: Kind = "a") -> None: ...
"""


def test_the_type_of_an_inherited_constructors_option_is_found_in_the_module_of_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The annotation is the text ``"Kind"``, a name that this module, the child's, does not have."""
    (tmp_path / "module_of_parent.py").write_text(MODULE_OF_PARENT)
    monkeypatch.syspath_prepend(tmp_path)
    parent: Any = importlib.import_module("module_of_parent").Parent

    class Child(parent):
        """Has no constructor of its own."""

    for make in (parent, Child, functools.partial(parent), functools.partial(Child)):
        assert options_of(make)["kind"].types == (Literal["a", "b"],), make


def test_an_option_that_must_be_given_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def needy(base: Any, *, tau: float, gather: Any = None) -> nn.Module:
        """A loss.

        Args:
            tau: Temperature.
        """
        return nn.ModuleList([base])

    register(monkeypatch, needy=needy)
    (loss,) = catalog.choose("needy")
    with pytest.raises(OptionError, match=r"needy\.tau must be given: Temperature"):
        loss.build(rankloss.ClipLoss(), None)


JOINED = "rankclip-distill+mimicry"


@pytest.mark.parametrize("typed", [("--loss", JOINED), (f"--loss={JOINED}",)])
def test_each_of_joined_losses_is_typed_with_its_own_options(typed: tuple[str, ...]) -> None:
    losses, _ = parse_command_line(*typed, "--rankclip-top-k", "4", "--mimicry-weight", "2")
    distilled, mimicry = losses
    assert (distilled.name, distilled.values["top_k"]) == ("rankclip-distill", 4)
    assert (mimicry.name, mimicry.values["weight"]) == ("mimicry", 2.0)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--loss", JOINED, "--tiny-weight", "1"), r"^--tiny-weight: only with --loss tiny"),
        (("--loss", "rankclip+mimcry"), r"^--loss: loss must be one of .*did you mean mimicry"),
        (("--loss", "clip+mimicry"), r"^--loss: .*; got 'clip', the trainer's own loss, .*: leave it out"),
    ],
)
def test_a_join_of_a_name_that_is_no_part_and_an_option_of_another_loss_are_refused(
    typed: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command_line(*typed)


def test_arguments_for_a_loss_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss must be one of .*; got 'mimcry'; did you mean mimicry"):
        LossArguments(argparse.ArgumentParser(), ["rankclip", "mimcry"])


def test_the_options_of_joined_losses_are_listed() -> None:
    text = " ".join(described(["rankclip-distill", "mimicry"]).split())  # without its line breaks
    assert "--rankclip-top-k N" in text
    _, _, help_of_weight = text.partition("--mimicry-weight X ")
    assert "(default: 16.0)" in help_of_weight, "the weight beside rankclip-distill; alone it is 8"


# --- registered by other packages ---------------------------------------------------------------------------


def test_a_callable_that_is_registered_twice_is_a_loss_of_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, mine=a_loss, also=a_loss)
    assert [catalog.choose(name)[0].name for name in ("mine", "also")] == ["mine", "also"]


def test_a_package_cannot_register_a_name_of_rankloss_or_of_the_trainers_own_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [EntryPoint(name, "x:y", catalog.GROUP) for name in ("clip", "mine", "rankclip")]
    monkeypatch.setattr(catalog.metadata, "entry_points", lambda *, group: points)
    known_without_cache = catalog.known.__wrapped__()
    assert known_without_cache == {**dict.fromkeys(catalog.LOSSES, ()), "mine": (points[1],)}


def test_an_option_of_the_constructor_hides_another_of_its_name() -> None:
    named = Named(k_loss, more=lambda *, k="hidden", weight=0.5: None)
    assert {key: option.default for key, option in named.options.items()} == {"k": 1, "weight": 0.5}


def test_a_row_that_is_registered_has_its_defaults_and_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, row=Named(a_loss, {"weight": 2.0}, prefix="own"))
    assert catalog.load("row").options["weight"].default == 2.0
    (loss,), _ = parse_command_line("--own-kind", "b", loss="row")
    assert loss.given == {"kind": "b"}


def test_a_prefix_of_rankloss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, taken=Named(a_loss, prefix="rankclip"), streamed=a_loss)
    with pytest.raises(ValueError, match="the prefix 'rankclip' of taken is taken"):
        catalog.load("taken")
    with pytest.raises(ValueError, match="the prefix 'streamed' of streamed is taken"):
        catalog.load("streamed")


def k_loss(base: Any, *, k: int = 1, gather: Any = None) -> nn.Module:
    """A loss whose option k, if its name is rankclip-top, would have the flag of rankclip's top_k."""
    return nn.ModuleList([base])


def test_a_loss_whose_flag_is_one_of_rankclips_cannot_be_used_and_rankclip_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, **{"rankclip-top": k_loss})
    typed = ["--loss", "rankclip", "--rankclip-top-k", "3"]
    losses = LossArguments(argparse.ArgumentParser(), mentioned(typed))
    assert [*losses.unusable] == ["rankclip-top"]
    (rankclip,), _ = losses.chosen(losses.parser.parse_args(typed))
    assert rankclip.given == {"top_k": 3}


def test_a_command_line_mentions_no_loss_whose_name_ends_like_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, **{"my-rankclip": k_loss})
    assert "my-rankclip" not in mentioned(["--loss", "rankclip", "--rankclip-top-k", "3"])


def test_the_help_has_those_options_of_another_package_that_can_be_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, odd=odd_loss)
    page = LossArguments(argparse.ArgumentParser(), ["odd"]).parser.format_help()
    assert "--odd-chunk {auto,N}" in page
    assert "--odd-betas" not in page, "a tuple has no spelling"


def test_name_of_two_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("mine", f"{module}:mine", catalog.GROUP) for module in "xy"]
    monkeypatch.setattr(catalog.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(catalog, "known", catalog.known.__wrapped__)  # without the cache
    with pytest.raises(ValueError, match="mine is registered by both unknown package and unknown package"):
        catalog.load("mine")


# --- options of a run ---------------------------------------------------------------------------------------


def test_an_error_begins_with_the_flag_of_its_option_or_with_that_of_the_loss() -> None:
    losses = catalog.choose("rankclip")
    for loss, key, begins in (
        ("rankclip", "top_k", "--rankclip-top-k: "),
        ("", "teacher", "--loss-teacher: "),
        ("", "lambda_cross", "--loss: lambda_cross"),  # of a part that no name stands for
    ):
        assert with_flag(losses, OptionError(key, "must be 0", loss)).startswith(begins)


@pytest.mark.parametrize(("key", "value"), OTHER_VALUES.items())
def test_every_option_of_a_run_has_a_flag(key: str, value: Any) -> None:
    _, run = parse_command_line(flag(RUN, key), options_of(RunOptions)[key].spelled(value))
    assert run == RunOptions(**{key: value})


def test_type_checkers_see_the_options_of_a_run_with_their_types() -> None:
    annotated = get_type_hints(RunOptions)
    assert get_type_hints(RunKeywords) == {key: annotated[key] for key in options_of(RunOptions)}


def test_the_options_of_a_run_are_typed_together() -> None:
    _, run = parse_command_line(
        "--loss-teacher", "x", "--loss-agreement-every", "3", "--loss-schedule-unit", "step"
    )
    assert run == RunOptions(teacher="x", agreement_every=3, schedule_unit="step")


def test_the_options_of_a_run_are_refused_without_a_loss() -> None:
    with pytest.raises(ValueError, match=r"^--loss-teacher"):
        parse_command_line("--loss", "clip", "--loss-teacher", "x")


def test_a_bad_value_of_an_option_of_a_run_is_refused_by_its_flag() -> None:
    with pytest.raises(ValueError, match=r"^--loss-agreement-every.*0"):
        parse_command_line("--loss-agreement-every", "0")


def test_a_teacher_may_be_a_path() -> None:
    assert RunOptions(teacher=Path("x")).teacher == "x"  # type: ignore[arg-type]


def test_a_teacher_is_a_folder_where_there_is_one_of_its_name(tmp_path: Path) -> None:
    named_like_encoders = tmp_path / "a=b:c"
    named_like_encoders.mkdir()
    assert Teacher(str(named_like_encoders)).folder == str(named_like_encoders)


def test_a_teacher_that_is_not_spelled_as_a_model_is_a_folder_that_has_to_exist_when_it_is_opened() -> None:
    teacher = Teacher("no-folder-yet")
    assert (teacher.folder, teacher.spec) == ("no-folder-yet", None)


@pytest.mark.parametrize(
    ("text", "are_encoders"), [("text=minilm", True), ("image=a,text=b", True), ("ViT-B-32:openai", False)]
)
def test_a_teacher_of_named_towers_is_of_encoders_and_a_model_is_not(text: str, are_encoders: bool) -> None:
    assert Teacher(text).are_encoders is are_encoders


def test_an_unknown_model_is_refused_as_a_teacher() -> None:
    with pytest.raises(OptionError, match=r"^teacher: .*ViT-B-33: unknown model"):
        Teacher("ViT-B-33:openai").check()
