"""Aligned folders: of the flag and of the command, interrupted, damaged, for new pairs; their setting."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import signal
import tarfile
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
    WIDTH,
    contents_of_files,
    contents_without_command,
    csv_data,
    csv_table,
    flip_a_bit,
    in_process,
    picture,
    record_batch_sizes,
    shards,
    teacher,
    times_of_writing,
    trainer_arguments,
    under_torchrun,
)
from torch import Tensor

from rankloss.metrics import recall
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
    """Two tiny encoders in the place of any others; the options of each load, in a list that grows."""
    loads: list[Any] = []

    def load(options: list[str], args: Any, device: torch.device) -> Any:
        loads.append(options)
        return two_encoders(**{option: getattr(args, option) for option in options})

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.setattr(caching, "_WORKERS", 0)
    monkeypatch.delenv("RANKLOSS_CACHE", raising=False)
    return loads


def two_encoders(change: Any = lambda _, features: features, **about: Any) -> Any:
    """The tiny teacher, as two encoders without a common space."""
    return replace(teacher(change, **about), spaces="separate", scale=None)


def run_features(data: Path, output: Path, *options: str, encoders: Any = ENCODERS) -> int:
    """Run ``rankloss features`` with two encoders and some options; the exit code."""
    arguments = ["--data", str(data), "--output", str(output), "--workers", "0"]
    return main(["features", *encoders, *arguments, *options])


# --- the folder -------------------------------------------------------------------------------------------


def test_a_training_and_the_command_write_the_same_aligned_features_bit_for_bit(tmp_path: Path) -> None:
    pairs = csv_table(tmp_path)
    assert run_features(pairs, tmp_path / "x", "--align") == 0
    folder = Path(cached(SPEC, csv_data(pairs), tmp_path / "cache", "cpu"))
    assert contents_without_command(folder) == contents_without_command(tmp_path / "x")


def test_the_cache_has_the_aligned_features_and_the_encoders_own(tmp_path: Path) -> None:
    data, cache = csv_data(csv_table(tmp_path)), tmp_path / "cache"
    aligned = cached(SPEC, data, cache, "cpu")
    encoded = cached(SPEC._replace(align=False), data, cache, "cpu")
    assert Features(aligned).common_space
    assert not Features(encoded).common_space


def test_what_the_cache_has_loads_no_encoder_again(tmp_path: Path, loaded: list[Any]) -> None:
    data, cache = csv_data(csv_table(tmp_path)), tmp_path / "cache"
    folder = cached(SPEC, data, cache, "cpu")
    assert cached(SPEC, data, cache, "cpu") == folder
    cached(SPEC._replace(align=False), data, cache, "cpu")
    assert len(loaded) == 1


def test_a_folder_of_the_cache_says_which_command_would_write_it(tmp_path: Path) -> None:
    folder = cached(SPEC, csv_data(csv_table(tmp_path)), tmp_path / "cache", "cpu")
    command = "rankloss features --image-encoder some --text-encoder other --align"
    assert Features(folder).about["command"] == f"{command} --data {tmp_path}/pairs.csv --output {folder}"


COPIES = (7, 9)
"""Rows that have the picture of row 2."""


def table_with_copies(folder: Path) -> Path:
    """A table in which the copies are files of their own."""
    file = csv_table(folder)
    for row in COPIES:
        (folder / f"{row}.png").write_bytes(picture(2))
    return file


def shard_with_copies(folder: Path) -> Path:
    """A shard, where each sample has a key of its own."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for row, caption in enumerate(CAPTIONS):
            add_sample(tar, f"{row}", png=picture(2 if row in COPIES else row), txt=caption.encode())
    return folder / "a.tar"


@pytest.mark.parametrize("write_pairs", [table_with_copies, shard_with_copies])
def test_a_picture_of_three_names_is_one_where_a_setting_is_chosen(
    tmp_path: Path, write_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[np.ndarray] = []  # of the pictures by row, as the choice is given them

    def tuned_noting_numbers(take: Any, pictures: Any) -> Any:
        numbers.append(pictures)
        return tuned(take, pictures)

    monkeypatch.setattr(aligning, "tuned", tuned_noting_numbers)
    assert run_features(write_pairs(tmp_path), tmp_path / "x", "--align") == 0
    (pictures,) = numbers  # the setting is chosen once
    assert len(np.unique(pictures)) == ROWS - len(COPIES)
    assert {*pictures[[2, *COPIES]]} == {pictures[2]}


def test_an_aligned_folder_has_one_space_and_no_folder_of_the_encoders_own_features(tmp_path: Path) -> None:
    assert run_features(csv_table(tmp_path), tmp_path / "x", "--align") == 0
    assert Features(str(tmp_path / "x")).check().common_space
    assert not (tmp_path / "x/.encoders").exists()


def test_a_folder_without_the_flag_has_no_projections(tmp_path: Path) -> None:
    assert run_features(csv_table(tmp_path), tmp_path / "raw") == 0
    assert Features(str(tmp_path / "raw")).check().alignment is None


def tensors_of(features: Features) -> list[Tensor]:
    """The stored features of pictures and of captions."""
    return [torch.from_numpy(features.arrays[name][:]) for name in NAMES]


@pytest.fixture
def aligned_and_encoded(tmp_path: Path) -> tuple[Features, Features]:
    """The folder of the pairs with ``--align``, and the one without it."""
    pairs = csv_table(tmp_path)
    assert run_features(pairs, tmp_path / "aligned", "--align") == 0
    assert run_features(pairs, tmp_path / "encoded") == 0
    return Features(str(tmp_path / "aligned")), Features(str(tmp_path / "encoded"))


def test_the_features_of_an_aligned_folder_are_the_encoders_projected_by_its_projections(
    aligned_and_encoded: tuple[Features, Features],
) -> None:
    aligned, encoded = aligned_and_encoded
    images, texts = tensors_of(encoded)
    cca = aligned.alignment
    assert cca is not None
    for stored, projected in zip(tensors_of(aligned), (cca.images(images), cca.texts(texts)), strict=True):
        torch.testing.assert_close(stored, projected.half())


def test_the_projections_of_few_pairs_are_a_fit_of_them_with_the_default_setting(
    aligned_and_encoded: tuple[Features, Features],
) -> None:
    aligned, encoded = aligned_and_encoded
    images, texts = tensors_of(encoded)
    cca, expected = aligned.alignment, CanonicalCorrelation.fit(images, texts, dimensions=WIDTH)
    assert cca is not None
    assert cca.setting == Setting(dimensions=WIDTH)
    torch.testing.assert_close(cca.images(images), expected.images(images))
    torch.testing.assert_close(cca.texts(texts), expected.texts(texts))


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    pairs = csv_table(tmp_path)
    assert run_features(pairs, tmp_path / "x", "--align") == 0
    before = times_of_writing(tmp_path / "x")
    assert run_features(pairs, tmp_path / "x", "--align") == 0
    assert times_of_writing(tmp_path / "x") == before


@pytest.mark.parametrize(
    ("captions", "options", "reason"),
    [
        (CAPTIONS[::-1], (), "is none of the 40 rows"),
        (CAPTIONS, ("--dtype", "float32"), "was begun with another dtype, float16, not float32"),
    ],
    ids=["captions", "dtype"],
)
def test_a_complete_folder_of_other_captions_or_another_dtype_is_refused(
    tmp_path: Path, capsys: Any, captions: list[str], options: tuple[str, ...], reason: str
) -> None:
    assert run_features(csv_table(tmp_path), tmp_path / "x", "--align") == 0
    assert run_features(csv_table(tmp_path, captions), tmp_path / "x", "--align", *options) == 1
    assert reason in capsys.readouterr().err


def kill_while_encoding(patch: pytest.MonkeyPatch) -> None:
    """Let the process be killed in the third batch of captions."""
    killing = two_encoders(
        record_batch_sizes([], NAMES[1], kill_at=3), image_encoder="some", text_encoder="other"
    )
    patch.setattr(sources, "load", lambda *_: killing)


def kill_while_aligning(patch: pytest.MonkeyPatch) -> None:
    """Let the process be killed as it projects the second shard, whose second modality is the fourth call."""
    project, calls = aligning._projected, itertools.count(1)

    def project_or_die(*args: Any) -> Any:
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return project(*args)

    patch.setattr(aligning, "_projected", project_or_die)


@pytest.mark.parametrize("kill", [kill_while_encoding, kill_while_aligning])
def test_a_command_that_was_killed_writes_the_same_folder_when_it_is_run_again(
    tmp_path: Path, kill: Any, monkeypatch: Any
) -> None:
    pairs, options = csv_table(tmp_path), ("--align", "--batch-size", "8")
    assert run_features(pairs, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        kill(patch)
        assert in_process(run_features, pairs, tmp_path / "x", *options) == -signal.SIGKILL
    assert run_features(pairs, tmp_path / "x", *options) == 0
    assert contents_without_command(tmp_path / "x") == contents_without_command(tmp_path / "whole")


def test_a_complete_folder_loses_what_a_kill_has_left_of_the_encoders_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, output = csv_table(tmp_path), tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(aligning.shutil, "rmtree", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_process(run_features, pairs, output, "--align") == -signal.SIGKILL
    Features(str(output)).check()
    assert (output / ".encoders").exists()
    assert run_features(pairs, output, "--align") == 0
    assert not (output / ".encoders").exists()


def run_features_killed_at_file(number: int, *arguments: Any) -> None:
    """Run the command; kill this process where that file, counted from 0, is to be brought to the disk."""
    fsync, calls = os.fsync, itertools.count()

    def fsync_or_die(file: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = fsync_or_die
    run_features(*arguments)


def files_brought_to_the_disk(pairs: Path, output: Path, *options: str) -> list[str]:
    """Run the command; the paths of the files that it brings to the disk, in their order."""
    fsync, paths = os.fsync, list[str]()

    def fsync_noting_path(file: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync_noting_path)
        assert run_features(pairs, output, *options) == 0
    return paths


def test_a_kill_at_any_file_leaves_a_folder_that_is_refused_and_goes_on(tmp_path: Path) -> None:
    """At any file from the last of the encoders' own features on."""
    pairs, options = csv_table(tmp_path), ("--align", "--batch-size", "8")
    paths = files_brought_to_the_disk(pairs, tmp_path / "whole", *options)
    last_of_encoders = max(number for number, path in enumerate(paths) if "/.encoders/" in path)
    whole = contents_without_command(tmp_path / "whole")
    for number in range(last_of_encoders, len(paths)):
        output = tmp_path / f"{number}"
        killed = in_process(run_features_killed_at_file, number, pairs, output, *options)
        assert killed == -signal.SIGKILL
        with pytest.raises(
            ValueError, match=rf"^{output}( is no folder of| is unfinished|/pairs\.npy cannot be read)"
        ):
            Features(str(output))
        assert run_features(pairs, output, *options) == 0
        assert contents_without_command(output) == whole


def test_the_processes_of_torchrun_write_what_one_does_and_then_find_it_complete(tmp_path: Path) -> None:
    pairs, options = csv_table(tmp_path), ("--align", "--batch-size", "8")
    assert run_features(pairs, tmp_path / "one", *options) == 0
    under_torchrun(run_features, pairs, tmp_path / "two", *options)
    assert contents_without_command(tmp_path / "two") == contents_without_command(tmp_path / "one")
    before = times_of_writing(tmp_path / "two")
    under_torchrun(run_features, pairs, tmp_path / "two", *options)
    assert times_of_writing(tmp_path / "two") == before


def test_pairs_whose_picture_cannot_be_read_have_rows_of_zeros(tmp_path: Path) -> None:
    assert run_features(Path(shards(tmp_path, broken=(3, 8))), tmp_path / "x", "--align") == 0
    features = Features(str(tmp_path / "x")).check()
    # The first of two shards has the 20 even samples: 8 is row 4, and 3 is the second row of the other shard.
    rows_of_broken = [4, 21]
    assert features.about["skipped"] == len(rows_of_broken)
    for rows in tensors_of(features):
        assert (rows == 0).all(dim=1).nonzero().flatten().tolist() == rows_of_broken


def test_the_cache_leaves_out_the_pictures_that_the_command_cannot_read(tmp_path: Path) -> None:
    urls = shards(tmp_path, broken=(3, 8))
    assert run_features(Path(urls), tmp_path / "x", "--align") == 0
    data = of_open_clip(trainer_arguments(urls), SPEC)
    folder = cached(SPEC, data, tmp_path / "cache", "cpu")
    assert contents_without_command(Path(folder)) == contents_without_command(tmp_path / "x")


def double_numbers(file: Path) -> None:
    """Write tensors of the same shapes, whose numbers are doubled: only their hash tells."""
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("damage", [flip_a_bit, double_numbers, Path.unlink])
def test_damaged_projections_are_named(tmp_path: Path, damage: Any) -> None:
    assert run_features(csv_table(tmp_path), tmp_path / "x", "--align") == 0
    damage(tmp_path / "x" / ALIGNMENT)
    with pytest.raises(ValueError, match=rf"{ALIGNMENT} is not as it was written"):
        Features(str(tmp_path / "x")).check()


# --- new pairs --------------------------------------------------------------------------------------------


def test_the_projections_of_a_folder_serve_new_pairs(tmp_path: Path) -> None:
    """New pairs that are the first nine of the aligned ones have their features."""
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
    assert run_features(csv_table(tmp_path / "first"), tmp_path / "x", "--align") == 0
    new = csv_table(tmp_path / "second", CAPTIONS[:9])
    assert run_features(new, tmp_path / "y", "--align", str(tmp_path / "x")) == 0
    of_all, of_new = Features(str(tmp_path / "x")).check(), Features(str(tmp_path / "y")).check()
    assert of_new.common_space
    for name in NAMES:
        # The aligned folder has projected what float16 had rounded, the new one the encoders' own features.
        np.testing.assert_allclose(of_new.arrays[name][:], of_all.arrays[name][:9], atol=4e-3)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (
            ("--align",),
            (
                "--align {folder} has the projections of other encoders, of image_encoder 'some'",
                "these have 'another'",
            ),
        ),
        ((), ("{folder} has no projections: it was written without --align",)),
        (None, ("--align {folder}: {folder} is no folder",)),
    ],
    ids=["of other encoders", "not aligned", "no folder"],
)
def test_a_folder_whose_projections_do_not_fit_is_refused_before_anything_is_encoded(
    tmp_path: Path, capsys: Any, monkeypatch: Any, options: tuple[str, ...] | None, reasons: tuple[str, ...]
) -> None:
    """The folder of the projections is written with these options; with None it is not there."""
    pairs, folder, batch_sizes = csv_table(tmp_path), tmp_path / "aligned", list[int]()
    if options is not None:
        assert run_features(pairs, folder, *options) == 0
    other = two_encoders(record_batch_sizes(batch_sizes), image_encoder="another")
    monkeypatch.setattr(sources, "load", lambda *_: other)
    assert run_features(pairs, tmp_path / "y", "--align", str(folder)) == 1
    error = capsys.readouterr().err
    for reason in reasons:
        assert reason.format(folder=folder) in error
    assert not batch_sizes
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("write_pairs", [csv_table, shards])
def test_two_pairs_are_refused_by_the_command_before_they_are_encoded(
    tmp_path: Path, write_pairs: Any, monkeypatch: Any, capsys: Any
) -> None:
    batch_sizes: list[int] = []
    monkeypatch.setattr(sources, "load", lambda *_: two_encoders(record_batch_sizes(batch_sizes)))
    assert run_features(write_pairs(tmp_path, CAPTIONS[:2]), tmp_path / "x", "--align") == 1
    assert "has 2 pairs: at least 3 bring two encoders into one space" in capsys.readouterr().err
    assert not batch_sizes


@pytest.mark.parametrize("write_pairs", [csv_table, shards])
def test_two_pairs_are_refused_by_a_training_before_they_are_encoded(
    tmp_path: Path, write_pairs: Any, monkeypatch: Any
) -> None:
    batch_sizes: list[int] = []
    monkeypatch.setattr(sources, "load", lambda *_: two_encoders(record_batch_sizes(batch_sizes)))
    data = of_open_clip(trainer_arguments(write_pairs(tmp_path, CAPTIONS[:2])), SPEC)
    with pytest.raises(ValueError, match="has 2 pairs: at least 3"):
        cached(SPEC, data, tmp_path / "cache", "cpu")
    assert not batch_sizes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--image-encoder", "some"), "--align brings .* into one space: --image-encoder has one modality"),
        (("--text-encoder", "some"), "--align brings .* into one space: --text-encoder has one modality"),
    ],
    ids=["pictures alone", "captions alone"],
)
def test_one_modality_is_not_aligned(tmp_path: Path, options: Any, named: str, capsys: Any) -> None:
    assert run_features(csv_table(tmp_path), tmp_path / "x", "--align", encoders=options) == 1
    assert re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_an_unaligned_folder_is_not_written_over(tmp_path: Path, capsys: Any) -> None:
    pairs = csv_table(tmp_path)
    assert run_features(pairs, tmp_path / "x") == 0
    before = contents_of_files(tmp_path / "x")
    assert run_features(pairs, tmp_path / "x", "--align") == 1
    assert "was begun with another spaces, separate, not common" in capsys.readouterr().err
    assert contents_of_files(tmp_path / "x") == before


@pytest.mark.parametrize("text", ["image=a,align", "text=a,align"])
def test_a_teacher_with_align_needs_two_encoders(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}': align brings two encoders into one space"):
        Spec.of(text)


def test_align_is_not_the_first_word_of_a_teacher() -> None:
    with pytest.raises(ValueError, match="'align,image=a,text=b' is no teacher: give"):
        Spec.of("align,image=a,text=b")


def test_align_may_stand_behind_either_encoder() -> None:
    assert Spec.of("image=a,text=b,align").align
    assert Spec.of("image=a,align,text=b") == Spec.of("image=a,text=b,align")


# --- the setting ------------------------------------------------------------------------------------------


def features_of_pairs(pictures: int, captions: int = 2) -> tuple[Tensor, Tensor, np.ndarray]:
    """Rows of pairs: each picture with several captions, and the picture of each row.

    Both modalities are noisy linear maps of what a picture and its captions share.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = normal(pictures, 5)
    v = shared @ normal(5, 24) + normal(pictures, 24)
    noise = normal(pictures, captions, 16)
    t = (shared @ normal(5, 16))[:, None] + noise
    return v.repeat_interleave(captions, 0), t.flatten(0, 1), np.arange(pictures).repeat(captions)


GRID = Grid(image_ridges=(0.1, 1.0), text_ridges=(0.1, 1.0), dimensions=(4, 16), powers=(1.0,))


def taking(v: Tensor, t: Tensor) -> Any:
    """A function from numbers of rows to their features, by which ``tuned`` reads the pairs."""
    return lambda rows: (v[rows], t[rows])


def test_the_best_setting_is_fitted_to_all_pairs_and_to_those_that_were_not_held_out() -> None:
    v, t, pictures = features_of_pairs(150)
    tuned_fit = tuned(taking(v, t), pictures, grid=GRID)
    options = tuned_fit.trials[0].setting.as_options()  # of the best
    learned = ~tuned_fit.is_held_out
    of_all = CanonicalCorrelation.fit(v, t, **options)
    of_learned = CanonicalCorrelation.fit(v[learned], t[learned], **options)
    for fit, expected in ((tuned_fit.cca, of_all), (tuned_fit.of_learned, of_learned)):
        torch.testing.assert_close(fit.images(v), expected.images(v))
        torch.testing.assert_close(fit.texts(t), expected.texts(t))


def test_every_setting_of_the_grid_is_tried() -> None:
    v, t, pictures = features_of_pairs(150)
    trials = tuned(taking(v, t), pictures, grid=GRID).trials
    on_features_and_on_their_roots = (False, True)
    expected = itertools.product(
        GRID.image_ridges, GRID.text_ridges, GRID.dimensions, GRID.powers, on_features_and_on_their_roots
    )
    tried = [dataclasses.astuple(trial.setting) for trial in trials]
    assert sorted(tried) == sorted(expected)


def test_a_tenth_of_the_pictures_is_held_out_with_all_captions() -> None:
    v, t, pictures = features_of_pairs(150)
    tuned_fit = tuned(taking(v, t), pictures, grid=GRID)
    assert {*pictures[~tuned_fit.is_held_out]}.isdisjoint(pictures[tuned_fit.is_held_out])
    assert len({*pictures[tuned_fit.is_held_out]}) == 150 // 10  # of 150 pictures


def test_groups_of_pictures_are_on_one_side() -> None:
    v, t, pictures = features_of_pairs(300)
    groups = pictures // 2  # of two pictures each
    tuned_fit = tuned(taking(v, t), pictures, groups, grid=GRID)
    assert tuned_fit.is_held_out.any()
    assert {*groups[~tuned_fit.is_held_out]}.isdisjoint(groups[tuned_fit.is_held_out])


def test_pictures_of_one_group_are_partners() -> None:
    """The recall of the best setting takes all texts of a picture's group for right answers."""
    v, t, pictures = features_of_pairs(300)
    groups = pictures // 2  # of two pictures each
    tuned_fit = tuned(taking(v, t), pictures, groups, grid=GRID)
    is_held_out = tuned_fit.is_held_out
    images = tuned_fit.of_learned.images(v[is_held_out][::2])  # each picture has two rows: the first
    texts = tuned_fit.of_learned.texts(t[is_held_out])
    ids = torch.from_numpy(groups[is_held_out])
    recalls = recall(images, texts, 10, image_ids=ids[::2], text_ids=ids)
    expected = (recalls["image_to_text_R@10"] + recalls["text_to_image_R@10"]) / 2
    assert tuned_fit.trials[0].recall == pytest.approx(expected.item(), abs=1e-6)
    assert tuned_fit.trials[0].recall != tuned(taking(v, t), pictures, grid=GRID).trials[0].recall


def test_the_order_of_the_rows_does_not_matter() -> None:
    v, t, pictures = features_of_pairs(150)
    order = np.random.default_rng(0).permutation(len(v))
    in_order = tuned(taking(v, t), pictures, grid=GRID)
    reordered = tuned(taking(v[order], t[order]), pictures[order], grid=GRID)
    assert in_order.trials[0].setting == reordered.trials[0].setting
    torch.testing.assert_close(in_order.cca.images(v), reordered.cca.images(v), atol=1e-5, rtol=0)


def test_a_row_that_is_not_finite_is_named_by_its_own_number() -> None:
    """Whether it is held out, or stands after some that are."""
    v, t, pictures = features_of_pairs(150)
    first_held_out, last = int(held_out(pictures).argmax()), len(v) - 1
    for row in (first_held_out, last):
        spoilt = v.clone()
        spoilt[row, 3] = torch.nan
        with pytest.raises(ValueError, match=f"image_features must be finite; row {row} has NaN or infinity"):
            tuned(taking(spoilt, t), pictures, grid=GRID)


def test_pictures_and_groups_of_two_lengths_are_refused() -> None:
    v, t, pictures = features_of_pairs(150)
    with pytest.raises(ValueError, match="one value for each row; got 300 and 299"):
        tuned(taking(v, t), pictures, pictures[1:])


def test_few_groups_are_not_searched(caplog: Any) -> None:
    v, t, pictures = features_of_pairs(tuning.FEWEST_TO_SEARCH - 1)
    with caplog.at_level(logging.INFO, "rankloss_features"):
        tuned_fit = tuned(taking(v, t), pictures)
    assert f"{tuning.FEWEST_TO_SEARCH - 1} groups of pairs are too few to search a setting" in caplog.text
    assert tuned_fit.trials == []
    assert tuned_fit.cca.setting == Setting(dimensions=16)  # all of the narrower features, the texts


@pytest.mark.parametrize(
    ("groups", "held_out_groups"), [(30, 3), (500, 7)], ids=["a tenth", "the most that are needed"]
)
def test_a_tenth_of_the_groups_is_held_out_but_not_more_than_needed(
    groups: int, held_out_groups: int, monkeypatch: Any
) -> None:
    """As if seven groups were all that is needed."""
    monkeypatch.setattr(tuning, "MOST_HELD_OUT", 7)
    rows_of_group = 2
    assert held_out(np.arange(groups).repeat(rows_of_group)).sum() == rows_of_group * held_out_groups


def test_another_seed_holds_out_other_groups() -> None:
    groups = np.arange(500).repeat(2)
    assert (held_out(groups, seed=0) != held_out(groups, seed=1)).any()


def test_a_single_group_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="ids must differ, so that pairs can be held out; all 8 are one"):
        held_out(np.zeros(8))


@pytest.fixture
def cca() -> CanonicalCorrelation:
    """Projections of 40 made-up pictures with two captions each to four dimensions."""
    v, t, _ = features_of_pairs(40)
    return CanonicalCorrelation.fit(v, t, dimensions=4)


def test_projections_are_the_same_when_they_are_made_of_their_tensors(cca: CanonicalCorrelation) -> None:
    v, t, _ = features_of_pairs(40)
    again = CanonicalCorrelation.of_tensors(cca.setting, cca.tensors())
    assert torch.equal(again.images(v), cca.images(v))
    assert torch.equal(again.texts(t), cca.texts(t))
    assert torch.equal(again.correlations, cca.correlations)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("image_mean", lambda x: x[:-1]),
        ("text_projection", lambda x: x[:, :-1]),
        ("correlations", lambda x: x.float()),
        ("text_mean", lambda x: x * torch.nan),
        ("more", lambda _: torch.ones(1, dtype=torch.float64)),
    ],
    ids=["another width", "fewer directions", "float32", "not finite", "one tensor too many"],
)
def test_stored_tensors_that_do_not_fit_are_refused(
    cca: CanonicalCorrelation, name: str, change: Any
) -> None:
    tensors = cca.tensors()
    tensors[name] = change(tensors.get(name))
    with pytest.raises(ValueError, match=r"tensors must be image_mean, .*, finite float64; got shapes"):
        CanonicalCorrelation.of_tensors(cca.setting, tensors)


def test_rows_of_the_tests_are_too_few_to_be_searched() -> None:
    """The premise of the tests above in which a folder is fitted with the default setting."""
    assert ROWS < tuning.FEWEST_TO_SEARCH
