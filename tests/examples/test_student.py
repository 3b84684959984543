"""The photographs' student: its data and model, and the arms' losses against their formulas."""

from __future__ import annotations

import pytest
import study_formulas
import torch
from studies.photographs import data, model, train
from studies.photographs import student_losses as losses
from study_formulas import cross_entropy, mean_of, pearson, unit, within

import rankloss

# --- data and student ---


def test_words_of_the_train_side_are_numbered_and_others_are_unknown():
    words = data.vocabulary(["A dog .", "a cat, a dog", "a bird"])
    assert words == {"a": 2, "dog": 3}
    found = data.numbered([["The DOG", "!"], ["a dog a", "a"]], words)
    assert found.tolist() == [[[1, 3, 0], [1, 0, 0]], [[2, 3, 2], [2, 0, 0]]]
    assert data.numbered([["a " * 99]], words).shape == (1, 1, model.MAX_WORDS)


def test_a_crop_is_a_part_of_its_own_picture_as_often_mirrored_as_not():
    n, size = 200, data.PICTURE_SIZE
    number = torch.arange(size * size, dtype=torch.int32).view(1, size, size, 1) + 10000 * torch.arange(
        n, dtype=torch.int32
    ).view(n, 1, 1, 1)
    found = train.crops(number, torch.Generator().manual_seed(0))
    corners, mirrored = set(), 0
    for i, crop in enumerate(found[..., 0]):
        flipped = bool(crop[0, 0] > crop[0, -1])
        crop = crop.flip(1) if flipped else crop
        y, x = divmod(int(crop[0, 0]) - 10000 * i, size)
        assert torch.equal(crop, number[i, y : y + model.CROP, x : x + model.CROP, 0])
        mirrored += flipped
        corners.add((y, x))
    assert 70 < mirrored < 130
    assert {max(of) for of in zip(*corners, strict=True)} == {size - model.CROP}
    assert {min(of) for of in zip(*corners, strict=True)} == {0}


def test_a_students_features_do_not_depend_on_padding_and_on_the_pictures_edge():
    torch.manual_seed(0)
    student = model.Student(9).eval()
    for x in student.transformer.parameters():  # its layers start as nothing
        torch.nn.init.normal_(x, std=0.3)
    sentences = torch.tensor([[[2, 3, 0], [4, 0, 0]], [[5, 6, 7], [8, 1, 0]]])
    found = student.sentences(sentences)
    assert found.shape == (2, 2, model.WIDTH)
    torch.testing.assert_close(student.sentences(sentences[0, :1, :2]), found[0, :1])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 2))
    swapped = student.sentences(torch.tensor([[3, 2]]))
    assert (swapped - found[0, :1]).abs().max() > 1e-3  # the order of words counts
    pictures = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    middle = student.pictures(pictures)
    pictures[:, :4] = 0
    torch.testing.assert_close(student.pictures(pictures), middle)
    torch.testing.assert_close(student.pictures(pictures[:, 4:60, 4:60]), middle)


# --- the arms' losses ---

N, D, WIDTHS = 6, 4, (7, 5)
S, S_TEACHER = 5.0, 20.0


STUDENT = unit(N, D, 0), unit(N, D, 1)
TEACHER = unit(N, WIDTHS[0], 2), unit(N, WIDTHS[1], 3)


def numpy_mimicry(v, t, loss):
    projected = (
        x @ project.weight.detach().numpy().T
        for x, project in zip((v, t), loss.term.projections, strict=True)
    )
    return study_formulas.mimicry([*map(study_formulas.normalized, projected)], TEACHER)


RIVALS = {
    "softmax": lambda v, t, _: mean_of(cross_entropy, within((v, t), S), within(TEACHER, S_TEACHER)),
    "pearson": lambda v, t, _: mean_of(pearson, within((v, t), S), within(TEACHER, S_TEACHER)),
    "distances": lambda v, t, _: study_formulas.distances((v, t), TEACHER),
    "cka": lambda v, t, _: study_formulas.cka((v, t), TEACHER),
    "projected-mimicry": numpy_mimicry,
}


def given(arm):
    return losses.references(arm, tuple(map(torch.from_numpy, TEACHER)))


@pytest.mark.parametrize("arm", RIVALS)
def test_a_rival_is_its_formula(arm):
    loss = losses.build(arm, D, WIDTHS, weight=2.5, scale=S_TEACHER, label_smoothing=0.1).double()
    base, scale = losses.build("clip", D, WIDTHS, label_smoothing=0.1), torch.tensor(S)

    def term(*features):
        return loss(*features, scale, **given(arm)) - base(*features, scale)

    study_formulas.assert_is_formula(term, lambda *x: RIVALS[arm](*x, loss), STUDENT, 2.5)


def test_ranks_are_the_librarys_by_the_encoders_of_the_arm():
    features = [*map(torch.from_numpy, STUDENT)]

    def added(arm, weight, **options):
        loss = losses.build(arm, D, WIDTHS, weight=weight, **options)
        loss.set_epoch(3, 3)
        clip = rankloss.ClipLoss()(*features, logit_scale=S)
        return (loss(*features, torch.tensor(S), **given(arm)) - clip).item()

    teacher = given("ranks")
    names = [*teacher]
    terms = rankloss.RankConsistency(cross_modal=0.0, in_modal=1.0, top_k=2)
    for arm, kept in {"picture-ranks": names[:1], "text-ranks": names[1:], "ranks": names}.items():
        expected = terms(*features, logit_scale=S, **{name: teacher[name] for name in kept}).item()
        assert added(arm, 8.0, top_k=2) == pytest.approx(2 * 8 / 16 * expected, rel=1e-5)
    expected = rankloss.RankConsistency()(*features, logit_scale=S).item()
    assert added("rankclip", 4.0) == pytest.approx(2 * 4 / 16 * expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"arm: must be one of clip, rankclip, .*, got 'other'"):
        losses.build("other", D, WIDTHS)
