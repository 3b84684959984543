"""Lists of graded captions in open_clip's trainer: read, encoded, and trained as in a loop of one's own."""

from __future__ import annotations

import json
import math
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import open_clip_train.data
import pandas
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import completed_args
from teacher_features import features_of_all_pairs, model_after_first_epoch
from torch import Tensor
from trainer_runs import SAMPLES, Run, Trainer

from lists_item_by_item import literal
from rankloss import ClipLoss, RankedLists
from rankloss_open_clip.columns.candidates import Candidates
from rankloss_open_clip.training import run_of
from rankloss_trainers.graded.term import RankedListsTerm
from samples import add_sample

PAGE = Path(__file__).parents[2] / "docs/lists.md"

# --- what is refused --------------------------------------------------------------------------------------

A_LIST = ["a dog", "a cat"], [2, 1]  # candidates, and their grades


def as_json(cell: Any) -> str:
    """A cell as JSON; a text is one already."""
    return cell if isinstance(cell, str) else json.dumps(cell)


def csv_dataset(folder: Path, *lists: tuple[Any, Any]) -> tuple[Any, str]:
    """The trainer's dataset of a CSV file, and its path; the own captions of its lists are a0, a1, …."""
    rows = [
        (f"{number}.png", f"a{number}", as_json(candidates), as_json(grades))
        for number, (candidates, grades) in enumerate(lists)
    ]
    file = folder / "data.csv"
    table = pandas.DataFrame(rows, columns=["filepath", "title", "candidates", "grades"])
    table.to_csv(file, sep="\t", index=False)
    return open_clip_train.data.CsvDataset(str(file), None, "filepath", "title", sep="\t"), str(file)


def sample_of(key: str, candidates: Any, grades: Any) -> dict[str, Any]:
    """A sample of the shard x.tar, with its list."""
    members = {"candidates.json": as_json(candidates).encode(), "grades.json": as_json(grades).encode()}
    return {"__key__": key, "__url__": "x.tar", "png": b"", **members}


bad_lists = pytest.mark.parametrize(
    ("candidates", "grades", "message"),
    [
        pytest.param([3], [1], "^candidates must be texts; got 3 in", id="a number as candidate"),
        pytest.param("[a]", [1], r"must be JSON lists; got .*\[a\].* in", id="no JSON"),
        pytest.param(
            ["x", "a1"],
            [1, 2],
            "own caption 'a1' cannot be above all candidates and among them, in",
            id="own caption among the candidates",
        ),
        pytest.param(
            ["x", "y"],
            [2.0**1023, 1],
            r"grades must be below 2\*\*1023, .* got 8\.98\d*e\+307 in",
            id="a grade whose double is infinite",
        ),
        pytest.param(
            ["a", "b", "c", "d"],
            [1, 1, 1, 1],
            "has 4 candidates, more than --ranked-lists-max-candidates 3",
            id="too many candidates",
        ),
    ],
)


@bad_lists
def test_a_bad_list_of_a_csv_file_is_refused_by_its_row(
    tmp_path: Path, candidates: Any, grades: Any, message: str
) -> None:
    dataset, file = csv_dataset(tmp_path, A_LIST, (candidates, grades))
    column = Candidates(own_caption="top", max_candidates=3)
    with pytest.raises(ValueError, match=message) as error:
        column.read_rows(file, "\t", dataset)
    assert f"row 2 of {file}" in str(error.value)


@bad_lists
def test_a_bad_list_of_a_webdataset_is_refused_by_its_sample(
    candidates: Any, grades: Any, message: str
) -> None:
    column = Candidates(own_caption="top", max_candidates=3)
    with pytest.raises(ValueError, match=message) as error:
        column.read_sample(sample_of("7", candidates, grades), caption="a1", image=b"")
    assert "sample '7' of x.tar" in str(error.value)


def test_the_own_caption_has_a_finite_grade_above_the_highest_that_is_taken() -> None:
    highest = math.nextafter(2.0**1023, 0)
    column = Candidates(own_caption="top", max_candidates=2)
    text = column.read_sample(sample_of("7", ["x", "y"], [highest, 1]), caption="a1", image=b"")
    _picture_id, _own_id, captions, (top, *others) = json.loads(text)
    assert captions == ["a1", "x", "y"]
    assert math.inf > top > highest
    assert others == [highest, 1]


@pytest.mark.parametrize(
    ("grades", "own_caption", "is_warned_of"),
    [
        pytest.param([2, 2], "apart", True, id="ties alone"),
        pytest.param([2, 2], "top", False, id="ties below the own caption"),
        pytest.param([2, 1], "apart", False, id="an order"),
    ],
)
def test_lists_without_any_order_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, grades: Any, own_caption: Any, is_warned_of: bool
) -> None:
    list_of_one = ["z"], [0]  # which has no order either, unless the own caption is above it
    dataset, file = csv_dataset(tmp_path, (["x", "y"], grades), list_of_one)
    with caplog.at_level("WARNING", "rankloss_trainers"):
        Candidates(own_caption=own_caption).read_rows(file, "\t", dataset)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (1 if is_warned_of else 0)
    assert all(file in warning for warning in warnings)


def test_a_csv_file_without_a_column_of_the_lists_is_refused(tmp_path: Path) -> None:
    dataset, file = csv_dataset(tmp_path, A_LIST)
    pandas.read_csv(file, sep="\t").drop(columns="grades").to_csv(file, sep="\t", index=False)
    with pytest.raises(ValueError, match="has no column 'grades'; it has filepath, title, candidates"):
        Candidates().read_rows(file, "\t", dataset)


def test_a_sample_without_a_member_of_the_lists_is_refused() -> None:
    sample = sample_of("7", *A_LIST)
    del sample["grades.json"]
    with pytest.raises(ValueError, match=r"sample '7' of x\.tar has no grades\.json; every picture needs"):
        Candidates(max_candidates=3).read_sample(sample, caption="a", image=b"")


def test_lists_of_a_webdataset_need_the_length_of_the_longest() -> None:
    with pytest.raises(ValueError, match=r"a webdataset needs .* --ranked-lists-max-candidates"):
        Candidates(max_candidates=None).read_sample(sample_of("7", *A_LIST), caption="a", image=b"")


def one_token_each(captions: list[str]) -> Tensor:
    """A tokenizer where the tokens do not matter, as the features are given."""
    return torch.ones(len(captions), 1, dtype=torch.long)


def evaluate_with_negatives(column: Candidates, texts: list[str]) -> Tensor:
    """The loss of a batch, with in-batch negatives: of lists that the column has read, and some features."""
    encoded = column.encode(one_token_each, texts)
    own_captions_and_two_candidates_each = 3 * len(texts)
    features = {
        "image_features": torch.eye(4)[: len(texts)],
        "text_features": torch.full((own_captions_and_two_candidates_each, 4), 0.5),
    }
    term = RankedListsTerm(RankedLists(in_batch_negatives=True))
    return term(logit_scale=1.0, **column.outputs(features, encoded))


ONE_QUERY = "rows 0 and 2 of the batch are one query"


def test_a_picture_twice_in_a_batch_of_a_csv_file_is_refused_with_in_batch_negatives(tmp_path: Path) -> None:
    """A picture is its file, however the path is written."""
    column = Candidates(max_candidates=2)
    dataset, file = csv_dataset(tmp_path, A_LIST, A_LIST, A_LIST)
    dataset.images = ["0.png", "a/0.png", "./0.png"]
    texts = column.read_rows(file, "\t", dataset)
    with pytest.raises(ValueError, match=ONE_QUERY):
        evaluate_with_negatives(column, texts)
    evaluate_with_negatives(column, texts[:2])  # whose pictures are two files


def test_a_picture_twice_in_a_batch_of_samples_is_refused_with_in_batch_negatives() -> None:
    """A picture is its content: neither the key of a sample nor its caption counts."""
    column = Candidates(max_candidates=2)

    def read(key: str, caption: str, image: bytes) -> str:
        return column.read_sample(sample_of(key, *A_LIST), caption, image)

    first, second = read("0", "a", b"first"), read("1", "a", b"second")
    with pytest.raises(ValueError, match=ONE_QUERY):
        evaluate_with_negatives(column, [first, second, read("2", "b", b"first")])
    evaluate_with_negatives(column, [first, second, read("0", "a", b"third")])


LISTS = [(["x", "y"], [2, 1]), (["a0", "z"], [1, 2])]
"""The second list has the first picture's own caption, a0, which stands apart from the first list."""


def texts_of_csv(column: Candidates, folder: Path) -> list[str]:
    """LISTS as a column reads them from the rows of a CSV file."""
    dataset, file = csv_dataset(folder, *LISTS)
    return column.read_rows(file, "\t", dataset)


def texts_of_samples(column: Candidates, folder: Path) -> list[str]:
    """LISTS as a column reads them from webdataset samples."""
    return [
        column.read_sample(sample_of(f"{i}", *of_sample), caption=f"a{i}", image=bytes([i]))
        for i, of_sample in enumerate(LISTS)
    ]


@pytest.mark.parametrize("read", [texts_of_csv, texts_of_samples])
def test_an_own_caption_in_another_list_is_no_negative_of_its_picture(
    tmp_path: Path, read: Callable[[Candidates, Path], list[str]]
) -> None:
    """Against the loss written item by item, which is told to leave that caption out."""
    column = Candidates(max_candidates=2)
    encoded = column.encode(one_token_each, read(column, tmp_path))
    features = torch.nn.functional.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
    images, texts = features[:2], features[2:]
    inputs = column.outputs({"image_features": images, "text_features": texts}, encoded)
    term = RankedListsTerm(RankedLists(in_batch_negatives=True))

    _own_0, _own_1, x, y, a0, z = range(6)  # the rows of texts
    none = -1
    expected = literal(
        images,
        texts,
        index=torch.tensor([[x, y], [a0, z]]),
        grades=torch.tensor([[2.0, 1.0], [1.0, 2.0]]),
        logit_scale=10.0,
        in_batch_negatives=True,
        excluded=[a0, none],
    )
    torch.testing.assert_close(term(logit_scale=10.0, **inputs), expected)


# --- runs of the trainer ----------------------------------------------------------------------------------

SETTING = [  # steps that are proportional to small gradients
    *("--epochs", "2", "--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)", "--skip-scheduler", "--wd", "0"),
    *("--lr", "0.01", "--beta1", "0.9", "--beta2", "0.98", "--eps", "0.001"),
]
OPTIONS = [
    *("--loss", "ranked-lists", "--ranked-lists-weight", "0.5", "--ranked-lists-own-caption", "top"),
    *("--ranked-lists-in-batch-negatives", "include"),
]
MAX_CANDIDATES = ["--ranked-lists-max-candidates", "3"]  # as a webdataset needs


def graded_captions() -> list[tuple[list[str], list[float]]]:
    """One to three captions for each pair, some shared, and their grades, with ties; −∞ is no grade."""
    pool = [f"{i % 5} pears and {i % 3} plums" for i in range(15)]
    grades = [1.0, 0.0, 1.0, -math.inf]
    lists = []
    for n in range(SAMPLES):
        places = range(1 + n % 3)
        lists.append(([pool[(n + 4 * k) % 15] for k in places], [grades[(n + k) % 4] for k in places]))
    return lists


@pytest.fixture(scope="module")
def data(trainer: Trainer) -> dict[str, list[str]]:
    """The options that name the data of :func:`graded_captions`, in the two formats."""
    lines = ["filepath\ttitle\tcandidates\tgrades"]
    shard = trainer.directory / "lists.tar"
    with tarfile.open(shard, "w") as file:
        rows = zip(trainer.rows, graded_captions(), strict=True)
        for n, ((picture, title, _), (captions, grades)) in enumerate(rows):
            lines.append("\t".join([picture, title, json.dumps(captions), json.dumps(grades)]))
            members = {
                "candidates.json": json.dumps(captions).encode(),
                "grades.json": json.dumps(grades).encode(),
            }
            add_sample(file, f"{n:03}", png=Path(picture).read_bytes(), txt=title.encode(), **members)
    (trainer.directory / "lists.csv").write_text("\n".join(lines) + "\n")
    samples = ["--dataset-type", "webdataset", "--train-num-samples", str(SAMPLES)]
    return {
        "csv": ["--train-data", str(trainer.directory / "lists.csv")],
        "webdataset": ["--train-data", str(shard), *samples, *MAX_CANDIDATES],
    }


def second_step_item_by_item(
    trainer: Trainer, run: Run, *, scale_gradient_factor: float
) -> dict[str, Tensor]:
    """The model after the second step of a run, from its first checkpoint, by a loop over lists and items.

    The loss is CLIP's plus half that of the lists, as OPTIONS say: the own caption has a grade above the
    others of its list, and other lists' candidates are negatives.
    """
    clip, optimizer = model_after_first_epoch(trainer, run)
    images, own_texts = features_of_all_pairs(trainer, clip)
    scale, lists = clip.logit_scale.exp(), graded_captions()
    titles = [title for _, title, _ in trainer.rows]
    all_captions = sorted({*titles, *(caption for captions, _ in lists for caption in captions)})
    tokenize = open_clip.get_tokenizer(f"local-dir:{trainer.directory / 'tiny'}")
    items = clip.encode_text(tokenize(all_captions), normalize=True)
    # An own caption and up to three candidates; a grade of NaN is a place without an item.
    index, grades = torch.zeros(SAMPLES, 4, dtype=torch.long), torch.full((SAMPLES, 4), math.nan)
    for n, (title, (captions, grades_of_list)) in enumerate(zip(titles, lists, strict=True)):
        with_own = [title, *captions]
        own_grade = 1 + max(0.0, *grades_of_list)
        index[n, : len(with_own)] = torch.tensor([all_captions.index(caption) for caption in with_own])
        grades[n, : len(with_own)] = torch.tensor([own_grade, *grades_of_list])
    of_lists = literal(images, items, index, grades, scale, in_batch_negatives=True)
    (ClipLoss()(images, own_texts, scale) + 0.5 * of_lists).backward()
    clip.logit_scale.grad *= scale_gradient_factor
    optimizer.step()
    return dict(clip.state_dict())


@pytest.mark.parametrize(
    ("data_format", "batches_of_a_step"),
    [pytest.param("csv", 1, id="csv"), pytest.param("webdataset", 2, id="webdataset, accumulated")],
)
def test_a_run_is_a_loop_of_ones_own(
    trainer: Trainer, data: dict[str, list[str]], data_format: str, batches_of_a_step: int
) -> None:
    """In the gradient of the scale the trainer counts every batch of an accumulated step in full."""
    sizes = ["--batch-size", str(SAMPLES // batches_of_a_step)]
    if batches_of_a_step > 1:
        sizes += ["--accum-freq", str(batches_of_a_step), "--grad-checkpointing"]
    run = trainer.call(f"lists, {data_format}", *SETTING, *OPTIONS, *data[data_format], *sizes)
    before, after = run.tensors_after_epoch(1), run.tensors_after_epoch(2)
    expected = second_step_item_by_item(trainer, run, scale_gradient_factor=float(batches_of_a_step))
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=2e-5, msg=name)
    change = (after["text_projection"] - before["text_projection"]).abs().max()
    assert change > 1e-3, "the step is far larger than the tolerance"
    assert {"contrastive_loss", "ranked_lists_loss"} <= run.scalars.keys()


@pytest.mark.parametrize(
    ("section", "commands_there"), [("Hard negatives", 1), ("In open_clip's trainer", 2)]
)
def test_the_pages_commands_are_accepted_and_its_file_is_read(
    trainer: Trainer, data: dict[str, list[str]], section: str, commands_there: int
) -> None:
    """The section's table with this test's pictures, and the options of its commands from ``--loss`` on.

    A command for a webdataset has this file's shard in place of the page's. A shard is not read before it is
    trained on; a CSV file is, when the command line is parsed.
    """
    text = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (table,) = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for number, name in enumerate(sorted(set(re.findall(r"^\w+\.jpg", table, re.MULTILINE)))):
        table = table.replace(name, trainer.rows[number][0])
    file = trainer.directory / f"{section}.csv"
    file.write_text(table)
    (console,) = re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    commands = console.replace("\\\n", " ").splitlines()
    assert len(commands) == commands_there
    for command in commands:
        words = shlex.split(command)
        options_of_loss = words[words.index("--loss") :]
        if "webdataset" in words:
            source = data["webdataset"][: -len(MAX_CANDIDATES)]  # which the command itself names
        else:
            source = ["--train-data", str(file), "--batch-size", "2"]
        run = run_of(completed_args(parse_args(trainer.arguments("page", *source, *options_of_loss))))
        assert "ranked-lists" in run.name
        assert run.text_columns() is not None


def test_a_bad_sample_ends_the_run_before_a_checkpoint(trainer: Trainer, data: dict[str, list[str]]) -> None:
    shard = trainer.directory / "bad.tar"
    with tarfile.open(shard, "w") as file:
        for n, (picture, title, _) in enumerate(trainer.rows):
            grades = b"[NaN]" if n == 5 else b"[1]"
            members = {"candidates.json": b'["a"]', "grades.json": grades, "txt": title.encode()}
            add_sample(file, f"{n:03}", png=Path(picture).read_bytes(), **members)
    source = [*data["webdataset"], "--train-data", str(shard)]  # the last one counts
    run = trainer.call("bad sample", *SETTING, "--loss", "ranked-lists", *source, code=1)
    assert re.search(r"grades .* nan in sample '005' of .*bad\.tar", run.output)
    assert not list((run.directory / "checkpoints").glob("*.pt"))
