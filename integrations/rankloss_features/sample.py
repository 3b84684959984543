"""``rankloss sample``: pictures with captions and ids, and tiny models, to try every command and example on.

The folder has

- ``pictures``: 64 drawings, two of each of 32 products (a shape of a colour), and ``train.csv`` and
  ``val.csv`` with their paths, titles, products and classes; no product is in both files;
- ``open_clip`` and ``transformers``: a CLIP for each of these libraries, with random weights;
- ``image_encoder`` and ``text_encoder``: encoders of timm and sentence-transformers, with random weights.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from rankloss_features import opening
from rankloss_features.folder import write_bytes

COLORS = {
    "red": (220, 40, 40),
    "orange": (250, 150, 30),
    "yellow": (240, 220, 60),
    "green": (50, 160, 70),
    "blue": (50, 90, 220),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.25, "large": 0.42}  # the radius, as a share of the picture's width
WIDTH = 64  # of a picture, in pixels
COLUMNS = ("filepath", "title", "product", "class")

_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 16, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, "width": 32, "layers": 2},
}


def main(argv: Sequence[str]) -> int:
    """Carry out a command line, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rankloss sample",
        description="Write 64 pictures with captions and ids, and tiny models with random weights: data to "
        "try every command and example on.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    output = parser.parse_args(argv).output
    try:
        write(output)
    except (OSError, ValueError) as error:
        print(f"rankloss sample: {error}", file=sys.stderr)
        return 1
    print(f"{output} has train.csv, val.csv, pictures and tiny models. Try:")
    model, pairs = f"local-dir:{output}/open_clip", f"{output}/val.csv"
    print(shlex.join(["rankloss", "evaluate", "--model", model, "--data", pairs, "--ids-key", "product"]))
    return 0


def write(folder: Path) -> None:
    """Write everything into a new folder; equal at every call.

    Raises:
        ValueError: The folder has files.
        OSError: The disk is full, or the folder cannot be written; nothing of it is left.
        ImportError: A package is not installed; nothing of the folder is left, either.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is there and not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            write_open_clip(folder / "open_clip")
            write_transformers(folder / "transformers")
            write_encoders(folder / "image_encoder", folder / "text_encoder")
        write_pairs(folder)  # last: without its tables nobody takes a part for the whole
    except Exception as error:  # the libraries raise their own
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ImportError):
            raise
        raise OSError(f"--output {folder} cannot be written: {error}") from error


# --- pictures ---------------------------------------------------------------------------------------------


def write_pairs(folder: Path) -> None:
    """Draw the pictures, and write ``train.csv`` and ``val.csv``, tab-separated as open_clip reads them.

    Of each colour one shape is held out, so that its words are known from other products.
    """
    (folder / "pictures").mkdir(parents=True)
    rows: dict[str, list[tuple[str, ...]]] = {"train": [COLUMNS], "val": [COLUMNS]}
    generator = random.Random(0)
    for number, color in enumerate(COLORS):
        held_out_shape = SHAPES[number % len(SHAPES)]
        for shape in SHAPES:
            product = f"{color}-{shape}"
            part = "val" if shape == held_out_shape else "train"
            for size in SIZES:
                file = folder / "pictures" / f"{product}-{size}.png"
                draw(color, shape, size, generator).save(file)
                rows[part].append((file.as_posix(), f"a {size} {color} {shape}", product, shape))
    for part, rows_of_part in rows.items():
        lines = ["\t".join(row) + "\n" for row in rows_of_part]
        write_bytes(folder / f"{part}.csv", "".join(lines).encode())


def draw(color: str, shape: str, size: str, generator: random.Random) -> Image.Image:
    """A shape on a light grey ground, at a place that is drawn at random."""
    grey = generator.randint(170, 210)
    picture = Image.new("RGB", (WIDTH, WIDTH), (grey, grey, grey))
    pen = ImageDraw.Draw(picture)
    radius = SIZES[size] * WIDTH
    slack = WIDTH / 2 - radius
    x = WIDTH / 2 + generator.uniform(-slack, slack)
    y = WIDTH / 2 + generator.uniform(-slack, slack)
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    fill = COLORS[color]
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill)
    elif shape == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill)
    else:
        third = radius / 3
        pen.rectangle((left, y - third, right, y + third), fill)
        pen.rectangle((x - third, top, x + third, bottom), fill)
    return picture


# --- models -----------------------------------------------------------------------------------------------


def write_open_clip(folder: Path) -> None:
    """Write a CLIP of open_clip, for ``local-dir:``."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    about = json.dumps({"model_cfg": _CLIP, "preprocess_cfg": {}}, indent=2)
    (folder / "open_clip_config.json").write_text(about + "\n", encoding="utf-8")
    save_file(open_clip.CLIP(**_CLIP).state_dict(), folder / "open_clip_model.safetensors")


def write_transformers(folder: Path) -> None:
    """Write a CLIP of transformers and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder.mkdir()
    tokens = _write_vocabulary(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tower: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    end = tokens - 1
    text = {
        **tower,
        "vocab_size": tokens,
        "max_position_embeddings": 16,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {**tower, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _write_vocabulary(folder: Path) -> int:
    """Write the vocabulary of CLIP's tokenizer: letters, the words of the titles, and two marks.

    Returns:
        The number of tokens. The mark of a text's beginning is the last but one, that of its end the last.
    """
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    last_letters = [f"{letter}</w>" for letter in letters]  # of a word
    merges = _merges(["a", *SIZES, *COLORS, *SHAPES])
    joined = ["".join(pair) for pair in merges]
    tokens = [*letters, *last_letters, *joined, "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of tokens that a byte-pair encoding joins, until each word is one token.

    Example:
        >>> _merges(["red"])
        [('r', 'e'), ('re', 'd</w>')]
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:  # as the tokenizer does, before those of this word
            parts = _joined(parts, pair)
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = _joined(parts, (parts[0], parts[1]))
    return list(merges)


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The tokens of a word after one merge: where the pair stands side by side, it becomes one token.

    Example:
        >>> _joined(["r", "e", "d</w>"], ("r", "e"))
        ['re', 'd</w>']
    """
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def write_encoders(images: Path, texts: Path) -> None:
    """Write an encoder of pictures for timm, and one of texts, the mean of its words' vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from timm.models import save_for_hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    save_for_hf(opening.timm_model("test_vit", num_classes=0), str(images))
    words = ["?", "a", *SIZES, *COLORS, *SHAPES]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu").save(str(texts))
