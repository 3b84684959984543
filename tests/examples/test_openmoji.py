"""The emoji example: split, pictures, baseline, scores, and what counts as the same run."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from examples_common import terminal
from examples_common.trainer import TrainingError
from miniature_icons import digests
from openmoji_demo import command, data, draw, evaluate, progress, report, train
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


CONCEPTS = yaml.safe_load(Path(__file__).with_name("emoji_concepts.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONCEPTS)
def test_concept_merges_variants_only(name):
    assert data.concept_of(name, {"health worker", "person"}) == CONCEPTS[name]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_concept_is_on_both_sides(emojis, number):
    split = data.split_by_concept(emojis, number)
    train, test, dropped = ([e.concept for e in part] for part in (split.train, split.test, split.dropped))
    assert not {*train} & {*test}
    assert len({*test}) == len(test)
    assert {*dropped} <= {*test}
    assert Counter((*split.train, *split.test, *split.dropped)) == Counter(emojis)


def test_no_gender_variant_of_a_held_out_emoji_is_trained_on(split):
    # Worked out from the code points, not from the names that the split itself goes by.
    def base(hexcode):
        signs = {"2640", "2642", "FE0F", "200D", "27A1", "1F468", "1F469", "1F9D1"}
        return frozenset(hexcode.split("-")) - signs

    professions = {base(e.hexcode) for e in split.test if "-200D-" in e.hexcode} - {frozenset()}
    assert professions
    assert professions.isdisjoint(base(e.hexcode) for e in split.train if "-200D-" in e.hexcode)


def test_counts_are_those_of_the_readme(split):
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    counts = split.counts()
    assert counts["test_concepts"] == 270
    assert counts["train_rows"] == data.CAPTIONS_PER_IMAGE * counts["train_images"]
    stated = ("concepts", "train_concepts", "train_images", "train_rows", "test_concepts", "test_subgroups")
    assert all(f"{counts[key]:,}" in readme for key in stated)


def test_captions_and_split_depend_on_the_seed_only(emojis, split):
    assert data.split_by_concept(emojis, 0) == split
    assert {e.concept for e in data.split_by_concept(emojis, 1).test} != {e.concept for e in split.test}
    for emoji in split.train[::50]:
        captions = data.train_captions(emoji)
        assert data.train_captions(emoji) == captions
        assert len(captions) == data.CAPTIONS_PER_IMAGE
        words = {emoji.name, *emoji.tags, emoji.subgroup, emoji.group}
        assert all(any(word in caption for word in words) for caption in captions)
    held_out = [data.held_out_caption(e) for e in split.test]
    assert len(set(held_out)) == len(held_out)


def test_line_art_of_an_apple_is_its_line_groups_grey_and_not_empty():
    svg = data.read_svg("1F34E")
    layers = [set(re.findall(r'<g id="([a-z]+)', text)) for text in (svg, data.line_art(svg))]
    assert "color" in layers[0]
    assert layers[1] == {"line"}
    colour, line = (np.asarray(data.rasterise(text)).astype(int) for text in (svg, data.line_art(svg)))
    assert colour.shape == line.shape == (data.IMAGE_SIZE, data.IMAGE_SIZE, 3)
    assert np.ptp(colour, axis=2).max() > 100
    assert np.ptp(line, axis=2).max() == 0
    assert 0.02 < (line < 128).mean() < 0.5


def test_two_builds_are_byte_equal(built, few, tmp_path):
    data.build(tmp_path / "data" / "split0", root=tmp_path, emojis=few)
    first, second = digests(built / "data"), digests(tmp_path / "data")
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

    train, test = (data.read_table(folder / name) for name in ("train.csv", "test.csv"))
    assert list(train) == ["filepath", "title"]
    assert all((built / path).is_file() for path in [*train["filepath"], *test["line_filepath"]])
    for column in train:
        assert not {*train[column]} & {*test[column]}
    tables = (evaluate.open_all(built, {*table["filepath"]}) for table in (train, test))
    seen, unseen = ({image.tobytes() for image in images} for images in tables)
    assert not seen & unseen


def test_line_drawings_that_look_alike_are_left_out(built):
    # Coloured circles and squares have one line drawing each.
    folder = built / "data" / "split0"
    rows = data.read_table(folder / "test.csv")
    unique = rows[rows["line_is_unique"] == "1"]
    assert "geometric" in {*rows.drop(unique.index)["subgroup"]}
    assert len(evaluate.load_test_set(built, folder, "color").images) == len(rows)
    assert len(evaluate.load_test_set(built, folder, "line").images) == len(unique) < len(rows)


def test_a_failed_build_leaves_nothing(few, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "rasterise", lambda svg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.build(tmp_path / "data" / "split0", root=tmp_path, emojis=few)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.fixture
def taus():
    """Two models' agreement on four training concepts and three others."""
    lists = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([4.0, 2.0, 3.0, 1.0])
    concepts = {evaluate.TRAINING: 4, evaluate.HELD_OUT: 3}
    taus = {"CLIP": 0.25, "RankCLIP": 0.5}
    averages = {m: {evaluate.TRAINING: tau, evaluate.HELD_OUT: 0.0625} for m, tau in taus.items()}
    labels = ["apple", "banana", "cherry", "a date, which is a long name"]
    return evaluate.Agreement(averages, concepts, 0, labels, dict.fromkeys(averages, lists))


@pytest.fixture(scope="module")
def scored(built):
    """The scores of the two baselines on the held-out pictures in colour, and the pictures."""
    folder = built / "data" / "split0"
    shown = evaluate.load_test_set(built, folder, "color")
    knn = partial(evaluate.knn_scores, evaluate.load_pictures(built, folder / "train_emojis.csv"))
    return shown, evaluate.chance_scores(shown), evaluate.score(knn, shown)[0]


def test_pixel_knn_is_far_above_chance(scored):
    _, chance, knn = scored
    for task, scores in knn.items():
        assert sum(scores.values()) > sum(chance[task].values())
        assert scores.keys() == chance[task].keys()
        assert list(scores.values()) == sorted(scores.values())


@pytest.fixture
def block(scored):
    """A block with two models whose scores are the baseline's, moved by points."""
    shown, chance, knn = scored
    sizes = [len(shown.classes[level]) for level in evaluate.LEVELS]

    def make(**points):
        moved = {
            name: {task: {k: score + more for k, score in of.items()} for task, of in knn.items()}
            for name, more in points.items()
        }
        rows = {report.CHANCE: chance, report.KNN: knn, **moved}
        return report.Block("color", len(shown.images), *sizes, rows)

    return make


def test_the_table_has_every_score_in_all_its_forms(block, taus, scored, tmp_path):
    made = block(CLIP=1.0, RankCLIP=-1.0)
    lines = [line for line in report.markdown([made], taus).splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in table[3:7]] == list(made.rows)
    for row, scores in zip(table[3:7], made.rows.values(), strict=True):
        assert row[1:] == ["/".join(f"{v:.1f}" for v in scores[task].values()) for task in evaluate.TASKS]
    assert table[7] == ["method", "4 training concepts", "3 held-out concepts"]
    assert table[9:] == [["CLIP", "0.250", "0.062"], ["RankCLIP", "0.500", "0.062"]]
    report.save([made], taus, {"seed": 0}, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["results"][0]["rows"]["CLIP"]["group"]["1"] == pytest.approx(scored[2]["group"][1] + 1)
    out = io.StringIO()
    report.show([made], taus, Console(file=out, width=80))
    assert {"0.500", *table[3][1:]} <= set(out.getvalue().split())
    assert "…" not in out.getvalue()


def test_notes_follow_the_numbers(block):
    alone = block(RankCLIP=-1.0)
    assert report.knn_ahead(alone, "RankCLIP") == (6, 6)
    assert report.apart(alone) is None
    both = block(CLIP=1.0, RankCLIP=0.0)
    assert [report.knn_ahead(both, name) for name in ("CLIP", "RankCLIP")] == [(0, 6)] * 2
    both.rows["RankCLIP"]["group"][3] += 5.0
    found = report.apart(both)
    assert (found["ahead"], found["scores"], found["where"]) == (1, 12, "group top-3")
    assert found["points"] == pytest.approx(4.0)
    assert [len(report.notes([made])) for made in (alone, both)] == [4, 6]
    own, chance = (both.rows[name]["image_to_text"][1] for name in ("CLIP", report.CHANCE))
    assert f"image → text {own / chance:.0f}× at R@1" in report.notes([both])[0]
    assert "RankCLIP is ahead of CLIP on 1 of 12 scores" in report.notes([both])[3]


def test_the_agreement_is_that_of_the_features_and_the_pair_is_a_typical_one():
    torch.manual_seed(0)
    of = [(model, n) for model in ("CLIP", "RankCLIP") for n in (30, 7)]
    features = {one: torch.nn.functional.normalize(torch.randn(2, one[1], 8), dim=-1) for one in of}

    class Model(str):
        def features(self, shown):
            return features[self, len(shown.images)]

    pairs = {
        n: evaluate.Pictures([None] * n, pd.DataFrame({"name": [f"concept {i}" for i in range(n)]}))
        for n in (30, 7)
    }
    measured = evaluate.measure_agreement({m: Model(m) for m in ("CLIP", "RankCLIP")}, pairs[30], pairs[7])
    distances = torch.zeros(30)
    for name in ("CLIP", "RankCLIP"):
        for key, n in ((evaluate.TRAINING, 30), (evaluate.HELD_OUT, 7)):
            v, t = (x.double().numpy() for x in features[name, n])
            taus = [kendalltau(v[i] @ t.T, t[i] @ v.T).statistic for i in range(n)]
            assert measured.averages[name][key] == pytest.approx(np.mean(taus))
            if n == 30:
                distances += (torch.tensor(taus) - np.mean(taus)).square()
        v, t = features[name, 30]
        torch.testing.assert_close(measured.scores[name][0], t @ v[measured.anchor])
        torch.testing.assert_close(measured.scores[name][1], v @ t[measured.anchor])
    assert measured.anchor == int(distances.argmin())
    assert measured.concepts == {evaluate.TRAINING: 30, evaluate.HELD_OUT: 7}


def test_pairs_are_the_first_picture_of_every_concept(built):
    table = built / "data/split0/train_emojis.csv"
    every, pairs = (evaluate.load_pictures(built, table, once=once) for once in (False, True))
    first = {}
    for concept, caption, image in zip(every.rows["concept"], every.captions, every.images, strict=True):
        first.setdefault(concept, (caption, image))
    assert len(first) < len(every.images)
    assert list(first.values()) == list(zip(pairs.captions, pairs.images, strict=True))


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_the_time_left_follows_the_machine(slower):
    now, bars = 100.0, terminal.bars(Console(file=io.StringIO()))
    bars.get_time = lambda: now
    stages = progress.Stages({"start": 10.0, "skipped": 500.0, "train": 100.0, "end": 20.0}, bars)
    (bar,) = bars.tasks
    assert (bar.description, bar.total) == ("start", 630)
    now += 10 * slower
    for stage, seconds in (("train", 100), ("end", 20)):
        for done, _ in enumerate(stages.track(range(seconds), seconds, stage)):
            assert bar.description == stage
            now += slower
            if stage == "train" and done > 1:
                assert bar.time_remaining == pytest.approx(slower * (100 - done + 20), abs=2)
                assert bar.percentage == pytest.approx(100 * (10 + done) / 130)
    assert (bar.percentage, bar.time_remaining) == (100, 0)


@pytest.fixture
def runs(built, monkeypatch):
    """Trains two losses whose trainers are scripts; each is given what it does beside logging a step."""
    (built / "model").mkdir(exist_ok=True)
    (built / "model" / "open_clip_config.json").write_text("{}", encoding="utf-8")
    pair = [train.Run(built, "data/split0", loss, 5, 1, "cpu") for loss in ("clip", "rankclip")]
    step = "Train Epoch: 0 [5372/5372 (100%)] Contrastive_loss: 5.2 (5.2) Cross_modal_loss: 0 (0)"

    def make(jobs, **deeds):
        def command(run):
            script = (
                "import pathlib, sys, time\n"
                f"p = pathlib.Path({str(run.checkpoint)!r}); p.parent.mkdir(parents=True)\n"
                f"print({step!r}); {deeds[run.loss]}; p.touch()"
            )
            return [sys.executable, "-c", script]

        monkeypatch.setattr(train.Run, "command", command)
        monkeypatch.setattr(train, "side_by_side", lambda count, device: (jobs, 1))
        shares, warnings = [], []
        train.train_all(pair, "cpu", shares.append, warnings.append)
        return shares, warnings

    return pair, make


def test_finished_runs_are_recognised_and_not_overwritten(runs):
    pair, make = runs
    said = make(1, clip="print('2026-01-01,00:00:00 | WARNING | beware')", rankclip="pass")
    assert said == ([0.5, 0.5, 1.0], ["clip: beware"])
    for run in pair:
        assert run.is_complete()
        assert run.record()["seconds"] >= 0
        assert run.record()["threads"] == 1
    (run.root / "model" / "open_clip_config.json").write_text('{"embed_dim": 8}', encoding="utf-8")
    with pytest.raises(TrainingError, match="other settings"):
        run.is_complete()


def test_a_run_that_fails_ends_the_other(runs):
    pair, make = runs
    with pytest.raises(TrainingError, match="status 3"):
        make(2, clip="sys.exit(3)", rankclip="time.sleep(600)")
    assert not any(run.is_complete() for run in pair)


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(train, "cpu_count", lambda: 2)
    shared = [train.side_by_side(*of) for of in ((1, "cpu"), (2, "cpu"), (3, "cpu"), (2, "cuda"))]
    assert shared == [(1, 2), (2, 1), (2, 1), (1, None)]


def test_the_picture_shows_hits_and_misses_alike(built, taus, tmp_path):
    similarity = torch.eye(20)
    similarity[10:] = -similarity[10:]  # the right caption comes last
    chosen = draw.choose_queries(similarity)
    assert sum(i < 10 for i in chosen) == sum(i >= 10 for i in chosen) == draw.QUERIES // 2
    assert len(draw.choose_queries(torch.eye(20))) == draw.QUERIES
    # What one of two models finds is a hit.
    three = torch.cat((torch.eye(20)[:3], -torch.eye(20)[3:]))
    assert draw.choose_queries(three, -torch.eye(20)) == draw.choose_queries(-torch.eye(20), three)
    assert sum(i < 3 for i in draw.choose_queries(three, -torch.eye(20))) == 3

    test_set = evaluate.load_test_set(built, built / "data" / "split0", "color")
    scores = torch.rand(2 * [len(test_set.images)], generator=torch.Generator().manual_seed(0))
    points = pd.Series({0: 2.0, 10: 1.0, 19: 0.5})
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
    assert command.parse([]).loss == ["clip", "rankclip"]
    args = command.parse(["--loss", "rankclip", "--", "--lr", "5e-4"])
    assert args.loss == ["rankclip"]
    run = train.Run(Path(), "data/split0", "rankclip", 3, 2, "cpu", args.extra)
    assert run.command()[-2:] == ["--lr", "5e-4"]  # verbatim, and last
    for mistake, said in ((["--", "--loss=clip"], "--loss after --"), (["--epochs", "2", "clip"], ": clip")):
        with pytest.raises(SystemExit):
            command.parse(mistake)
        assert said in capsys.readouterr().err


def test_missing_packages_are_named():
    hide = "import runpy, sys; sys.modules['clip_evaluation.metrics'] = None; "
    script = f"{hide}runpy.run_path({str(EXAMPLE / 'run.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'clip_evaluation.metrics'" in done.stderr
    assert "pip install" in done.stderr
