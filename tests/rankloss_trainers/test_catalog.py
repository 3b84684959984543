"""The catalogue: entries of both signatures, entry points of both groups, and options from one place."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankloss
from rankloss.distributed import Gather
from rankloss.options import RankOptions, choices_of
from rankloss_open_clip import names
from rankloss_trainers import catalog
from rankloss_trainers.catalog import LossEntry, Option

ALONE = Gather(local_loss=False, gather_with_grad=False, rank=0, world_size=1)
TODAY = LossEntry(
    build=lambda base, options, gather: (base, options, gather),
    options=(Option("deep-end", 3, "how deep"),),
    refuse=lambda options, gather: f"deep_end: {options['deep_end']} {gather.local_loss}",
    describe=lambda options, epochs: f"{options['deep_end']} {epochs}",
    unit=lambda options, epochs: "step" if epochs == 1 else "epoch",
    caption_key=lambda options: f"key {options['deep_end']}",
)
FORMER = LossEntry(
    build=lambda base, args: (base, args.mine_deep_end),
    options=TODAY.options,
    refuse=lambda args: f"--mine-deep-end: {args.mine_deep_end}",
    describe=lambda args: f"{args.mine_deep_end} {args.epochs}",
    unit=lambda args: "step" if args.epochs == 1 else "epoch",
    caption_key=lambda args: f"key {args.mine_deep_end}",
)


def test_entries_of_both_signatures_say_the_same() -> None:
    args = SimpleNamespace(mine_deep_end=5, epochs=1)
    said = []
    for loaded in (TODAY, FORMER):
        entry, options = loaded.taking(args), catalog.option_values("mine", loaded, args)
        assert options == {"deep_end": 5}
        said.append((entry.describe(options, 1), entry.unit(options, 1), entry.caption_key(options)))
        assert entry.refuse(options, ALONE)
    assert said == [("5 1", "step", "key 5")] * 2
    assert TODAY.taking(args).build("base", {"deep_end": 5}, ALONE) == ("base", {"deep_end": 5}, ALONE)
    assert FORMER.taking(args).build("base", {"deep_end": 5}, ALONE) == ("base", 5)
    assert (FORMER.is_former, TODAY.is_former) == (True, False)


class Optional:
    def __init__(self, base: Any, args: Any, extra: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("build", "is_former"),
    [
        (lambda base, args: base, True),
        (lambda *args: args, True),
        (Optional, True),
        (lambda base, options, gather: base, False),
        (lambda base, options, *, gather: base, False),
        (rankloss.RankClipLoss, False),
    ],
)
def test_signature_tells_a_former_entry(build: Any, is_former: bool) -> None:
    assert LossEntry(build=build).is_former is is_former


def test_defaults_of_a_former_entry_say_nothing() -> None:
    entry = LossEntry(build=lambda base, args: base).taking(SimpleNamespace())
    assert entry.refuse({}, ALONE) is entry.caption_key({}) is None
    assert (entry.describe({}, 3), entry.unit) == ("", "epoch")


def test_both_groups_of_entry_points_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"rankloss.losses": ("new", "TODAY"), "rankloss_open_clip.losses": ("old", "FORMER")}

    class Point(importlib.metadata.EntryPoint):
        dist: Any = SimpleNamespace(name="p", version="1.0")

    def entry_points(group: str) -> list[Point]:
        name, target = groups[group]
        return [Point(name, f"{__name__}:{target}", group)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    found = catalog.candidates()
    assert list(found) == [*catalog.BUILT_IN, "new", "old"]
    assert found["new"].load() is TODAY
    assert found["old"].load() is FORMER


def test_names_of_the_bootstrap_are_the_catalogues() -> None:
    assert names.PREFIXES == catalog.PREFIXES == ("rankclip", "cyclip", "alip", "streamed")


# --- options from RankOptions ---------------------------------------------------------------------------

RANKCLIP = catalog.candidates()["rankclip"].load()


HIDDEN = {"reduction"}
FIELDS = [field for field in dataclasses.fields(RankOptions) if field.name not in HIDDEN]


def test_every_option_of_the_rank_terms_can_be_typed_but_those_without_a_use() -> None:
    own = {"schedule", "schedule_unit", "lambda_cross", "lambda_in", "agreement_every"}
    own |= {"reference", "reference_features", "distill_loss"}
    keys = {option.key for option in RANKCLIP.options}
    assert keys - own == {field.name for field in FIELDS}
    assert keys >= own


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for option in RANKCLIP.options:
        parser.add_argument(
            catalog.flag("rankclip", RANKCLIP, option), default=option.default, help="", **option.keywords
        )
    return catalog.option_values("rankclip", RANKCLIP, parser.parse_args(argv))


def test_defaults_are_those_of_the_library() -> None:
    loss = RANKCLIP.build(None, parsed(), ALONE)
    assert loss.consistency.options == RankOptions()


@given(st.data())
def test_what_is_typed_is_what_the_library_gets(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([f for f in FIELDS if f.name != "reference_scale"]))
    spelled = {None: "none", True: "include", False: "exclude"}
    if choices_of(field.name):
        value = data.draw(st.sampled_from(choices_of(field.name)))
        text = spelled[value] if value is None or isinstance(value, bool) else value
    else:
        bounds = field.metadata["bounds"]
        value = data.draw(st.integers(bounds["at_least"], bounds["at_most"]))
        text = str(value)
    options = parsed(f"--rankclip-{field.name.replace('_', '-')}", text)
    loss = RANKCLIP.build(nn.Identity(), options, ALONE)
    assert loss.consistency.options == RankOptions(**{field.name: value})
    # A trainer that is given values instead of text gives them as Python has them.
    loss = RANKCLIP.build(nn.Identity(), {**parsed(), field.name: value}, ALONE)
    assert loss.consistency.options == RankOptions(**{field.name: value})


def test_teacher_is_asked_for_by_an_option_and_has_a_scale_of_its_own() -> None:
    typed = ("--rankclip-model", "top_one", "--rankclip-reference-scale", "2.5")
    options = parsed(*typed, "--rankclip-reference", "teacher")
    loss = RANKCLIP.build(nn.Identity(), options, ALONE)
    assert loss.consistency.options == RankOptions(model="top_one", reference_scale=2.5)
    assert RANKCLIP.uses_teacher(options)
    assert RANKCLIP.refuse(options, ALONE) is None
    assert "ranked by the teacher" in RANKCLIP.describe(options, 3)
    own = parsed()
    assert not RANKCLIP.uses_teacher(own)
    assert "teacher" not in RANKCLIP.describe(own, 3)
    assert RANKCLIP.refuse(parsed(*typed), ALONE).startswith("reference_scale: multiplies a teacher's")
    fixed = parsed("--rankclip-fixed-reference", "text", "--rankclip-reference", "teacher")
    assert RANKCLIP.refuse(fixed, ALONE).startswith("fixed_reference: fixes one of the batch's own")
    for bad in ("0", "-1", "nan", "x"):
        with pytest.raises(argparse.ArgumentError, match="must be a finite number above 0, got"):
            parsed("--rankclip-reference-scale", bad)


def test_preset_of_a_teacher_is_rankclip_with_other_defaults() -> None:
    preset = catalog.candidates()["rankclip-distill"].load()
    options = catalog.option_values("rankclip-distill", preset, argparse.Namespace())
    changed = {key: value for key, value in options.items() if value != parsed()[key]}
    weights = dict.fromkeys(("lambda_cross", "lambda_in"), 64.0)
    assert changed == {"reference": "teacher", "top_k": 8, "distill_loss": "exclude", **weights}
    loss = preset.build(nn.Identity(), options, ALONE)
    assert loss.consistency.options == RankOptions(top_k=8)
    assert preset.uses_teacher(options)
    assert not preset.keeps_distillation(options)
    loss.set_epoch(3, 3)
    assert loss.rank_weights == {"cross_modal": 8.0, "in_modal": 8.0}


def test_features_of_a_teacher_are_a_teacher() -> None:
    features = parsed("--rankclip-reference-features", "teacher")
    assert RANKCLIP.uses_teacher(features)
    assert RANKCLIP.reference_features(features) == "teacher"
    assert RANKCLIP.reference_features(parsed()) is None
    assert "ranked by the teacher's features in teacher" in RANKCLIP.describe(features, 3)
    excluded = parsed("--rankclip-distill-loss", "exclude")
    assert RANKCLIP.refuse(excluded, ALONE).startswith("distill_loss: exclude leaves a teacher")
    assert RANKCLIP.refuse({**excluded, "reference": "teacher"}, ALONE) is None


@pytest.mark.parametrize(
    "gather", [ALONE, dataclasses.replace(ALONE, local_loss=True, gather_with_grad=True)]
)
def test_every_own_loss_is_built_by_its_defaults(gather: Gather) -> None:
    for name in catalog.BUILT_IN:
        entry = catalog.candidates()[name].load()
        options = {option.key: option.default for option in entry.options}
        if name == "alip":
            assert entry.refuse(options, gather) is not None
            options["caption_key"] = "synthetic"
        assert entry.refuse(options, gather) is None
        loss = entry.build(rankloss.ClipLoss(gather=gather), options, gather)
        assert isinstance(loss, nn.Module)
        assert entry.describe(options, 3)


def test_one_list_of_the_batch_leaves_local_loss_where_that_is_exact() -> None:
    options = {**parsed(), "lists": "batch"}
    for local_loss, with_grad in ((True, True), (False, True), (False, False)):
        gather = dataclasses.replace(ALONE, local_loss=local_loss, gather_with_grad=with_grad)
        assert RANKCLIP.refuse(options, gather) is None
        assert RANKCLIP.build(nn.Identity(), options, gather).consistency.gather.local_loss is False
    approximate = dataclasses.replace(ALONE, local_loss=True)
    assert RANKCLIP.refuse(options, approximate).startswith("lists: batch needs the whole batch")


@pytest.mark.parametrize(
    ("type_", "good", "bad"),
    [
        (catalog.weight, {"0": 0.0, "1e3": 1000.0}, ["-1", "nan", "inf", "x"]),
        (catalog.number_type(), {"-2.5": -2.5}, ["nan", "-inf", ""]),
        (catalog.count, {"1": 1, "12": 12}, ["0", "1.5", "-3", "x"]),
        (catalog.count_type(at_least=0, at_most=4), {"0": 0, "4": 4}, ["-1", "5", ""]),
    ],
)
def test_types_take_what_is_in_range(type_: Any, good: dict[str, float], bad: list[str]) -> None:
    assert {text: type_(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}'"):
            type_(text)
