"""Lists of graded captions in open_clip's trainer: read, encoded, and trained as in a loop of one's own."""

from __future__ import annotations

import json
import math
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import open_clip_train.data
import pandas
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import ready
from teacher_features import encoded, resumed
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

GOOD = ["a dog", "a cat"], [2, 1]


def csv(path: Path, *lists: Any) -> tuple[Any, str]:
    """A CSV file of own captions a0, a1, …, as the trainer reads it; cells are JSON unless they are texts."""
    columns: dict[str, list[str]] = {"filepath": [], "title": [], "candidates": [], "grades": []}
    for i, of_row in enumerate(lists):
        cells = (x if isinstance(x, str) else json.dumps(x) for x in of_row)
        for column, cell in zip(columns.values(), (f"{i}.png", f"a{i}", *cells), strict=True):
            column.append(cell)
    file = path / "data.csv"
    pandas.DataFrame(columns).to_csv(file, sep="\t", index=False)
    return open_clip_train.data.CsvDataset(str(file), None, "filepath", "title", sep="\t"), str(file)


@pytest.mark.parametrize(
    ("captions", "grades", "named"),
    [
        ([3], [1], "^candidates must be texts; got 3 in"),
        ("[a]", [1], r"must be JSON lists; got .*\[a\].* in"),
        (["x", "a1"], [1, 2], "own caption 'a1' cannot be above all candidates and among them, in"),
        (["x", "y"], [1e308, 1], "1e\\+308"),
        (list("abcd"), [1] * 4, "has 4 candidates, more than --ranked-lists-max-candidates 3"),
    ],
)
def test_a_bad_list_is_refused_by_its_row_or_sample(
    tmp_path: Path, captions: Any, grades: Any, named: str
) -> None:
    dataset, file = csv(tmp_path, GOOD, (captions, grades))
    lists = Candidates(own_caption="top", max_candidates=3)
    with pytest.raises(ValueError, match=named) as error:
        lists.read_rows(file, "\t", dataset)
    assert f"row 2 of {file}" in str(error.value)
    members = {
        "candidates.json": (captions if isinstance(captions, str) else json.dumps(captions)).encode(),
        "grades.json": json.dumps(grades).encode(),
    }
    with pytest.raises(ValueError, match=named) as error:
        lists.read_sample({"__key__": "7", "__url__": "x.tar", "png": b"", **members}, "a1", b"")
    assert "sample '7' of x.tar" in str(error.value)


@pytest.mark.parametrize(
    ("grades", "own", "warned"), [([2, 2], "apart", 1), ([2, 2], "top", 0), ([2, 1], "apart", 0)]
)
def test_lists_without_any_order_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, grades: Any, own: Any, warned: int
) -> None:
    dataset, file = csv(tmp_path, (["x", "y"], grades), (["z"], [0]))
    with caplog.at_level("WARNING", "rankloss_trainers"):
        Candidates(own_caption=own).read_rows(file, "\t", dataset)
    assert [file in x.getMessage() for x in caplog.records] == [True] * warned


def test_lists_that_are_not_there_are_refused(tmp_path: Path) -> None:
    dataset, _ = csv(tmp_path, GOOD)
    (tmp_path / "other.csv").write_text("filepath\ttitle\tcandidates\nx\ty\t[]\n")
    with pytest.raises(ValueError, match="has no column 'grades'; it has filepath, title, candidates"):
        Candidates().read_rows(str(tmp_path / "other.csv"), "\t", dataset)
    sample = {"__key__": "7", "__url__": "x.tar", "png": b"", "candidates.json": b'["a"]'}
    with pytest.raises(ValueError, match=r"sample '7' of x\.tar has no grades\.json; every picture needs"):
        Candidates(max_candidates=3).read_sample(sample, "a", b"")
    with pytest.raises(ValueError, match=r"a webdataset needs .* --ranked-lists-max-candidates"):
        Candidates().read_sample({**sample, "grades.json": b"[1]"}, "a", b"")


def test_a_picture_twice_in_a_batch_is_refused_with_in_batch_negatives(tmp_path: Path) -> None:
    """By its file, however its path is written, or in shards by its content; captions do not matter."""
    lists, term = Candidates(max_candidates=2), RankedListsTerm(RankedLists(in_batch_negatives=True))
    dataset, file = csv(tmp_path, GOOD, GOOD, GOOD)
    dataset.images = ["0.png", "a/0.png", "./0.png"]
    rows = lists.read_rows(file, "\t", dataset)
    members = {"candidates.json": b'["a dog", "a cat"]', "grades.json": b"[2, 1]"}
    of_samples = [("0", "a", b"first"), ("1", "a", b"second"), ("2", "b", b"first"), ("0", "a", b"third")]
    samples = [
        lists.read_sample({"__url__": "x.tar", "__key__": key, "png": image, **members}, text, image)
        for key, text, image in of_samples
    ]

    def loss(*texts: str) -> Tensor:
        encoded = lists.encode(lambda captions: torch.ones(len(captions), 1, dtype=torch.long), [*texts])
        v, t = torch.eye(4)[: len(texts)], torch.full((3 * len(texts), 4), 0.5)
        return term(logit_scale=1.0, **lists.outputs({"image_features": v, "text_features": t}, encoded))

    for texts in (rows, samples[:3]):
        with pytest.raises(ValueError, match="rows 0 and 2 of the batch are one query"):
            loss(*texts)
    loss(*rows[:2])
    loss(*samples[:2], samples[3])


@pytest.mark.parametrize("is_csv", [True, False])
def test_an_own_caption_in_another_list_is_no_negative_of_its_picture(tmp_path: Path, is_csv: bool) -> None:
    """The second list has the first picture's own caption, which stands apart from the first list."""
    column, lists = Candidates(max_candidates=2), [(["x", "y"], [2, 1]), (["a0", "z"], [1, 2])]
    if is_csv:
        dataset, file = csv(tmp_path, *lists)
        texts = column.read_rows(file, "\t", dataset)
    else:
        members = [
            {"candidates.json": json.dumps(x).encode(), "grades.json": json.dumps(y).encode()}
            for x, y in lists
        ]
        samples = [{"__url__": "x.tar", "__key__": f"{i}", **x} for i, x in enumerate(members)]
        texts = [column.read_sample(sample, f"a{i}", bytes([i])) for i, sample in enumerate(samples)]
    encoded = column.encode(lambda captions: torch.ones(len(captions), 1, dtype=torch.long), texts)
    features = torch.nn.functional.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
    v, t = features[:2], features[2:]  # the own captions, then x, y, a0, z
    inputs = column.outputs({"image_features": v, "text_features": t}, encoded)
    term = RankedListsTerm(RankedLists(in_batch_negatives=True))
    index, grades = torch.tensor([[2, 3], [4, 5]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    expected = literal(v, t, index, grades, 10.0, in_batch_negatives=True, excluded=[4, -1])
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


def lists_of(trainer: Trainer) -> list[tuple[list[str], list[float]]]:
    """One to three captions for each pair, some shared, with ties, and some without a grade."""
    pool = [f"{i % 5} pears and {i % 3} plums" for i in range(15)]
    grades = [1.0, 0.0, 1.0, -math.inf]
    return [
        ([pool[(n + 4 * k) % 15] for k in range(1 + n % 3)], [grades[(n + k) % 4] for k in range(1 + n % 3)])
        for n in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def data(trainer: Trainer) -> dict[str, list[str]]:
    """The options that name the data, in the two formats."""
    lines = ["filepath\ttitle\tcandidates\tgrades"]
    shard = trainer.directory / "lists.tar"
    with tarfile.open(shard, "w") as file:
        for n, (row, (captions, grades)) in enumerate(zip(trainer.rows, lists_of(trainer), strict=True)):
            cells = json.dumps(captions), json.dumps(grades)
            lines.append("\t".join([*row[:2], *cells]))
            members = dict(zip(("candidates.json", "grades.json"), (x.encode() for x in cells), strict=True))
            add_sample(file, f"{n:03}", png=Path(row[0]).read_bytes(), txt=row[1].encode(), **members)
    (trainer.directory / "lists.csv").write_text("\n".join(lines) + "\n")
    samples = ["--train-num-samples", str(SAMPLES), "--ranked-lists-max-candidates", "3"]
    return {
        "csv": ["--train-data", str(trainer.directory / "lists.csv")],
        "webdataset": ["--train-data", str(shard), "--dataset-type", "webdataset", *samples],
    }


def own_step(trainer: Trainer, run: Run, scale_factor: float) -> dict[str, Tensor]:
    """The second step of a run, from its first checkpoint, by a loop over lists and items."""
    clip, optimizer = resumed(trainer, run)
    v, t = encoded(trainer, clip)
    titles = [row[1] for row in trainer.rows]
    tokenize = open_clip.get_tokenizer(f"local-dir:{trainer.directory / 'tiny'}")
    s, lists = clip.logit_scale.exp(), lists_of(trainer)
    everyone = sorted({*titles, *(caption for captions, _ in lists for caption in captions)})
    items = clip.encode_text(tokenize(everyone), normalize=True)
    index, grades = torch.zeros(SAMPLES, 4, dtype=torch.long), torch.full((SAMPLES, 4), math.nan)
    for n, (title, (captions, given)) in enumerate(zip(titles, lists, strict=True)):
        own = [title, *captions]
        index[n, : len(own)] = torch.tensor([everyone.index(caption) for caption in own])
        grades[n, : len(own)] = torch.tensor([1 + max(0.0, *given), *given])
    of_lists = literal(v, items, index, grades, s, in_batch_negatives=True)
    (ClipLoss()(v, t, s) + 0.5 * of_lists).backward()
    clip.logit_scale.grad *= scale_factor
    optimizer.step()
    return dict(clip.state_dict())


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_run_is_a_loop_of_ones_own(trainer: Trainer, data: dict[str, list[str]], kind: str) -> None:
    """The gradient of the scale is the trainer's own, which counts every micro-batch in full."""
    sizes = ["--batch-size", str(SAMPLES)]
    if kind == "webdataset":
        sizes = ["--batch-size", str(SAMPLES // 2), "--accum-freq", "2", "--grad-checkpointing"]
    run = trainer.call(f"lists, {kind}", *SETTING, *OPTIONS, *data[kind], *sizes)
    found, before = run.epoch(2), run.epoch(1)
    for name, value in own_step(trainer, run, scale_factor=1.0 if kind == "csv" else 2.0).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert (found["text_projection"] - before["text_projection"]).abs().max() > 1e-3
    assert {"contrastive_loss", "ranked_lists_loss"} <= run.scalars.keys()


@pytest.mark.parametrize(("section", "number"), [("Hard negatives", 1), ("In open_clip's trainer", 2)])
def test_the_pages_file_and_commands_are_read(
    trainer: Trainer, data: dict[str, list[str]], section: str, number: int
) -> None:
    """The file of the page, and the options of its commands on the test's data."""
    page = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (text,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for name in re.findall(r"^\w+\.jpg", text, re.MULTILINE):
        text = text.replace(name, trainer.rows[ord(name[0]) - ord("a")][0])
    (trainer.directory / f"page {number}.csv").write_text(text)
    (block,) = re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    commands = block.replace("\\\n", " ").splitlines()
    assert len(commands) == number
    for command in commands:
        options = shlex.split(command)
        given = options[options.index("--loss") :]
        files = ["--train-data", str(trainer.directory / f"page {number}.csv"), "--batch-size", "2"]
        files = data["webdataset"][:-2] if "webdataset" in options else files
        run = run_of(ready(parse_args(trainer.arguments("page", *files, *given))))
        assert "ranked-lists" in run.name
        assert run.text_columns() is not None


def test_a_bad_sample_ends_the_run_before_a_checkpoint(trainer: Trainer, data: dict[str, list[str]]) -> None:
    shard = trainer.directory / "bad.tar"
    with tarfile.open(shard, "w") as file:
        for n, row in enumerate(trainer.rows):
            grades = b"[NaN]" if n == 5 else b"[1]"
            members = {"candidates.json": b'["a"]', "grades.json": grades, "txt": row[1].encode()}
            add_sample(file, f"{n:03}", png=Path(row[0]).read_bytes(), **members)
    files = ["--train-data", str(shard), *data["webdataset"][2:]]
    run = trainer.call("bad sample", *SETTING, "--loss", "ranked-lists", *files, code=1)
    assert re.search(r"grades .* nan in sample '005' of .*bad\.tar", run.output)
    assert not list((run.directory / "checkpoints").glob("*.pt"))
