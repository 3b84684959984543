"""Parts 2b and 3 of the photographs: teacher, views, losses, the plans' choices, records, reports."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import formulas
import numpy as np
import pytest
import torch
from examples_common.records import Store
from examples_common.statistics import Difference
from formulas import both_ways, cross_entropy, log_softmax, pearson, within
from photographs_folder import PICTURES, drawn, established, filled, finder, primary, read_folder, reported
from photostudy import command, heads, students
from photostudy import plan as part1
from photostudy.features import Side
from photostudy.findings import CORRELATION, PRIMARY
from photostudy.heads import WIDTH
from photostudy.study import Study as Heads
from photostudy.taught import findings, losses, plan, report, study, teacher, views
from photostudy.taught.setting import Setting
from photostudy.taught.teacher import Teacher
from rich.console import Console
from studies import assert_corrected
from torch.nn.functional import normalize

import oracle
import rankloss

N, D, S = 6, WIDTH, 5.0
TRAIN, EACH, WIDE = 70, 5, 300  # pictures, sentences of each, the teacher's width


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def made_up():
    common = unit(TRAIN, 1, WIDE, seed=0)
    pictures, sentences = common[:, 0], normalize(common + 0.8 * unit(TRAIN, EACH, WIDE, seed=1), dim=-1)
    side, weak = Side(pictures, sentences), Side(unit(TRAIN, 9, seed=2), unit(TRAIN, EACH, 9, seed=3))
    return Teacher({"train": side}, **teacher.lists(side, weak)), weak


TEACHER, WEAK = made_up()
INPUTS = Side(unit(TRAIN, 8, seed=4), unit(TRAIN, EACH, 12, seed=5))  # of the students
STUDENT = unit(N, D, seed=6), unit(N, D, seed=7)
ROWS, DRAWN = torch.tensor([3, 29, 0, 11, 7, 21]), torch.tensor([0, 4, 2, 2, 1, 3])
TRAINED = TEACHER.sides["train"].pictures[ROWS], TEACHER.sides["train"].sentences[ROWS, DRAWN]
SMOOTHING = 0.1


class Model:
    """A model whose features of sentences are given."""

    candidates = unit(TRAIN * EACH, D, seed=8)

    def sentences(self, features):
        """Return the features of the sentences that are looked for in the students' inputs."""
        same = (features[..., None, :] == INPUTS.sentences.flatten(0, 1)).all(-1)
        return self.candidates[same.float().argmax(-1)]


def seen(view):
    return views.of(view, TEACHER, INPUTS)(Model(), ROWS, DRAWN)


def built(view, arm, **changes):
    loss = losses.build(Setting(arm, 0, "dev", view=view, label_smoothing=SMOOTHING, **changes), (WIDE, WIDE))
    loss = loss.double()
    if hasattr(loss, "set_epoch"):
        loss.set_epoch(3, 3)  # the end of the ramp: λ = 2/16
    return loss


# --- literal formulas ---


def nll(x, y, top_k):
    terms, mu = oracle.nll_terms(torch.as_tensor(x), torch.as_tensor(y), top_k=top_k)
    return (terms.sum(-1) / mu.sum(-1)).mean().item()


def standardised_squares(x, y):
    return (((x - x.mean()) / x.std() - (y - y.mean()) / y.std()) ** 2).mean()


TAUGHT = [x.numpy() for x in TRAINED]
REDUCED = [formulas.normalized(x[:, :WIDTH]) for x in TAUGHT]


def four(v, t):
    return [*both_ways((v, t)), *within((v, t))]


def of_four(view, distance, scale=1.0):
    change = {"sharpened": lambda x: np.exp(20 * (x - 1)), "saturated": lambda x: np.tanh(4 * x)}
    theirs = [scale * change.get(view, lambda x: x)(x) for x in four(*TAUGHT)]
    return lambda v, t: sum(distance(S * x, y) for x, y in zip(four(v, t), theirs, strict=True)) / 2


def listed_in_batch():
    """Return the places in the batch of each picture's listed ids, best first."""
    found = []
    for row in ROWS.tolist():
        graded = sorted(
            zip(TEACHER.grades[row].tolist(), TEACHER.ids[row].tolist(), strict=True), reverse=True
        )
        found.append([(grade, ROWS.tolist().index(i)) for grade, i in graded if i in ROWS])
    return found


def soft_labels(v, t):
    total, rows = 0.0, [[place for _, place in of] for of in listed_in_batch()]
    for x in (v @ t.T, t @ v.T):
        total += sum(-log_softmax(S * x)[i, of].mean() for i, of in enumerate(rows) if of) / 2
    return total / sum(map(bool, rows))


def ids_ranked(v, t):
    """Return own pair first, then the listed ids in the batch, within a modality without the own pair."""
    grades = torch.full((N, N), -math.inf).fill_diagonal_(math.inf)
    for i, of in enumerate(listed_in_batch()):
        for grade, place in of:
            grades[i, place] = grade
    v, t = torch.from_numpy(v), torch.from_numpy(t)
    others, rows = ~torch.eye(N, dtype=torch.bool), torch.arange(N).expand(N, N)
    pairs = (v, t, None), (t, v, None), (v, v, others), (t, t, others)
    return sum(oracle.ranked_lists(x, y, rows, grades, S, mask).item() for x, y, mask in pairs) / 2


def of_lists(model, scale=1.0):
    def value(v, _):
        lists = TEACHER.hard[ROWS], scale * TEACHER.hard_scores[ROWS]
        return oracle.ranked_lists(torch.from_numpy(v), Model.candidates, *lists, S, model=model).item()

    return value


NUMPY = {
    ("features", "mimicry"): (lambda *x: formulas.mimicry(x, REDUCED), {}),
    ("features", "contrast"): (
        lambda *x: formulas.contrast(x, REDUCED, 20.0),
        {"scale": 20.0},
    ),
    ("features", "softmax"): (of_four("scores", cross_entropy, 20.0), {"scale": 20.0}),
    ("scores", "ranks"): (of_four("scores", lambda x, y: nll(x, y, 3)), {"top_k": 3}),
    ("scores", "softmax"): (of_four("scores", cross_entropy, 20.0), {"scale": 20.0}),
    ("scores", "pearson"): (of_four("scores", pearson, 20.0), {"scale": 20.0}),
    ("scores", "squares"): (of_four("scores", standardised_squares), {}),
    ("sharpened", "softmax"): (of_four("sharpened", cross_entropy, 10.0), {"scale": 10.0}),
    ("saturated", "squares"): (of_four("saturated", standardised_squares), {}),
    ("ten ids", "ranks"): (ids_ranked, {}),
    ("ten ids", "soft-labels"): (soft_labels, {}),
    ("reranker", "ranks"): (of_lists("plackett_luce"), {}),
    ("reranker", "pairwise"): (of_lists("pairwise"), {}),
    ("reranker with scores", "softmax"): (of_lists("top_one", 10.0), {"scale": 10.0}),
}


@pytest.mark.parametrize(("view", "arm"), NUMPY)
def test_a_loss_is_its_formula(view, arm):
    formula, changes = NUMPY[view, arm]
    loss, given, scale = built(view, arm, weight=2.5, **changes), seen(view), torch.tensor(S).double()
    base = losses.losses.build("clip", label_smoothing=SMOOTHING)

    def term(*features):
        return loss(*features, scale, **given) - base(*features, scale)

    formulas.assert_is_formula(term, formula, [x.numpy() for x in STUDENT], 2.5)


def test_the_lists_of_the_formulas_are_no_trivial_ones():
    listed = listed_in_batch()
    assert any(listed)
    assert not all(listed)
    assert (TEACHER.ids < 0).any()


def test_ranks_of_features_are_the_librarys_terms():
    features, scale = [x.clone() for x in STUDENT], torch.tensor(S).double()
    clip = losses.losses.build("clip", label_smoothing=SMOOTHING)(*features, scale)
    given = seen("features")
    terms = rankloss.RankConsistency(top_k=3)(*features, scale, **given)
    loss = built("features", "ranks", weight=16.0, top_k=3)(*features, scale, **given)
    assert (loss - clip).item() == pytest.approx(2 * terms.item())
    both = built("features", "mimicry-and-ranks", weight=16.0, top_k=3, mimicry=4.0)
    added = 2 * terms.item() + 4 * formulas.mimicry([x.numpy() for x in features], REDUCED)
    assert (both(*features, scale, **given) - clip).item() == pytest.approx(added)


def test_a_view_without_a_common_space_has_part_2as_losses():
    given, scale = seen("separate"), torch.tensor(S).double()
    clip = losses.losses.build("clip", label_smoothing=SMOOTHING)(*STUDENT, scale)
    terms = rankloss.RankConsistency(cross_modal=0.0, top_k=2)(*STUDENT, scale, **given)
    loss = built("separate", "ranks", weight=8.0, top_k=2)(*STUDENT, scale, **given)
    assert (loss - clip).item() == pytest.approx(terms.item())
    with pytest.raises(ValueError, match="the view 'separate' has no arm 'mimicry'"):
        built("separate", "mimicry")


# --- views ---


@pytest.mark.parametrize("view", ["sharpened", "saturated"])
def test_no_rank_changes_under_a_monotone_map(view):
    """Of float32 features, some cosines of which are next to each other."""
    n = 64
    pictures = unit(n, 16, seed=20).float()
    pictures[1::2] = normalize(pictures[::2] + 1e-4 * unit(n // 2, 16, seed=21).float(), dim=-1)
    close = pictures.unsqueeze(1) + 1e-4 * unit(n, 1, 16, seed=22).float()
    of = dataclasses.replace(
        TEACHER, sides={"train": Side(pictures, normalize(close, dim=-1))}, span=(-1.0, 1.0)
    )
    rows = torch.arange(n)
    both = (views.of(name, of, INPUTS)(Model(), rows, torch.zeros_like(rows)) for name in ("scores", view))
    for x, y in zip(*(seen["scores"] for seen in both), strict=True):
        assert not torch.equal(x, y)
        assert torch.equal(x[:, None] <= x[:, :, None], y[:, None] <= y[:, :, None])
    cosines = x.flatten().float()
    assert (torch.nextafter(cosines, torch.tensor(2.0))[:, None] == cosines[:500]).any()


def test_four_bits_have_16_levels_over_the_span_and_their_ties_share_a_rank():
    found = seen("4 bits")["scores"]
    low, high = TEACHER.span
    step = (high - low) / 15
    for x, y in zip(found, seen("scores")["scores"], strict=True):
        inside = (y >= low) & (y <= high)
        assert ((x - y).abs()[inside] <= step / 2 + 1e-12).all()
        levels = (x - low) / step
        torch.testing.assert_close(levels, levels.round())
        assert ((x >= low - 1e-12) & (x <= high + 1e-12)).all()
    x, y = S * STUDENT[0] @ STUDENT[1].T, found[0]
    assert any(len(row.unique()) < N for row in y)
    assert losses.ranks(x, y, top_k=2).item() == pytest.approx(nll(x.numpy(), y.numpy(), 2))
    everything = TEACHER.sides["train"].pictures @ TEACHER.sides["train"].sentences.flatten(0, 1).T
    assert TEACHER.span == (everything.min().item(), everything.max().item())


def test_a_view_shows_its_part_of_the_teacher_alone():
    assert seen("") == {}
    assert {*seen("ten ids")} == {"order_pictures", "order_listed", "order_grades"}
    assert not any(x.is_floating_point() for x in seen("ten ids").values())
    for view in views.MAPS:
        assert [*seen(view)] == ["scores"]
    order, scored = (seen(view)["grades"] for view in ("reranker", "reranker with scores"))
    assert torch.equal(order.sort(1).values, torch.arange(20.0).expand(N, 20))
    assert torch.equal(order.argsort(1), scored.argsort(1))
    torch.testing.assert_close(scored, TEACHER.hard_scores[ROWS])
    apart, together = (four(*(x.numpy() for x in seen(v).values())) for v in ("separate", "features"))
    for x, y in zip(apart[2:], together[2:], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert abs(np.corrcoef(apart[0].ravel(), together[0].ravel())[0, 1]) < 0.5
    assert together[0].diagonal().min() > 0.5 > abs(apart[0].diagonal()).max()
    with pytest.raises(ValueError, match=r"view: must be one of , features, .*, got 'other'"):
        seen("other")


def test_lists_are_the_teachers_best_and_the_weak_models_hardest():
    side = TEACHER.sides["train"]
    scores = np.einsum("id,jcd->ijc", side.pictures, side.sentences)
    of_ids = scores.max(2)
    np.fill_diagonal(of_ids, -np.inf)
    weak = np.einsum("id,jcd->ijc", WEAK.pictures, WEAK.sentences)
    for i in range(TRAIN):
        best = {}
        for of in (of_ids[i], of_ids[:, i]):
            for place, j in enumerate(np.argsort(-of)[:10]):
                best[int(j)] = max(best.get(int(j), 0), 10 - place)
        there = TEACHER.ids[i] >= 0
        ids, grades = TEACHER.ids[i][there].tolist(), TEACHER.grades[i][there].tolist()
        assert len({*ids}) == len(ids)
        assert dict(zip(ids, grades, strict=True)) == best
        wrong = weak[i].copy()
        wrong[i] = -np.inf
        assert {*TEACHER.hard[i].tolist()} == {*np.argsort(-wrong.ravel())[:20].tolist()}
        np.testing.assert_allclose(TEACHER.hard_scores[i], scores[i].ravel()[TEACHER.hard[i]], rtol=1e-6)


def test_components_of_full_width_keep_every_cosine():
    pictures, sentences = unit(40, 6, seed=30).float(), unit(40, EACH, 6, seed=31).float()
    sides = {"train": Side(pictures, sentences), "dev": Side(pictures[:3], sentences[:3])}
    whole = teacher.reduced(sides, 99)
    for name, side in sides.items():
        torch.testing.assert_close(whole[name].pictures @ whole[name].sentences[0].T,
                                   side.pictures @ side.sentences[0].T)  # fmt: skip
    few = teacher.reduced(sides, 2)["dev"].sentences
    torch.testing.assert_close(few, normalize(whole["dev"].sentences[..., :2], dim=-1))
    weighed = np.concatenate([np.repeat(pictures.numpy(), EACH, 0), sentences.flatten(0, 1)])
    _, vectors = np.linalg.eigh(weighed.T @ weighed)
    expected = np.abs(pictures.numpy() @ vectors[:, -1])
    np.testing.assert_allclose(whole["train"].pictures[:, 0].abs(), expected, atol=1e-5)


# --- the plans ---


def test_mimicry_and_ranks_are_tried_around_the_winners_of_both():
    sizes, asked = plan.PLANS["2b"]["full"], []

    def score(one):
        if one.loss == "mimicry-and-ranks":
            asked.append(one)
            return -abs(one.mimicry - 3) - abs(one.weight - 20)
        best = {"mimicry": {"weight": 4.0}, "ranks": {"weight": 64.0, "top_k": 8}}[one.loss]
        return -sum(abs(getattr(one, name) - value) for name, value in best.items())

    first = plan.choice(sizes, plan.BOTH, {}, finder(lambda _: None))
    assert {one.loss for one in first.due} == {"mimicry", "ranks"}
    assert first.chosen is None
    found = plan.choice(sizes, plan.BOTH, {}, finder(score))
    assert {(one.mimicry, one.weight) for one in asked} >= {
        *itertools.product((2.0, 4.0), (16.0, 32.0, 64.0))
    }
    assert {one.top_k for one in asked} == {8}
    assert found.chosen["top_k"] == 8
    assert (found.chosen["mimicry"], found.chosen["weight"]) == (2.0, 16.0)


def test_every_try_is_a_loss_and_every_arm_is_compared_once():
    for part, tries, tests in (("2b", 6, 9), ("3", 4, 35)):
        sizes = plan.PLANS[part]["full"]
        for arm in sizes.arms.values():
            points = [*itertools.product(*arm.grid.values())]
            assert len(points) == (1 if arm.loss == plan.BOTH else tries)
            for point in points:
                changes = dict(zip(arm.grid, point, strict=True)) or {"mimicry": 1.0, "weight": 1.0}
                assert isinstance(built(arm.view, arm.loss, **changes), torch.nn.Module)
        assert part == "3" or tests == students.plan.OTHERS
        assert len({*sizes.comparisons}) == len(sizes.comparisons) == tests
        assert all({*pair} <= {plan.CLIP, *sizes.arms} for pair in sizes.comparisons)
    ranks = plan.PLANS["3"]["full"].ranks_of
    assert ranks("sharpened: squares") == "scores: ranks"
    assert ranks("reranker with scores: softmax") == "reranker: ranks"
    assert ranks("4 bits: softmax") == "4 bits: ranks"


TINY_HEADS = dataclasses.replace(
    part1.QUICK, start={"train_pictures": PICTURES["train"], "batch_size": 12, "epochs": 2}
)
TINY = {
    part: dataclasses.replace(of["quick"], heads=TINY_HEADS, seeds=(5, 6, 7))
    for part, of in plan.PLANS.items()
}


def search():
    return plan.of_heads(TINY["2b"], lambda _: {})


def found_of(part, skip=lambda one: False, others=None):
    find = drawn(lambda one: one.side == "test" and skip(one))
    return findings.findings(TINY[part], search(), find, others or {})


def test_differences_are_paired_and_corrected_with_those_of_part_2a():
    # Part 2a has a comparison of the same names.
    pairs = [("ranks", "clip"), *(("2a", str(i)) for i in range(1, 16))]
    others = {
        (pair, PRIMARY.title): Difference(1.0, 0.1, 3, p=0.001 * (i + 1)) for i, pair in enumerate(pairs)
    }
    found = found_of("2b", others=others)
    values = [primary(found, pair, TINY["2b"].seeds) for pair in TINY["2b"].comparisons]
    differences = [found.difference(pair) for pair in TINY["2b"].comparisons]
    assert_corrected(differences, values, [d.p for d in others.values()])


def test_what_lacks_a_training_is_not_stated_and_counts_in_the_correction():
    found = found_of("3", lambda one: one.arm == "scores ranks" and one.seed == 7)
    assert found.missing == 1
    lacking = {pair for pair in TINY["3"].comparisons if "scores: ranks" in pair}
    assert len(lacking) == 1 + 3 + 2 + 2
    assert {pair for pair in TINY["3"].comparisons if found.difference(pair) is None} == lacking
    assert all(found.planned[pair, PRIMARY.title].p == 1 for pair in lacking)
    assert report.of_views(TINY["3"], found) == []


def told(part, **means):
    """Return the sentences where these arms' differences are established, the others having none."""
    return {"2b": report.of_teachers, "3": report.of_views}[part](
        TINY[part], established(found_of(part), means)
    )


def test_the_conclusions_are_the_plans():
    ranks = dict.fromkeys(("scores: ranks", "ten ids: ranks"), 1.0)
    lines = dict(line.split(": ", 1) for line in told("3", **ranks, **{"ten ids: soft-labels": 2.0}))
    assert lines["scores"] == "**ranks retrieve better than every rival**. Ranks help."
    assert lines["saturated"] == "**ranks retrieve better than every rival**. Ranks help."
    assert lines["ten ids"] == "`ten ids: soft-labels` retrieves better than ranks. Ranks help."
    assert lines["separate"].startswith("no rival is shown to retrieve better than ranks. Ranks are not")
    partly = dict(line.split(": ", 1) for line in told("3", **{"4 bits: softmax": -1.0}))
    assert "better than ranks; ranks retrieve better than `4 bits: softmax`. Ranks" in partly["4 bits"]
    text = " ".join(told("2b", ranks=1.0, mimicry=2.0))
    assert "`ranks` helps: R@10 +1.00 points" in text
    assert "**`mimicry` retrieves better than `ranks`: R@10 +1.00 points" in text
    assert "`mimicry-and-ranks` is not shown to be above `ranks`" in text
    assert "Not shown to raise R@10 above plain CLIP's: `contrast`, `softmax`, `mimicry-and-ranks`." in text


# --- from the folder to the report ---


FEW = ("scores: ranks", "4 bits: squares", "ten ids: soft-labels", "separate: cka", "reranker: ranks")
SHORT = {
    "2b": dataclasses.replace(TINY["2b"], seeds=(5, 6)),
    "3": dataclasses.replace(TINY["3"], seeds=(5, 6), arms={name: plan.VIEWS[name] for name in (
        *FEW, "4 bits: ranks", "ten ids: ranks", "separate: ranks")}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("flickr8k")
    photographs = read_folder(root)
    cache = filled(photographs)
    found = {}
    for part, sizes in SHORT.items():
        of = Heads(photographs, cache, Store(root / part), PICTURES["train"])
        found[part] = study.Study(of, sizes, search().chosen, of.store)
        found[part].follow(Console(file=io.StringIO()))
    return found


def test_the_teacher_is_trained_once(trained, monkeypatch):
    of = trained["3"]
    monkeypatch.setattr(heads, "train", None)
    again = study.Study(of.of, of.sizes, of.base, of.store)
    for side in PICTURES:
        assert torch.equal(again.teacher.sides[side].pictures, of.teacher.sides[side].pictures)
    assert trained["2b"].data == of.data
    other = dataclasses.replace(of.sizes, teacher=(8, 9))
    with pytest.raises(TypeError):  # other heads are to be trained
        study.Study(of.of, other, of.base, of.store)


def test_a_seed_trains_the_same_student_in_every_view(trained):
    of = trained["3"]
    arms = {
        "": ("clip", {}),
        "scores": ("squares", {"weight": 1e-9}),
        "separate": ("projected-mimicry", {"weight": 0.0}),
        "reranker": ("ranks", {"weight": 1e-9}),
    }
    first, *same = (
        study.train(
            Setting(loss, 0, "dev", view=view, **of.base, **changes), of.of.sides["train"], of.teacher
        )
        for view, (loss, changes) in arms.items()
    )
    plain = heads.train(heads.Setting("clip", 0, "dev", **of.base), of.of.sides["train"])
    assert torch.equal(first.of_pictures[1].weight, plain.of_pictures[1].weight)
    for one in same:
        for mine, theirs in zip(one.parameters(), first.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
    taught = study.train(
        Setting("ranks", 0, "dev", view="reranker", weight=16.0, **of.base), of.of.sides["train"], of.teacher
    )
    assert (taught.of_sentences[1].weight - first.of_sentences[1].weight).abs().max() > 2e-4


def test_a_losss_own_parameters_are_the_seeds(trained):
    of, changes = trained["3"], {"view": "separate", "weight": 16.0}
    setting = Setting("projected-mimicry", 0, "dev", **of.base, **changes)
    found = []
    for state in range(2):
        torch.manual_seed(state)
        found.append(study.train(setting, of.of.sides["train"], of.teacher))
    first, second = found
    assert torch.equal(first.of_pictures[1].weight, second.of_pictures[1].weight)


@pytest.mark.parametrize("part", plan.PLANS)
def test_a_report_is_made_of_the_records_alone(trained, tmp_path, part):
    find, sizes = command.finished(trained[part].store, Setting), SHORT[part]
    text = report.write(sizes, search(), find, tmp_path, {}).read_text(encoding="utf-8")
    found = findings.findings(sizes, search(), find, {})
    assert found.missing == 0
    assert "are missing" not in text
    for arm in (plan.CLIP, *sizes.arms):
        mean = np.mean([PRIMARY(record) for record in found.records[arm].values()])
        assert f"| `{arm}`" in text
        assert f"{mean:.2f} ± " in text
    (of_teacher,) = find([study.of_teacher(sizes, search().chosen)]).values()
    assert f"an R@10 of {PRIMARY(of_teacher):.1f} and a τ_c of {CORRELATION(of_teacher):.1f}" in text


@pytest.mark.parametrize("part", plan.PLANS)
def test_the_command_reports_without_data(trained, tmp_path, part):
    text = reported(part, trained[part].store, tmp_path)
    assert "of the planned trainings on the test side are missing" in text  # none is of the quick plan
