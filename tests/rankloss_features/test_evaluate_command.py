"""``rankloss evaluate``: numbers against open_clip's and the oracle, intervals, comparisons, refusals."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import scipy.stats
import tiny_teacher as tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from rankloss import metrics, reference
from rankloss_features import evaluation, opening, teachers
from rankloss_features.evaluate import evaluate
from rankloss_trainers.console import main
from samples import add_sample

WAYS = ("image_to_text", "text_to_image")


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a table whose cells are separated by tabs, each by the names of its columns."""
    with open(file, encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def write_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as such a table; its file."""
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def run_evaluate(sample: Path, data: Path, *options: str, model: str = "open_clip") -> int:
    """Run ``rankloss evaluate`` with a model of a folder; the exit code."""
    arguments = ["--model", f"local-dir:{sample}/{model}", "--data", str(data), "--workers", "0", *options]
    return main(["evaluate", *arguments])


def evaluated(
    sample: Path, data: Path, tmp_path: Path, *options: str, model: str = "open_clip"
) -> dict[str, Any]:
    """The result that the command writes as JSON."""
    assert run_evaluate(sample, data, "--json", str(tmp_path / "result.json"), *options, model=model) == 0
    return dict(json.loads((tmp_path / "result.json").read_text()))


def features_by_open_clip(sample: Path, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of pictures and of titles, as open_clip's evaluation computes them."""
    name = f"local-dir:{sample}/open_clip"
    model, _, transform = open_clip.create_model_and_transforms(name)
    pictures = torch.stack([transform(Image.open(row["filepath"])) for row in rows])
    with torch.no_grad():
        v, t, _ = model.eval()(pictures, open_clip.get_tokenizer(name)([row["title"] for row in rows]))
    return v, t


def write_changed_model(sample: Path, folder: Path) -> Path:
    """A copy of the sample's model, whose weights are changed at random, in a new folder; the folder."""
    shutil.copytree(sample / "open_clip", folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    torch.manual_seed(5)
    for weight in weights.values():
        if weight.is_floating_point():
            weight += 0.3 * torch.randn_like(weight)
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def test_numbers_of_unique_captions_are_open_clips_own(sample_folder: Path, tmp_path: Path) -> None:
    theirs = pytest.importorskip("open_clip_train.train").get_clip_metrics(
        *features_by_open_clip(sample_folder, read_csv(sample_folder / "train.csv")), torch.tensor(1.0)
    )
    result = evaluated(sample_folder, sample_folder / "train.csv", tmp_path, "--batch-size", "7")
    for way in WAYS:
        assert result["median_rank"][way] == theirs[f"{way}_median_rank"]
        for k in (1, 5, 10):
            assert result["recall"][f"{way}_R@{k}"]["value"] == pytest.approx(theirs[f"{way}_R@{k}"])
    assert set(result["recall"]) == {f"{way}_R@{k}" for way in WAYS for k in (1, 5, 10)}


def rows_with_shared_titles(sample_folder: Path) -> list[dict[str, str]]:
    """Pairs of which each two of a product have one title; one picture has a second title, before its own."""
    rows = read_csv(sample_folder / "train.csv")
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["product"] == second["product"]
        first["title"] = second["title"]
    rows.insert(3, {**rows[4], "title": "a second title"})
    assert len({row["title"] for row in rows}) == 48 // 2 + 1
    return rows


@pytest.mark.parametrize("column", ["product", "class"])
def test_numbers_by_ids_are_the_oracles(sample_folder: Path, tmp_path: Path, column: str) -> None:
    """Also where a title stands in several rows, and a picture has two titles."""
    rows = rows_with_shared_titles(sample_folder)
    table = write_csv(tmp_path / "grouped.csv", rows)
    result = evaluated(sample_folder, table, tmp_path, "--ids-key", column, "--k", "1", "5")
    pictures = list({row["filepath"]: row for row in rows}.values())
    texts = list({row["title"]: row for row in rows}.values())
    v, t = features_by_open_clip(sample_folder, pictures)[0], features_by_open_clip(sample_folder, texts)[1]
    ids = {
        "image_ids": [row[column] for row in pictures],
        "text_ids": [row[column] for row in texts],
    }
    expected = reference.recall(v.double(), t.double(), (1, 5), **ids)
    numbers = {name: recall["value"] for name, recall in result["recall"].items()}
    numbers |= {f"{way}_median_rank": rank for way, rank in result["median_rank"].items()}
    assert numbers == pytest.approx({name: expected[name] for name in numbers})
    # Two values of R@k and a median rank of each way: also of pictures and of texts among themselves.
    assert len(numbers) == 4 * 3


@pytest.fixture
def doubled(sample_folder: Path) -> list[dict[str, str]]:
    """Pairs in which every picture has a second caption: its class, which it shares with other pictures."""
    rows = read_csv(sample_folder / "val.csv")
    return [{**row, "title": title} for row in rows for title in (row["title"], f"{row['class']} here")]


def test_rows_of_one_picture_are_its_captions(
    sample_folder: Path, tmp_path: Path, doubled: list[dict[str, str]]
) -> None:
    """Without ids; a caption that stands beside another picture is a wrong answer there."""
    result = evaluated(sample_folder, write_csv(tmp_path / "two.csv", doubled), tmp_path)
    assert (result["pictures"], result["texts"], result["groups"]) == (16, 32, 16)
    v, t = features_by_open_clip(sample_folder, doubled)
    places = [row["filepath"] for row in doubled]
    expected = reference.recall(v[::2].double(), t.double(), image_ids=places[::2], text_ids=places)
    for way in WAYS:
        assert result["recall"][f"{way}_R@5"]["value"] == pytest.approx(expected[f"{way}_R@5"])


def test_captions_that_stand_beside_several_pictures_are_counted_with_the_remedy(
    sample_folder: Path, tmp_path: Path, doubled: list[dict[str, str]], capsys: Any
) -> None:
    evaluated(sample_folder, write_csv(tmp_path / "two.csv", doubled), tmp_path)
    printed = capsys.readouterr().out
    # Each of 16 pictures has the caption of its class; of four classes, all but the first four repeat it.
    assert "12 texts repeat a caption of another picture" in printed
    assert "--ids-key names the column" in printed


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its result as JSON, and what the command has written to stdout and to stderr.

    Attributes:
        result: The result.
        printed: Of stdout, its table.
        progress: Of stderr, its bar of progress.
    """

    result: dict[str, Any]
    printed: str
    progress: str


@pytest.fixture(scope="module")
def by_product(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The evaluation of the sample's model on ``val.csv``, by its products."""
    table, folder = sample_folder / "val.csv", tmp_path_factory.mktemp("by_product")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        result = evaluated(sample_folder, table, folder, "--ids-key", "product")
    return Evaluation(result, out.getvalue(), err.getvalue())


def test_progress_counts_the_pairs(by_product: Evaluation) -> None:
    assert "16/16" in by_product.progress


def test_the_table_has_recall_in_percent_with_intervals_over_ids(by_product: Evaluation) -> None:
    recall = by_product.result["recall"]["image_to_text_R@10"]
    value, low, high = (100 * recall[key] for key in ("value", "low", "high"))
    assert f"{value:.1f} [{low:.1f}, {high:.1f}]" in by_product.printed
    assert "95 % intervals over the 8 ids of 'product'" in by_product.printed


def test_a_row_of_the_table_ends_with_the_median_rank(by_product: Evaluation) -> None:
    assert by_product.result["median_rank"]["image_to_image"] == 2  # as the row must show it
    assert re.search(r"^picture → picture .* 2$", by_product.printed, re.MULTILINE)


def test_the_modality_gap_is_that_of_the_features(by_product: Evaluation, sample_folder: Path) -> None:
    gap = metrics.modality_gap(
        *features_by_open_clip(sample_folder, read_csv(sample_folder / "val.csv"))
    ).item()
    assert by_product.result["modality_gap"] == pytest.approx(gap, rel=1e-4)


def test_the_agreement_of_ranks_is_that_of_the_features(by_product: Evaluation, sample_folder: Path) -> None:
    v, t = features_by_open_clip(sample_folder, read_csv(sample_folder / "val.csv"))
    agreement = metrics.rank_agreement(v, t)
    cross, inside = (agreement[name].item() for name in ("cross_modal_tau", "in_modal_tau"))
    assert by_product.result["cross_modal_tau"] == pytest.approx(cross, rel=1e-4)
    assert by_product.result["in_modal_tau"] == pytest.approx(inside, rel=1e-4)
    assert f"τ {cross:.3f} cross-modal, {inside:.3f} in-modal" in by_product.printed


def test_intervals_are_those_of_scipys_bootstrap_over_groups() -> None:
    """Hits of 60 groups of unequal size, of which every second one has more; some queries have no answer."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), random.integers(1, 6, 60))
    values = (random.random(len(groups)) < 0.3 + 0.4 * (groups % 2)).astype(float)
    values[::11] = np.nan
    interval = evaluation.means({"score": evaluation.Scores(values, groups)})["score"]
    kept = ~np.isnan(values)
    sums = np.bincount(groups[kept], values[kept], 60)
    counts = np.bincount(groups[kept], minlength=60)
    scipys = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert interval["value"] == pytest.approx(np.nanmean(values))
    # The draws are others, so the ends differ by some hundredths of the interval.
    assert [interval["low"], interval["high"]] == pytest.approx(scipys, abs=0.012)
    assert interval["high"] - interval["low"] > 0.15  # so that the tolerance is small beside it


@pytest.fixture(scope="module")
def base(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the sample's model, against which others are compared."""
    file = tmp_path_factory.mktemp("base") / "base.json"
    options = ("--ids-key", "product", "--json", str(file))
    assert run_evaluate(sample_folder, sample_folder / "train.csv", *options) == 0
    return file


def test_a_model_does_not_differ_from_itself(
    sample_folder: Path, tmp_path: Path, capsys: Any, base: Path
) -> None:
    options = ("--ids-key", "product", "--against", str(base))
    differences = evaluated(sample_folder, sample_folder / "train.csv", tmp_path, *options)["differences"]
    assert differences
    assert all(difference == {"value": 0, "low": 0, "high": 0} for difference in differences.values())
    printed = capsys.readouterr().out
    assert f"Difference from local-dir:{sample_folder}/open_clip ({base}), same pictures:" in printed
    assert "+0.0 [+0.0, +0.0]" in printed


def test_two_models_differ_by_their_recalls_with_an_interval_around(
    sample_folder: Path, tmp_path: Path, base: Path
) -> None:
    write_changed_model(sample_folder, tmp_path / "other")
    options = ("--ids-key", "product", "--against", str(base))
    result = evaluated(tmp_path, sample_folder / "train.csv", tmp_path, *options, model="other")
    before = json.loads(base.read_text())["recall"]
    assert any(difference["value"] != 0 for difference in result["differences"].values())
    for name, difference in result["differences"].items():
        assert difference["value"] == pytest.approx(result["recall"][name]["value"] - before[name]["value"])
        assert difference["low"] <= difference["value"] <= difference["high"]


def refusal(capsys: Any, code: int) -> str:
    """The error of a command that has ended with an exit code, which must be 1."""
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rankloss evaluate: ")
    return str(error)


@pytest.fixture(scope="module")
def result(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the sample's model on ``val.csv`` without ids."""
    return evaluated(sample_folder, sample_folder / "val.csv", tmp_path_factory.mktemp("result"))


def refused_against(sample: Path, base: Path, content: Any, capsys: Any) -> str:
    """The error of a comparison on ``val.csv`` with a file of some content."""
    base.write_text(json.dumps(content))
    return refusal(capsys, run_evaluate(sample, sample / "val.csv", "--against", str(base)))


@pytest.mark.parametrize(
    "ranks",
    [None, {}, [], {"image_to_text": [1] * 16}],
    ids=["null", "no direction", "a list", "one direction of two"],
)
def test_a_result_without_the_ranks_of_a_direction_is_no_comparison(
    sample_folder: Path, tmp_path: Path, capsys: Any, result: dict[str, Any], ranks: Any
) -> None:
    error = refused_against(sample_folder, tmp_path / "base.json", {**result, "ranks": ranks}, capsys)
    assert f"--against {tmp_path}/base.json is damaged: its ranks are not those of the directions" in error


@pytest.mark.parametrize(
    "values",
    [[1] * 15, ["1"] * 16, [float("nan")] * 16, [0] * 16, [1.5] * 16, [[1]] * 16, [True] * 16, 7],
    ids=["too few", "texts", "NaN", "zeros", "fractions", "lists", "booleans", "a number"],
)
def test_a_result_with_other_values_than_ranks_is_no_comparison(
    sample_folder: Path, tmp_path: Path, capsys: Any, result: dict[str, Any], values: Any
) -> None:
    damaged = {**result, "ranks": {**result["ranks"], "text_to_image": values}}
    error = refused_against(sample_folder, tmp_path / "base.json", damaged, capsys)
    words = "is damaged: text_to_image must have 16 ranks from 1, or null"
    assert f"--against {tmp_path}/base.json {words}" in error


def test_a_result_that_has_no_ranks_is_no_comparison(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    error = refused_against(sample_folder, tmp_path / "base.json", {"identity": "0"}, capsys)
    assert "it has no 'ranks'" in error


@pytest.mark.parametrize(
    ("file", "options"), [("train.csv", ()), ("val.csv", ("--ids-key", "product"))], ids=["pairs", "ids"]
)
def test_results_of_other_pairs_or_ids_are_not_compared(
    sample_folder: Path, tmp_path: Path, capsys: Any, result: dict[str, Any], file: str, options: Any
) -> None:
    base = tmp_path / "base.json"
    base.write_text(json.dumps(result))
    error = refusal(
        capsys, run_evaluate(sample_folder, sample_folder / file, *options, "--against", str(base))
    )
    assert f"--against {base} is of other pictures, captions or ids: 16 pictures and 16 texts" in error


def test_a_file_that_is_no_json_is_no_comparison(sample_folder: Path, capsys: Any) -> None:
    table = sample_folder / "val.csv"
    error = refusal(capsys, run_evaluate(sample_folder, table, "--against", str(table)))
    assert f"--against {table} is no JSON file" in error


def test_a_pipe_is_no_comparison(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """It would be waited for, since nobody writes to it."""
    os.mkfifo(tmp_path / "pipe")
    code = run_evaluate(sample_folder, sample_folder / "val.csv", "--against", str(tmp_path / "pipe"))
    assert re.search("is no JSON file.*it is no regular file", refusal(capsys, code))


def test_a_result_without_ids_is_compared_in_the_directions_that_it_has(
    sample_folder: Path, tmp_path: Path
) -> None:
    """Where each picture has an id of its own, and two captions: the texts have partners by ids alone."""
    rows = [
        {**row, "title": f"{row['title']} {place}", "product": f"product {number}"}
        for number, row in enumerate(read_csv(sample_folder / "val.csv"))
        for place in ("here", "there")
    ]
    table, base = write_csv(tmp_path / "two.csv", rows), tmp_path / "base.json"
    assert run_evaluate(sample_folder, table, "--json", str(base)) == 0
    result = evaluated(sample_folder, table, tmp_path, "--ids-key", "product", "--against", str(base))
    assert "text_to_text_R@1" in result["recall"]
    assert {name.rpartition("_R@")[0] for name in result["differences"]} == {*WAYS}


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        (["a", None, None, "b"], "row 1 has NoneType None"),
        (["a", "", "", "b"], "row 1 has none: ''"),
        (["a", "b", "c", "  "], "row 3 has none: '  '"),
        ([1.5, 1.5, 2.5, 2.5], "row 0 has float 1.5"),
        ([True, True, False, False], "row 0 has bool True"),
        ([["a"], ["a"], ["b"], ["b"]], r"row 0 has list \['a'\]"),
    ],
    ids=["missing", "empty", "blank", "floats", "booleans", "lists"],
)
def test_ids_of_a_folder_of_datasets_that_are_none_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, values: list[Any], wrong: str
) -> None:
    """Missing ids would make partners of all their pictures."""
    rows = read_csv(sample_folder / "val.csv")[:4]
    columns = {"image": [row["filepath"] for row in rows], "caption": [row["title"] for row in rows]}
    datasets.Dataset.from_dict({**columns, "product": values}).save_to_disk(tmp_path / "data")
    error = refusal(capsys, run_evaluate(sample_folder, tmp_path / "data", "--ids-key", "product"))
    assert re.search(f"ids in column product must be texts or integers; {wrong}", error)


@pytest.mark.parametrize(("first", "second"), [("1e5", "100000"), ("1.1", "1.10"), ("true", "TRUE")])
def test_ids_of_a_csv_file_that_reading_makes_equal_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, first: str, second: str
) -> None:
    rows = read_csv(sample_folder / "val.csv")[:2]
    rows[0]["product"], rows[1]["product"] = first, second
    error = refusal(
        capsys, run_evaluate(sample_folder, write_csv(tmp_path / "x.csv", rows), "--ids-key", "product")
    )
    assert re.search("ids in column product must be texts or integers; row 0 has (float|bool) ", error)


@pytest.mark.parametrize(
    "others", [("8", "9"), ("x", "y")], ids=["a column of integers", "a column with words"]
)
def test_ids_of_a_csv_file_are_two_where_they_differ_by_zeros_in_front(
    sample_folder: Path, tmp_path: Path, others: tuple[str, str]
) -> None:
    rows = read_csv(sample_folder / "val.csv")[::2][:4]
    for row, product in zip(rows, ("7", "007", *others), strict=True):
        row["product"] = product
    table = write_csv(tmp_path / "x.csv", rows)
    result = evaluated(sample_folder, table, tmp_path, "--ids-key", "product", "--k", "1")
    ways_with_partners = {name.rpartition("_R@")[0] for name in result["recall"]}
    assert ways_with_partners == {*WAYS}  # pictures of one id would be partners, image_to_image


def test_weights_that_open_clip_would_ignore_are_refused(sample_folder: Path, capsys: Any) -> None:
    code = run_evaluate(sample_folder, sample_folder / "val.csv", "--pretrained", "epoch_3.pt")
    error = refusal(capsys, code)
    assert f"--pretrained epoch_3.pt: open_clip ignores it beside --model local-dir:{sample_folder}" in error
    assert "open_clip_pytorch_model.bin" in error


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_cannot_be_read_is_named(
    sample_folder: Path, tmp_path: Path, capsys: Any, workers: str
) -> None:
    rows = read_csv(sample_folder / "val.csv")
    rows[5]["filepath"] = str(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    code = run_evaluate(sample_folder, write_csv(tmp_path / "broken.csv", rows), "--workers", workers)
    assert re.search(r"row 5: the picture of .*broken.png.* cannot be read", refusal(capsys, code))


def test_features_with_nan_are_refused(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    file = write_changed_model(sample_folder, tmp_path / "nan") / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, file)
    error = refusal(capsys, run_evaluate(tmp_path, sample_folder / "val.csv", model="nan"))
    assert f"--model local-dir:{tmp_path}/nan: image_features must be finite; row 0 has NaN" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k", "17"), "k must be at most the number of pictures, 16; got 17; give fewer"),
        (("--k", "0"), "--k must be an integer of at least 1; got 0"),
        (("--batch-size", "0"), "--batch-size must be an integer of at least 1; got 0"),
        (("--ids-key", "sku"), "--ids-key sku: .* has the columns .*'product'"),
    ],
    ids=["k above the pictures", "k of 0", "batches of 0", "a missing column"],
)
def test_a_bad_option_is_named(sample_folder: Path, capsys: Any, options: Any, message: str) -> None:
    assert re.search(
        message, refusal(capsys, run_evaluate(sample_folder, sample_folder / "val.csv", *options))
    )


@pytest.mark.parametrize("ending", ["crlf.csv", "cr.csv", "lf.csv.gz"])
def test_a_cell_that_swallows_rows_is_refused_in_every_kind_of_file(
    sample_folder: Path, tmp_path: Path, capsys: Any, ending: str
) -> None:
    """Files with each line break; and a compressed one, whose bytes have no quotation mark."""
    rows = read_csv(sample_folder / "val.csv")
    rows[1]["title"] = f'"{rows[1]["title"]}'  # up to the mark two rows below, all is one cell
    rows[3]["title"] += '"'
    text = write_csv(tmp_path / "plain.csv", rows).read_text(encoding="utf-8")
    line_break = {"crlf.csv": "\r\n", "cr.csv": "\r", "lf.csv.gz": "\n"}[ending]
    content = text.replace("\n", line_break).encode()
    if ending.endswith(".gz"):
        # Blank lines at the end, which are no rows, change the compressed bytes.
        compressed = (gzip.compress(content + b"\n" * blank, mtime=0) for blank in range(1000))
        content = next(file for file in compressed if b'"' not in file)
    (tmp_path / ending).write_bytes(content)
    error = refusal(capsys, run_evaluate(sample_folder, tmp_path / ending, "--dataset-type", "csv"))
    assert f"row 1 of {tmp_path / ending}, column 'title'" in error
    assert "goes on for 2 more lines" in error


@pytest.mark.parametrize(
    ("column", "options", "group"),
    [
        pytest.param("filepath", (), "picture", id="one picture"),
        pytest.param("product", ("--ids-key", "product"), "id of 'product'", id="one id"),
    ],
)
def test_pairs_by_which_every_answer_is_right_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, column: str, options: tuple[str, ...], group: str
) -> None:
    rows = read_csv(sample_folder / "val.csv")
    for row in rows:
        row[column] = rows[0][column]
    table = write_csv(tmp_path / "one.csv", rows)
    error = refusal(capsys, run_evaluate(sample_folder, table, "--k", "1", *options))
    assert f"--data {table}: its pairs, 16, have one {group}, so every answer would be right" in error


def test_a_missing_id_is_named(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = read_csv(sample_folder / "val.csv")
    rows[1]["product"] = ""
    error = refusal(
        capsys, run_evaluate(sample_folder, write_csv(tmp_path / "x.csv", rows), "--ids-key", "product")
    )
    assert re.search("row 1 of .*, column 'product': '' is a missing value", error)


def test_a_picture_of_two_ids_is_named(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = read_csv(sample_folder / "val.csv")
    picture, product = rows[0]["filepath"], rows[0]["product"]
    rows[1].update(filepath=picture, product="other")
    error = refusal(
        capsys, run_evaluate(sample_folder, write_csv(tmp_path / "x.csv", rows), "--ids-key", "product")
    )
    name = os.path.basename(picture)
    of_row_1 = f"row 1: the picture '{name}' has the id 'other' here"
    assert f"{of_row_1}, and '{product}' in row 0, as '{name}'" in error


def test_a_folder_of_transformers_is_evaluated_as_the_library_embeds(
    sample_folder: Path, tmp_path: Path
) -> None:
    rows, folder = read_csv(sample_folder / "val.csv"), sample_folder / "transformers"
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    pictures = [Image.open(row["filepath"]) for row in rows]
    titles = [row["title"] for row in rows]
    with torch.no_grad():
        output = model(**processor(text=titles, images=pictures, return_tensors="pt", padding=True))
    expected = metrics.recall(output.image_embeds, output.text_embeds)
    options = ["--data", str(sample_folder / "val.csv"), "--json", str(tmp_path / "x.json")]
    assert main(["evaluate", "--model", str(folder), *options, "--workers", "0"]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    for name, recall in result["recall"].items():
        assert recall["value"] == pytest.approx(expected[name].item())


def test_weights_beside_a_folder_of_transformers_are_refused(sample_folder: Path, capsys: Any) -> None:
    options = ["--pretrained", "x.bin", "--data", str(sample_folder / "val.csv")]
    error = refusal(capsys, main(["evaluate", "--model", f"{sample_folder}/transformers", *options]))
    assert f"--pretrained x.bin: the folder --model {sample_folder}/transformers has its own weights" in error


# --- pictures are their content ---------------------------------------------------------------------------


def write_webdataset(file: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as a webdataset of one shard, with each pair's product as text and in a JSON; its file."""
    with tarfile.open(file, "w") as tar:
        for number, row in enumerate(rows):
            about = json.dumps({"product": row["product"]}).encode()
            members = {"txt": row["title"].encode(), "id": row["product"].encode(), "json": about}
            add_sample(tar, f"{number:04}", png=Path(row["filepath"]).read_bytes(), **members)
    return file


def test_a_picture_is_its_content_by_any_name_and_in_shards(sample_folder: Path, tmp_path: Path) -> None:
    """Pictures have copies of another name and title; the first is there once more, by a relative path."""
    rows = read_csv(sample_folder / "val.csv")
    copies = []
    for number, row in enumerate(rows):
        copy = shutil.copy(row["filepath"], f"{tmp_path}/{number}.png")
        copies.append({**row, "filepath": copy, "title": f"copy {number}"})
    relative = {**rows[0], "filepath": os.path.relpath(rows[0]["filepath"]), "title": "by a relative path"}
    all_rows = [*rows, *copies, relative]
    of_table = evaluated(sample_folder, write_csv(tmp_path / "x.csv", all_rows), tmp_path)
    of_shards = evaluated(sample_folder, write_webdataset(tmp_path / "x.tar", all_rows), tmp_path)
    for result in (of_table, of_shards):
        # Titles: 16 of val.csv, 16 of the copies, and that of the relative path.
        assert (result["pictures"], result["texts"], result["groups"]) == (16, 33, 16)
    assert of_table["identity"] == of_shards["identity"]
    assert of_table["recall"] == of_shards["recall"]


@pytest.fixture
def moved(sample_folder: Path, tmp_path: Path) -> list[dict[str, str]]:
    """The pairs of ``val.csv`` with copies of their pictures in another place."""
    rows = read_csv(sample_folder / "val.csv")
    for number, row in enumerate(rows):
        row["filepath"] = shutil.copy(row["filepath"], f"{tmp_path}/{number}.png")
    return rows


def test_pictures_may_move_between_two_results_that_are_compared(
    sample_folder: Path, tmp_path: Path, moved: list[dict[str, str]], result: dict[str, Any]
) -> None:
    base = tmp_path / "base.json"
    base.write_text(json.dumps(result))
    table = write_csv(tmp_path / "moved.csv", moved)
    assert evaluated(sample_folder, table, tmp_path, "--against", str(base))["differences"]


def test_another_picture_of_the_same_name_is_not_compared(
    sample_folder: Path, tmp_path: Path, moved: list[dict[str, str]], capsys: Any
) -> None:
    table, base = write_csv(tmp_path / "moved.csv", moved), tmp_path / "base.json"
    assert run_evaluate(sample_folder, table, "--json", str(base)) == 0
    Image.new("RGB", (8, 8)).save(moved[3]["filepath"])
    error = refusal(capsys, run_evaluate(sample_folder, table, "--against", str(base)))
    assert "is of other pictures, captions or ids" in error


def test_a_picture_of_two_ids_is_refused_by_its_content(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = read_csv(sample_folder / "val.csv")
    copy = shutil.copy(rows[2]["filepath"], f"{tmp_path}/copy.png")
    rows.append({**rows[2], "filepath": copy, "product": "other"})
    error = refusal(
        capsys, run_evaluate(sample_folder, write_csv(tmp_path / "x.csv", rows), "--ids-key", "product")
    )
    assert "row 16: the picture " in error
    assert f"has the id 'other' here, and {rows[2]['product']!r} in row 2" in error


@pytest.mark.parametrize("key", ["id", "json:product"])
def test_ids_of_shards_are_those_of_the_table(sample_folder: Path, tmp_path: Path, key: str) -> None:
    rows = read_csv(sample_folder / "val.csv")
    of_table = evaluated(sample_folder, sample_folder / "val.csv", tmp_path, "--ids-key", "product")
    of_shards = evaluated(
        sample_folder, write_webdataset(tmp_path / "x.tar", rows), tmp_path, "--ids-key", key
    )
    assert of_shards["recall"] == of_table["recall"]
    assert of_shards["groups"] == 8  # of 16 pairs, two of each product


def test_a_sample_of_shards_without_its_id_is_named(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    shard = write_webdataset(tmp_path / "x.tar", read_csv(sample_folder / "val.csv")[:3])
    error = refusal(capsys, run_evaluate(sample_folder, shard, "--ids-key", "cls"))
    assert "--ids-key cls: sample '0000' of" in error
    assert "has no text or integer there, but None" in error


def test_each_picture_is_read_once(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[Any] = []

    def content_noting_source(source: Any) -> bytes:
        sources.append(source)
        return opening.content_of(source)

    monkeypatch.setattr(teachers, "content_of", content_noting_source)
    evaluated(sample_folder, sample_folder / "val.csv", tmp_path)
    assert len(sources) == len({*sources}) == 16  # pictures of val.csv


def test_a_model_is_evaluated_without_a_command_line(tmp_path: Path) -> None:
    result, encoded = evaluate(tiny.teacher(), tiny.data_of("csv", tmp_path / "data"), (1, 5), name="tiny")
    assert (result["model"], result["pictures"], result["ids_key"]) == ("tiny", tiny.ROWS, None)
    assert encoded.image_features.shape == (tiny.ROWS, tiny.WIDTH)
    assert set(result["recall"]) == {f"{way}_R@{k}" for way in WAYS for k in (1, 5)}
