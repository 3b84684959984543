"""No code that a file brings is run, in any kind of model or data, from a folder or a hub's cache."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_teacher import CLIP_CONFIG, WORDS, csv_data, picture, teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.torch_version import TorchVersion
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel
from transformers.integrations import hub_kernels

from rankloss_features import opening, sources
from rankloss_features.command import _parser
from rankloss_features.data import groups_of
from rankloss_features.teachers import Batches
from untrusted import Pickled, bring_tokenizer, edit, trust_tokenizer

FEATURES = Path(opening.__file__).parent
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ST = "sentence_transformers.models"  # the beginning of its classes' names
SENTENCE_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{ST}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{ST}.Pooling"},
]


# --- folders that bring code ------------------------------------------------------------------------------
#
# Each function completes a folder whose `code.py` makes a folder `made` where it is imported: with a model
# whose files ask for that code, or with weights that are a pickle and make `made` where they are unpickled.


def open_clip_weights(folder: Path, made: Path) -> None:
    """A CLIP of open_clip, whose weights are a pickle."""
    edit(folder / "open_clip_config.json", model_cfg=CLIP_CONFIG, preprocess_cfg={})
    torch.save(Pickled(made), folder / "open_clip_pytorch_model.bin")


def open_clip_tokenizer(folder: Path, made: Path) -> None:
    """A CLIP of open_clip, whose tokenizer needs the code and whose configuration trusts it."""
    edit(folder / "open_clip_config.json", model_cfg=CLIP_CONFIG, preprocess_cfg={})
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors", {"format": "pt"})
    bring_tokenizer(folder, made)
    trust_tokenizer(folder, str(folder))


def open_clip_tokenizer_elsewhere(folder: Path, made: Path) -> None:
    """From a hub, the tokenizer is another model's."""
    open_clip_tokenizer(folder, made)
    trust_tokenizer(folder, "org/text-tokenizer")


def open_clip_text_tower(folder: Path, made: Path) -> None:
    """The configuration of a text tower of transformers, for which open_clip passes no option."""
    open_clip_tokenizer(folder, made)
    tower = {"hf_model_name": str(folder), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    edit(folder / "open_clip_config.json", model_cfg={**CLIP_CONFIG, "text_cfg": tower})
    edit(folder / "config.json", model_type="unheard-of", auto_map={"AutoConfig": "code.Config"})


def timm_weights(folder: Path, made: Path) -> None:
    """A model of timm, whose weights are a pickle."""
    save_for_hf(timm.create_model("test_vit"), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(Pickled(made), folder / "pytorch_model.bin")


def image_model(folder: Path, made: Path) -> None:
    """An encoder of pictures of a type that transformers has not: the code has its classes."""
    image_processor(folder, made)
    edit(folder / "preprocessor_config.json", image_processor_type="ViTImageProcessor", auto_map={})
    classes = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    edit(folder / "config.json", model_type="unheard-of", auto_map=classes)


def image_processor(folder: Path, made: Path) -> None:
    """An encoder of pictures of transformers, whose preparation of pictures needs the code."""
    ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=16)).save_pretrained(folder)
    classes = {"AutoImageProcessor": "code.Processor", "AutoProcessor": "code.Processor"}
    edit(folder / "preprocessor_config.json", image_processor_type="Theirs", auto_map=classes)


def image_weights(folder: Path, made: Path) -> None:
    """An encoder of pictures of transformers, whose weights are a pickle."""
    image_processor(folder, made)
    edit(folder / "preprocessor_config.json", image_processor_type="ViTImageProcessor", auto_map={})
    pickled_weights(folder, made)


def pickled_weights(folder: Path, made: Path) -> None:
    """Put a pickle in the place of a folder's weights."""
    (folder / "model.safetensors").unlink()
    torch.save(Pickled(made), folder / "pytorch_model.bin")


def text_model(folder: Path, made: Path) -> None:
    """An encoder of texts of a type that transformers has not: the code has its classes."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    BertModel(BertConfig(**TOWER, vocab_size=len(words))).save_pretrained(folder)
    classes = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    edit(folder / "config.json", model_type="unheard-of", auto_map=classes)


def text_tokenizer(folder: Path, made: Path) -> None:
    """An encoder of texts of transformers, whose tokenizer asks for the code without need."""
    text_model(folder, made)
    edit(folder / "config.json", model_type="bert", auto_map={})
    bring_tokenizer(folder, made)


def sentence_model(folder: Path, made: Path) -> None:
    """The options of the folder's own configuration trust code and pickles."""
    text_model(folder, made)
    (folder / "modules.json").write_text(json.dumps(SENTENCE_MODULES))
    (folder / "1_Pooling").mkdir()
    edit(folder / "1_Pooling/config.json", word_embedding_dimension=16, pooling_mode_mean_tokens=True)
    trusting = {"trust_remote_code": True, "weights_only": False, "use_safetensors": False}
    options = dict.fromkeys(("model_args", "tokenizer_args", "config_args"), trusting)
    edit(folder / "sentence_bert_config.json", max_seq_length=16, **options)


def sentence_weights(folder: Path, made: Path) -> None:
    """An encoder of sentence-transformers, whose weights are a pickle."""
    sentence_model(folder, made)
    edit(folder / "config.json", model_type="bert", auto_map={})
    options = {"model_args": {"weights_only": False}, "tokenizer_args": {}, "config_args": {}}
    edit(folder / "sentence_bert_config.json", **options)
    pickled_weights(folder, made)


def sentence_module(folder: Path, made: Path) -> None:
    """An encoder of sentence-transformers, whose first module is a class of the code."""
    sentence_weights(folder, made)
    (folder / "modules.json").write_text(json.dumps([{**SENTENCE_MODULES[0], "type": "code.Module"}]))


# --- every kind of model, from folders and from a hub's cache -----------------------------------------------

PICKLE = "Weights only load failed|weights_only=True blocked|is a pickle, and torch"  # the latter below 2.10
KINDS: dict[Callable[[Path, Path], None], tuple[str, str, str | None]] = {
    open_clip_weights: ("--model local-dir:", "--model hf-hub:", PICKLE),
    open_clip_tokenizer: ("--model local-dir:", "--model hf-hub:", "needs code of its own, code.py"),
    open_clip_tokenizer_elsewhere: (
        "--model local-dir:",
        "--model hf-hub:",
        "needs code of its own, code.py",
    ),
    open_clip_text_tower: ("--model local-dir:", "--model hf-hub:", "requires you to execute custom code"),
    timm_weights: ("--image-encoder local-dir:", "--image-encoder hf-hub:", PICKLE),
    image_model: ("--image-encoder ", "--image-encoder ", "contains custom code"),
    image_processor: ("--image-encoder ", "--image-encoder ", "contains custom code"),
    image_weights: ("--image-encoder ", "--image-encoder ", PICKLE),
    text_model: ("--text-encoder ", "--text-encoder ", "contains custom code"),
    text_tokenizer: ("--text-encoder ", "--text-encoder ", None),
    sentence_model: ("--text-encoder ", "--text-encoder ", "contains custom code"),
    sentence_weights: ("--text-encoder ", "--text-encoder ", PICKLE),
    sentence_module: ("--text-encoder ", "--text-encoder ", "code.Module"),
}
"""The options of a folder and of a hub's model, and the refusal's words; None if it opens without code."""

WITHOUT_GUARD = (open_clip_tokenizer,)
"""Kinds that are opened without our guard, too, where a library alone would run their code."""

OPENER = """
import contextlib, json, sys, torch
from rankloss_features import opening, sources
from rankloss_features.command import _parser
from rankloss_features.data import groups_of
from rankloss_features.teachers import Batches

def error_of(line):
    args = _parser().parse_args(["--output", "x", *line.split()])
    try:
        sources.load(sources.options_of_teacher(args), args, torch.device("cpu"))
    except ValueError as error:
        return " ".join(str(error).split())

guarded, unguarded = json.load(sys.stdin)
errors = {line: error_of(line) for line in guarded}
opening.without_code = contextlib.nullcontext
for line in unguarded:
    error_of(line)
print(json.dumps(errors))
"""
"""A script that opens models by lines of options; it prints the error of each opened with the guard."""

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all models, of the hub's cache, and of the folders that their code would make."""
    return tmp_path_factory.mktemp("brought")


def write_kind(place: Path, kind: Callable[[Path, Path], None], group: str, name: str) -> list[str]:
    """Write a model as a folder and into a hub's cache; the options that open both."""
    of_folder, of_hub, _ = KINDS[kind]
    folder, made = place / group / name, place / f"made by {group} {kind.__name__}"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    kind(folder, made)
    cached = place / f"home/hub/models--org--{name}"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    return [f"{of_folder}{folder}", f"{of_hub}org/{name}"]


def name_of(kind: Callable[[Path, Path], None]) -> str:
    """The name of a kind's folder, and of its model of a hub."""
    return kind.__name__.replace("_", "-")


@pytest.fixture(scope="module")
def errors(place: Path) -> dict[str, str | None]:
    """The errors of a process that opens every kind, by the options; then some kinds without the guard."""
    guarded, unguarded = [], []
    for kind in KINDS:
        guarded += write_kind(place, kind, "guarded", name_of(kind))
    for kind in WITHOUT_GUARD:
        unguarded += write_kind(place, kind, "unguarded", f"{name_of(kind)}-alone")
    # Of this process's variables none that leads to another cache, as a test's script sets one.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_HOME": str(place / "home"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # for loads that do not say what they are
    }
    done = subprocess.run(
        [sys.executable, "-c", OPENER],
        input=json.dumps([guarded, unguarded]),
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_code_of_a_model_is_not_run(
    place: Path, errors: dict[str, str | None], kind: Callable[[Path, Path], None], where: str
) -> None:
    of_folder, of_hub, words = KINDS[kind]
    options = {
        "folder": f"{of_folder}{place}/guarded/{name_of(kind)}",
        "hub": f"{of_hub}org/{name_of(kind)}",
    }
    error = errors[options[where]]
    if words is None:
        assert error is None
    else:
        assert re.search(words, error or "")
    assert not (place / f"made by guarded {kind.__name__}").exists()


@pytest.mark.parametrize("kind", WITHOUT_GUARD, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("errors")  # which has opened a copy of the file without the guard
def test_without_the_guard_the_code_would_be_run(place: Path, kind: Callable[[Path, Path], None]) -> None:
    """So its code leaves a trace when it runs, and above it did not run."""
    assert (place / f"made by unguarded {kind.__name__}").exists()


def load_by(options: str) -> None:
    """Load the teacher that options of ``rankloss features`` name."""
    args = _parser().parse_args(["--output", "x", *options.split()])
    sources.load(sources.options_of_teacher(args), args, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript archive")
@pytest.mark.parametrize("form", ["pickle", "archive"])
@pytest.mark.parametrize(
    "options",
    ["--image-encoder test_vit --image-weights {}", "--model tiny --pretrained {}"],
)
def test_a_file_of_weights_that_is_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, form: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP_CONFIG)
    file, made = tmp_path / "weights.pt", tmp_path / "made"
    if form == "pickle":
        torch.save(Pickled(made), file)
        words = PICKLE
    else:
        with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
            torch.jit.script(torch.nn.Linear(1, 1)).save(str(file))
        words = "with TorchScript archives|is a pickle, and torch"  # the latter below 2.10
    first_option = options.split()[0]
    with pytest.raises(ValueError, match=f"^{first_option} .*({words})"):
        load_by(options.format(file))
    assert not made.exists()


def test_a_script_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    folder, made = tmp_path / "pairs", tmp_path / "made"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        opening.dataset(str(folder))
    assert not made.exists()


def test_an_archive_of_torchscript_is_refused() -> None:
    with opening.without_code(), pytest.raises(ValueError, match=r"x\.pt is an archive of TorchScript"):
        torch.jit.load("x.pt")


def test_a_kernel_of_a_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(hub_kernels, "get_kernel"):
        pytest.skip("this transformers loads none")
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    with opening.without_code(), pytest.raises(ValueError, match="the kernel org/kernel, which is code"):
        hub_kernels.load_and_register_attn_kernel("org/kernel")


def test_the_libraries_are_as_before_after_an_error() -> None:
    before = [getattr(module, name) for module, name, _ in opening._replacements()]

    def fail_within() -> None:
        with opening.without_code(), opening.without_code():
            assert torch.load is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert [getattr(module, name) for module, name, _ in opening._replacements()] == before


OPENERS = {"load", "open", "from_pretrained", "create_model", "create_model_and_transforms", "get_tokenizer"}
OPENERS |= {"SentenceTransformer", "load_dataset", "load_from_disk", "load_checkpoint", "load_state_dict"}
"""Functions of the libraries that open a file."""
LIBRARIES = {"torch", "np", "open_clip", "timm", "datasets", "transformers", "Image", "pickle", "joblib"}


def opens_files(node: ast.AST) -> bool:
    """True of the import of a function that opens files, ``LIBRARY.FUNCTION`` and ``from_pretrained``."""
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in OPENERS for alias in node.names)
    if isinstance(node, ast.Attribute) and node.attr in OPENERS:
        is_of_a_library = isinstance(node.value, ast.Name) and node.value.id in LIBRARIES
        return is_of_a_library or node.attr == "from_pretrained"
    return False


def test_files_of_others_are_opened_in_one_place() -> None:
    """And in ``sample.py``, which makes models."""
    trees = {file.name: ast.parse(file.read_text()) for file in FEATURES.glob("*.py")}
    opening_files = {name for name, tree in trees.items() if any(map(opens_files, ast.walk(tree)))}
    assert opening_files == {"opening.py", "sample.py"}


# --- pickles below torch 2.10, pictures, arrays -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: timm.create_model("test_vit"), "--image-encoder test_vit --image-weights"),
        (lambda: open_clip.CLIP(**CLIP_CONFIG), "--model tiny --pretrained"),
    ],
    ids=["timm", "open_clip"],
)
def test_below_torch_2_10_pickles_of_weights_are_refused_and_safetensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], torch.nn.Module], options: str
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP_CONFIG)
    weights = make().state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.pth is a pickle, and torch 2\.9\.1 .* torch>=2\.10"):
        load_by(f"{options} {tmp_path}/weights.pth")
    load_by(f"{options} {tmp_path}/weights.safetensors")


def test_weights_that_are_known_by_their_hash_are_read_by_any_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    assert opening.known_weights(tmp_path / "x.pth") == {"x": torch.ones(1)}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pictures_of_the_common_formats_are_read_from_files_and_bytes(tmp_path: Path, form: str) -> None:
    file = tmp_path / "picture"
    Image.new("RGB", (8, 6), (200, 40, 40)).save(file, form)
    for source in (str(file), file.read_bytes()):
        with opening.picture(source) as picture:
            assert picture.size == (8, 6)
            np.testing.assert_allclose(picture.convert("RGB").getpixel((3, 3)), (200, 40, 40), atol=3)


def test_a_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    """Ghostscript would be started for EPS."""
    file = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 6)).save(file, "EPS")
    with pytest.raises(OSError, match=r"picture\.jpg is none of .*JPEG, PNG.*, or it is damaged"):
        opening.picture(str(file)).__enter__()


def test_a_picture_that_would_fill_the_memory_is_an_error_of_its_row(tmp_path: Path) -> None:
    """Its header says 2¹⁵ by 2¹⁴ pixels."""
    file = tmp_path / "0.png"
    content = bytearray(picture(0))
    header, checksum = slice(12, 29), slice(29, 33)
    content[16:24] = struct.pack(">II", 2**15, 2**14)
    content[checksum] = struct.pack(">I", zlib.crc32(content[header]))
    file.write_bytes(content)
    (tmp_path / "pairs.csv").write_text(f"filepath\ttitle\n{file}\ta bomb\n")
    data = csv_data(tmp_path / "pairs.csv")
    list(data.pairs())
    with pytest.raises(ValueError, match=r"row 0: the picture of '0\.png' .* decompression bomb"):
        list(Batches(data, groups_of(data, 1, [range(1)]), teacher()))


def fifo(file: Path) -> None:
    os.mkfifo(file)


def huge_header(file: Path) -> None:
    """A file of NumPy's second version, whose header has a mebibyte of spaces."""
    file.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**20) + b" " * 2**20)


def huge_shape(file: Path) -> None:
    """A file that says to have 2⁴⁰ rows, and has four."""
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 4)}
    np.lib.format.write_array_header_1_0(header, about)
    file.write_bytes(header.getvalue() + bytes(64))


def objects(file: Path) -> None:
    """A pickle in an array, which makes a folder."""
    with file.open("wb") as opened:
        np.save(opened, np.array([Pickled(file.with_name("made"))]), allow_pickle=True)


@pytest.mark.parametrize("damage", [fifo, huge_header, huge_shape, objects])
@pytest.mark.parametrize("name", ["image_features.npy", "features.npz"])
def test_an_array_that_is_none_is_refused_with_its_name(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    """A folder with the file of an array, and an archive of one."""
    file = tmp_path / name
    if name.endswith(".npz") and damage is not fifo:
        damage(tmp_path / "image_features.npy")
        with zipfile.ZipFile(file, "w") as archive:
            archive.write(tmp_path / "image_features.npy", "image_features.npy")
    else:
        damage(file)
    features = tmp_path if name.endswith(".npy") else file
    with pytest.raises(ValueError, match=rf"--features {features}: {file} cannot be read: "):
        load_by(f"--features {features}")
    assert not (tmp_path / "made").exists()


# --- versions that open them safely -------------------------------------------------------------------------

OPENERS_OF = {
    "datasets": lambda: opening.dataset("x"),
    "pillow": lambda: opening.picture(picture(0)).__enter__(),
    "sentence-transformers": lambda: opening.sentence_transformers_model("x", torch.device("cpu")),
    "timm": lambda: opening.timm_model("test_vit"),
}


@pytest.mark.parametrize("distribution", OPENERS_OF)
def test_a_version_that_opens_files_unsafely_is_refused(
    monkeypatch: pytest.MonkeyPatch, distribution: str
) -> None:
    opening.check_version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9.1")
    needed = re.escape(f"pip install '{distribution}>={opening.SAFE_FROM[distribution]}'")
    match = rf"^{distribution} 0\.9\.1 is installed, .* {needed}"
    with pytest.raises(ValueError, match=match):
        OPENERS_OF[distribution]()


def test_the_safe_versions_are_the_floors_of_the_extra() -> None:
    listed = (FEATURES.parents[1] / "pyproject.toml").read_text()
    for distribution, version in opening.SAFE_FROM.items():
        assert f'"{distribution}>={version}' in listed
