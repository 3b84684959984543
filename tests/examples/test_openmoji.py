"""The emoji example: split, pictures, baseline, scores, and what counts as the same run."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_evaluation import metrics
from examples_common.trainer import LossNotAttachedError, TrainingError
from openmoji_demo import agreement, command, data, draw, evaluate, progress, report, train
from PIL import Image
from rich.console import Console
from scipy.stats import kendalltau

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


@pytest.fixture
def taus():
    """Two models' agreement on four training concepts and three others."""
    lists = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([4.0, 2.0, 3.0, 1.0])
    return agreement.Agreement(
        averages={
            name: {agreement.TRAINING: tau, agreement.HELD_OUT: 0.0625}
            for name, tau in (("CLIP", 0.25), ("RankCLIP", 0.5))
        },
        concepts={agreement.TRAINING: 4, agreement.HELD_OUT: 3},
        anchor=0,
        labels=["apple", "banana", "cherry", "a date, which is a long name"],
        scores={"CLIP": lists, "RankCLIP": lists},
    )


def test_the_table_has_n_chance_and_the_untrained_row(blocks, taus, tmp_path):
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.markdown(blocks, taus).splitlines()
        if line.startswith("|")
    ][2:]
    assert [row[0] for row in rows[:8]] == [
        "**Colour, n = 270**", report.CHANCE, report.KNN, "RankCLIP",
        "**Line art, n = 254**", report.CHANCE, report.KNN, "RankCLIP",
    ]  # fmt: skip
    assert rows[1][1:] == ["0.4/1.9/3.7", "0.4/1.9/3.7", "1.2/3.5/5.9", "11.1/33.3/55.6"]
    assert rows[8] == ["method", "4 training concepts", "3 held-out concepts"]
    assert rows[10:] == [["CLIP", "0.250", "0.062"], ["RankCLIP", "0.500", "0.062"]]
    report.save(blocks, taus, {"seed": 0}, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["results"][0]["rows"]["RankCLIP"]["image_to_text"]["1"] == 20.0
    out = io.StringIO()
    report.show(blocks, taus, Console(file=out, width=80))
    assert "11.1/33.3/55.6" in out.getvalue()
    assert "0.500" in out.getvalue()
    assert "…" not in out.getvalue()


def test_notes_follow_the_numbers(blocks):
    assert [report.knn_ahead(block, "RankCLIP") for block in blocks] == [(6, 6), (0, 6)]
    assert "54× at R@1" in " ".join(report.notes(blocks))
    for block in blocks:
        for task in ("image_to_text", "text_to_image"):
            block.rows["RankCLIP"][task] = dict.fromkeys(metrics.RETRIEVAL_KS, 99.0)
    assert {report.knn_ahead(block, "RankCLIP") for block in blocks} == {(0, 6)}


def test_two_models_are_compared_and_nothing_is_claimed(blocks):
    assert not any("One training" in line for line in report.notes(blocks))
    rows = blocks[0].rows
    rows["CLIP"] = {
        task: {k: score + 1.0 for k, score in rows["RankCLIP"][task].items()} for task in rows["RankCLIP"]
    }
    rows["RankCLIP"]["group"][3] = 25.0
    order = (report.CHANCE, report.KNN, "CLIP", "RankCLIP")
    block = dataclasses.replace(blocks[0], rows={name: rows[name] for name in order})
    blocks[1].rows["CLIP"] = blocks[1].rows["RankCLIP"]
    (line,) = (line for line in report.notes([block, blocks[1]]) if "One training" in line)
    assert "RankCLIP is ahead of CLIP on 1 of 12 scores" in line
    assert "group top-3, +4.0 points" in line
    assert "no evidence" in line


# --- agreement ---


def test_the_agreement_is_that_of_the_features_and_the_pair_is_a_typical_one():
    generator = torch.Generator().manual_seed(0)

    def unit(n):
        return torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=-1)

    features = {(model, n): (unit(n), unit(n)) for model in ("CLIP", "RankCLIP") for n in (30, 7)}

    class Model:
        def __init__(self, name):
            self.name = name

        def features(self, images, captions):
            return features[self.name, len(images)]

    pairs = {n: evaluate.Pairs([f"concept {i}" for i in range(n)], [None] * n, [""] * n) for n in (30, 7)}
    measured = agreement.measure({name: Model(name) for name in ("CLIP", "RankCLIP")}, pairs[30], pairs[7])
    distances = torch.zeros(30)
    for name in ("CLIP", "RankCLIP"):
        for key, n in ((agreement.TRAINING, 30), (agreement.HELD_OUT, 7)):
            v, t = (x.double().numpy() for x in features[name, n])
            taus = [kendalltau(v[i] @ t.T, t[i] @ v.T).statistic for i in range(n)]
            assert measured.averages[name][key] == pytest.approx(np.mean(taus))
            if n == 30:
                distances += (torch.tensor(taus) - np.mean(taus)).square()
        v, t = features[name, 30]
        torch.testing.assert_close(measured.scores[name][0], t @ v[measured.anchor])
        torch.testing.assert_close(measured.scores[name][1], v @ t[measured.anchor])
    assert measured.anchor == int(distances.argmin())
    assert measured.concepts == {agreement.TRAINING: 30, agreement.HELD_OUT: 7}


def test_pairs_are_the_first_picture_of_every_concept(built):
    table = built / "data/split0/train_emojis.csv"
    rows = data.read_table(table)
    pairs = evaluate.load_pairs(built, table)
    first = {}
    for row in rows:
        first.setdefault(row["concept"], row)
    assert len(first) < len(rows)
    assert sorted(pairs.names) == sorted(row["name"] for row in first.values())
    captions = {row["name"]: row["title"] for row in first.values()}
    assert [captions[name] for name in pairs.names] == pairs.captions


# --- progress ---


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_bar_moves_before_anything_is_reported_and_the_time_left_counts_down():
    clock = Clock()
    forecast = progress.Forecast({"a": 10.0, "b": 50.0}, clock)
    assert (forecast.share, forecast.remaining) == (0.0, 60.0)
    clock.now += 3
    assert forecast.share == pytest.approx(3 / 60)
    assert forecast.remaining == pytest.approx(57)


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_the_time_left_follows_the_machine(slower):
    clock = Clock()
    forecast = progress.Forecast(
        {"start": 10.0, "skipped": 500.0, "train": 100.0, "end": 20.0, "done": 0.0}, clock
    )
    clock.now += 10 * slower
    forecast.begin("train")
    shares = [forecast.share]
    for percent in range(1, 101):
        clock.now += slower
        forecast.report(percent / 100)
        shares.append(forecast.share)
        if percent >= 20:
            assert forecast.remaining == pytest.approx(slower * (100 - percent + 20), rel=0.15)
    forecast.begin("end")
    clock.now += 20 * slower
    assert forecast.remaining == pytest.approx(0, abs=4)  # three seconds stand for the expectation
    forecast.begin("done")
    assert forecast.remaining == 0
    shares.append(forecast.share)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_loop_is_a_stage():
    clock = Clock()
    forecast = progress.Forecast({"start": 1.0, "loop": 4.0}, clock)
    seen = []
    for item in forecast.track("abcd", 4, "loop"):
        clock.now += 1
        seen.append((item, forecast.stage))
    assert seen == [(letter, "loop") for letter in "abcd"]
    assert forecast.remaining == pytest.approx(0, abs=0.1)


def test_trainings_side_by_side_are_expected_to_take_the_time_of_one():
    one, two, in_turn = (
        progress.expected(6, trainings, cores)[progress.TRAINING]
        for trainings, cores in ((1, 2), (2, 2), (2, 1))
    )
    assert one < two < in_turn
    assert in_turn == 2 * two


def test_the_bar_shows_stage_and_time_left():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    clock = Clock()
    with progress.bar(console, progress.Forecast({"Training": 100.0}, clock)):
        clock.now += 25
    assert "Training" in out.getvalue()
    assert "25 %" in out.getvalue()
    assert "about 1:15 left" in out.getvalue()
    assert [progress.clock_time(s) for s in (5, 65, 605, 3661)] == ["0:05", "1:05", "10:05", "1:01:01"]


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


def _train(*runs, jobs=1, warnings=None):
    shares = []
    warn = [].append if warnings is None else warnings.append
    asyncio.run(train.train_all(runs, jobs=jobs, threads=1, on_share=shares.append, warn=warn))
    return shares


def test_a_run_is_complete_when_it_trained_its_loss(trainer):
    run = trainer("Contrastive_loss: 5.2 (5.2) Loss: 5.2 (5.2)", checkpoint=True)
    with pytest.raises(LossNotAttachedError):
        _train(run)
    assert not run.is_complete()
    run = trainer("Contrastive_loss: 5.2 (5.2) Cross_modal_loss: 0 (0) Loss: 5.2 (5.2)", checkpoint=True)
    assert _train(run) == [pytest.approx(128 / 5372)]
    assert run.is_complete()
    assert run.record()["seconds"] >= 0
    assert run.record()["threads"] == 1


@pytest.fixture
def runs(built, monkeypatch):
    """Runs of two losses whose trainers are scripts; each is given what it does beside logging a step."""
    (built / "model").mkdir(exist_ok=True)
    (built / "model" / "open_clip_config.json").write_text("{}", encoding="utf-8")
    pair = [train.Run(built, "data/split0", loss, 5, 1, "cpu") for loss in ("clip", "rankclip")]

    def command(run, deeds):
        line = (
            "2026-01-01,00:00:00 | INFO | Train Epoch: 0 [5372/5372 (100%)] "
            "Contrastive_loss: 5.2 (5.2) Cross_modal_loss: 0 (0) Loss: 5.2 (5.2)"
        )
        script = (
            "import time, sys; from pathlib import Path; "
            f"here, other = Path({str(run.folder)!r}), Path({str(pair[run.loss == 'clip'].folder)!r}); "
            f"p = Path({str(run.checkpoint)!r}); p.parent.mkdir(parents=True, exist_ok=True); "
            f"(here / 'started').touch(); print({line!r})\n{deeds[run.loss]}\np.touch()"
        )
        return [sys.executable, "-c", script]

    def make(**deeds):
        for run in pair:
            shutil.rmtree(run.folder, ignore_errors=True)
        monkeypatch.setattr(train.Run, "command", lambda self: command(self, deeds))
        return pair

    return make


_WAIT = "while not (other / 'started').exists(): time.sleep(0.01)"


def test_two_runs_train_at_the_same_time(runs):
    # Each waits for the other to begin: one after the other they would never end.
    pair = runs(clip=_WAIT, rankclip=_WAIT)
    assert sorted(_train(*pair, jobs=2)) == [0.5, 1.0]
    assert all(run.is_complete() for run in pair)


def test_in_turn_no_two_runs_train_at_the_same_time(runs):
    pair = runs(clip="assert not (other / 'started').exists()", rankclip="")
    assert _train(*pair, jobs=1) == [0.5, 1.0]
    assert all(run.is_complete() for run in pair)


def test_a_run_that_fails_ends_the_other(runs):
    pair = runs(clip=_WAIT + "\nsys.exit(3)", rankclip="time.sleep(600)")
    with pytest.raises(TrainingError, match="status 3"):
        _train(*pair, jobs=2)
    assert not any(run.is_complete() for run in pair)


def test_warnings_of_the_trainer_are_passed_on_with_the_loss(runs):
    warnings = []
    pair = runs(clip="print('2026-01-01,00:00:00 | WARNING | beware')", rankclip="")
    _train(*pair, warnings=warnings)
    assert warnings == ["clip: beware"]


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(train, "cores", lambda: 2)
    assert train.side_by_side(1, "cpu") == (1, 2)
    assert train.side_by_side(2, "cpu") == (2, 1)
    assert train.side_by_side(3, "cpu") == (2, 1)
    assert train.side_by_side(2, "cuda") == (1, None)


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


def test_the_picture_shows_hits_and_misses_alike(built, taus, tmp_path):
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
    for names in (["RankCLIP"], ["CLIP", "cyclip", "RankCLIP"]):
        path = tmp_path / f"{len(names)}.png"
        draw.draw(
            path,
            agreement=dataclasses.replace(taus, scores=dict.fromkeys(names, taus.scores["CLIP"])),
            picture=test_set.images[0],
            test_set=test_set,
            similarities=dict.fromkeys(names, scores),
            curves=dict.fromkeys(names, curves),
            epochs=2,
        )
        with Image.open(path) as image:
            assert min(image.size) > 800


def test_a_query_that_one_of_two_models_finds_is_a_hit():
    finds, misses = torch.eye(20), -torch.eye(20)
    half = torch.cat((torch.eye(20)[:3], -torch.eye(20)[3:]))
    assert sum(i < 3 for i in draw.choose_queries(half, misses)) == 3
    assert draw.choose_queries(half, misses) == draw.choose_queries(misses, half)
    assert len(draw.choose_queries(finds, misses)) == draw.QUERIES


def test_clip_and_rankclip_are_the_default():
    assert command.parse([]).loss == ["clip", "rankclip"]
    assert command.parse(["--epochs", "1", "--loss", "rankclip"]).loss == ["rankclip"]


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        ("clip", ["--lr", "1"]),
        ("rankclip", ["--rankclip-lists", "row", "--lr", "1"]),
        ("rankclip-in", ["--rankclip-lists", "row", "--lr", "1"]),
        ("cyclip", ["--lr", "1", "--cyclip-lambda-in=2"]),
        ("clip-streamed", ["--lr", "1", "--streamed-memory-budget", "9"]),
    ],
)
def test_options_of_a_loss_go_to_its_runs_only(loss, kept):
    given = ["--rankclip-lists", "row", "--lr", "1", "--cyclip-lambda-in=2", "--streamed-memory-budget", "9"]
    assert list(train.arguments_for(loss, given)) == kept


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
runpy.run_path({str(EXAMPLE / "run.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'clip_evaluation.metrics'" in done.stderr
    assert "pip install" in done.stderr
