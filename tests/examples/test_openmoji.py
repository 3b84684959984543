"""The emoji example: split, pictures, baseline, scores, and what counts as the same run."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_evaluation import metrics
from examples_common.trainer import LossNotAttachedError, TrainingError
from openmoji_demo import command, data, draw, evaluate, report, train
from PIL import Image
from rich.console import Console

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openmoji"


@pytest.fixture(scope="module")
def emojis():
    return data.load_emojis()


@pytest.fixture(scope="module")
def split(emojis):
    return data.split_by_concept(emojis)


@pytest.fixture(scope="module")
def few(emojis):
    """Some whole sub-groups, enough for a split."""
    return [e for e in emojis if e.subgroup in {"food fruit", "person fantasy", "geometric"}]


@pytest.fixture(scope="module")
def built(few, tmp_path_factory):
    root = tmp_path_factory.mktemp("openmoji")
    data.build(root / "data" / "split0", root=root, emojis=few)
    return root


# --- concepts and split ---


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("woman health worker", "health worker"),
        ("man: red hair", "person"),
        ("woman running facing right", "person running"),
        ("mermaid", "merperson"),
        ("Mrs. Claus", "santa claus"),
        ("family: man, woman, boy", "family"),
        ("kiss: woman, man", "kiss"),
        ("left-facing fist", "fist"),
        ("thumbs up", "thumbs up"),
        ("keycap: 1", "keycap: 1"),
        ("manual wheelchair", "manual wheelchair"),
    ],
)
def test_concept_merges_variants_only(name, concept):
    assert data.concept_of(name, {"health worker", "person"}) == concept


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_concept_is_on_both_sides(emojis, number):
    split = data.split_by_concept(emojis, number)
    train_concepts = {e.concept for e in split.train}
    test_concepts = [e.concept for e in split.test]
    assert train_concepts.isdisjoint(test_concepts)
    assert len(set(test_concepts)) == len(test_concepts)
    assert {e.concept for e in split.dropped} <= set(test_concepts)
    assert {e.hexcode for e in split.train}.isdisjoint(e.hexcode for e in (*split.test, *split.dropped))
    assert len(split.train) + len(split.test) + len(split.dropped) == len(emojis)


def test_no_gender_variant_of_a_held_out_emoji_is_trained_on(split):
    # Worked out from the code points, not from the names that the split itself goes by.
    def base(hexcode):
        signs = {"2640", "2642", "FE0F", "200D", "27A1", "1F468", "1F469", "1F9D1"}
        return frozenset(hexcode.split("-")) - signs

    professions = {base(e.hexcode) for e in split.test if "-200D-" in e.hexcode} - {frozenset()}
    assert professions
    assert professions.isdisjoint(base(e.hexcode) for e in split.train if "-200D-" in e.hexcode)


def test_splits_are_deterministic_and_differ(emojis, split):
    assert data.split_by_concept(emojis, 0) == split
    assert {e.concept for e in data.split_by_concept(emojis, 1).test} != {e.concept for e in split.test}


def test_counts_are_those_of_the_readme(split):
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    counts = split.counts()
    assert counts["test_concepts"] == 270
    assert counts["train_rows"] == data.CAPTIONS_PER_IMAGE * counts["train_images"]
    stated = ("concepts", "train_concepts", "train_images", "train_rows", "test_concepts", "test_subgroups")
    assert all(f"{counts[key]:,}" in readme for key in stated)


def test_captions(split):
    emoji = split.train[0]
    assert data.train_captions(emoji) == data.train_captions(emoji)
    assert len(data.train_captions(emoji)) == data.CAPTIONS_PER_IMAGE
    assert any(emoji.name in caption for caption in data.train_captions(emoji))
    words = {emoji.name, *emoji.tags, emoji.subgroup, emoji.group}
    assert all(any(word in caption for word in words) for caption in data.train_captions(emoji))
    held_out = [data.held_out_caption(e) for e in split.test]
    assert len(set(held_out)) == len(held_out)


# --- pictures ---


def test_line_art_keeps_line_groups_only():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        '<g id="color"><path d="M0 0"/></g><g id="skin"/><g id="hair"/><g id="color-foreground"/>'
        '<g id="line"><g id="inner"><path d="M1 1"/></g></g><g id="line-supplement"/></svg>'
    )
    kept = data.line_art(svg)
    assert re.findall(r'id="([^"]+)"', kept) == ["line", "inner", "line-supplement"]


def test_line_art_of_an_apple_is_grey_and_not_empty():
    colour = np.asarray(data.rasterise(data.read_svg("1F34E"))).astype(int)
    line = np.asarray(data.rasterise(data.line_art(data.read_svg("1F34E")))).astype(int)
    assert colour.shape == line.shape == (data.IMAGE_SIZE, data.IMAGE_SIZE, 3)
    assert np.ptp(colour, axis=2).max() > 100
    assert np.ptp(line, axis=2).max() == 0
    assert 0.02 < (line < 128).mean() < 0.5


# --- build ---


def _digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_two_builds_are_byte_equal(built, few, tmp_path):
    data.build(tmp_path / "data" / "split0", root=tmp_path, emojis=few)
    first, second = _digests(built / "data"), _digests(tmp_path / "data")
    assert first == second
    assert len(first) > 50


def test_build_is_complete_attributed_and_leaks_nothing(built):
    folder = built / "data" / "split0"
    assert data.is_complete(folder, 0)
    assert not data.is_complete(folder, 1)
    assert [p.name for p in folder.parent.iterdir()] == ["split0"]
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "All emojis designed by OpenMoji" in attribution
    assert "CC BY-SA 4.0" in attribution

    train_rows = data.read_table(folder / "train.csv")
    test_rows = data.read_table(folder / "test.csv")
    assert list(train_rows[0]) == ["filepath", "title"]
    assert all((built / row["filepath"]).is_file() for row in train_rows)
    assert all((built / row["line_filepath"]).is_file() for row in test_rows)
    assert {r["filepath"] for r in train_rows}.isdisjoint(r["filepath"] for r in test_rows)
    assert {r["title"] for r in train_rows}.isdisjoint(r["title"] for r in test_rows)

    def pixels(rows):
        images = evaluate._open_all(built, sorted({row["filepath"] for row in rows}))
        return {hashlib.sha256(image.tobytes()).digest() for image in images}

    assert pixels(train_rows).isdisjoint(pixels(test_rows))


def test_line_drawings_that_look_alike_are_left_out(built):
    # Coloured circles and squares have one line drawing each.
    folder = built / "data" / "split0"
    rows = data.read_table(folder / "test.csv")
    unique = [row for row in rows if row["line_is_unique"] == "1"]
    assert any(row["subgroup"] == "geometric" and row["line_is_unique"] == "0" for row in rows)
    assert len(evaluate.load_test_set(built, folder, "color").images) == len(rows)
    assert len(evaluate.load_test_set(built, folder, "line").images) == len(unique) < len(rows)


def test_a_failed_build_leaves_nothing(few, tmp_path, monkeypatch):
    def fail(svg, size=72):
        raise ValueError("broken picture")

    monkeypatch.setattr(data, "rasterise", fail)
    with pytest.raises(ValueError, match="broken picture"):
        data.build(tmp_path / "data" / "split0", root=tmp_path, emojis=few)
    assert list((tmp_path / "data").iterdir()) == []


# --- scores ---


def _flat(colour):
    return Image.new("RGB", (4, 4), colour)


def test_pixel_knn_lends_the_words_and_classes_of_the_nearest_pictures():
    baseline = evaluate.PixelKNN(
        [_flat("red"), _flat((250, 0, 0)), _flat("blue"), _flat((0, 0, 250))],
        ["cherry, fruit", "apple, fruit", "whale, sea", "fish, sea"],
        ["fruit", "fruit", "marine", "marine"],
        ["food", "food", "animals", "animals"],
        k=2,
    )
    queries = [_flat((252, 0, 0)), _flat((0, 0, 252))]
    scores = baseline.caption_scores(queries, ["strawberry, fruit", "dolphin, sea"])
    assert metrics.recall_at_k(scores, (1,)) == {1: 100.0}
    assert scores[0, 1] == scores[1, 0] == 0
    votes = baseline.class_scores(queries, "group", ["animals", "food"])
    assert votes.argmax(dim=1).tolist() == [1, 0]
    assert votes.floor().tolist() == [[0, 2], [2, 0]]


# --- table ---


@pytest.fixture
def blocks(built):
    def rows(n, knn, clip):
        ks, cs = metrics.RETRIEVAL_KS, metrics.CLASS_KS

        def scores(value):
            return {task: dict.fromkeys(ks if "to" in task else cs, value) for task in evaluate.TASKS}

        guess = {task: metrics.chance(n, ks) for task in ("image_to_text", "text_to_image")}
        guess |= {"subgroup": metrics.chance(85, cs), "group": metrics.chance(9, cs)}
        return {report.CHANCE: guess, report.KNN: scores(knn), "RankCLIP": scores(clip)}

    return [
        report.Block("color", 270, 85, 9, rows(270, 30.0, 20.0)),
        report.Block("line", 254, 85, 9, rows(254, 5.0, 6.0)),
    ]


def test_the_table_has_n_chance_and_the_untrained_row(blocks, tmp_path):
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.markdown(blocks).splitlines()
        if line.startswith("|")
    ][2:]
    assert [row[0] for row in rows] == [
        "**Colour, n = 270**", report.CHANCE, report.KNN, "RankCLIP",
        "**Line art, n = 254**", report.CHANCE, report.KNN, "RankCLIP",
    ]  # fmt: skip
    assert rows[1][1:] == ["0.4/1.9/3.7", "0.4/1.9/3.7", "1.2/3.5/5.9", "11.1/33.3/55.6"]
    report.save(blocks, {"seed": 0}, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["results"][0]["rows"]["RankCLIP"]["image_to_text"]["1"] == 20.0
    out = io.StringIO()
    report.show(blocks, Console(file=out, width=80))
    assert "11.1/33.3/55.6" in out.getvalue()
    assert "…" not in out.getvalue()


def test_notes_follow_the_numbers(blocks):
    assert [report.knn_ahead(block, "RankCLIP") for block in blocks] == [(6, 6), (0, 6)]
    assert "54× at R@1" in " ".join(report.notes(blocks))
    for block in blocks:
        for task in ("image_to_text", "text_to_image"):
            block.rows["RankCLIP"][task] = dict.fromkeys(metrics.RETRIEVAL_KS, 99.0)
    assert {report.knn_ahead(block, "RankCLIP") for block in blocks} == {(0, 6)}


# --- training ---


@pytest.fixture
def trainer(built, monkeypatch):
    """A run whose trainer is a script that logs like open_clip's; the plug-in's term is a parameter."""
    (built / "model").mkdir(exist_ok=True)
    (built / "model" / "open_clip_config.json").write_text("{}", encoding="utf-8")

    def make(terms, *, checkpoint=False):
        run = train.Run(built, "data/split0", "rankclip", 0, 1, "cpu")
        line = "2026-01-01,00:00:00 | INFO | Train Epoch: 0 [ 128/5372 (2%)] LR: 0.1 " + terms
        script = f"print({line!r})"
        if checkpoint:
            script += f"; from pathlib import Path; p = Path({str(run.checkpoint)!r})"
            script += "; p.parent.mkdir(parents=True); p.touch()"
        monkeypatch.setattr(train.Run, "command", lambda self: [sys.executable, "-c", script])
        return run

    return make


def test_a_run_is_complete_when_it_trained_its_loss(trainer):
    run = trainer("Contrastive_loss: 5.2 (5.2) Loss: 5.2 (5.2)", checkpoint=True)
    with pytest.raises(LossNotAttachedError):
        run.train(Console(file=io.StringIO()))
    assert not run.is_complete()
    run = trainer("Contrastive_loss: 5.2 (5.2) Cross_modal_loss: 0 (0) Loss: 5.2 (5.2)", checkpoint=True)
    run.train(Console(file=io.StringIO()))
    assert run.is_complete()
    assert run.seconds >= 0


def test_a_run_with_other_settings_is_never_overwritten(trainer):
    run = trainer("")
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run.checkpoint.touch()
    (run.folder / "complete.json").write_text(json.dumps({"settings": run.settings()}), encoding="utf-8")
    assert run.is_complete()
    (run.folder / "complete.json").write_text(json.dumps({"settings": {}}), encoding="utf-8")
    with pytest.raises(TrainingError, match="other settings"):
        run.is_complete()


def test_the_loss_is_passed_on_verbatim_and_the_model_path_is_relative(built):
    line = train.Run(built, "data/split0", "rankclip", 3, 2, "cpu", ("--rankclip-lists", "row")).command()
    assert line[1:3] == ["-m", "open_clip_train.main"]
    assert line[line.index("--loss") + 1] == "rankclip"
    assert line[line.index("--model") + 1] == "local-dir:model"
    assert line[-2:] == ["--rankclip-lists", "row"]


# --- picture and command line ---


def test_the_picture_shows_hits_and_misses_alike(built, tmp_path):
    similarity = torch.eye(20)
    similarity[10:] = -similarity[10:]  # the right caption comes last
    chosen = draw.choose_queries(similarity)
    assert sum(i < 10 for i in chosen) == sum(i >= 10 for i in chosen) == draw.QUERIES // 2
    assert len(draw.choose_queries(torch.eye(20))) == draw.QUERIES

    test_set = evaluate.load_test_set(built, built / "data" / "split0", "color")
    scores = torch.rand(
        len(test_set.images), len(test_set.images), generator=torch.Generator().manual_seed(0)
    )
    points = [(0, 2.0), (10, 1.0), (19, 0.5)]
    curves = {f"train/{key}": points for key in (*draw._CURVES, "rank_lambda")}
    path = tmp_path / "picture.png"
    draw.draw(
        path, title="RankCLIP", test_set=test_set, similarity=scores, curves={"RankCLIP": curves}, epochs=2
    )
    with Image.open(path) as image:
        assert min(image.size) > 800


def test_trainer_arguments_follow_two_dashes(capsys):
    args = command.parse(["--loss", "clip", "rankclip", "--", "--lr", "5e-4"])
    assert args.loss == ["clip", "rankclip"]
    assert args.extra == ("--lr", "5e-4")
    with pytest.raises(SystemExit):
        command.parse(["--", "--loss=clip"])
    assert "--loss after --" in capsys.readouterr().err


def test_missing_packages_are_named():
    script = f"""
import runpy, sys
sys.modules["clip_evaluation.metrics"] = None
runpy.run_path({str(EXAMPLE / "run.py")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'clip_evaluation.metrics'" in done.stderr
    assert "pip install" in done.stderr
