"""Aligned folders: of the flag and of the command, interrupted, damaged, for new pairs; their setting."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import socket
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teacher import (
    CAPTIONS,
    ROWS,
    csv_data,
    files,
    flip,
    forks,
    in_process,
    picture,
    shards,
    table,
    teacher,
    watched,
)
from torch import Tensor

from rankloss_features import Features, aligning, caching, sources, tuning
from rankloss_features.caching import Spec, cached, of_open_clip
from rankloss_features.cca import CanonicalCorrelation, Grid, Setting
from rankloss_features.folder import ALIGNMENT, NAMES
from rankloss_features.tuning import held_out, tuned
from rankloss_trainers.console import main
from samples import add_sample

SPEC = Spec.of("image=some,text=other,align")
ENCODERS = ("--image-encoder", "some", "--text-encoder", "other")


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two tiny encoders in the place of any others, and the names by which they are loaded."""
    found: list[Any] = []

    def load(given: list[str], args: Any, device: torch.device) -> Any:
        found.append(given)
        return spaceless(**{name: getattr(args, name) for name in given})

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.setattr(caching, "_WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    return found


def spaceless(change: Any = lambda _, features: features, **about: Any) -> Any:
    """The tiny teacher, as two encoders without a common space."""
    return replace(teacher(change, **about), spaces="separate", scale=None)


def aligned(data: Path, output: Path, *options: str, encoders: Any = ENCODERS) -> int:
    given = ["--data", str(data), "--output", str(output), "--workers", "0"]
    return main(["features", *encoders, *given, *(options or ("--align",))])


def own(folder: Path) -> dict[str, Any]:
    return {name: content for name, content in files(folder).items() if name != "folder.json"}


# --- the folder -------------------------------------------------------------------------------------------


def test_the_flag_and_the_command_give_the_same_features_bit_for_bit(tmp_path: Path) -> None:
    pairs = table(tmp_path)
    assert aligned(pairs, tmp_path / "x") == 0
    folder = Path(cached(SPEC, csv_data(pairs), tmp_path / "cache", "cpu"))
    assert own(folder) == own(tmp_path / "x")


def test_the_cache_has_the_aligned_features_and_the_encoders_own(tmp_path: Path, loaded: list[Any]) -> None:
    data, cache = csv_data(table(tmp_path)), tmp_path / "cache"
    folder = cached(SPEC, data, cache, "cpu")
    assert len(loaded) == 1
    assert cached(SPEC, data, cache, "cpu") == folder
    encoded = cached(SPEC._replace(align=False), data, cache, "cpu")
    assert len(loaded) == 1, "both were there"
    assert Features(folder).common_space
    assert not Features(encoded).common_space


def test_a_folder_of_the_cache_says_which_command_would_write_it(tmp_path: Path) -> None:
    folder = cached(SPEC, csv_data(table(tmp_path)), tmp_path / "cache", "cpu")
    command = "rankloss features --image-encoder some --text-encoder other --align --data"
    assert Features(folder).about["command"].startswith(command)


def test_a_picture_of_two_names_is_one_where_a_setting_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a table, and in shards, where each sample has a key of its own."""
    found: list[Any] = []

    def tuned_of(take: Any, pictures: Any) -> Any:
        found.append(pictures)
        return tuned(take, pictures)

    monkeypatch.setattr(aligning, "tuned", tuned_of)
    pairs = table(tmp_path)
    for row in (7, 9):
        (tmp_path / f"{row}.png").write_bytes(picture(2))
    assert aligned(pairs, tmp_path / "x") == 0
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row, caption in enumerate(CAPTIONS):
            add_sample(tar, f"{row}", png=picture(2 if row in (7, 9) else row), txt=caption.encode())
    assert aligned(tmp_path / "a.tar", tmp_path / "y") == 0
    for pictures in found:
        assert len(np.unique(pictures)) == ROWS - 2
        assert pictures[2] == pictures[7] == pictures[9]


def test_an_aligned_folder_has_one_space_and_no_folder_of_the_encoders_own_features(tmp_path: Path) -> None:
    assert aligned(table(tmp_path), tmp_path / "x") == 0
    assert Features(str(tmp_path / "x")).check().common_space
    assert not (tmp_path / "x/.encoders").exists()


def test_a_folder_without_the_flag_has_no_projections(tmp_path: Path) -> None:
    assert aligned(table(tmp_path), tmp_path / "raw", "--batch-size", "256") == 0
    assert Features(str(tmp_path / "raw")).check().alignment is None


def test_an_aligned_folder_has_the_projections_that_made_it(tmp_path: Path) -> None:
    pairs = table(tmp_path)
    assert aligned(pairs, tmp_path / "x") == aligned(pairs, tmp_path / "raw", "--batch-size", "256") == 0
    features, encoded = (Features(str(tmp_path / name)).check() for name in ("x", "raw"))
    cca = features.alignment
    assert cca is not None
    assert cca.setting == Setting(dimensions=6)  # forty pictures are too few to search
    rows = {name: torch.from_numpy(encoded.arrays[name][:]) for name in NAMES}
    expected = CanonicalCorrelation.fit(rows[NAMES[0]], rows[NAMES[1]], dimensions=6)
    for name, project, of_fit in (
        (NAMES[0], cca.images, expected.images),
        (NAMES[1], cca.texts, expected.texts),
    ):
        found = torch.from_numpy(features.arrays[name][:])
        assert torch.equal(found, project(rows[name]).half())
        torch.testing.assert_close(project(rows[name]), of_fit(rows[name]))


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    pairs = table(tmp_path)
    assert aligned(pairs, tmp_path / "x") == 0
    before = files(tmp_path / "x")
    assert aligned(pairs, tmp_path / "x") == 0
    assert files(tmp_path / "x") == before


@pytest.mark.parametrize(
    ("captions", "options", "reason"),
    [
        (CAPTIONS[::-1], (), "is none of the 40 rows"),
        (CAPTIONS, ("--dtype", "float32"), "was begun with another dtype, float16, not float32"),
    ],
)
def test_a_complete_folder_of_other_captions_or_another_dtype_is_refused(
    tmp_path: Path, capsys: Any, captions: list[str], options: tuple[str, ...], reason: str
) -> None:
    assert aligned(table(tmp_path), tmp_path / "x") == 0
    assert aligned(table(tmp_path, captions), tmp_path / "x", "--align", *options) == 1
    assert reason in capsys.readouterr().err


def kill_in(stage: str, monkeypatch: Any) -> None:
    """Let the process be killed while it encodes the third batch, or aligns the second shard."""
    if stage == "encoding":
        calls: list[int] = []
        killing = spaceless(watched(calls, NAMES[1], kill_at=3), image_encoder="some", text_encoder="other")
        monkeypatch.setattr(sources, "load", lambda given, args, device: killing)
        return
    projected, shards_of = aligning._projected, list[int]()

    def project(*args: Any) -> Any:
        shards_of.append(len(args[1]))
        if len(shards_of) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return projected(*args)

    monkeypatch.setattr(aligning, "_projected", project)


@pytest.mark.parametrize("stage", ["encoding", "aligning"])
def test_an_interrupted_command_goes_on(tmp_path: Path, stage: str, monkeypatch: Any) -> None:
    pairs, options = table(tmp_path), ("--align", "--batch-size", "8")
    assert aligned(pairs, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        kill_in(stage, patch)
        assert in_process(aligned, pairs, tmp_path / "x", *options) == -signal.SIGKILL
    assert aligned(pairs, tmp_path / "x", *options) == 0
    assert own(tmp_path / "x") == own(tmp_path / "whole")


def killed_at_file(number: int, *given: Any) -> None:
    """The command, in a process that is killed where a file is to be brought to the disk."""
    fsync, calls = os.fsync, itertools.count()

    def killing(file: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = killing
    aligned(*given)


def test_a_kill_at_any_file_leaves_a_folder_that_is_refused_or_whole_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last of the encoders' own files on; the one before was killed at the one before."""
    pairs, options, fsync = table(tmp_path), ("--align", "--batch-size", "8"), os.fsync
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(file) or fsync(file))
    assert aligned(pairs, tmp_path / "whole", *options) == 0
    monkeypatch.setattr(os, "fsync", fsync)
    of_aligned = [file for file in files_below(tmp_path / "whole") if file.name != ".lock"]
    for number in range(len(calls) - len(of_aligned) - 6, len(calls)):
        output = tmp_path / f"{number}"
        assert in_process(killed_at_file, number, pairs, output, *options) == -signal.SIGKILL
        with suppress(ValueError):
            Features(str(output)).check()
            assert {**own(tmp_path / "whole"), **own(output)} == own(tmp_path / "whole")
        assert aligned(pairs, output, *options) == 0
        assert own(output) == own(tmp_path / "whole")


def files_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_the_processes_of_torchrun_write_what_one_does(tmp_path: Path) -> None:
    pairs, options = table(tmp_path), ("--align", "--batch-size", "8")
    assert aligned(pairs, tmp_path / "one", *options) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for _ in range(2):  # the second finds a complete folder
        given = (aligned, pairs, tmp_path / "two", *options)
        ranks = [{"RANK": str(rank), **group} for rank in range(2)]
        processes = [forks.Process(target=in_process, args=given, kwargs=rank) for rank in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert own(tmp_path / "two") == own(tmp_path / "one")


def test_a_picture_that_cannot_be_read_has_no_features_and_is_not_fitted(tmp_path: Path) -> None:
    urls = shards(tmp_path, broken=(3, 8))
    assert aligned(Path(urls), tmp_path / "x") == 0
    features = Features(str(tmp_path / "x")).check()
    assert features.about["skipped"] == 2
    assert [int((~x[:].any(axis=1)).sum()) for x in features.arrays.values()] == [2, 2]
    folder = cached(SPEC, of_open_clip(_trained(urls), SPEC), tmp_path / "cache", "cpu")
    assert own(Path(folder)) == own(tmp_path / "x")


def _trained(urls: str) -> Any:
    from test_caching import trained

    return trained(urls)


@pytest.mark.parametrize("kind", ["bit", "other", "missing"])
def test_damaged_projections_are_named(tmp_path: Path, kind: str) -> None:
    assert aligned(table(tmp_path), tmp_path / "x") == 0
    file = tmp_path / "x" / ALIGNMENT
    if kind == "bit":
        flip(file)
    elif kind == "other":
        save_file({name: x * 2 for name, x in load_file(file).items()}, file)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=rf"{ALIGNMENT} is not as it was written"):
        Features(str(tmp_path / "x")).check()


# --- new pairs --------------------------------------------------------------------------------------------


def test_the_projections_of_a_folder_serve_new_pairs(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
    assert aligned(table(first), tmp_path / "x") == 0
    new = table(second, CAPTIONS[:9])
    assert aligned(new, tmp_path / "y", "--align", str(tmp_path / "x")) == 0
    whole, part = (Features(str(tmp_path / name)).check() for name in "xy")
    assert part.common_space
    for name in NAMES:
        np.testing.assert_allclose(part.arrays[name][:], whole.arrays[name][:9], atol=4e-3)


@pytest.mark.parametrize(
    ("write", "reasons"),
    [
        (
            ("--align",),
            (
                "--align {given} has the projections of other encoders, of image_encoder 'some'",
                "these have 'another'",
            ),
        ),
        (("--dtype", "float16"), ("given has no projections: it was written without --align",)),
        (None, ("--align {given}: {given} is no folder",)),
    ],
    ids=["of other encoders", "not aligned", "no folder"],
)
def test_a_folder_whose_projections_do_not_fit_is_refused_before_anything_is_encoded(
    tmp_path: Path, capsys: Any, monkeypatch: Any, write: tuple[str, ...] | None, reasons: tuple[str, ...]
) -> None:
    pairs, given, calls = table(tmp_path), tmp_path / "given", list[int]()
    if write is not None:
        assert aligned(pairs, given, *write) == 0
    other = spaceless(watched(calls), image_encoder="another")
    monkeypatch.setattr(sources, "load", lambda *_: other)
    assert aligned(pairs, tmp_path / "y", "--align", str(given)) == 1
    error = capsys.readouterr().err
    for reason in reasons:
        assert reason.format(given=given) in error
    assert not calls
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("write", [table, shards])
def test_two_pairs_are_refused_before_they_are_encoded(
    tmp_path: Path, write: Any, monkeypatch: Any, capsys: Any
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(sources, "load", lambda *_: spaceless(watched(calls)))
    pairs = write(tmp_path, CAPTIONS[:2])
    assert aligned(pairs, tmp_path / "x") == 1
    assert "has 2 pairs: at least 3 bring two encoders into one space" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 2 pairs: at least 3"):
        cached(SPEC, of_open_clip(_trained(pairs), SPEC), tmp_path / "cache", "cpu")
    assert not calls


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--image-encoder", "some"), "--align brings .* into one space: --image-encoder has one modality"),
        (("--text-encoder", "some"), "--align brings .* into one space: --text-encoder has one modality"),
    ],
)
def test_one_modality_is_not_aligned(tmp_path: Path, options: Any, named: str, capsys: Any) -> None:
    assert aligned(table(tmp_path), tmp_path / "x", encoders=options) == 1
    assert re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_an_unaligned_folder_is_not_written_over(tmp_path: Path, capsys: Any) -> None:
    pairs = table(tmp_path)
    assert aligned(pairs, tmp_path / "x", "--dtype", "float16") == 0
    before = files(tmp_path / "x")
    assert aligned(pairs, tmp_path / "x") == 1
    assert "was begun with another spaces, separate, not common" in capsys.readouterr().err
    assert files(tmp_path / "x") == before


@pytest.mark.parametrize("text", ["image=a,align", "text=a,align", "align,image=a"])
def test_the_flag_needs_two_encoders(text: str) -> None:
    with pytest.raises(ValueError, match="align"):
        Spec.of(text)
    assert Spec.of("image=a,align,text=b") == Spec.of("image=a,text=b,align")
    assert Spec.of("image=a,text=b,align").align


# --- the setting ------------------------------------------------------------------------------------------


def views(pictures: int, captions: int = 2) -> tuple[Tensor, Tensor, np.ndarray]:
    """Rows of pairs: each picture with several captions, and the picture of each row."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(pictures, 5, generator=generator)
    v = shared @ torch.randn(5, 24, generator=generator) + torch.randn(pictures, 24, generator=generator)
    noise = torch.randn(pictures, captions, 16, generator=generator)
    t = (shared @ torch.randn(5, 16, generator=generator))[:, None] + noise
    return v.repeat_interleave(captions, 0), t.flatten(0, 1), np.arange(pictures).repeat(captions)


GRID = Grid((0.1, 1.0), (0.1, 1.0), (4, 16), (1.0,))


def test_the_best_setting_on_held_out_pictures_is_fitted_to_all_pairs() -> None:
    v, t, pictures = views(150)
    found = tuned(lambda rows: (v[rows], t[rows]), pictures, grid=GRID)
    assert len(found.trials) == 16
    options = found.trials[0].setting.as_options()
    torch.testing.assert_close(found.cca.images(v), CanonicalCorrelation.fit(v, t, **options).images(v))
    learned = ~found.is_held_out
    of_learned = CanonicalCorrelation.fit(v[learned], t[learned], **options)
    torch.testing.assert_close(found.of_learned.texts(t), of_learned.texts(t))
    assert {*pictures[learned]}.isdisjoint(pictures[found.is_held_out])
    assert len({*pictures[found.is_held_out]}) == 15


def test_groups_of_pictures_are_on_one_side_and_partners() -> None:
    v, t, pictures = views(300)
    groups = pictures // 2
    found = tuned(lambda rows: (v[rows], t[rows]), pictures, groups, grid=GRID)
    assert {*groups[~found.is_held_out]}.isdisjoint(groups[found.is_held_out])
    alone = tuned(lambda rows: (v[rows], t[rows]), pictures, pictures, grid=GRID)
    assert found.trials[0].recall != alone.trials[0].recall


def test_the_order_of_the_rows_does_not_matter() -> None:
    v, t, pictures = views(150)
    order = np.random.default_rng(0).permutation(len(v))
    found = tuned(lambda rows: (v[rows], t[rows]), pictures, grid=GRID)
    turned = tuned(lambda rows: (v[order][rows], t[order][rows]), pictures[order], grid=GRID)
    assert found.trials[0].setting == turned.trials[0].setting
    torch.testing.assert_close(found.cca.images(v), turned.cca.images(v), atol=1e-5, rtol=0)


def test_a_row_that_is_not_finite_is_named_by_its_own_number() -> None:
    """Whether it is held out, or stands after some that are."""
    v, t, pictures = views(150)
    is_held_out = held_out(pictures)
    for row in (int(is_held_out.argmax()), len(v) - 1):
        spoilt = v.clone()
        spoilt[row, 3] = torch.nan
        with pytest.raises(ValueError, match=f"image_features must be finite; row {row} has NaN or infinity"):
            tuned(lambda rows, x=spoilt: (x[rows], t[rows]), pictures, grid=GRID)


def test_pictures_and_groups_of_two_lengths_are_refused() -> None:
    v, t, pictures = views(150)
    with pytest.raises(ValueError, match="one value for each row; got 300 and 299"):
        tuned(lambda rows: (v[rows], t[rows]), pictures, pictures[1:])


def test_few_groups_are_not_searched(caplog: Any) -> None:
    v, t, pictures = views(99)
    with caplog.at_level(logging.INFO, "rankloss_features"):
        found = tuned(lambda rows: (v[rows], t[rows]), pictures)
    assert "99 groups of pairs are too few to search a setting" in caplog.text
    assert found.trials == []
    assert found.cca.setting == Setting(dimensions=16)


def test_a_tenth_of_the_groups_is_held_out_but_not_more_than_needed(monkeypatch: Any) -> None:
    monkeypatch.setattr(tuning, "MOST_HELD_OUT", 7)
    groups = np.arange(1000) // 2
    assert held_out(groups).sum() == 14
    assert held_out(groups[:60]).sum() == 6
    assert (held_out(groups, 0) != held_out(groups, 1)).any()
    with pytest.raises(ValueError, match="ids must differ, so that pairs can be held out; all 8 are one"):
        held_out(np.zeros(8))


def test_stored_tensors_that_do_not_fit_are_refused() -> None:
    v, t, _ = views(40)
    cca = CanonicalCorrelation.fit(v, t, dimensions=4)
    tensors = cca.tensors()
    again = CanonicalCorrelation.of_tensors(cca.setting, tensors)
    assert torch.equal(again.images(v), cca.images(v))
    for change in (
        {"image_mean": tensors["image_mean"][:-1]},
        {"text_projection": tensors["text_projection"][:, :-1]},
        {"correlations": tensors["correlations"].float()},
        {"text_mean": tensors["text_mean"] * torch.nan},
        {"more": torch.ones(1, dtype=torch.float64)},
    ):
        with pytest.raises(ValueError, match=r"tensors must be image_mean, .*, finite float64; got shapes"):
            CanonicalCorrelation.of_tensors(cca.setting, {**tensors, **change})


def test_rows_of_the_tests_are_too_few_to_be_searched() -> None:
    assert ROWS < tuning.FEWEST_TO_SEARCH
