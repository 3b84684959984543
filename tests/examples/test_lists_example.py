"""The example of graded lists: its data, LambdaLoss, the plan, the trainings and the report."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
import torch
from examples_common.records import Store
from examples_common.trainings import finder
from hypothesis import given
from hypothesis import strategies as st
from liststudy import command, emojis, findings, losses, photographs, plan, report
from liststudy.plan import ARMS, CLIP, MODELS
from liststudy.study import Study
from liststudy.train import Setting
from photographs_folder import PICTURES, Encoders, filled, write_folder
from photostudy import folder
from rich.console import Console
from studies import assert_corrected, assert_reported_again, decided, printed_by_readme, records
from torch.nn.functional import normalize

import rankloss

TINY = plan.Plan("full", 1, 1, 4, (1e-3,), (1.0,), 0, (5, 6, 7), PICTURES["train"], None)


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory):
    root = tmp_path_factory.mktemp("flickr8k")
    expected = write_folder(root)
    names = [f"test_{i}.jpg" for i in range(PICTURES["test"])]
    votes = itertools.cycle([(3, 0), (0, 3), (1, 2), (2, 1), (0, 3), (0, 4)])
    lines = [
        f"{picture}\t{name}#2\t{yes / (yes + no)}\t{yes}\t{no}"
        for picture in names[:-1]
        for name, (yes, no) in zip(names, votes, strict=False)
    ]
    (root / folder.TEXTS / photographs.CROWD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder.read(root, expected), lines


# --- people's grades ---


def test_grades_are_read_by_picture_and_damaged_lines_counted(flickr8k, tmp_path, monkeypatch):
    whole, lines = flickr8k
    texts = tmp_path / folder.TEXTS
    texts.mkdir()
    damaged = [
        lines[0].replace("test_0.jpg\t", "other.jpg\t"),  # of no picture of the test
        lines[1].replace("\t0\t3", "\t1\t2"),  # share and votes differ
        lines[2][:-3],
        "\x00\xff",
    ]
    content = "\n".join([*damaged, *lines[4:]]).encode("latin-1")
    (texts / photographs.CROWD).write_bytes(content)
    copy = dataclasses.replace(whole, folder=tmp_path)
    found = photographs.read_crowd(copy)
    kept = photographs.read_crowd(whole).lists["test_0.jpg"]
    assert kept[:3] == [(("test_0.jpg", 2), 1.0), (("test_1.jpg", 2), 0.0), (("test_2.jpg", 2), 1 / 3)]
    assert found.damaged == 4
    assert sum(map(len, found.lists.values())) == len(lines) - 4
    monkeypatch.setattr(photographs, "MAX_DAMAGED", 3)
    with pytest.raises(folder.FolderError, match="4 lines are damaged"):
        photographs.read_crowd(copy)


# --- LambdaLoss ---


def _ndcg(order, grades):
    ideal = sum(g / math.log2(2 + i) for i, g in enumerate(sorted(grades, reverse=True)))
    return sum(grades[item] / math.log2(2 + i) for i, item in enumerate(order)) / ideal


@given(st.integers(0, 10**6), st.integers(2, 7))
def test_lambdaranks_weights_are_changes_of_ndcg(seed, k):
    rng = np.random.default_rng(seed)
    x, grades = rng.normal(size=k), rng.integers(0, 4, k) / 3
    grades[rng.integers(k)] = 1.0
    order = np.argsort(-x)
    padded = [torch.tensor(np.append(of, extra))[None] for of, extra in ((x, 9.0), (grades, 1.0))]
    mask = torch.tensor([[True] * k + [False]])
    found = losses.lambda_weights(*padded, mask, mu=0.0)[0]
    assert not found[k].any()
    assert not found[:, k].any()
    for p, q in itertools.product(range(k), repeat=2):
        swapped = [{p: q, q: p}.get(item, item) for item in order]
        change = abs(_ndcg(order, grades) - _ndcg(swapped, grades)) if grades[p] > grades[q] else 0.0
        assert found[p, q].item() == pytest.approx(change, abs=1e-6)


def test_ndcg_loss_2_adds_a_weight_by_the_distance_of_the_ranks():
    x, grades = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.5]])
    mask = torch.ones_like(grades, dtype=torch.bool)
    ideal = 1 + 0.5 / math.log2(3)
    added = (
        losses.lambda_weights(x, grades, mask, mu=10.0) - losses.lambda_weights(x, grades, mask, mu=0.0)
    )[0]
    expected = 10 * 0.5 / ideal * (1 / math.log2(4) - 1 / math.log2(5))  # ranks 4 and 1: distance 3
    assert added[3, 0].item() == pytest.approx(expected, rel=1e-5)
    assert added[1, 3].item() == pytest.approx(10 * 0.5 / ideal * (1 / math.log2(3) - 0.5), rel=1e-5)


def _batch():
    generator = torch.Generator().manual_seed(0)
    queries = normalize(torch.randn(3, 8, generator=generator), dim=-1)
    candidates = normalize(torch.randn(9, 8, generator=generator), dim=-1)
    index = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(3)])
    grades = torch.randint(0, 4, (3, 5), generator=generator) / 3
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return queries, candidates, grades, index, mask


def test_lambda_loss_is_the_weighted_sum_over_pairs():
    queries, candidates, grades, index, mask = _batch()
    loss = losses.LambdaLoss(losses.LAMBDARANK)
    found = loss(queries, candidates, grades, torch.tensor(9.0), candidate_index=index, mask=mask)
    x = 9 * (candidates[index] * queries[:, None]).sum(-1)
    weights = losses.lambda_weights(x, grades, mask, mu=0.0)
    pairs = weights * torch.log2(1 + (x[:, None] - x[:, :, None]).exp())
    assert found.item() == pytest.approx(pairs.sum((1, 2)).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "option"), [(model, option) for model, of in losses.OPTIONS.items() for option in of]
)
def test_padding_changes_no_loss_and_every_loss_has_a_gradient(model, option):
    queries, candidates, grades, index, mask = _batch()
    candidates.requires_grad_()
    loss = losses.build(model, option)
    first = loss(queries, candidates, grades, torch.tensor(9.0), candidate_index=index, mask=mask)
    first.backward()
    assert candidates.grad.abs().sum() > 0
    other = grades.where(mask, 0.7)
    second = loss(queries, candidates, other, torch.tensor(9.0), candidate_index=index, mask=mask)
    assert second.item() == pytest.approx(first.item())
    with pytest.raises(ValueError, match="option"):
        losses.build(model, "other")


def test_plackett_luce_is_told_which_sentences_are_unranked():
    queries, candidates, grades, index, mask = _batch()
    places = {"candidate_index": index, "mask": mask}
    unranked = grades.masked_fill(grades == 0, -math.inf)
    found = losses.build("plackett_luce", "zeros unranked")(
        queries, candidates, grades, torch.tensor(9.0), **places
    )
    expected = rankloss.RankedLists()(queries, candidates, unranked, torch.tensor(9.0), **places)
    assert found.item() == expected.item()


# --- the plan ---


def test_every_arm_has_as_many_tries_and_the_best_is_kept():
    found = plan.searches(
        plan.FULL, "m", records(lambda one: {"m": [one.lr * one.weight + (one.option == "affine")]})
    )
    assert {len(search.scores) for search in found.values()} == {6}
    assert all(search.chosen.lr == 1e-3 for search in found.values())
    assert found["squared_error"].chosen.option == "affine"
    beside = found[plan.BESIDE["squared_error"]]
    assert {one.option for one in beside.scores} == {"affine"}
    assert beside.chosen.weight == 16 * max(plan.FULL.weights)
    trainings = plan.arms(plan.FULL, found)
    assert {len(of) for of in trainings.values()} == {8}
    assert plan.FULL.choice_seed not in plan.FULL.seeds


# --- from the data to the report ---


@pytest.fixture(scope="module")
def trained(flickr8k, tmp_path_factory):
    pictures, _ = flickr8k
    cache = filled(pictures)
    task = photographs.task(pictures, cache, PICTURES["train"])
    study = Study(task, Store(tmp_path_factory.mktemp("results")), report.PRIMARY["photographs"])
    study.follow(TINY, Console(file=io.StringIO()))
    return study


def _findings(study):
    names = report.PRIMARY["photographs"], report.SECONDARY["photographs"]
    return findings.findings(TINY, *names, finder(study.store, Setting))


def test_held_out_pictures_have_no_list_to_train_on(trained):
    parts = [trained.task.choice, *trained.task.tests]
    assert sum(PICTURES["test"] - len(part.lists.pictures) for part in parts) >= PICTURES["test"] - 1
    assert all((part.lists.grades[~part.lists.mask] == 0).all() for part in parts)


def test_the_tests_are_paired_by_seed_and_corrected_over_all_comparisons(trained):
    found = _findings(trained)
    pairs = {
        pair: [[plan.score(found.records[arm][seed], found.primary) for seed in TINY.seeds] for arm in pair]
        for pair in plan.comparisons()
    }
    assert_corrected([found.tests[pair] for pair in pairs], [*pairs.values()])
    assert len(pairs) == 35


def test_the_report_is_made_of_the_records_and_the_readme_computes_its_numbers(
    trained, tmp_path, monkeypatch
):
    text = report.write(TINY, {"photographs": trained.store}, tmp_path).read_text(encoding="utf-8")
    assert "missing" not in text
    found = _findings(trained)
    for arm in ARMS:
        mean = found.estimate(arm, found.primary).mean
        assert f"| `{arm}` " in text
        assert f"{mean:.2f} ±".replace("-", "−") in text
    printed = printed_by_readme("lists", "results/photographs", trained.store, tmp_path, monkeypatch)
    by_hand = [line.rsplit(" ", 3) for line in printed]
    differences = {arm: float(mean) for arm, _, mean, _ in by_hand}
    assert differences.keys() == set(ARMS)
    for arm in ARMS[1:]:
        assert differences[arm] == pytest.approx(found.tests[arm, CLIP].mean)


def test_a_winner_is_above_all_others_and_else_no_difference_is_shown():
    find = decided({"lambda": 30.0, "top_one": 5.0}, lambda value: {"m": [value]})
    found = findings.findings(TINY, "m", (), find)
    assert findings.winner(found, MODELS) == "lambda"
    assert any("`lambda` won" in said for said in report.conclusions(found, 3))
    beside = plan.BESIDE.values()
    assert findings.winner(found, beside) is None
    first, equals = findings.best(found, beside)
    assert {first, *equals} == set(beside)
    assert any("no difference is shown" in said for said in report.conclusions(found, 3))
    assert found.sign("lambda", CLIP) == 1
    assert found.sign(CLIP, "top_one") is None or found.sign("top_one", CLIP) == -1


def test_an_unfinished_study_concludes_nothing(trained, tmp_path):
    store = Store(tmp_path / "results")
    with pytest.raises(RuntimeError, match="no record"):
        report.write(TINY, {"photographs": store}, tmp_path)
    lines = trained.store.path.read_text(encoding="utf-8").splitlines(keepends=True)
    store.path.parent.mkdir()
    store.path.write_text("".join(lines[:9]), encoding="utf-8")
    text = report.write(TINY, {"photographs": store}, tmp_path).read_text(encoding="utf-8")
    assert "of the planned trainings are missing" in text
    assert "won" not in text


def test_the_command_runs_on_emojis_alone_and_says_where_photographs_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FrozenEncoders", Encoders)
    monkeypatch.setattr(emojis, "DRAWN", {2: 3, 1: 3, 0: 3})
    options = ["--preset", "quick", "--output", str(tmp_path)]
    assert command.main(options) == 0
    assert photographs.CROWD in capsys.readouterr().out
    written = tmp_path / "quick/report/lists.md"
    text = written.read_text(encoding="utf-8")
    assert "smoke test" in text
    assert "Nothing is concluded from fewer than 3 seeds." in text
    assert_reported_again(command.main, options, written)
